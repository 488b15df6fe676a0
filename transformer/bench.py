"""How fast, how near to what the machine can do, and how exact: the harness behind our timings.

    python -m transformer.bench                    every case, in a decoder of SmolLM2's sizes
    python -m transformer.bench matmul norm        cases whose names begin so
    python -m transformer.bench attend --forms     every form of an operation, in turns
    python -m transformer.bench decode --where     where a decoded token's time goes
    python -m transformer.bench --save a.jsonl     then, after a change, --compare a.jsonl

A *case* is a function, its inputs, and what the work amounts to: floating-point operations, and the
bytes that must move however clever the function is (each input read once, each output written
once). From these and two measured numbers, how fast this machine reads memory and how fast it
multiplies matrices of a dtype, follows the least time the case could take: its *roof* (the roofline
model; Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785). Both numbers are measured
in the process that measures the case. Where the data fits a cache, a case can be above its roof.

Rules that keep the figures honest: compiled first, and the compile time stated; weights and caches
come from memory, as in a model, where all other weights are read between two uses of one; every
figure of a comparison comes from turns, one sample each, so that a machine that slows down slows
all; results are compared with float64 before anything is timed. Times are wall-clock, a call and
the wait for its result; the calls of a sample fill at least a millisecond.

A package that has something to measure has a `bench.py` with `cases() -> Iterator[Case]`. Those of
this one are in `kernels/cases.py`.

Leaves out: energy, memory, several processes, several devices.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer import kernels

_SAMPLE_SECONDS = 1e-3  # a sample repeats its call until it takes so long
_MOST_SAMPLES = 1000
_FEWEST_SAMPLES = 5
_PROBE_SECONDS = 0.7  # for each roof
_READ_BYTES = 2**30  # of the probe of memory: more than any cache holds
_GEMM_SIDE = 2048

# --- what is measured ---------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Case:
    """Something to measure."""

    name: str  # the operation or program, sizes, dtype: "matmul 1x1536x576 float32"
    function: Callable[..., Any]  # pure; it is compiled here
    inputs: Callable[[], tuple]  # makes the arguments, so that they live while they are needed
    flops: float
    bytes: float | None = None  # that must move; None: all arguments and the outcome, once
    dtype: str = "float32"  # of the products: whose roof counts
    operation: str | None = None  # of `kernels.FORMS`; None for a program made of several
    expected: Callable[..., Any] | None = None  # the right result in float64, of the same arguments
    result: Callable[[Any], Any] = lambda out: out  # which part of the outcome that is
    cold: tuple[int, ...] = ()  # arguments that come from memory, not from a cache
    sweep: float = 0.0  # bytes that pass between two uses of the cold arguments
    donated: tuple[int, ...] = ()
    again: Callable[[tuple, Any], tuple] | None = None  # arguments after a call that donated some


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A case with the forms to take in it."""

    case: Case
    form: str = "chosen"  # what to call it
    tried: Mapping[str, str] = dataclasses.field(default_factory=dict)  # operation: form


@dataclass(frozen=True)
class Roofs:
    """What this machine can do."""

    bytes_per_second: float
    flops_per_second: dict[str, float]  # by dtype of the products
    call_seconds: float  # calling a compiled function that does nothing, and waiting for it

    def seconds(self, flops: float, num_bytes: float, dtype: str) -> tuple[float, str]:
        """The least time some work could take, and what bounds it: "memory" or "arithmetic"."""
        reading = num_bytes / self.bytes_per_second
        computing = flops / self.flops_per_second[dtype]
        return max((reading, "memory"), (computing, "arithmetic"))


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


class _Ready:
    """A contender, compiled, with its arguments.

    Raises:
        kernels.Unavailable: a form does not run here, or not on these arguments.
    """

    def __init__(self, contender: Contender, arguments: list[tuple]):
        self.contender, self._case = contender, contender.case
        self._arguments, self._turn = arguments, 0
        with kernels.trying(**contender.tried):
            program = jax.jit(self._case.function, donate_argnums=self._case.donated)
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
        if self._case.again is not None:
            self._arguments[i] = self._case.again(self._arguments[i], out)
        return out

    def error(self) -> tuple[float | None, float | None]:
        """The largest difference from float64, and the same by the largest expected value."""
        if self._case.expected is None:
            return None, None
        expected = np.asarray(self._case.expected(*self._arguments[0]), np.float64)
        found = np.asarray(self._case.result(self()), np.float64)
        if found.shape != expected.shape:
            raise ValueError(
                f"{self._case.name}, {self.contender.form}: the result has shape {found.shape}, "
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


def _arguments(case: Case) -> list[tuple]:
    """The arguments of a case, so many times that the cold ones leave the caches between uses."""
    first = case.inputs()
    cold = sum(leaf.nbytes for i in case.cold for leaf in jax.tree.leaves(first[i]))
    found = [first]
    for _ in range(math.ceil(case.sweep / cold) - 1 if cold else 0):
        own = list(first)
        for i in case.cold:
            own[i] = jax.tree.map(jnp.copy, first[i])
        found.append(tuple(own))
    return jax.block_until_ready(found)


def measure(
    contenders: Sequence[Contender],
    roofs: Roofs,
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
    ready: list[_Ready] = []
    shared: dict[int, list[tuple]] = {}  # arguments that no call gives away
    for contender in contenders:
        case = contender.case
        arguments = _arguments(case) if case.donated else shared.get(id(case))
        if arguments is None:
            arguments = shared[id(case)] = _arguments(case)
        try:
            ready.append(_Ready(contender, arguments))
        except kernels.Unavailable as error:
            if say is None:
                raise
            say(f"{case.name}, {contender.form}: {error}")
    if not ready:
        return []
    errors = [one.error() for one in ready]
    calls = []
    for one in ready:
        once = min(one.sample(1) for _ in range(3))
        calls.append(math.ceil(_SAMPLE_SECONDS / once))
    times: list[list[float]] = [[] for _ in ready]
    started = time.perf_counter()
    while len(times[0]) < _FEWEST_SAMPLES or (
        time.perf_counter() - started < seconds * len(ready) and len(times[0]) < _MOST_SAMPLES
    ):
        first = len(times[0]) % len(ready)  # nobody always runs behind the same neighbour
        for i in [*range(first, len(ready)), *range(first)]:
            times[i].append(ready[i].sample(calls[i]))
    results = []
    for i, one in enumerate(ready):
        case, taken = one.contender.case, sorted(times[i])
        roof, bound = roofs.seconds(case.flops, one.bytes, case.dtype)
        median = statistics.median(taken)
        turns = [first / own for first, own in zip(times[0], times[i], strict=True)]
        results.append(
            Result(
                case=case.name,
                form=one.contender.form,
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


def in_float64(function: Callable[..., Any]) -> Callable[..., np.ndarray]:
    """The same function with every float of its arguments in float64: what a form is held to.

    The function must name no precision of its own, as references of `kernels` don't.
    """

    def run(*inputs: Any) -> np.ndarray:
        def widen(leaf: Any) -> Any:
            is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
            return np.asarray(leaf).astype(np.float64) if is_float else np.asarray(leaf)

        with jax.enable_x64(True):
            out = jax.jit(function)(*jax.tree.map(widen, inputs))
            if any(leaf.dtype != jnp.float64 for leaf in jax.tree.leaves(out)):
                raise TypeError("the reference fell back to a narrower type than float64")
            return np.asarray(out)

    return run


# --- the machine --------------------------------------------------------------------------------


def roofs(dtypes: Iterable[str] = ("float32", "bfloat16", "int8")) -> Roofs:
    """Measures the machine: reading 1 GB in a product with one row, and square products."""
    rows = 2048

    def read() -> tuple:
        return jnp.ones((1, rows)), jnp.ones((_READ_BYTES // (4 * rows), rows))

    best = min(
        _best(lambda x, w, form=form: kernels.matmul(x, w, impl=form), read())
        for form in ("dot", "slices")
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
    return Roofs(_READ_BYTES / best, flops, idle)


def _best(function: Callable[..., Any], inputs: tuple) -> float:
    compiled = jax.jit(function).lower(*inputs).compile()
    times, started = [], time.perf_counter()
    while len(times) < 3 or time.perf_counter() - started < _PROBE_SECONDS:
        before = time.perf_counter()
        jax.block_until_ready(compiled(*inputs))
        times.append(time.perf_counter() - before)
    return min(times)


def machine(found: Roofs) -> dict[str, Any]:
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


# --- what is shown ------------------------------------------------------------------------------


def table(results: Sequence[Result], *, has_turns: bool = False) -> str:
    """The results in columns; with turns, how many times as fast as the first each one is."""
    head = ["CASE", "FORM", "MEDIAN", "MIN", "P80", "N", "GFLOP/S", "GB/S", "ROOF", "OF ROOF"]
    head += ["ERROR", "COMPILE"] + (["SPEED"] if has_turns else [])
    rows = []
    for one in results:
        error = "-" if one.relative_error is None else f"{one.relative_error:.0e}"
        row = [one.case, one.form, *map(duration, (one.median, one.min, one.p80)), str(one.n)]
        row += [f"{one.gflops:.3g}", f"{one.gbs:.3g}", f"{duration(one.roof)} {one.bound}"]
        row += [f"{one.percent:.0f} %", error, duration(one.compile)]
        rows.append(row + ([f"x{one.ratio:.2f}"] if has_turns else []))
    return columns(head, rows, left=2)


def columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Aligned columns, the first `left` of them to the left, the others to the right."""
    lines = [head, *rows]
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


def duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Saves JSON lines: first {"machine": ...}, then one object a result."""
    Path(path).write_text("".join(f"{line}\n" for line in lines(about, results)), "utf-8")


def lines(about: Mapping[str, Any], results: Iterable[Result]) -> Iterator[str]:
    """The JSON lines of `write`."""
    yield json.dumps({"machine": about})
    for result in results:
        yield json.dumps(dataclasses.asdict(result))


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """What `write` saved.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no such file.
    """
    try:
        first, *rest = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        return first["machine"], [Result(**fields) for fields in rest]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} holds no results of this bench: {error!r}") from None


def compare(old: Sequence[Result], new: Sequence[Result]) -> str:
    """Old beside new, for the cases that both have.

    Two runs are two states of the machine. "OF ROOF" takes out what the roofs know of that; a
    difference of a few percent wants both in one run, in turns (`--try`).
    """
    before = {(one.case, one.form): one for one in old}
    rows = []
    for one in new:
        if (was := before.get((one.case, one.form))) is not None:
            row = [one.case, one.form, duration(was.median), duration(one.median)]
            row += [
                f"x{was.median / one.median:.2f}",
                f"{was.percent:.0f} %",
                f"{one.percent:.0f} %",
            ]
            rows.append(row)
    head = ["CASE", "FORM", "OLD", "NEW", "SPEED", "OF ROOF, OLD", "NEW"]
    return columns(head, rows, left=2)


def roofline(results: Sequence[Result], about: Mapping[str, Any], path: Path) -> None:
    """Draws the roofs and, under them, every result by its operations a byte.

    Args:
        about: of `machine`.
        path: where to; the ending says the kind of picture (.png, .svg).
    """
    from matplotlib.figure import Figure

    peaks, gbs = about["roofs"]["gflops"], about["roofs"]["gbs"]
    colours = dict(zip(peaks, ("#1b6ca8", "#c8553d", "#3c7a3c", "#7a4fa3"), strict=False))
    intensity = [one.flops / one.bytes for one in results]
    low, high = min([0.1, *intensity]) / 2, max([1e3, *intensity]) * 2
    figure = Figure(figsize=(11, max(6.5, 0.16 * len(results))), layout="constrained")
    axes = figure.add_subplot()
    x = np.geomspace(low, high, 200)
    for dtype, peak in peaks.items():
        label = f"{dtype}: {peak:.0f} GFLOP/s"
        axes.plot(x, np.minimum(peak, gbs * x), color=colours[dtype], linewidth=1.5, label=label)
    axes.plot(x, gbs * x, color="#888888", linewidth=1, linestyle=":", label=f"{gbs:.0f} GB/s")
    for i, (one, at) in enumerate(zip(results, intensity, strict=True), 1):
        name = f"{i}  {one.case}" + ("" if one.form == "chosen" else f", {one.form}")
        axes.plot(at, one.gflops, "o", color=colours[one.dtype], markersize=5, label=name)
        axes.annotate(str(i), (at, one.gflops), (4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("operations a byte that must move (FLOP/byte)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{about['processor']}, jax {about['jax']}", fontsize=10)
    axes.grid(which="major", color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


# --- the command --------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What to measure, and what to do with it. Raises ValueError for a form that is not there."""

    names: Sequence[str] = ()  # beginnings of the names of cases; none: all
    forms: bool = False  # every form of each operation, beside the chosen one
    tried: Mapping[str, str] = dataclasses.field(default_factory=dict)  # operation: form
    seconds: float = 1.0

    def __post_init__(self) -> None:
        for operation, form in self.tried.items():
            kernels.find(operation, form)

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
        if self.tried:
            name = ", ".join(f"{operation}={form}" for operation, form in self.tried.items())
            found.append(Contender(case=case, form=name, tried=self.tried))
        if self.forms and case.operation is not None:
            for form in kernels.FORMS[case.operation]:
                found.append(Contender(case=case, form=form, tried={case.operation: form}))
        return found


def run(
    plan: Plan, cases: Iterable[Case], found: Roofs, *, say: Callable[[str], None]
) -> Iterator[list[Result]]:
    """Measures case after case: for each, its contenders. Forms that do not run here are said."""
    for case in cases:
        if results := measure(plan.contenders(case), found, seconds=plan.seconds, say=say):
            yield results


def parse_forms(pairs: Iterable[str]) -> dict[str, str]:
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


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    from transformer.kernels import cases

    parser = argparse.ArgumentParser(
        prog="python -m transformer.bench", description="Times what a decoder is made of."
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="beginnings of cases' names")
    parser.add_argument("--model", type=Path, help="take the sizes of this GGUF file or folder")
    parser.add_argument("--context", type=int, default=512, help="tokens in the cache; default 512")
    parser.add_argument("--forms", action="store_true", help="every form of each operation")
    parser.add_argument(
        "--try", action="append", default=[], metavar="OPERATION=FORM", dest="tried",
        help="measure with this form too, in turns; repeatable",
    )  # fmt: skip
    parser.add_argument("--where", action="store_true", help="where a decoded token's time goes")
    parser.add_argument("--list", action="store_true", help="name the cases and leave")
    parser.add_argument("--seconds", type=float, default=1.0, help="of samples a case; default 1")
    parser.add_argument("--json", action="store_true", help="print JSON lines instead of a table")
    parser.add_argument("--save", type=Path, metavar="FILE", help="write the JSON lines there too")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="with what --save wrote")
    parser.add_argument("--roofline", type=Path, metavar="FILE.png", help="draw the results")
    options = parser.parse_args(argv)
    say = lambda line: print(line, file=sys.stderr, flush=True)  # noqa: E731
    try:
        old = read(options.compare) if options.compare else None
        sizes = cases.Sizes.of(options.model, context=options.context)
        plan = Plan(
            names=options.names,
            forms=options.forms,
            tried=parse_forms(options.tried),
            seconds=options.seconds,
        )
        chosen = plan.select(cases.cases(sizes))
    except (OSError, ValueError) as error:
        say(f"python -m transformer.bench: {error}")
        return 2
    if options.list:
        print("\n".join(case.name for case in chosen))
        return 0
    return report(
        plan,
        chosen,
        where=sizes if options.where else None,
        as_json=options.json,
        save=options.save,
        old=old,
        picture=options.roofline,
        say=say,
    )


def report(
    plan: Plan,
    chosen: Sequence[Case],
    *,
    where: Any = None,
    as_json: bool = False,
    save: Path | None = None,
    old: tuple[dict[str, Any], list[Result]] | None = None,
    picture: Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Measures the cases and prints what comes of it; returns an exit status.

    Args:
        where: `cases.Sizes`: instead of the cases, say where a decoded token's time goes.
        old: of `read`, to compare with.
        picture: where to draw the roofline.
        say: for progress.
    """
    say("measuring the machine")
    found = roofs()
    about = machine(found)
    rates = ", ".join(f"{value:.0f} {name}" for name, value in about["roofs"]["gflops"].items())
    say(
        f"{about['processor']}, {about['cores']} cores, jax {about['jax']} on {about['platform']}: "
        f"reads {about['roofs']['gbs']:.1f} GB/s; multiplies, in GFLOP/s: {rates}; "
        f"a call takes {duration(found.call_seconds)}"
    )
    if where is not None:
        from transformer.kernels import where as table_of

        rows = table_of.where(where, found, say=say)
        print(json.dumps({"machine": about, "where": rows}) if as_json else table_of.show(rows))
        return 0
    results: list[Result] = []
    for group in run(plan, chosen, found, say=say):
        results += group
        say(f"{group[0].case}: {', '.join(f'{one.form} {duration(one.median)}' for one in group)}")
    if as_json:
        print("\n".join(lines(about, results)))
    elif results:
        print(table(results, has_turns=plan.forms or bool(plan.tried)))
    if old is not None and results:
        if old[0]["processor"] != about["processor"] or old[0]["jax"] != about["jax"]:
            say(f"the other figures are from {old[0]['processor']}, jax {old[0]['jax']}")
        text = compare(old[1], results)
        say(text) if as_json else print(f"\n{text}")
    if save is not None:
        write(save, about, results)
    if picture is not None:
        roofline(results, about, picture)
    return 0 if results else 1


if __name__ == "__main__":
    raise SystemExit(main())
