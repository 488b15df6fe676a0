"""Measures number formats for one model, in a process of its own: `dtypes.py` decides.

    python -m serve.models.dtype_probe PATH FORMAT... [--quality]

A line of JSON for each format, as it is known: the milliseconds of a decoding step of four layers
and the head, with made-up weights of the model's sizes (how fast a product is does not depend on
the numbers in it), and with `--quality` the model's perplexity on a passage, which reads all of its
weights. The process takes its memory along when it ends; inside the server, what measuring had
touched stayed with it.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import bpe
from serve.models.decoder import keep_compiled_programs
from serve.models.dtypes import PASSAGE
from transformer import cache, checkpoint, generate, rotation, sampling
from transformer.bench import decoder_cases as cases
from transformer.checkpoint import Format
from transformer.config import Config
from transformer.decoder import Params, abstract, forward
from transformer.sampling import Sampling
from transformer.weights import Linear


def milliseconds(cfg: Config, format: Format, repeats: int = 12) -> float:
    """The fastest of some decoding steps of the first four layers and the head, two rows."""
    few = replace(cfg, num_layers=min(cfg.num_layers, 4))
    params = _made_up(few, format)
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


def _made_up(cfg: Config, format: Format) -> Params:
    """Weights of a model's sizes, one map after the other: never all of them in two formats."""

    def fill(place: tuple, part):
        name = getattr(place[-1], "name", "")
        part = jax.tree.map(lambda info: jnp.full(info.shape, 0.01, jnp.float32), part)
        return cases.as_format({name: part}, format, wide=rotation.wide_in_int8(cfg))[name]

    is_map = lambda node: isinstance(node, Linear)  # noqa: E731
    return jax.tree_util.tree_map_with_path(fill, abstract(cfg), is_leaf=is_map)


def perplexity(path: Path, format: Format) -> float:
    """How hard the passage is for a model to predict."""
    params, cfg, metadata = checkpoint.load(path, format=format)
    tokenizer = bpe.load(path) if path.is_dir() else bpe.from_gguf(metadata)
    ids = tokenizer.encoding.encode_ordinary(PASSAGE)[: cfg.max_seq_len]
    logits, _ = jax.jit(forward, static_argnums=1)(params, cfg, np.array([ids], np.int32))
    logprobs = jax.nn.log_softmax(logits[0, :-1])
    return float(jnp.exp(-jnp.mean(logprobs[jnp.arange(len(ids) - 1), jnp.array(ids[1:])])))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("path", type=Path)
    parser.add_argument("formats", nargs="+")
    parser.add_argument("--quality", action="store_true")
    options = parser.parse_args()
    logging.disable(logging.WARNING)  # the process that asked says the same of these files
    keep_compiled_programs()
    try:
        cfg = checkpoint.read_config(options.path)
        for format in options.formats:
            found = {"format": format, "milliseconds": milliseconds(cfg, format)}
            if options.quality:
                found["perplexity"] = perplexity(options.path, format)
            print(json.dumps(found), flush=True)
    except (OSError, ValueError) as error:
        print(json.dumps({"error": str(error)}), flush=True)


if __name__ == "__main__":
    main()
