"""Measuring cases in turns: compiled first, compared with float64 before anything is timed."""

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

_SAMPLE_SECONDS = 1e-3  # a sample repeats its call until it takes so long
_MAX_SAMPLES = 1000
_MIN_SAMPLES = 5


@dataclass(frozen=True, kw_only=True)
class Result:
    """One case measured. Times in seconds."""

    case: str
    form: str
    dtype: str
    min: float
    median: float
    p80: float  # four of five samples were at most this
    n: int  # samples
    flops: float
    bytes: float
    gflops: float  # GFLOP/s at the median
    gbs: float  # GB/s at the median
    roof: float  # the least time by the roofs
    bound: str  # what that is bound by
    percent: float  # of the roof, at the median
    max_error: float | None  # against float64
    relative_error: float | None  # the same, by the largest expected value
    compile: float
    ratio: float = 1.0  # of the first contender's time to this one's: the median over the turns


class _CompiledContender:
    """A contender, compiled, with its arguments.

    Raises:
        kernels.Unavailable: a form does not run here, or not on these arguments.
    """

    def __init__(self, contender: Contender, arguments: list[tuple]):
        self.contender, self._case = contender, contender.case
        self._arguments, self._turn = arguments, 0
        with kernels.override(**contender.overrides):
            program = jax.jit(self._case.function, donate_argnums=self._case.donate_argnums)
            started = time.perf_counter()
            self._run = program.lower(*arguments[0]).compile()
            self.compile_seconds = time.perf_counter() - started
        self.bytes = self._case.bytes
        if self.bytes is None:
            moved = jax.tree.leaves((arguments[0], jax.eval_shape(program, *arguments[0])))
            self.bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in moved)

    def __call__(self) -> Any:
        i = self._turn % len(self._arguments)
        self._turn += 1
        out = self._run(*self._arguments[i])
        jax.block_until_ready(out)
        if self._case.next_inputs is not None:
            self._arguments[i] = self._case.next_inputs(self._arguments[i], out)
        return out

    def error(self) -> tuple[float | None, float | None]:
        """The largest difference from float64, and the same by the largest expected value."""
        if self._case.expected is None:
            return None, None
        expected = np.asarray(self._case.expected(*self._arguments[0]), np.float64)
        found = np.asarray(self._case.select_output(self()), np.float64)
        if found.shape != expected.shape:
            raise ValueError(
                f"{self._case.name}, {self.contender.impl}: the result has shape {found.shape}, "
                f"that in float64 {expected.shape}"
            )
        most = float(np.max(np.abs(found - expected)))
        return most, most / max(float(np.max(np.abs(expected))), 1e-300)

    def sample(self, calls: int) -> float:
        """Seconds a call, over some calls."""
        started = time.perf_counter()
        for _ in range(calls):
            self()
        return (time.perf_counter() - started) / calls


def argument_sets(case: Case) -> list[tuple]:
    """The arguments of a case, so many times that the cold ones leave the caches between uses."""
    first = case.inputs()
    cold = sum(leaf.nbytes for i in case.cold_argnums for leaf in jax.tree.leaves(first[i]))
    found = [first]
    for _ in range(math.ceil(case.reuse_distance / cold) - 1 if cold else 0):
        own = list(first)
        for i in case.cold_argnums:
            own[i] = jax.tree.map(jnp.copy, first[i])
        found.append(tuple(own))
    return jax.block_until_ready(found)


def measure(
    contenders: Sequence[Contender],
    roofs: Peaks,
    *,
    seconds: float = 1.0,
    say: Callable[[str], None] | None = None,
) -> list[Result]:
    """Measures contenders in turns, one sample of each after the other.

    Args:
        seconds: for all samples of one contender, roughly; there are at least five.
        say: is told which contenders are left out because a form does not run here, or not on
            these arguments. Without it they raise.

    Raises:
        kernels.Unavailable: see `say`.
    """
    ready: list[_CompiledContender] = []
    shared: dict[int, list[tuple]] = {}  # arguments that no call gives away
    for contender in contenders:
        case = contender.case
        arguments = argument_sets(case) if case.donate_argnums else shared.get(id(case))
        if arguments is None:
            arguments = shared[id(case)] = argument_sets(case)
        try:
            ready.append(_CompiledContender(contender, arguments))
        except kernels.Unavailable as error:
            if say is None:
                raise
            say(f"{case.name}, {contender.impl}: {error}")
    if not ready:
        return []
    errors = [one.error() for one in ready]
    calls = []
    for one in ready:
        once = min(one.sample(1) for _ in range(3))
        calls.append(math.ceil(_SAMPLE_SECONDS / once))
    times: list[list[float]] = [[] for _ in ready]
    started = time.perf_counter()
    while len(times[0]) < _MIN_SAMPLES or (
        time.perf_counter() - started < seconds * len(ready) and len(times[0]) < _MAX_SAMPLES
    ):
        first = len(times[0]) % len(ready)  # nobody always runs behind the same neighbour
        for i in [*range(first, len(ready)), *range(first)]:
            times[i].append(ready[i].sample(calls[i]))
    results = []
    for i, one in enumerate(ready):
        case, taken = one.contender.case, sorted(times[i])
        roof, bound = roofs.roofline_seconds(case.flops, one.bytes, case.dtype)
        median = statistics.median(taken)
        turns = [first / own for first, own in zip(times[0], times[i], strict=True)]
        results.append(
            Result(
                case=case.name,
                form=one.contender.impl,
                dtype=case.dtype,
                min=taken[0],
                median=median,
                p80=taken[math.ceil(0.8 * len(taken)) - 1],
                n=len(taken),
                flops=case.flops,
                bytes=one.bytes,
                gflops=case.flops / median / 1e9,
                gbs=one.bytes / median / 1e9,
                roof=roof,
                bound=bound,
                percent=100 * roof / median,
                max_error=errors[i][0],
                relative_error=errors[i][1],
                compile=one.compile_seconds,
                ratio=statistics.median(turns),
            )
        )
    return results


@dataclass(frozen=True, kw_only=True)
class BenchPlan:
    """What to measure, and what to do with it. Raises ValueError for a form that is not there."""

    names: Sequence[str] = ()  # beginnings of the names of cases; none: all
    all_impls: bool = False  # every form of each operation, beside the chosen one
    overrides: Mapping[str, str] = dataclasses.field(default_factory=dict)  # operation: form
    seconds: float = 1.0

    def __post_init__(self) -> None:
        for operation, form in self.overrides.items():
            kernels.get_impl(operation, form)

    def select(self, cases: Iterable[Case]) -> list[Case]:
        """The cases that are meant.

        Raises:
            ValueError: a name is the beginning of none.
        """
        found = list(cases)
        known = list(dict.fromkeys(case.name.partition(" ")[0] for case in found))
        for name in self.names:
            if not any(case.name.startswith(name) for case in found):
                raise ValueError(f"no case is called {name!r}: there are {', '.join(known)}")
        return [one for one in found if not self.names or one.name.startswith(tuple(self.names))]

    def contenders(self, case: Case) -> list[Contender]:
        """A case as the table has it, and its rivals."""
        found = [Contender(case=case)]
        if self.overrides:
            name = ", ".join(f"{operation}={form}" for operation, form in self.overrides.items())
            found.append(Contender(case=case, impl=name, overrides=self.overrides))
        if self.all_impls and case.operation is not None:
            for form in kernels.IMPLS[case.operation]:
                found.append(Contender(case=case, impl=form, overrides={case.operation: form}))
        return found


def run(
    plan: BenchPlan, cases: Iterable[Case], found: Peaks, *, say: Callable[[str], None]
) -> Iterator[list[Result]]:
    """Measures case after case: for each, its contenders. Forms that do not run here are said."""
    for case in cases:
        if results := measure(plan.contenders(case), found, seconds=plan.seconds, say=say):
            yield results


def parse_overrides(pairs: Iterable[str]) -> dict[str, str]:
    """["norm=reference"] as a dictionary.

    Raises:
        ValueError: one is not OPERATION=FORM.
    """
    found = {}
    for pair in pairs:
        operation, sign, form = pair.partition("=")
        if not sign:
            raise ValueError(f"a form is given as OPERATION=FORM, got {pair!r}")
        found[operation] = form
    return found
