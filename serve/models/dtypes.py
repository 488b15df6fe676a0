"""Which number format a model is served in.

Which is fastest depends on the machine (one processor multiplies bytes, another converts them
first), which is good enough depends on the model, and which fits depends on what else is running.
So the first start measures those that fit (`dtype_probe.py`), remembers the answer beside the
models, and says what it chose and why. Of the catalogue's models it is known which formats are good
enough, so only speed is measured: seconds instead of a minute.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from serve import settings
from serve.models import json_cache, memory
from transformer.checkpoint import Format
from transformer.config import Config

F = TypeVar("F", bound=str)

FORMATS: tuple[Format, ...] = ("int8", "bfloat16", "float32")
# int8 needs a token table apart from the head, or keeps a third of the weights in bfloat16.
BYTES_PER_WEIGHT = {"int8": 1.3, "bfloat16": 2.0, "float32": 4.0}
# What loading, compiling and computing take beside the weights.
WORKING_MEMORY = 300 * 2**20
REMEMBERED = "formats.json"  # in the data folder
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


def named(dtype: str, known: Sequence[F]) -> F | None:
    """Return the one of `known` that a user named; None for "auto".

    Raises:
        ValueError: it is neither.
    """
    if dtype != "auto" and dtype not in known:
        raise ValueError(f"dtype must be auto or one of {', '.join(known)}: {dtype!r}")
    return next((format for format in known if format == dtype), None)


def weight_bytes(cfg: Config, format: Format) -> int:
    """About how much memory the weights take in a format."""
    return int(cfg.num_params * BYTES_PER_WEIGHT[format])


def that_fit(
    id: str,
    cfg: Config,
    extra: int,
    wanted: Sequence[Format] = FORMATS,
    limit: int | None = None,
) -> tuple[Format, ...]:
    """The formats whose weights fit into the memory that is free, with `extra` bytes beside them.

    Args:
        limit: bytes that weights and `extra` may take at most; None for what is free.

    Raises:
        MemoryError: none does.
    """
    free = memory.available()
    if limit is not None:
        free = min(free, limit + WORKING_MEMORY)
    extra += WORKING_MEMORY
    fitting = tuple(format for format in wanted if weight_bytes(cfg, format) + extra <= free)
    if not fitting:
        least = min(wanted, key=BYTES_PER_WEIGHT.__getitem__)
        raise MemoryError(
            f"{id} needs {_gigabytes(weight_bytes(cfg, least) + extra)} of memory in {least}, "
            f"{_gigabytes(extra)} of it beside the weights; {_gigabytes(free)} are free"
        )
    return fitting


def expected(
    cfg: Config, name: str, extra: int, good: Sequence[Format] = (), limit: int | None = None
) -> Format:
    """The format that `choose` will choose; before it has measured, the widest it may be.

    Args:
        cfg, name, extra, good, limit: as of `choose`.
    """
    within = [f for f in FORMATS if limit is None or weight_bytes(cfg, f) + extra <= limit]
    if not within:
        return FORMATS[0]  # which will be refused
    wanted = _wanted(within, good)
    known = (_remembered(name, wanted[:count]) for count in range(len(wanted), 1, -1))
    return next(filter(None, known), wanted[-1])


def choose(
    id: str,
    path: Path,
    cfg: Config,
    name: str,
    extra: int,
    notify: Callable[[str], None],
    good: Sequence[Format] = (),
    limit: int | None = None,
) -> Format:
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
    fitting = that_fit(id, cfg, extra, limit=limit)
    tried = _wanted(fitting, good)
    if (known := _remembered(name, tried)) in tried:
        return known

    for format in FORMATS[len(fitting) :]:
        notify(
            f"{id}: {format} would need {_gigabytes(weight_bytes(cfg, format) + extra)} of memory, "
            f"{_gigabytes(memory.available())} are free: not tried"
        )
    if len(tried) == 1:
        is_good = not good or tried[0] in good
        notify(
            f"serving {id} in {tried[0]}, the only format that fits"
            + ("" if is_good else ", though it answers worse in it")
        )
        return tried[0]
    notify(f"measuring which number format is fastest for {id} (once) ...")
    found: dict[Format, float] = {}  # milliseconds, of those that are good enough
    widest = 0.0  # the perplexity to compare with
    for line in _probe(path, tried[::-1], quality=not good):
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
    json_cache.add(settings.data_folder() / REMEMBERED, _key(name, tried), chosen)
    return chosen


def fastest(
    id: str,
    name: str,
    formats: Sequence[F],
    measure: Callable[[F], tuple[float, np.ndarray]],
    distance: Callable[[np.ndarray, np.ndarray], float],
    limit: float,
    notify: Callable[[str], None],
) -> F:
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
    known = _remembered(name, formats)
    if known in formats:
        return known
    notify(f"measuring which number format is fastest for {id} (once) ...")
    seconds: dict[F, float] = {}  # of each format that is near
    expected = None
    for format in formats:
        time, results = measure(format)
        expected = results if expected is None else expected
        difference = distance(expected, results)
        if expected is results and not math.isfinite(difference):
            raise ValueError(
                f"{id} computes values that are not finite in {format}: damaged weights?"
            )
        if difference <= limit:
            seconds[format] = time
        verdict = "" if format in seconds else " (too far off)"
        notify(f"  {format:8} {time * 1e3:8.1f} ms, distance {difference:.5f}{verdict}")
    chosen = min(seconds, key=seconds.__getitem__)
    notify(f"serving {id} in {chosen}")
    json_cache.add(settings.data_folder() / REMEMBERED, _key(name, formats), chosen)
    return chosen


def _wanted(fitting: Sequence[Format], good: Sequence[Format]) -> list[Format]:
    """Those that are good enough, or may be; if none is, the best there is."""
    return [format for format in fitting if not good or format in good] or [fitting[-1]]


def _remembered(name: str, tried: Sequence[str]) -> Any:
    return json_cache.read(settings.data_folder() / REMEMBERED).get(_key(name, tried))


def _key(name: str, tried: Sequence[str]) -> str:
    """What a choice is remembered under: with more memory, another might have come out."""
    return " ".join([name, *tried])


def _probe(path: Path, formats: Sequence[Format], *, quality: bool) -> Iterator[dict[str, Any]]:
    """What a process of its own measures, format by format; see `dtype_probe.py`."""
    command = [sys.executable, "-m", "serve.models.dtype_probe", str(path), *formats]
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
