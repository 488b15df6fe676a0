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
this one are in `decoder_cases.py`.

Read `case.py`, `peaks.py` (the machine), `measure.py`, `report.py`; `profile.py` is where the time
of a decoding step goes.

Leaves out: energy, memory, several processes, several devices.
"""

from transformer.bench.case import Case, Contender, in_float64
from transformer.bench.measure import BenchPlan, Result, measure, parse_overrides, run
from transformer.bench.peaks import Peaks, machine, measure_peaks
from transformer.bench.report import (
    align_columns,
    compare,
    format_duration,
    format_table,
    json_lines,
    read,
    report,
    roofline,
    write,
)

__all__ = [
    "Case",
    "Contender",
    "BenchPlan",
    "Result",
    "Peaks",
    "align_columns",
    "compare",
    "format_duration",
    "in_float64",
    "json_lines",
    "machine",
    "measure",
    "parse_overrides",
    "read",
    "report",
    "roofline",
    "measure_peaks",
    "run",
    "format_table",
    "write",
]
