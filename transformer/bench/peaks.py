"""What the machine can do: how fast it reads memory and multiplies, measured in this process."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from transformer import kernels

_PROBE_SECONDS = 0.7  # for each roof
_READ_BYTES = 2**30  # of the probe of memory: more than any cache holds
_GEMM_SIDE = 2048


@dataclass(frozen=True)
class Peaks:
    """What this machine can do."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype of the products
    call_seconds: float  # calling a compiled function that does nothing, and waiting for it

    def roofline_seconds(self, flops: float, num_bytes: float, dtype: str) -> tuple[float, str]:
        """The least time some work could take, and what bounds it: "memory" or "arithmetic"."""
        reading = num_bytes / self.bytes_per_second
        computing = flops / self.flops_per_second[dtype]
        return max((reading, "memory"), (computing, "arithmetic"))


def measure_peaks(dtypes: Iterable[str] = ("float32", "bfloat16", "int8")) -> Peaks:
    """Measures the machine: reading 1 GB in a product with one row, and square products."""
    rows = 2048

    def read() -> tuple:
        return jnp.ones((1, rows)), jnp.ones((_READ_BYTES // (4 * rows), rows))

    best = min(
        _best(lambda x, w, form=form: kernels.matmul(x, w, impl=form), read())
        for form in ("dot", "split_weight")
    )
    flops = {}
    for dtype in dtypes:
        sums = jnp.int32 if dtype == "int8" else jnp.float32
        square = jnp.ones((_GEMM_SIDE, _GEMM_SIDE), dtype)
        seconds = _best(
            lambda a, b, sums=sums: jnp.matmul(a, b, preferred_element_type=sums), (square, square)
        )
        flops[dtype] = 2 * _GEMM_SIDE**3 / seconds
    idle = _best(lambda x: x, (jnp.ones(1),))
    return Peaks(_READ_BYTES / best, flops, idle)


def _best(function: Callable[..., Any], inputs: tuple) -> float:
    compiled = jax.jit(function).lower(*inputs).compile()
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < _PROBE_SECONDS:
        before = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - before)
    return min(times)


def machine(found: Peaks) -> dict[str, Any]:
    """What a figure must be read with."""
    return {
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "roofs": {
            "gbs": found.bytes_per_second / 1e9,
            "gflops": {name: value / 1e9 for name, value in found.flops_per_second.items()},
            "call": found.call_seconds,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
