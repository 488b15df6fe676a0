"""What this machine can multiply: the roof that "model FLOPs utilisation" is told against.

Utilisation (Chowdhery et al. 2022, arXiv:2204.02311, appendix B) is the arithmetic that the model's
mathematics needs in a second, over the most the machine can do in one. Work that is done twice
(rematerialisation) and padding earn nothing. The roof is measured, not read from a data sheet: the
best of a few large products.
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
    """The most multiplications and additions a second, in products of this dtype."""
    x = jnp.ones((_SIDE, _SIDE), dtype)
    multiply = jax.jit(lambda x: jnp.dot(x, x, preferred_element_type=jnp.float32))
    multiply(x).block_until_ready()
    best, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < _SECONDS:
        before = time.perf_counter()
        multiply(x).block_until_ready()
        best = min(best, time.perf_counter() - before)
    return 2 * _SIDE**3 / best
