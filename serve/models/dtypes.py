"""Choose the dtype of a model's weights.

Which dtype is fastest depends on the machine (some CPUs multiply int8, others convert it to float
first), which is accurate depends on the model, and which fits depends on the available memory. So
the first start measures the dtypes that fit, caches the result in the data folder, and reports the
choice. The catalogue lists the accurate dtypes of its models, so that only speed is measured, in
seconds instead of a minute.

A decoder is measured in a separate process, whose memory is freed when it ends. (In the server's
process, memory touched by the measurement was not returned.) The process prints one line of JSON
per dtype:

    python -m serve.models.dtypes PATH DTYPE... [--quality]
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

D = TypeVar("D", bound=str)
FloatDtype = Literal["float32", "bfloat16"]

# "auto" is one of these. In int4 the inputs of a product are rounded to 8 bits in blocks of 32: the
# perplexity passes, but SmolLM2 answers "What is the capital of France?" in French.
AUTO_DTYPES: tuple[Dtype, ...] = DTYPES[1:]
# For models that are measured in the server's process; the first is the reference.
FLOAT_DTYPES: tuple[FloatDtype, ...] = ("float32", "bfloat16")
# int8 takes more than 1: tied embeddings are stored twice, or a third of the weights stays in
# bfloat16. int4 takes 0.63 in blocks of 4 bits and 1.07 in blocks of 8 bits.
BYTES_PER_WEIGHT = {"int4": 0.8, "int8": 1.3, "bfloat16": 2.0, "float32": 4.0}
# Bytes for loading, compiling and computing, in addition to the weights.
WORKING_MEMORY = 300 * 2**20
CHOICES_FILE = "formats.json"  # in the data folder
# A dtype is accepted if it multiplies the perplexity of PROBE_TEXT by at most this factor.
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
    """Return the element of `choices` equal to `dtype`; None for "auto".

    Raises:
        ValueError: `dtype` is neither in `choices` nor "auto".
    """
    if dtype != "auto" and dtype not in choices:
        raise ValueError(f"dtype must be auto or one of {', '.join(choices)}: got {dtype!r}")
    return next((choice for choice in choices if choice == dtype), None)


def weight_bytes(cfg: Config, dtype: Dtype) -> int:
    """Return the approximate bytes of a model's weights in a dtype."""
    return int(cfg.num_params * BYTES_PER_WEIGHT[dtype])


def fitting_dtypes(
    id: str,
    cfg: Config,
    extra_bytes: int,
    candidates: Sequence[Dtype] = AUTO_DTYPES,
    memory_limit: int | None = None,
) -> tuple[Dtype, ...]:
    """Return the dtypes in which a model fits into the available memory.

    Args:
        id: the id of the model, for the error message.
        cfg: its configuration.
        extra_bytes: bytes needed in addition to the weights.
        candidates: the dtypes to consider.
        memory_limit: the maximum bytes of weights and `extra_bytes`; None for the available memory.

    Raises:
        MemoryError: the model fits in none of them.
    """
    free = memory.available()
    if memory_limit is not None:
        free = min(free, memory_limit + WORKING_MEMORY)
    extra_bytes += WORKING_MEMORY
    fitting: tuple[Dtype, ...] = tuple(
        dtype for dtype in candidates if weight_bytes(cfg, dtype) + extra_bytes <= free
    )
    if not fitting:
        narrowest = min(candidates, key=BYTES_PER_WEIGHT.__getitem__)
        needed = _gigabytes(weight_bytes(cfg, narrowest) + extra_bytes)
        raise MemoryError(
            f"{id} needs {needed} of memory in {narrowest}, {_gigabytes(extra_bytes)} of it in "
            f"addition to the weights; {_gigabytes(free)} are available: free memory, or choose a "
            "smaller model"
        )
    return fitting


def expected_dtype(
    cfg: Config,
    key: str,
    extra: int,
    accepted_dtypes: Sequence[Dtype] = (),
    memory_limit: int | None = None,
) -> Dtype:
    """Return the cached choice of `choose_dtype`; without one, the widest dtype within the limit.

    Args:
        cfg: the configuration of the model.
        key: the cache key of the choice.
        extra: bytes needed in addition to the weights.
        accepted_dtypes: the dtypes known to be accurate; empty if the accuracy is unknown.
        memory_limit: the maximum bytes of weights and `extra`; None for no limit.
    """
    within: list[Dtype] = [
        d
        for d in AUTO_DTYPES
        if memory_limit is None or weight_bytes(cfg, d) + extra <= memory_limit
    ]
    if not within:
        return AUTO_DTYPES[0]  # loading will raise MemoryError
    candidates = _candidates(within, accepted_dtypes)
    for count in range(len(candidates), 1, -1):  # fewer may have fitted into memory back then
        if cached := _cached_choice(key, candidates[:count]):
            return cached
    return candidates[-1]


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
    """Return the fastest accurate dtype of a decoder on this machine, and cache the choice.

    A dtype is accurate if its perplexity on `PROBE_TEXT` is at most `MAX_PERPLEXITY_RATIO` times
    that of the widest dtype that fits.

    Args:
        id: the id of the model, for messages.
        path: its files.
        cfg: its configuration.
        key: the cache key, which stands for these weights on this machine.
        extra: bytes needed in addition to the weights.
        notify: called with a message for each slow operation.
        accepted_dtypes: the dtypes known to be accurate; empty to measure the accuracy.
        memory_limit: the maximum bytes of weights and `extra`; None for the available memory.

    Raises:
        MemoryError: the model fits in no dtype.
        OSError: the measurement failed.
        ValueError: the weights are damaged.
    """
    fitting = fitting_dtypes(id, cfg, extra, memory_limit=memory_limit)
    candidates = _candidates(fitting, accepted_dtypes)
    if (cached := _cached_choice(key, candidates)) in candidates:
        return cached

    for dtype in AUTO_DTYPES[len(fitting) :]:
        notify(
            f"{id}: {dtype} needs {_gigabytes(weight_bytes(cfg, dtype) + extra)} of memory, "
            f"{_gigabytes(memory.available())} are available: not measured"
        )
    if len(candidates) == 1:
        is_accepted = not accepted_dtypes or candidates[0] in accepted_dtypes
        accurate = "accurate " if len(fitting) > 1 else ""
        notify(
            f"serving {id} in {candidates[0]}, the only {accurate}dtype that fits"
            + ("" if is_accepted else ", with less accurate results")
        )
        return candidates[0]
    notify(f"measuring which dtype is fastest for {id} (once) ...")
    milliseconds: dict[Dtype, float] = {}  # of each accurate dtype
    reference = 0.0  # perplexity of the widest dtype
    for line in _probe(path, candidates[::-1], quality=not accepted_dtypes):
        dtype, ratio = line["format"], 1.0
        report = f"  {dtype:8} {line['milliseconds']:6.2f} ms for four layers and the head"
        if (perplexity := line.get("perplexity")) is not None:
            reference = reference or perplexity
            if not math.isfinite(reference):
                raise ValueError(
                    f"{path}: the perplexity is {reference}: check the weights for damage"
                )
            ratio = perplexity / reference
            report += f", perplexity x{ratio:.3f}"
        if ratio <= MAX_PERPLEXITY_RATIO:  # false for NaN
            milliseconds[dtype] = line["milliseconds"]
        notify(report if dtype in milliseconds else report + " (rejected: inaccurate)")
    chosen = min(milliseconds, key=milliseconds.__getitem__)
    notify(f"serving {id} in {chosen}")
    json_cache.add(settings.data_folder() / CHOICES_FILE, _key(key, candidates), chosen)
    return chosen


def best_time(compute: Callable[[], np.ndarray]) -> tuple[float, np.ndarray]:
    """Return the seconds of the fastest of four calls, and the result of the last call.

    The first call also compiles.
    """
    seconds, results = math.inf, np.zeros(0)
    for _ in range(4):
        started = time.perf_counter()
        results = compute()
        seconds = min(seconds, time.perf_counter() - started)
    return seconds, results


def fastest_dtype(
    id: str,
    name: str,
    dtypes: Sequence[D],
    measure: Callable[[D], tuple[float, np.ndarray]],
    distance: Callable[[np.ndarray, np.ndarray], float],
    max_distance: float,
    notify: Callable[[str], None],
) -> D:
    """Return the fastest dtype whose results are close to the first dtype's; cache the choice.

    Args:
        id: the id of the model, for messages.
        name: the cache key, which stands for these weights on this machine.
        dtypes: the dtypes to measure; the first is the reference.
        measure: returns the seconds that a dtype takes, and its results.
        distance: returns the distance between the reference results and other results.
        max_distance: the maximum distance of an accepted dtype.
        notify: called with a message for each slow operation.

    Raises:
        ValueError: the results of the reference are not finite.
    """
    cached = _cached_choice(name, dtypes)
    if cached in dtypes:
        return cached
    notify(f"measuring which dtype is fastest for {id} (once) ...")
    seconds: dict[D, float] = {}  # of each accepted dtype
    reference = None
    for dtype in dtypes:
        duration, results = measure(dtype)
        reference = results if reference is None else reference
        difference = distance(reference, results)
        if reference is results and not math.isfinite(difference):
            raise ValueError(
                f"{id} computes values that are not finite in {dtype}: check the weights for damage"
            )
        if difference <= max_distance:
            seconds[dtype] = duration
        rejected = "" if dtype in seconds else " (rejected: inaccurate)"
        notify(f"  {dtype:8} {duration * 1e3:8.1f} ms, distance {difference:.5f}{rejected}")
    chosen = min(seconds, key=seconds.__getitem__)
    notify(f"serving {id} in {chosen}")
    json_cache.add(settings.data_folder() / CHOICES_FILE, _key(name, dtypes), chosen)
    return chosen


def _candidates(fitting: Sequence[Dtype], accepted: Sequence[Dtype]) -> list[Dtype]:
    """Return the fitting dtypes that are accepted, or else the widest fitting one.

    All fitting dtypes are accepted if `accepted` is empty.
    """
    return [dtype for dtype in fitting if not accepted or dtype in accepted] or [fitting[-1]]


def _cached_choice(name: str, dtypes: Sequence[str]) -> Any:
    return json_cache.read(settings.data_folder() / CHOICES_FILE).get(_key(name, dtypes))


def _key(name: str, dtypes: Sequence[str]) -> str:
    """Return the cache key of a choice among these dtypes.

    The dtypes are a part of the key, because more of them fit when more memory is free.
    """
    return " ".join([name, *dtypes])


def _probe(path: Path, dtypes: Sequence[Dtype], *, quality: bool) -> Iterator[dict[str, Any]]:
    """Yield the measurements of each dtype from a separate process; see `main`."""
    command = [sys.executable, "-m", "serve.models.dtypes", str(path), *dtypes]
    root = Path(__file__).parents[2]  # the folder of the package `serve`, installed or not
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
                measurement = json.loads(line)
                if "error" in measurement:
                    raise ValueError(measurement["error"])
                yield measurement
            if status := process.wait():
                raise OSError(
                    f"the process that measures dtypes exited with status {status}: choose a dtype "
                    f"with --dtype"
                )
        finally:
            process.kill()


def _gigabytes(size: int) -> str:
    return f"{size / 2**30:.1f} GB"


# --- measuring a decoder --------------------------------------------------------------------------


def time_step(cfg: Config, dtype: Dtype, repeats: int = 12) -> float:
    """Return the milliseconds of a decoding step of two sequences in a model cut to four layers.

    Args:
        cfg: the configuration of the whole model.
        dtype: the dtype of the weights.
        repeats: the number of steps to time; the shortest time is returned.
    """
    few = replace(cfg, num_layers=min(cfg.num_layers, 4))
    params = _dummy_params(few, dtype)
    kv_cache = cache.init(few, 1, jnp.bfloat16)
    penalty_state = sampling.init_penalty_state(1, cfg.vocab_size)
    metadata = sampling.batch_sampling_params(
        [SamplingParams(temperature=0.0)] * 2, [0] * 2, [0] * 2, [0] * 2
    )
    ids, tables = np.zeros(2, np.int32), np.ones((2, 1), np.int32)
    best = math.inf
    for _ in range(repeats):
        started = time.perf_counter()
        output, kv_cache, penalty_state = generate.decode(
            params, few, kv_cache, penalty_state, ids, tables, np.zeros(2, np.int32), metadata,
            num_ids=cfg.vocab_size,
        )  # fmt: skip
        output.ids.block_until_ready()
        best = min(best, time.perf_counter() - started)
    return best * 1e3


def _dummy_params(cfg: Config, dtype: Dtype) -> Params:
    """Return constant weights with the shapes of a model.

    The speed of a matmul does not depend on the values. The linear layers are converted one by one,
    so that memory never holds all weights in two dtypes.
    """

    def fill(path: tuple, layer):
        name = getattr(path[-1], "name", "")
        layer = jax.tree.map(lambda info: jnp.full(info.shape, 0.01, jnp.float32), layer)
        return decoder_cases.as_dtype(
            {name: layer}, dtype, skip_modules=quarot.int8_skip_modules(cfg)
        )[name]

    is_linear = lambda node: isinstance(node, Linear)  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, abstract(cfg), is_leaf=is_linear)


def perplexity(path: Path, dtype: Dtype) -> float:
    """Return the perplexity of `PROBE_TEXT` under a model.

    Args:
        path: the files of the model.
        dtype: the dtype of the weights.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged.
    """
    params, cfg, metadata = checkpoint.load(path, dtype=dtype)
    tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata)
    ids = tokenizer.encoding.encode_ordinary(PROBE_TEXT)[: cfg.max_seq_len]
    logits, _ = jax.jit(forward, static_argnums=1)(params, cfg, np.array([ids], np.int32))
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))


def main() -> None:
    """Print the time of a decoding step per dtype; with `--quality`, also the perplexity."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("path", type=Path)
    parser.add_argument("dtypes", nargs="+")
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the parent process logs the same warnings
    enable_compilation_cache()
    try:
        cfg = checkpoint.read_config(options.path)
        for dtype in options.dtypes:
            measurement = {"format": dtype, "milliseconds": time_step(cfg, dtype)}
            if options.quality:
                measurement["perplexity"] = perplexity(options.path, dtype)
            print(json.dumps(measurement), flush=True)
    except (OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
