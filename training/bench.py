"""Measure the peak FLOP/s of this machine, the denominator of model FLOPs utilization (MFU).

MFU (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the FLOP/s of the model divided by the
peak FLOP/s of the machine. The FLOPs of the model exclude rematerialization and padding. The peak
is measured, not taken from a data sheet: it is that of the fastest of several large matrix
products.
"""

from __future__ import annotations

import functools
import time

import jax
import jax.numpy as jnp

_SIDE = 1024
_SECONDS = 0.3


@functools.cache
def peak_flops(dtype: str = "float32") -> float:
    """Return the peak FLOP/s of matrix products in a dtype, which is measured at the first call."""
    x = jnp.ones((_SIDE, _SIDE), dtype)
    multiply = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    multiply(x).block_until_ready()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best
