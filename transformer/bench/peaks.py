"""Peak memory bandwidth and matrix multiplication speed, measured in this process."""

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

_PROBE_SECONDS = 0.7  # duration of measuring one peak
_READ_BYTES = 2**30  # read to measure the bandwidth; larger than any CPU cache
_GEMM_SIDE = 2048


@dataclass(frozen=True)
class Peaks:
    """Peak performance of the machine."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype of the matrix products
    call_seconds: float  # overhead of calling a compiled function and waiting for its result

    def roofline_seconds(self, flops: float, num_bytes: float, dtype: str) -> tuple[float, str]:
        """Return the minimum time in seconds and what limits it, "memory" or "arithmetic".

        Args:
            flops: Number of floating-point operations.
            num_bytes: Number of bytes that must be moved.
            dtype: Dtype of the matrix products. Products with int4 blocks are sums of int8.

        Returns:
            (seconds, bound).
        """
        dtype = "int8" if dtype == "int4" else dtype
        memory_seconds = num_bytes / self.bytes_per_second
        arithmetic_seconds = flops / self.flops_per_second[dtype]
        return max((memory_seconds, "memory"), (arithmetic_seconds, "arithmetic"))


def measure_peaks(dtypes: Iterable[str] = ("float32", "bfloat16", "int8")) -> Peaks:
    """Measure memory bandwidth and matrix multiplication speed.

    The bandwidth is measured with the product of one row and a matrix of 1 GB, the speed with
    products of square matrices.

    Args:
        dtypes: Dtypes of the square matrices.

    Returns:
        The peaks.
    """
    width = 2048

    def inputs() -> tuple:
        return jnp.ones((1, width)), jnp.ones((_READ_BYTES // (4 * width), width))

    read_seconds = min(
        _min_seconds(lambda x, w, impl=impl: kernels.matmul(x, w, impl=impl), inputs())
        for impl in ("dot", "split_weight")
    )
    flops = {}
    for dtype in dtypes:
        sum_dtype = jnp.int32 if dtype == "int8" else jnp.float32
        square = jnp.ones((_GEMM_SIDE, _GEMM_SIDE), dtype)
        seconds = _min_seconds(
            lambda a, b, sum_dtype=sum_dtype: jnp.matmul(a, b, preferred_element_type=sum_dtype),
            (square, square),
        )
        flops[dtype] = 2 * _GEMM_SIDE**3 / seconds
    call_seconds = _min_seconds(lambda x: x, (jnp.ones(1),))
    return Peaks(_READ_BYTES / read_seconds, flops, call_seconds)


def _min_seconds(function: Callable[..., Any], inputs: tuple) -> float:
    compiled = jax.jit(function).lower(*inputs).compile()
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < _PROBE_SECONDS:
        call_started = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - call_started)
    return min(times)


def machine(peaks: Peaks) -> dict[str, Any]:
    """Return the description of the machine that is saved with the results, a JSON object."""
    return {
        "processor": _processor(),
        "device": jax.devices()[0].device_kind,
        "platform": jax.default_backend(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "roofs": {
            "gbs": peaks.bytes_per_second / 1e9,
            "gflops": {name: value / 1e9 for name, value in peaks.flops_per_second.items()},
            "call": peaks.call_seconds,
        },
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if "model name" in line)
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
