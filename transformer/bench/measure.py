"""Measurement of cases: compile, compare with float64, then sample the contenders alternately."""

from __future__ import annotations

import dataclasses
import math
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer import kernels
from transformer.bench.case import Case, Contender
from transformer.bench.peaks import Peaks

_SAMPLE_SECONDS = 1e-3  # minimum duration of a sample, which repeats its call
_MAX_SAMPLES = 1000
_MIN_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """Measurement of one contender. Times are in seconds per call."""

    case: str
    form: str  # `Contender.impl`; this name is in files of results
    dtype: str
    min: float
    median: float
    p80: float  # 80th percentile
    n: int  # number of samples
    flops: float
    bytes: float
    gflops: float  # GFLOP/s at the median
    gbs: float  # GB/s at the median
    roof: float  # roofline time
    bound: str  # which peak limits the roofline time, "memory" or "arithmetic"
    percent: float  # roofline time as a percentage of the median
    max_error: float | None  # largest absolute difference from the float64 reference
    relative_error: float | None  # max_error divided by the largest magnitude of the reference
    compile: float
    ratio: float = 1.0  # median speedup over the first contender, from alternating samples


class _CompiledContender:
    """A compiled contender with its arguments.

    Raises:
        kernels.Unavailable: An implementation does not support the platform or the arguments.
    """

    def __init__(self, contender: Contender, arguments: list[tuple]):
        self.contender, self._case = contender, contender.case
        self._arguments, self._num_calls = arguments, 0
        with kernels.override(**contender.overrides):
            program = jax.jit(self._case.function, donate_argnums=self._case.donate_argnums)
            started = time.perf_counter()
            self._run = program.lower(*arguments[0]).compile()
            self.compile_seconds = time.perf_counter() - started
        num_bytes = self._case.bytes
        if num_bytes is None:
            moved = jax.tree.leaves((arguments[0], jax.eval_shape(program, *arguments[0])))
            num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in moved)
        self.bytes: float = num_bytes

    def __call__(self) -> Any:
        i = self._num_calls % len(self._arguments)
        self._num_calls += 1
        out = self._run(*self._arguments[i])
        jax.block_until_ready(out)
        if self._case.next_inputs is not None:
            self._arguments[i] = self._case.next_inputs(self._arguments[i], out)
        return out

    def error(self) -> tuple[float | None, float | None]:
        """Return the largest difference from the float64 reference, absolute and relative.

        The relative difference is divided by the largest magnitude of the reference. Both are None
        if the case has no reference.
        """
        if self._case.expected is None:
            return None, None
        expected = np.asarray(self._case.expected(*self._arguments[0]), np.float64)
        actual = np.asarray(self._case.select_output(self()), np.float64)
        if actual.shape != expected.shape:
            raise ValueError(
                f"{self._case.name}, {self.contender.impl}: the result must have the shape of the "
                f"float64 reference, {expected.shape}, got {actual.shape}"
            )
        max_error = float(np.max(np.abs(actual - expected)))
        return max_error, max_error / max(float(np.max(np.abs(expected))), 1e-300)

    def sample(self, calls: int) -> float:
        """Call the program `calls` times; return the mean time of a call in seconds."""
        started = time.perf_counter()
        for _ in range(calls):
            self()
        return (time.perf_counter() - started) / calls


def argument_sets(case: Case) -> list[tuple]:
    """Return several sets of equal arguments, to use in turn.

    A model reads other weights between two uses of a weight, so the weight is no longer in the CPU
    cache. Therefore each set has its own copy of the arguments `case.cold_argnums`. All copies
    together have at least `case.reuse_distance` bytes.
    """
    first = case.inputs()
    cold_bytes = sum(leaf.nbytes for i in case.cold_argnums for leaf in jax.tree.leaves(first[i]))
    sets = [first]
    for _ in range(math.ceil(case.reuse_distance / cold_bytes) - 1 if cold_bytes else 0):
        arguments = list(first)
        for i in case.cold_argnums:
            arguments[i] = jax.tree.map(jnp.copy, first[i])
        sets.append(tuple(arguments))
    return jax.block_until_ready(sets)


def measure(
    contenders: Sequence[Contender],
    peaks: Peaks,
    *,
    seconds: float = 1.0,
    say: Callable[[str], None] | None = None,
) -> list[Result]:
    """Measure contenders by taking one sample of each in turn.

    Args:
        contenders: The contenders; speedups are relative to the first one.
        peaks: Peaks of this machine.
        seconds: Approximate sampling time per contender; there are at least five samples.
        say: Called with a message for each contender that is skipped, because an implementation
            does not support the platform or the arguments. If None, `kernels.Unavailable` is
            raised instead.

    Returns:
        One result per contender that was measured.

    Raises:
        kernels.Unavailable: See `say`.
        ValueError: A result does not have the shape of its reference.
    """
    compiled: list[_CompiledContender] = []
    shared: dict[int, list[tuple]] = {}  # id of a case that donates nothing -> its arguments
    for contender in contenders:
        case = contender.case
        arguments = argument_sets(case) if case.donate_argnums else shared.get(id(case))
        if arguments is None:
            arguments = shared[id(case)] = argument_sets(case)
        try:
            compiled.append(_CompiledContender(contender, arguments))
        except kernels.Unavailable as error:
            if say is None:
                raise
            say(f"{case.name}, {contender.impl}: {error}")
    if not compiled:
        return []
    errors = [contender.error() for contender in compiled]
    calls = []
    for contender in compiled:
        call_seconds = min(contender.sample(1) for _ in range(3))
        calls.append(math.ceil(_SAMPLE_SECONDS / call_seconds))
    times: list[list[float]] = [[] for _ in compiled]
    started = time.perf_counter()
    while len(times[0]) < _MIN_SAMPLES or (
        time.perf_counter() - started < seconds * len(compiled) and len(times[0]) < _MAX_SAMPLES
    ):
        # Rotate the order, so that no contender always runs after the same other contender.
        first = len(times[0]) % len(compiled)
        for i in [*range(first, len(compiled)), *range(first)]:
            times[i].append(compiled[i].sample(calls[i]))
    results = []
    for i, contender in enumerate(compiled):
        case, samples = contender.contender.case, sorted(times[i])
        roof, bound = peaks.roofline_seconds(case.flops, contender.bytes, case.dtype)
        median = statistics.median(samples)
        ratios = [first / current for first, current in zip(times[0], times[i], strict=True)]
        results.append(
            Result(
                case=case.name,
                form=contender.contender.impl,
                dtype=case.dtype,
                min=samples[0],
                median=median,
                p80=samples[math.ceil(0.8 * len(samples)) - 1],
                n=len(samples),
                flops=case.flops,
                bytes=contender.bytes,
                gflops=case.flops / median / 1e9,
                gbs=contender.bytes / median / 1e9,
                roof=roof,
                bound=bound,
                percent=100 * roof / median,
                max_error=errors[i][0],
                relative_error=errors[i][1],
                compile=contender.compile_seconds,
                ratio=statistics.median(ratios),
            )
        )
    return results


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """The cases and implementations that a run measures.

    Raises:
        ValueError: An operation or implementation of `overrides` does not exist.
    """

    names: Sequence[str] = ()  # prefixes of case names; empty: all cases
    all_impls: bool = False  # besides the default, measure all implementations of each operation
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # operation -> impl
    seconds: float = 1.0  # sampling time per contender

    def __post_init__(self) -> None:
        for operation, impl in self.overrides.items():
            kernels.get_impl(operation, impl)

    def select(self, cases: Iterable[Case]) -> list[Case]:
        """Return the cases whose names start with one of `names`.

        Raises:
            ValueError: No case name starts with one of the names.
        """
        cases = list(cases)
        known = list(dict.fromkeys(case.name.partition(" ")[0] for case in cases))
        for name in self.names:
            if not any(case.name.startswith(name) for case in cases):
                raise ValueError(
                    f"no case name starts with {name!r}; names start with {', '.join(known)}"
                )
        return [case for case in cases if not self.names or case.name.startswith(tuple(self.names))]

    def contenders(self, case: Case) -> list[Contender]:
        """Return contenders for a case: the default implementations, then the selected ones."""
        contenders = [Contender(case=case)]
        if self.overrides:
            label = ", ".join(f"{operation}={impl}" for operation, impl in self.overrides.items())
            contenders.append(Contender(case=case, impl=label, overrides=self.overrides))
        if self.all_impls and case.operation is not None:
            for impl in kernels.IMPLS[case.operation]:
                contenders.append(Contender(case=case, impl=impl, overrides={case.operation: impl}))
        return contenders


def run(
    plan: BenchPlan, cases: Iterable[Case], peaks: Peaks, *, say: Callable[[str], None]
) -> Iterator[list[Result]]:
    """Measure the contenders of each case.

    Args:
        plan: The implementations to measure.
        cases: The cases to measure.
        peaks: Peaks of this machine.
        say: Called with a message for each contender that is skipped; see `measure`.

    Yields:
        The results of each case, one per contender.
    """
    for case in cases:
        if results := measure(plan.contenders(case), peaks, seconds=plan.seconds, say=say):
            yield results


def parse_overrides(assignments: Iterable[str]) -> dict[str, str]:
    """Convert assignments such as "norm=reference" to a dictionary: operation -> implementation.

    Raises:
        ValueError: An item has no "=".
    """
    overrides = {}
    for assignment in assignments:
        operation, sign, impl = assignment.partition("=")
        if not sign:
            raise ValueError(f"expected OPERATION=IMPL, such as norm=reference, got {assignment!r}")
        overrides[operation] = impl
    return overrides
