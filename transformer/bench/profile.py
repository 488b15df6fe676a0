"""Profile of a decoding step by operation, compared with the roofline.

The decoding step of the engine is compiled and run under JAX's profiler, which records the start
and duration of each instruction of the compiled program. The text of the program states the origin
of an instruction (its `jax.named_scope`, and the names of the weights that it reads), by which its
time is attributed to an operation. Time of several cores in parallel counts once per core. Time
during which no instruction runs is reported as "between instructions".

The roofline of an operation is the time to read its weights or the KV cache.
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

from transformer import kernels
from transformer.bench import decoder_cases
from transformer.bench.peaks import Peaks
from transformer.bench.report import align_columns, format_duration, probe_machine
from transformer.weights import Linear

_STEPS = 12  # number of profiled steps; JAX records at most a million events

# Operation -> regular expression of the origins of its instructions. The first match counts.
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
    peaks: Peaks,
    *,
    dtypes: tuple[str, ...] = decoder_cases.DTYPES,
    rows: int = 1,
    overrides: Mapping[str, str] | None = None,
    say: Callable[[str], None],
) -> list[dict[str, Any]]:
    """Profile a decoding step in each dtype.

    Args:
        sizes: Sizes of the decoder, and the length of the context.
        peaks: Peaks of this machine.
        dtypes: Dtypes of the weights.
        rows: Number of sequences in the batch.
        overrides: Implementations to use instead of the defaults: operation -> name.
        say: Called with progress messages.

    Returns:
        For each dtype a dictionary {"format", "rows", "context", "step", "profiled", "roof",
        "stages": [{"stage", "seconds", "bytes", "roof"}]}. "format" is the dtype. Times are in
        seconds per step; the longest stage is first. "step" is measured without the profiler, and
        "profiled" with it. "bytes" are the bytes that a stage must read, and "roof" is the time
        that reading them takes at peak bandwidth; both are None for a stage that reads little.

    Raises:
        RuntimeError: See `profile_step`.
    """
    profiles = []
    for dtype in dtypes:
        say(f"profiling a decoding step in {dtype}")
        case = decoder_cases.decode_case(sizes.cfg, dtype, rows, sizes.context)
        arguments = case.inputs()
        program = jax.jit(case.function, donate_argnums=case.donate_argnums)
        with kernels.override(**overrides or {}):
            compiled = program.lower(*arguments).compile()
        origins = instruction_origins(compiled.as_text() or "")
        next_inputs: Any = case.next_inputs

        def step(run=compiled, next_inputs=next_inputs) -> None:
            nonlocal arguments
            out = jax.block_until_ready(run(*arguments))
            arguments = next_inputs(arguments, out)

        step_seconds = _median_seconds(step)
        stage_seconds, profiled = profile_step(step, origins)
        num_bytes = _required_bytes(sizes, dtype, rows, arguments[0])
        stages = [
            {
                "stage": stage,
                "seconds": seconds,
                "bytes": num_bytes.get(stage),
                "roof": num_bytes[stage] / peaks.bytes_per_second if stage in num_bytes else None,
            }
            for stage, seconds in stage_seconds.most_common()
        ]
        roof = (case.bytes or 0.0) / peaks.bytes_per_second
        profiles.append({"format": dtype, "rows": rows, "context": sizes.context,
                         "step": step_seconds, "profiled": profiled, "roof": roof,
                         "stages": stages})  # fmt: skip
    return profiles


def instruction_origins(text: str) -> dict[str, str]:
    """Return the `op_name` metadata of each instruction of a compiled program.

    Args:
        text: The program as text, from `compiled.as_text()`.

    Returns:
        A dictionary from the name of an instruction to its op_name. An instruction without an
        op_name (XLA drops it for float32 matrix products) gets the op_names of its operands.
    """
    origins, operands = {}, {}
    for line in text.splitlines():
        if (match := re.match(r"\s+(?:ROOT )?%?([\w.-]+) = ", line)) is None:
            continue
        name, rest = match[1], line[match.end() :]
        operands[name] = re.findall(r"%([\w.-]+)", rest.partition("metadata=")[0])
        if (origin := re.search(r'op_name="([^"]*)"', rest)) is not None:
            origins[name] = origin[1]
    completed = dict(origins)
    for name, sources in operands.items():
        if name not in origins:
            completed[name] = " ".join(origins[source] for source in sources if source in origins)
    return completed


def profile_step(
    step: Callable[[], None], origins: Mapping[str, str]
) -> tuple[collections.Counter, float]:
    """Run a decoding step under the profiler.

    Args:
        step: A function that runs one step and waits for its result.
        origins: Origin of each instruction, from `instruction_origins`.

    Returns:
        Seconds per step by stage (operation), and seconds per step in total.

    Raises:
        RuntimeError: The profiler recorded no instruction.
    """
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder, create_perfetto_trace=True):
            started = time.perf_counter()
            for _ in range(_STEPS):
                step()
            total = (time.perf_counter() - started) / _STEPS
        (path,) = Path(folder).rglob("perfetto_trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    threads = collections.defaultdict(list)
    for event in events:
        if "hlo_op" in event.get("args", {}):
            threads[event["pid"], event["tid"]].append(event)
    if not threads:
        raise RuntimeError(
            f"the profiler recorded no instruction on the platform {jax.default_backend()}; "
            "profiling needs events with hlo_op"
        )
    stage_seconds: Any = collections.Counter()  # with float values
    for thread in threads.values():
        for name, microseconds in _self_times(thread):
            stage_seconds[_stage(origins.get(name, ""))] += microseconds * 1e-6 / _STEPS
    stage_seconds[IDLE] = max(total - sum(stage_seconds.values()), 0.0)
    return stage_seconds, total


def _self_times(events: list[dict[str, Any]]) -> list[tuple[str, float]]:
    """Return (instruction, microseconds) of one thread, without the time of nested instructions."""
    events.sort(key=lambda event: (event["ts"], -event["dur"]))
    times, stack = [], []  # stack: (end, index) of the enclosing instructions
    for event in events:
        while stack and event["ts"] >= stack[-1][0]:
            stack.pop()
        if stack:
            times[stack[-1][1]][1] -= event["dur"]
        stack.append((event["ts"] + event["dur"], len(times)))
        times.append([event["args"]["hlo_op"], event["dur"]])
    return [(name, microseconds) for name, microseconds in times]


def _stage(label: str) -> str:
    return next((stage for stage, pattern in STAGES.items() if re.search(pattern, label)), OTHER)


def _median_seconds(step: Callable[[], None]) -> float:
    """Return the median time in seconds of a step without the profiler."""
    times = []
    for _ in range(20):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times[3:])


def _required_bytes(sizes: decoder_cases.Sizes, dtype: str, rows: int, params) -> dict[str, float]:
    """Return the bytes that each stage must read, for stages that read weights or the KV cache."""

    def size(modules) -> float:
        linears = [module for module in modules if isinstance(module, Linear)]
        return sum(map(read_bytes, jax.tree.leaves(linears)))

    def read_bytes(leaf: jax.Array) -> float:  # of the experts of a layer, those of one token
        chosen = sizes.cfg.num_experts_per_tok if leaf.ndim == 3 else None
        return leaf.nbytes if chosen is None else leaf.nbytes * chosen / leaf.shape[0]

    layers = params.layers
    kv_bytes = rows * (sizes.context + 1) * decoder_cases.kv_bytes_per_token(sizes.cfg, dtype)
    return {
        "attention over the cache": kv_bytes,
        "products q, k, v, out": sum(size((x.q, x.k, x.v, x.out)) for x in layers),
        "products gate, up, down": sum(size((x.gate, x.up, x.down)) for x in layers),
        "product with the head": size([params.embed if params.head is None else params.head]),
    }


def format_profile(profiles: list[dict[str, Any]]) -> str:
    """Return the profiles of `profile_decode` as text tables, one per dtype."""
    tables = []
    for profile in profiles:
        total = profile["profiled"]
        title = (
            f"{profile['format']}: batch of {profile['rows']}, context of {profile['context']} "
            f"tokens; a step takes {format_duration(profile['step'])}, "
            f"{format_duration(total)} under the profiler; the roofline is "
            f"{format_duration(profile['roof'])}"
        )
        rows = []
        for stage in profile["stages"]:
            roof, seconds = stage["roof"], stage["seconds"]
            cells = ["-"] * 4
            if roof is not None:
                cells = [f"{stage['bytes'] / 1e6:.3g} MB", f"{stage['bytes'] / seconds / 1e9:.3g}"]
                cells += [format_duration(roof), f"{100 * roof / seconds:.0f} %"]
            share = f"{100 * seconds / total:.0f} %"
            rows.append([stage["stage"], format_duration(seconds), share, *cells])
        head = ["OPERATION", "PER STEP", "SHARE", "MUST READ", "GB/S", "ROOFLINE", "OF ROOFLINE"]
        tables.append(f"{title}\n{align_columns(head, rows)}")
    return "\n\n".join(tables)


def report(
    sizes: decoder_cases.Sizes,
    *,
    overrides: Mapping[str, str] | None = None,
    as_json: bool,
    say: Callable[[str], None],
) -> int:
    """Profile a decoding step in each dtype and print the profiles.

    Args:
        sizes: Sizes of the decoder, and the length of the context.
        overrides: Implementations to use instead of the defaults: operation -> name.
        as_json: Print JSON instead of tables.
        say: Called with progress messages.

    Returns:
        The exit status, 0.
    """
    peaks, about = probe_machine(say)
    profiles = profile_decode(sizes, peaks, overrides=overrides, say=say)
    if as_json:
        print(json.dumps({"machine": about, "where": profiles}))
    else:
        print(format_profile(profiles))
    return 0
