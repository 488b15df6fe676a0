"""Which number format a model is served in.

Which is fastest depends on the machine (one processor multiplies bytes, another converts them
first), which is good enough depends on the model, and which fits depends on what else is running.
So the first start measures those that fit, remembers the answer beside the models, and says what it
chose and why. Of the catalogue's models it is known which formats are good enough, so only speed is
measured: seconds instead of a minute.

A decoder is measured in a process of its own, which takes its memory along when it ends; inside the
server, what measuring had touched stayed with it. That process prints a line of JSON a format:

    python -m serve.models.dtypes PATH FORMAT... [--quality]
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

import bpe
from serve import settings
from serve.models import json_cache, memory
from serve.models.catalogue import DTYPES
from serve.models.compilation_cache import enable_compilation_cache
from transformer import cache, checkpoint, generate, quarot, sampling
from transformer.bench import decoder_cases
from transformer.checkpoint import Dtype
from transformer.config import Config
from transformer.decoder import Params, abstract, forward
from transformer.sampling import SamplingParams
from transformer.weights import Linear

D = TypeVar("F", bound=str)
FloatDtype = Literal["float32", "bfloat16"]

# Of models that are quickly tried in this process; the first is the one to compare with.
FLOAT_DTYPES: tuple[FloatDtype, ...] = ("float32", "bfloat16")
# int8 needs a token table apart from the head, or keeps a third of the weights in bfloat16.
BYTES_PER_WEIGHT = {"int8": 1.3, "bfloat16": 2.0, "float32": 4.0}
# What loading, compiling and computing take beside the weights.
WORKING_MEMORY = 300 * 2**20
CHOICES_FILE = "formats.json"  # in the data folder
# A format serves if it makes the passage below at most this much harder to predict.
MAX_PERPLEXITY_RATIO = 1.03
PROBE_TEXT = (
    "The tokenizer cuts text into pieces that occur often, and each piece has a number. The model "
    "reads those numbers and says, for every number it knows, how likely it is to come next. "
    "One of them is drawn, put behind the others, and the whole is read again.\n\n"
    "def fibonacci(n: int) -> int:\n    a, b = 0, 1\n    for _ in range(n):\n"
    "        a, b = b, a + b\n    return a\n\n"
    "In 1969 two people walked on the Moon while a third stayed in orbit. They brought back "
    "21.5 kilograms of rock, and everybody on Earth with a television set had watched them."
)


def parse_dtype(dtype: str, choices: Sequence[D]) -> D | None:
    """Return the one of `known` that a user named; None for "auto".

    Raises:
        ValueError: it is neither.
    """
    if dtype != "auto" and dtype not in choices:
        raise ValueError(f"dtype must be auto or one of {', '.join(choices)}: {dtype!r}")
    return next((format for format in choices if format == dtype), None)


def weight_bytes(cfg: Config, dtype: Dtype) -> int:
    """About how much memory the weights take in a format."""
    return int(cfg.num_params * BYTES_PER_WEIGHT[dtype])


def fitting_dtypes(
    id: str,
    cfg: Config,
    extra_bytes: int,
    candidates: Sequence[Dtype] = DTYPES,
    memory_limit: int | None = None,
) -> tuple[Dtype, ...]:
    """The formats whose weights fit into the memory that is free, with `extra` bytes beside them.

    Args:
        limit: bytes that weights and `extra` may take at most; None for what is free.

    Raises:
        MemoryError: none does.
    """
    free = memory.available()
    if memory_limit is not None:
        free = min(free, memory_limit + WORKING_MEMORY)
    extra_bytes += WORKING_MEMORY
    fitting: tuple[Dtype, ...] = tuple(
        format for format in candidates if weight_bytes(cfg, format) + extra_bytes <= free
    )
    if not fitting:
        least = min(candidates, key=BYTES_PER_WEIGHT.__getitem__)
        raise MemoryError(
            f"{id} needs {_gigabytes(weight_bytes(cfg, least) + extra_bytes)} of memory in {least}, "
            f"{_gigabytes(extra_bytes)} of it beside the weights; {_gigabytes(free)} are free"
        )
    return fitting


def expected_dtype(
    cfg: Config,
    key: str,
    extra: int,
    accepted_dtypes: Sequence[Dtype] = (),
    memory_limit: int | None = None,
) -> Dtype:
    """The format that `choose` will choose; before it has measured, the widest it may be.

    Args:
        cfg, name, extra, good, limit: as of `choose`.
    """
    within: list[Dtype] = [
        f for f in DTYPES if memory_limit is None or weight_bytes(cfg, f) + extra <= memory_limit
    ]
    if not within:
        return DTYPES[0]  # which will be refused
    wanted = _candidates(within, accepted_dtypes)
    for count in range(len(wanted), 1, -1):
        if known := _cached_choice(key, wanted[:count]):
            return known
    return wanted[-1]


def choose_dtype(
    id: str,
    path: Path,
    cfg: Config,
    key: str,
    extra: int,
    notify: Callable[[str], None],
    accepted_dtypes: Sequence[Dtype] = (),
    memory_limit: int | None = None,
) -> Dtype:
    """The fastest format that predicts `PASSAGE` about as well as the widest that fits.

    Args:
        id: what to call the model.
        path: its files.
        cfg: its sizes.
        name: of these weights on this machine, for what is remembered.
        extra: bytes that will be needed beside the weights.
        notify: told one line for each thing that takes long.
        good: the formats that are known to predict well enough; none to find out.
        limit: bytes that weights and `extra` may take at most; None for what is free.

    Raises:
        MemoryError: it fits in no format.
        OSError: it could not be measured.
        ValueError: the weights are damaged.
    """
    fitting = fitting_dtypes(id, cfg, extra, memory_limit=memory_limit)
    tried = _candidates(fitting, accepted_dtypes)
    if (known := _cached_choice(key, tried)) in tried:
        return known

    for format in DTYPES[len(fitting) :]:
        notify(
            f"{id}: {format} would need {_gigabytes(weight_bytes(cfg, format) + extra)} of memory, "
            f"{_gigabytes(memory.available())} are free: not tried"
        )
    if len(tried) == 1:
        is_good = not accepted_dtypes or tried[0] in accepted_dtypes
        notify(
            f"serving {id} in {tried[0]}, the only format that fits"
            + ("" if is_good else ", though it answers worse in it")
        )
        return tried[0]
    notify(f"measuring which number format is fastest for {id} (once) ...")
    found: dict[Dtype, float] = {}  # milliseconds, of those that are good enough
    widest = 0.0  # the perplexity to compare with
    for line in _probe(path, tried[::-1], quality=not accepted_dtypes):
        format, ratio = line["format"], 1.0
        verdict = f"  {format:8} {line['milliseconds']:6.2f} ms for four layers and the head"
        if (perplexity := line.get("perplexity")) is not None:
            widest = widest or perplexity
            if not math.isfinite(widest):
                raise ValueError(f"{path}: the model predicts what is no number: damaged weights?")
            ratio = perplexity / widest
            verdict += f", perplexity x{ratio:.3f}"
        if ratio <= MAX_PERPLEXITY_RATIO:  # which NaN is not
            found[format] = line["milliseconds"]
        notify(verdict if format in found else verdict + " (too far off)")
    chosen = min(found, key=found.__getitem__)
    notify(f"serving {id} in {chosen}")
    json_cache.add(settings.data_folder() / CHOICES_FILE, _key(key, tried), chosen)
    return chosen


def fastest_dtype(
    id: str,
    name: str,
    dtypes: Sequence[D],
    measure: Callable[[D], tuple[float, np.ndarray]],
    distance: Callable[[np.ndarray, np.ndarray], float],
    max_distance: float,
    notify: Callable[[str], None],
) -> D:
    """Return the fastest format here whose results are near those of the first; remember it.

    Args:
        id: what to call the model.
        name: of these weights on this machine, under which the choice is remembered.
        formats: the first is the one to compare with.
        measure: the seconds that a format takes, and its results.
        distance: of other results from those of the first format.
        limit: the largest distance that is near.
        notify: told one line for each thing that takes long.

    Raises:
        ValueError: the first format itself computes values that are not finite.
    """
    known = _cached_choice(name, dtypes)
    if known in dtypes:
        return known
    notify(f"measuring which number format is fastest for {id} (once) ...")
    seconds: dict[D, float] = {}  # of each format that is near
    expected = None
    for format in dtypes:
        took, results = measure(format)
        expected = results if expected is None else expected
        difference = distance(expected, results)
        if expected is results and not math.isfinite(difference):
            raise ValueError(
                f"{id} computes values that are not finite in {format}: damaged weights?"
            )
        if difference <= max_distance:
            seconds[format] = took
        verdict = "" if format in seconds else " (too far off)"
        notify(f"  {format:8} {took * 1e3:8.1f} ms, distance {difference:.5f}{verdict}")
    chosen = min(seconds, key=seconds.__getitem__)
    notify(f"serving {id} in {chosen}")
    json_cache.add(settings.data_folder() / CHOICES_FILE, _key(name, dtypes), chosen)
    return chosen


def _candidates(fitting: Sequence[Dtype], good: Sequence[Dtype]) -> list[Dtype]:
    """Those that are good enough, or may be; if none is, the best there is."""
    return [format for format in fitting if not good or format in good] or [fitting[-1]]


def _cached_choice(name: str, tried: Sequence[str]) -> Any:
    return json_cache.read(settings.data_folder() / CHOICES_FILE).get(_key(name, tried))


def _key(name: str, tried: Sequence[str]) -> str:
    """What a choice is remembered under: with more memory, another might have come out."""
    return " ".join([name, *tried])


def _probe(path: Path, formats: Sequence[Dtype], *, quality: bool) -> Iterator[dict[str, Any]]:
    """What a process of its own measures, format by format; see `main`."""
    command = [sys.executable, "-m", "serve.models.dtypes", str(path), *formats]
    root = Path(__file__).parents[2]  # where `serve` is, installed or not
    paths = [str(root), *filter(None, [os.environ.get("PYTHONPATH")])]
    with subprocess.Popen(
        command + ["--quality"] * quality,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        text=True,
    ) as process:
        assert process.stdout is not None
        try:
            for line in process.stdout:
                found = json.loads(line)
                if "error" in found:
                    raise ValueError(found["error"])
                yield found
            if status := process.wait():
                raise OSError(
                    f"measuring number formats ended with status {status}: choose one with --dtype"
                )
        finally:
            process.kill()  # who asks no further wants no more


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


# --- measuring a decoder --------------------------------------------------------------------------


def time_step(cfg: Config, dtype: Dtype, repeats: int = 12) -> float:
    """The fastest of some decoding steps of the first four layers and the head, two rows."""
    few = replace(cfg, num_layers=min(cfg.num_layers, 4))
    params = _dummy_params(few, dtype)
    pool = cache.init(few, 1, jnp.bfloat16)
    past = sampling.init_penalty_state(1, cfg.vocab_size)
    rows = sampling.batch_sampling_params(
        [SamplingParams(temperature=0.0)] * 2, [0] * 2, [0] * 2, [0] * 2
    )
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


def _dummy_params(cfg: Config, format: Dtype) -> Params:
    """Weights of a model's sizes, one map after the other: never all of them in two formats.

    They are all alike: how fast a product is does not depend on the numbers.
    """

    def fill(place: tuple, part):
        name = getattr(place[-1], "name", "")
        part = jax.tree.map(lambda info: jnp.full(info.shape, 0.01, jnp.float32), part)
        return decoder_cases.as_dtype(
            {name: part}, format, skip_modules=quarot.int8_skip_modules(cfg)
        )[name]

    is_map = lambda node: isinstance(node, Linear)  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, abstract(cfg), is_leaf=is_map)


def perplexity(path: Path, dtype: Dtype) -> float:
    """How hard the passage is for a model to predict."""
    params, cfg, metadata = checkpoint.load(path, dtype=dtype)
    tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata)
    ids = tokenizer.encoding.encode_ordinary(PROBE_TEXT)[: cfg.max_seq_len]
    logits, _ = jax.jit(forward, static_argnums=1)(params, cfg, np.array([ids], np.int32))
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))


def main() -> None:
    """Print what a decoder's formats take: milliseconds of a step, with `--quality` perplexity."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the process that asked says the same of these files
    enable_compilation_cache()
    try:
        cfg = checkpoint.read_config(options.path)
        for format in options.formats:
            found = {"format": format, "milliseconds": time_step(cfg, format)}
            if options.quality:
                found["perplexity"] = perplexity(options.path, format)
            print(json.dumps(found), flush=True)
    except (OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
