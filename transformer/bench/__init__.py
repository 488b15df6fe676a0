"""Benchmarks of kernels and programs: time, fraction of the roofline, and numerical error.

    python -m transformer.bench                    all cases, for a decoder of SmolLM2's sizes
    python -m transformer.bench matmul norm        cases whose names start with matmul or norm
    python -m transformer.bench attend --all-impls  all implementations of an operation
    python -m transformer.bench decode --profile    profile of a decoding step
    python -m transformer.bench --save a.jsonl     then, after a change, --compare a.jsonl

A *case* is a function, its inputs, and its cost: the number of floating-point operations, and of
bytes that must be moved (each input read once, each output written once). The *roofline* is the
minimum time for this cost, given the memory bandwidth of the machine and its matrix multiplication
speed for a dtype (Williams, Waterman & Patterson 2009, doi:10.1145/1498765.1498785). Both peaks are
measured in the process that measures the case. A case whose data fits into a CPU cache can be
faster than its roofline.

Methodology: programs are compiled first, and the compile time is reported separately. Weights and
KV caches are read from memory, not from a CPU cache, as in a model, where all other weights are
read between two uses of the same weight. The implementations in a comparison (*contenders*) are
sampled alternately, so that changes in the speed of the machine affect all of them. Results are
compared with float64 before timing. Times are wall-clock times from the call until its result is
ready; the calls of a sample take at least a millisecond.

A package with benchmarks has a `bench.py` with `cases() -> Iterator[Case]`. The cases of this
package are in `decoder_cases.py`.

Reading order: `case.py`, `peaks.py` (peak speed of the machine), `measure.py` and `report.py`;
`profile.py` profiles a decoding step by operation.

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
