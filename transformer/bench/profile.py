"""Where a decoded token's time goes, operation by operation, against the machine's roof.

The step that a server runs is compiled and run under JAX's profiler, which notes when each
instruction of the compiled program began and how long it took. The program's text says which line
of ours an instruction came from (`jax.named_scope`, and the names of the weights it reads), and so
each microsecond of the step is some operation's. What several cores do at once counts once for
each; what no instruction accounts for is the time between them.

The roof of an operation is the time it takes to read what it must: its weights, or the cache.
"""

from __future__ import annotations

import collections
import gzip
import json
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from transformer.bench import decoder_cases
from transformer.bench.peaks import Peaks
from transformer.bench.report import align_columns, format_duration, probe_machine
from transformer.weights import Linear

_STEPS = 12  # profiled; JAX keeps at most a million events

# Operation: what the name of its instructions matches. The first that does.
STAGES = {
    "attention over the cache": r"attend_cached",
    "writing to the cache": r"append",
    "products q, k, v, out": r"layers\[\d+\]\.(q|k|v|out)\.|attention/matmul",
    "products gate, up, down": r"layers\[\d+\]\.(gate|up|down)\.|mlp/.*matmul",
    "product with the head": r"unembed/matmul|params\.(embed|head)\.weight",
    "norms": r"norm",
    "rotary positions": r"rotate|angles",
    "choosing the token": r"sample",
}
OTHER = "additions, activations, lookups"
IDLE = "between instructions"


def profile_decode(
    sizes: decoder_cases.Sizes,
    roofs: Peaks,
    *,
    dtypes: tuple[str, ...] = decoder_cases.DTYPES,
    rows: int = 1,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Profiles a decoding step in each format.

    Returns:
        For each format {"format", "step", "profiled", "stages": [{"stage", "seconds", "bytes",
        "roof"}]}; seconds a step, the longest stage first, `bytes` and `roof` None where little
        must be read.
    """
    found = []
    for format in dtypes:
        say(f"profiling a decoding step in {format}")
        case = decoder_cases.decode_case(sizes.cfg, format, rows, sizes.context)
        arguments = case.inputs()
        program = jax.jit(case.function, donate_argnums=case.donate_argnums)
        compiled = program.lower(*arguments).compile()
        names = instruction_origins(compiled.as_text())

        def step(run=compiled, case=case) -> None:
            nonlocal arguments
            out = jax.block_until_ready(run(*arguments))
            arguments = case.next_inputs(arguments, out)

        plain = _median_seconds(step)
        spent, profiled = profile_step(step, names)
        must = _required_bytes(sizes, format, rows, arguments[0])
        stages = [
            {
                "stage": stage,
                "seconds": seconds,
                "bytes": must.get(stage),
                "roof": must[stage] / roofs.bytes_per_second if stage in must else None,
            }
            for stage, seconds in spent.most_common()
        ]
        whole = {"step": plain, "profiled": profiled, "roof": case.bytes / roofs.bytes_per_second}
        found.append({"format": format, "rows": rows, "context": sizes.context, **whole,
                      "stages": stages})  # fmt: skip
    return found


def instruction_origins(text: str) -> dict[str, str]:
    """What each instruction of a compiled program came from, by its name.

    Args:
        text: of `compiled.as_text()`. An instruction that lost its origin on the way through the
            compiler (products of float32 do) gets the origins of what it reads.
    """
    own, reads = {}, {}
    for line in text.splitlines():
        if (match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)) is None:
            continue
        name, rest = match[1], line[match.end() :]
        reads[name] = re.findall(r"%([\w.-]+)", rest.partition("metadata=")[0])
        if (origin := re.search(r'op_name="([^"]*)"', rest)) is not None:
            own[name] = origin[1]
    known = dict(own)
    for name, sources in reads.items():
        if name not in own:
            known[name] = " ".join(own[source] for source in sources if source in own)
    return known


def profile_step(
    step: Callable[[], None], names: Mapping[str, str]
) -> tuple[collections.Counter, float]:
    """Seconds a step by stage, and the seconds of a whole step, under the profiler.

    Raises:
        RuntimeError: the profiler saw no instruction.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            started = time.perf_counter()
            for _ in range(_STEPS):
                step()
            whole = (time.perf_counter() - started) / _STEPS
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads = collections.defaultdict(list)
    for event in events:
        if "hlo_op" in event.get("args", {}):
            threads[event["pid"], event["tid"]].append(event)
    if not threads:
        raise RuntimeError("the profiler saw no instruction of the program: is the platform known?")
    spent: collections.Counter = collections.Counter()
    for thread in threads.values():
        for name, microseconds in _self_times(thread):
            spent[_stage(names.get(name, ""))] += microseconds * 1e-6 / _STEPS
    spent[IDLE] = max(whole - sum(spent.values()), 0.0)
    return spent, whole


def _self_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """(instruction, microseconds) of one thread, without what stands within: a loop's body."""
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    found, open_ = [], []  # open_: (end, index) of what has begun and not ended
    for event in events:
        while open_ and event["ts"] >= open_[-1][0]:
            open_.pop()
        if open_:
            found[open_[-1][1]][1] -= event["dur"]
        open_.append((event["ts"] + event["dur"], len(found)))
        found.append([event["args"]["hlo_op"], event["dur"]])
    return [(name, taken) for name, taken in found]


def _stage(label: str) -> str:
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, label)), OTHER)


def _median_seconds(step: Callable[[], None]) -> float:
    """The median of a step without a profiler."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _required_bytes(sizes: decoder_cases.Sizes, format: str, rows: int, params) -> dict[str, float]:
    """What the stages must read."""

    def size(parts) -> int:
        weights = [p for p in parts if isinstance(p, Linear)]
        return sum(leaf.nbytes for leaf in jax.tree.leaves(weights))

    layers = params.layers
    cached = rows * (sizes.context + 1) * decoder_cases.kv_bytes_per_token(sizes.cfg, format)
    return {
        "attention over the cache": cached,
        "products q, k, v, out": sum(size((x.q, x.k, x.v, x.out)) for x in layers),
        "products gate, up, down": sum(size((x.gate, x.up, x.down)) for x in layers),
        "product with the head": size([params.embed if params.head is None else params.head]),
    }


def format_profile(found: list[dict[str, Any]]) -> str:
    """The tables, one a format."""
    parts = []
    for one in found:
        whole = one["profiled"]
        title = f"{one['format']}: {one['rows']} row behind {one['context']} tokens; a step takes "
        title += f"{format_duration(one['step'])}, {format_duration(whole)} under the profiler, "
        title += f"{format_duration(one['roof'])} by the roof"
        rows = []
        for stage in one["stages"]:
            roof, taken = stage["roof"], stage["seconds"]
            cells = ["-"] * 4
            if roof is not None:
                cells = [f"{stage['bytes'] / 1e6:.3g} MB", f"{stage['bytes'] / taken / 1e9:.3g}"]
                cells += [format_duration(roof), f"{100 * roof / taken:.0f} %"]
            rows.append(
                [stage["stage"], format_duration(taken), f"{100 * taken / whole:.0f} %", *cells]
            )
        head = ["OPERATION", "A STEP", "SHARE", "MUST READ", "GB/S", "ROOF", "OF ROOF"]
        parts.append(f"{title}\n{align_columns(head, rows)}")
    return "\n\n".join(parts)


def report(sizes: decoder_cases.Sizes, *, as_json: bool, say: Callable[[str], None]) -> int:
    """Prints where a decoded token's time goes; returns an exit status."""
    found, about = probe_machine(say)
    rows = profile_decode(sizes, found, say=say)
    print(json.dumps({"machine": about, "where": rows}) if as_json else format_profile(rows))
    return 0
