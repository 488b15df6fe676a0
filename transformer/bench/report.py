"""What is shown of results: tables, JSON lines, comparisons, the roofline."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from transformer.bench.case import Case
from transformer.bench.measure import BenchPlan, Result, run
from transformer.bench.peaks import Peaks, machine, measure_peaks


def format_table(results: Sequence[Result], *, has_turns: bool = False) -> str:
    """The results in columns; with turns, how many times as fast as the first each one is."""
    head = ["CASE", "FORM", "MEDIAN", "MIN", "P80", "N", "GFLOP/S", "GB/S", "ROOF", "OF ROOF"]
    head += ["ERROR", "COMPILE"] + (["SPEED"] if has_turns else [])
    rows = []
    for one in results:
        error = "-" if one.relative_error is None else f"{one.relative_error:.0e}"
        row = [
            one.case,
            one.form,
            *map(format_duration, (one.median, one.min, one.p80)),
            str(one.n),
        ]
        row += [f"{one.gflops:.3g}", f"{one.gbs:.3g}", f"{format_duration(one.roof)} {one.bound}"]
        row += [f"{one.percent:.0f} %", error, format_duration(one.compile)]
        rows.append(row + ([f"x{one.ratio:.2f}"] if has_turns else []))
    return align_columns(head, rows, left=2)


def align_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
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


def format_duration(seconds: float) -> str:
    """Three digits and a unit."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Saves JSON lines: first {"machine": ...}, then one object a result."""
    Path(path).write_text("".join(f"{line}\n" for line in json_lines(about, results)), "utf-8")


def json_lines(about: Mapping[str, Any], results: Iterable[Result]) -> Iterator[str]:
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
            row = [one.case, one.form, format_duration(was.median), format_duration(one.median)]
            row += [
                f"x{was.median / one.median:.2f}",
                f"{was.percent:.0f} %",
                f"{one.percent:.0f} %",
            ]
            rows.append(row)
    head = ["CASE", "FORM", "OLD", "NEW", "SPEED", "OF ROOF, OLD", "NEW"]
    return align_columns(head, rows, left=2)


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


def probe_machine(say: Callable[[str], None]) -> tuple[Peaks, dict[str, Any]]:
    """Measures the machine and says what came of it; returns that, and the same for JSON."""
    say("measuring the machine")
    found = measure_peaks()
    about = machine(found)
    rates = ", ".join(f"{value:.0f} {name}" for name, value in about["roofs"]["gflops"].items())
    say(
        f"{about['processor']}, {about['cores']} cores, jax {about['jax']} on {about['platform']}: "
        f"reads {about['roofs']['gbs']:.1f} GB/s; multiplies, in GFLOP/s: {rates}; "
        f"a call takes {format_duration(found.call_seconds)}"
    )
    return found, about


def report(
    plan: BenchPlan,
    chosen: Sequence[Case],
    *,
    as_json: bool = False,
    save: Path | None = None,
    old: tuple[dict[str, Any], list[Result]] | None = None,
    roofline_path: Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Measures the cases and prints what comes of it; returns an exit status.

    Args:
        old: of `read`, to compare with.
        picture: where to draw the roofline.
        say: for progress.
    """
    found, about = probe_machine(say)
    results: list[Result] = []
    for group in run(plan, chosen, found, say=say):
        results += group
        say(
            f"{group[0].case}: {', '.join(f'{one.form} {format_duration(one.median)}' for one in group)}"
        )
    if as_json:
        print("\n".join(json_lines(about, results)))
    elif results:
        print(format_table(results, has_turns=plan.all_impls or bool(plan.overrides)))
    if old is not None and results:
        if old[0]["processor"] != about["processor"] or old[0]["jax"] != about["jax"]:
            say(f"the other figures are from {old[0]['processor']}, jax {old[0]['jax']}")
        text = compare(old[1], results)
        say(text) if as_json else print(f"\n{text}")
    if save is not None:
        write(save, about, results)
    if roofline_path is not None:
        roofline(results, about, roofline_path)
    return 0 if results else 1
