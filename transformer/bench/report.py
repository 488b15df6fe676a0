"""Output of results: tables, JSON lines, comparisons, roofline plots."""

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
    """Format results as a text table.

    With `has_turns`, the last column has the speedup over the first contender of the case.
    """
    head = ["CASE", "IMPL", "MEDIAN", "MIN", "P80", "N", "GFLOP/S", "GB/S", "ROOFLINE"]
    head += ["OF ROOFLINE", "ERROR", "COMPILE"] + (["SPEED"] if has_turns else [])
    rows = []
    for result in results:
        error = "-" if result.relative_error is None else f"{result.relative_error:.0e}"
        row = [
            result.case,
            result.form,
            *map(format_duration, (result.median, result.min, result.p80)),
            str(result.n),
            f"{result.gflops:.3g}",
            f"{result.gbs:.3g}",
            f"{format_duration(result.roof)} {result.bound}",
            f"{result.percent:.0f} %",
            error,
            format_duration(result.compile),
        ]
        rows.append(row + ([f"x{result.ratio:.2f}"] if has_turns else []))
    return align_columns(head, rows, left=2)


def align_columns(head: Sequence[str], rows: Sequence[Sequence[str]], *, left: int = 1) -> str:
    """Format a text table; the first `left` columns are left-aligned, the others right-aligned."""
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
    """Format a duration with three digits and a unit, for example "1.23 ms"."""
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds / 1e-6:.3g} us"


def write(path: Path, about: Mapping[str, Any], results: Sequence[Result]) -> None:
    """Save the results as JSON lines: first {"machine": ...}, then one object per result."""
    Path(path).write_text("".join(f"{line}\n" for line in json_lines(about, results)), "utf-8")


def json_lines(about: Mapping[str, Any], results: Iterable[Result]) -> Iterator[str]:
    """Yield the lines that `write` writes to a file, without line feeds."""
    yield json.dumps({"machine": about})
    for result in results:
        yield json.dumps(dataclasses.asdict(result))


def read(path: Path) -> tuple[dict[str, Any], list[Result]]:
    """Read a file of results that `write` wrote.

    Args:
        path: The file of JSON lines.

    Returns:
        The description of the machine and the results.

    Raises:
        OSError: The file cannot be read.
        ValueError: The file was not written by `write`.
    """
    try:
        first, *rest = [json.loads(line) for line in Path(path).read_text("utf-8").splitlines()]
        return first["machine"], [Result(**fields) for fields in rest]
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is not a file of benchmark results: {error!r}") from None


def compare(old: Sequence[Result], new: Sequence[Result]) -> str:
    """Format a text table that compares old and new results of the same case and implementation.

    The speed of the machine can differ between two runs. "OF ROOFLINE" corrects for the part of the
    difference that is in the measured peaks. To detect a difference of a few percent, measure both
    implementations in one run (`--impl`).
    """
    old_results = {(result.case, result.form): result for result in old}
    rows = []
    for result in new:
        if (previous := old_results.get((result.case, result.form))) is not None:
            rows.append(
                [
                    result.case,
                    result.form,
                    format_duration(previous.median),
                    format_duration(result.median),
                    f"x{previous.median / result.median:.2f}",
                    f"{previous.percent:.0f} %",
                    f"{result.percent:.0f} %",
                ]
            )
    head = ["CASE", "IMPL", "OLD", "NEW", "SPEED", "OF ROOFLINE, OLD", "NEW"]
    return align_columns(head, rows, left=2)


def roofline(results: Sequence[Result], about: Mapping[str, Any], path: Path) -> None:
    """Plot results in a roofline diagram: speed over arithmetic intensity.

    Args:
        results: The results.
        about: Description of the machine, from `machine` or `read`.
        path: Path of the image to write; its suffix selects the format (.png, .svg).
    """
    from matplotlib.figure import Figure

    peaks, gbs = about["roofs"]["gflops"], about["roofs"]["gbs"]
    colors = dict(zip(peaks, ("#1b6ca8", "#c8553d", "#3c7a3c", "#7a4fa3"), strict=False))
    intensity = [result.flops / result.bytes for result in results]
    low, high = min([0.1, *intensity]) / 2, max([1e3, *intensity]) * 2
    figure = Figure(figsize=(11, max(6.5, 0.16 * len(results))), layout="constrained")
    axes = figure.add_subplot()
    x = np.geomspace(low, high, 200)
    for dtype, peak in peaks.items():
        label = f"{dtype}: {peak:.0f} GFLOP/s"
        axes.plot(x, np.minimum(peak, gbs * x), color=colors[dtype], linewidth=1.5, label=label)
    axes.plot(x, gbs * x, color="#888888", linewidth=1, linestyle=":", label=f"{gbs:.0f} GB/s")
    for i, (result, flops_per_byte) in enumerate(zip(results, intensity, strict=True), 1):
        label = f"{i}  {result.case}" + ("" if result.form == "chosen" else f", {result.form}")
        point = (flops_per_byte, result.gflops)
        axes.plot(*point, "o", color=colors[result.dtype], markersize=5, label=label)
        axes.annotate(str(i), point, (4, 3), textcoords="offset points", fontsize=7)
    axes.set(xscale="log", yscale="log", xlim=(low, high))
    axes.set_xlabel("arithmetic intensity (FLOP/byte)")
    axes.set_ylabel("GFLOP/s")
    axes.set_title(f"{about['processor']}, jax {about['jax']}", fontsize=10)
    axes.grid(which="major", color="#dddddd", linewidth=0.5)
    figure.legend(loc="outside right upper", fontsize=7, frameon=False)
    figure.savefig(path, dpi=150)


def probe_machine(say: Callable[[str], None]) -> tuple[Peaks, dict[str, Any]]:
    """Measure the peaks of the machine and report them to `say`.

    Args:
        say: Called with progress messages.

    Returns:
        The peaks, and the description of the machine, a JSON object.
    """
    say("measuring the memory bandwidth and matrix multiplication speed of this machine")
    peaks = measure_peaks()
    about = machine(peaks)
    rates = ", ".join(f"{value:.0f} {name}" for name, value in about["roofs"]["gflops"].items())
    say(
        f"{about['processor']}, {about['cores']} cores, jax {about['jax']} on {about['platform']}: "
        f"memory {about['roofs']['gbs']:.1f} GB/s; matrix products in GFLOP/s: {rates}; "
        f"call overhead {format_duration(peaks.call_seconds)}"
    )
    return peaks, about


def report(
    plan: BenchPlan,
    cases: Sequence[Case],
    *,
    as_json: bool = False,
    save: Path | None = None,
    old: tuple[dict[str, Any], list[Result]] | None = None,
    roofline_path: Path | None = None,
    say: Callable[[str], None],
) -> int:
    """Measure the cases and print the results.

    Args:
        plan: The implementations to measure.
        cases: The cases, from `BenchPlan.select`.
        as_json: Print JSON lines instead of a table.
        save: File to write the results to; None to write none.
        old: Earlier results to compare with, from `read`.
        roofline_path: Image file to write the roofline plot to; None for no plot.
        say: Called with progress messages.

    Returns:
        The exit status: 0, or 1 if all contenders were skipped.
    """
    peaks, about = probe_machine(say)
    results: list[Result] = []
    for group in run(plan, cases, peaks, say=say):
        results += group
        times = ", ".join(f"{result.form} {format_duration(result.median)}" for result in group)
        say(f"{group[0].case}: {times}")
    if as_json:
        print("\n".join(json_lines(about, results)))
    elif results:
        print(format_table(results, has_turns=plan.all_impls or bool(plan.overrides)))
    if old is not None and results:
        if old[0]["processor"] != about["processor"] or old[0]["jax"] != about["jax"]:
            say(
                f"the old results are from another machine or version of JAX: "
                f"{old[0]['processor']}, jax {old[0]['jax']}"
            )
        text = compare(old[1], results)
        say(text) if as_json else print(f"\n{text}")
    if save is not None:
        write(save, about, results)
    if roofline_path is not None:
        roofline(results, about, roofline_path)
    return 0 if results else 1
