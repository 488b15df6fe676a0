"""Which number format a model is served in.

Which is fastest depends on the machine (one processor multiplies bytes, another converts them
first), which is good enough depends on the model, and which fits depends on what else is running.
So the first start measures those that fit, remembers the answer beside the models, and says what it
chose and why.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bpe
from serve import memory, settings
from transformer import cache, checkpoint, generate, sampling
from transformer.checkpoint import Format
from transformer.config import Config
from transformer.decoder import Params, forward
from transformer.sampling import Sampling

FORMATS: tuple[Format, ...] = ("int8", "bfloat16", "float32")
# int8 keeps the maps that write to the stream, about a third of the weights, in bfloat16.
BYTES_PER_WEIGHT = {"int8": 1.4, "bfloat16": 2.0, "float32": 4.0}
# What loading, compiling and computing take beside the weights.
WORKING_MEMORY = 300 * 2**20
# A format serves if it makes the passage below at most this much harder to predict.
MAX_PERPLEXITY_RATIO = 1.03
PASSAGE = (
    "The tokenizer cuts text into pieces that occur often, and each piece has a number. The model "
    "reads those numbers and says, for every number it knows, how likely it is to come next. "
    "One of them is drawn, put behind the others, and the whole is read again.\n\n"
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n"
    "        a, b = b, a + b\n    return a\n\n"
    "In 1969 two people walked on the Moon while a third stayed in orbit. They brought back "
    "21.5 kilograms of rock, and everybody on Earth with a television set had watched them."
)


def weight_bytes(cfg: Config, format: Format) -> int:
    """About how much memory the weights take in a format."""
    return int(cfg.num_params * BYTES_PER_WEIGHT[format])


def that_fit(
    id: str, cfg: Config, extra: int, wanted: tuple[Format, ...] = FORMATS
) -> tuple[Format, ...]:
    """The formats whose weights fit into the memory that is free, with `extra` bytes beside them.

    Raises:
        MemoryError: none does.
    """
    free = memory.available()
    extra += WORKING_MEMORY
    fitting = tuple(format for format in wanted if weight_bytes(cfg, format) + extra <= free)
    if not fitting:
        least = min(wanted, key=BYTES_PER_WEIGHT.__getitem__)
        raise MemoryError(
            f"{id} needs {_gigabytes(weight_bytes(cfg, least) + extra)} of memory in {least}, "
            f"{_gigabytes(extra)} of it beside the weights; {_gigabytes(free)} are free"
        )
    return fitting


def choose(
    id: str,
    path: Path,
    cfg: Config,
    name: str,
    extra: int,
    notify: Callable[[str], None],
) -> Format:
    """The fastest format that predicts `PASSAGE` about as well as the widest that fits.

    Args:
        id: what to call the model.
        path: its files.
        cfg: its sizes.
        name: of these weights on this machine, for what is remembered.
        extra: bytes that will be needed beside the weights.
        notify: told one line for each thing that takes long.

    Raises:
        MemoryError: it fits in no format.
        ValueError: the weights are damaged.
    """
    fitting = that_fit(id, cfg, extra)
    remembered = settings.data_folder() / "formats.json"
    try:
        known = json.loads(remembered.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(name) in fitting:
        return known[name]

    *narrow, widest = fitting  # the others are compared with it
    for format in FORMATS[len(fitting) :]:
        notify(
            f"{id}: {format} would need {_gigabytes(weight_bytes(cfg, format) + extra)} of memory, "
            f"{_gigabytes(memory.available())} are free: not tried"
        )
    if not narrow:
        notify(f"serving {id} in {widest}, the only format that fits")
        return widest
    notify(f"measuring which number format is fastest and good enough for {id} (once) ...")
    found: dict[Format, tuple[float, float]] = {}
    ids: list[int] = []
    for format in (widest, *reversed(narrow)):
        params, cfg, metadata = checkpoint.load(path, format=format)
        if not ids:
            tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata)
            ids = tokenizer.encoding.encode_ordinary(PASSAGE)[: cfg.max_seq_len]
        found[format] = _milliseconds(params, cfg), _perplexity(params, cfg, ids)
        del params  # before the next one comes
        milliseconds, perplexity = found[format]
        if format == widest and not math.isfinite(perplexity):
            raise ValueError(f"{path}: the model's predictions are not numbers: damaged weights?")
        ratio = perplexity / found[widest][1]
        verdict = "" if ratio <= MAX_PERPLEXITY_RATIO else " (too far off)"
        notify(
            f"  {format:8} {milliseconds:6.2f} ms for four layers and the head, "
            f"perplexity x{ratio:.3f}{verdict}"
        )
    limit = found[widest][1] * MAX_PERPLEXITY_RATIO
    good = [format for format in fitting if found[format][1] <= limit]
    chosen = min(good, key=lambda format: found[format][0])
    notify(f"serving {id} in {chosen}")
    if fitting == FORMATS:  # with more memory, another answer might come out
        with contextlib.suppress(OSError):  # a folder we may not write to: not remembered
            temporary = remembered.with_name(f".formats-{os.getpid()}")
            temporary.write_text(json.dumps(known | {name: chosen}, indent=1), "utf-8")
            os.replace(temporary, remembered)
    return chosen


def _milliseconds(params: Params, cfg: Config, repeats: int = 12) -> float:
    """The fastest of some decoding steps of the first four layers and the head, two rows."""
    few = replace(cfg, num_layers=min(cfg.num_layers, 4))
    params = params.replace(layers=params.layers[: few.num_layers])
    pool = cache.init(few, 1, jnp.bfloat16)
    past = sampling.history(1, cfg.vocab_size)
    rows = sampling.settings([Sampling(temperature=0.0)] * 2, [0] * 2, [0] * 2, [0] * 2)
    ids, tables = np.zeros(2, np.int32), np.ones((2, 1), np.int32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        drawn, pool, past = generate.decode(
            params, few, pool, past, ids, tables, np.zeros(2, np.int32), rows,
            num_ids=cfg.vocab_size,
        )  # fmt: skip
        drawn.ids.block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def _perplexity(params: Params, cfg: Config, ids: list[int]) -> float:
    logits, _ = jax.jit(forward, static_argnums=1)(params, cfg, np.array([ids], np.int32))
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"
