"""From a file to a model that answers: tokenizer, weights in the right format, cache, engine.

Which number format is fastest depends on the machine (one processor multiplies bytes, another
converts them first), and which is good enough depends on the model. So the first start measures
both, remembers the answer beside the models, and says what it chose and why.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bpe
from serve import settings
from serve.engine.engine import Engine
from serve.engine.runner import BUCKETS, NUM_SLOTS, Runner
from serve.engine.scheduler import Scheduler
from transformer import cache, checkpoint, generate, sampling
from transformer.checkpoint import Format
from transformer.config import Config
from transformer.decoder import Params
from transformer.sampling import Sampling

FORMATS: tuple[Format, ...] = ("int8", "bfloat16", "float32")
MAX_WAITING = 256  # requests in the queue before others are turned away
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


@dataclass(frozen=True, kw_only=True)
class ServedModel:
    """A model that answers requests."""

    id: str
    created: int  # seconds since 1970
    owned_by: str
    tokenizer: bpe.Tokenizer
    context: int  # tokens of prompt and answer together
    engine: Engine
    fingerprint: str  # changes with weights, format and library versions
    format: Format = "float32"


def load_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    cache_budget: int,
    dtype: str = "auto",
    max_rows: int = 2,
    notify: Callable[[str], None] = lambda line: None,
) -> ServedModel:
    """Loads a model and starts its engine.

    Args:
        path: a GGUF file or a Hugging Face folder.
        cache_budget: bytes for the keys and values of all conversations.
        dtype: "float32", "bfloat16", "int8", or "auto" for the fastest that is good enough here.
        max_rows: larger batches than this are compiled when needed, not in idle moments.
        notify: told one line for each thing that takes long.

    Raises:
        OSError: the file cannot be read.
        ValueError: the file is damaged, of an unknown kind, or the cache budget holds no block.
    """
    settings.private_folder(settings.data_folder())
    _keep_compiled_programs()
    if dtype not in ("auto", *FORMATS):
        raise ValueError(f"dtype must be auto or one of {', '.join(FORMATS)}, got {dtype!r}")
    chosen: Format = choose_format(id, path, notify) if dtype == "auto" else dtype  # type: ignore
    params, cfg, metadata = checkpoint.load(path, format=chosen)
    tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata, source=str(path))
    cache_dtype = jnp.float32 if chosen == "float32" else jnp.bfloat16
    num_blocks = cache_budget // cache.bytes_per_block(cfg, cache_dtype)
    if num_blocks < 1:
        raise ValueError(
            f"a cache of {cache_budget / 2**20:.0f} MB holds no block of {cache.BLOCK} tokens of "
            f"{id}: give it {math.ceil(cache.bytes_per_block(cfg, cache_dtype) / 2**20)} MB or more"
        )
    # Never more than every slot could fill.
    num_blocks = min(num_blocks, NUM_SLOTS * cache.blocks_for(cfg.max_seq_len))
    context = min(cfg.max_seq_len, num_blocks * cache.BLOCK)
    runner = Runner(params, cfg, tokenizer.encoding.n_vocab, num_blocks, cache_dtype, notify)
    programs = [partial(_compile, program) for program in runner.programs()]
    for program in programs[:2]:  # one conversation needs these; the rest can wait
        program()
    later = [p for size, p in zip(BUCKETS[1:], programs[2:], strict=True) if size <= max_rows]
    scheduler = Scheduler(NUM_SLOTS, num_blocks, cache.BLOCK, MAX_WAITING)
    return ServedModel(
        id=id,
        created=int(_weights_file(path).stat().st_mtime),
        owned_by=owned_by,
        tokenizer=tokenizer,
        context=context,
        engine=Engine(runner, scheduler, context, when_idle=later),
        fingerprint="fp_" + _digest(path, chosen)[:10],
        format=chosen,
    )


def _compile(program: Callable[[], object]) -> None:
    program()
    _give_back_memory()


def choose_format(id: str, path: Path, notify: Callable[[str], None]) -> Format:
    """The fastest format that predicts `PASSAGE` about as well as float32 does, on this machine."""
    remembered = settings.data_folder() / "formats.json"
    key = _digest(path, "auto")
    try:
        known = json.loads(remembered.read_text("utf-8"))
    except (OSError, ValueError):
        known = {}
    if known.get(key) in FORMATS:
        return known[key]

    notify(f"measuring which number format is fastest and good enough for {id} (once) ...")
    found: dict[Format, tuple[float, float]] = {}
    ids: list[int] = []
    for format in reversed(FORMATS):  # float32 first: the others are compared with it
        params, cfg, metadata = checkpoint.load(path, format=format)
        if not ids:
            tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata)
            ids = tokenizer.encoding.encode_ordinary(PASSAGE)[: cfg.max_seq_len]
        found[format] = _milliseconds(params, cfg), _perplexity(params, cfg, ids)
        del params  # before the next one comes
        milliseconds, perplexity = found[format]
        if format == "float32" and not math.isfinite(perplexity):
            raise ValueError(f"{path}: the model's predictions are not numbers: damaged weights?")
        ratio = perplexity / found["float32"][1]
        verdict = "" if ratio <= MAX_PERPLEXITY_RATIO else " (too far off)"
        notify(
            f"  {format:8} {milliseconds:6.2f} ms for four layers and the head, "
            f"perplexity x{ratio:.3f}{verdict}"
        )
    limit = found["float32"][1] * MAX_PERPLEXITY_RATIO
    good = [format for format in FORMATS if found[format][1] <= limit]
    chosen = min(good, key=lambda format: found[format][0])
    notify(f"serving {id} in {chosen}")
    with contextlib.suppress(OSError):  # a folder we may not write to: then it is not remembered
        temporary = remembered.with_name(f".formats-{os.getpid()}")
        temporary.write_text(json.dumps(known | {key: chosen}, indent=1), "utf-8")
        os.replace(temporary, remembered)
    return chosen


def _milliseconds(params: Params, cfg: Config, repeats: int = 12) -> float:
    """The fastest of some decoding steps of the first four layers and the head, two rows."""
    few = replace(cfg, num_layers=min(cfg.num_layers, 4))
    params = params.replace(layers=params.layers[: few.num_layers])
    memory = cache.init(few, 1, jnp.bfloat16)
    past = sampling.history(1, cfg.vocab_size)
    rows = sampling.settings([Sampling(temperature=0.0)] * 2, [0] * 2, [0] * 2, [0] * 2)
    ids, tables = np.zeros(2, np.int32), np.ones((2, 1), np.int32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        drawn, memory, past = generate.decode(
            params, few, memory, past, ids, tables, np.zeros(2, np.int32), rows,
            num_ids=cfg.vocab_size,
        )  # fmt: skip
        drawn.ids.block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def _perplexity(params: Params, cfg: Config, ids: list[int]) -> float:
    from transformer.decoder import forward

    logits, _ = jax.jit(forward, static_argnums=1)(params, cfg, np.array([ids], np.int32))
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))


def _give_back_memory() -> None:
    """Returns what the compiler freed to the system: glibc would keep some 100 MB of it."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def _weights_file(path: Path) -> Path:
    return path / "config.json" if path.is_dir() else path


def _digest(path: Path, format: str) -> str:
    """Names a model as it computes here: file, format, libraries, machine."""
    files = sorted(path.iterdir()) if path.is_dir() else [path]
    identity = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    parts = [identity, format, jax.__version__, platform.machine(), _processor(), os.cpu_count()]
    return hashlib.sha256(repr(parts).encode()).hexdigest()


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def _keep_compiled_programs() -> None:
    """Lets JAX keep compiled programs beside the models, unless the user chose another place."""
    if jax.config.jax_compilation_cache_dir is None:
        folder = settings.data_folder() / "compiled"
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)
        jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)
