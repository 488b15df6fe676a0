"""What this package has to measure: a window encoded, and a step of the decoder beside it.

`pellucid bench listen` runs these with the harness of `transformer/bench`. Sizes are those of
whisper-tiny.en; weights are random, so nothing need be downloaded. How it stands beside others,
from samples to text, is in `tests/bench/bench_speech.py`.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from audio import model
from audio.config import Config
from audio.model import Params
from transformer.bench import Case
from transformer.weights import Linear

DTYPES = ("float32", "bfloat16")
_TEXT_LEN = 64  # positions in the cache of a step


def cases(cfg: Config | None = None) -> Iterator[Case]:
    """A window of 30 seconds encoded, and a step of one row and of four, each its own sound."""
    cfg = Config.of_size("tiny.en") if cfg is None else cfg
    for format in DTYPES:
        yield _encode(cfg, format)
        for rows in (1, 4):
            yield _step(cfg, format, rows)


def _encode(cfg: Config, format: str) -> Case:
    def inputs() -> tuple:
        return _params(cfg, format), _normal(1, cfg.num_frames, cfg.num_mels)

    t, d, m = cfg.max_audio_len, cfg.d_model, cfg.num_mels
    layer = 8 * t * d * d + 4 * t * d * cfg.d_ff + 4 * t * t * d
    convolutions = 2 * 3 * cfg.num_frames * m * d + 2 * 3 * t * d * d
    return Case(
        name=f"listen encode {format}",
        function=lambda params, mel: model.encode(params, cfg, mel)[0],
        inputs=inputs,
        flops=cfg.num_audio_layers * layer + convolutions,
        bytes=_bytes(cfg, format, lambda params: params.encoder) + 4 * (cfg.num_frames * m + t * d),
        dtype=format,
    )


def _step(cfg: Config, format: str, rows: int) -> Case:
    def inputs() -> tuple:
        params = _params(cfg, format)
        sound = _normal(rows, cfg.max_audio_len, cfg.d_model)
        cache = jax.jit(functools.partial(model.init_cache, cfg=cfg, size=_TEXT_LEN))(
            params, audio_features=sound
        )
        return params, jnp.full((rows, 1), 100, jnp.int32), cache

    def function(params, ids, cache):
        at = jnp.zeros(1, jnp.int32)
        logits, cache, _ = model.forward_cached(
            params, cfg, ids, cache, jnp.int32(_TEXT_LEN // 2), at
        )
        return logits, cache

    d, positions = cfg.d_model, cfg.max_audio_len
    layer = 2 * (6 * d * d + 2 * d * cfg.d_ff) + 4 * d * (positions + _TEXT_LEN)
    width = jnp.dtype(format).itemsize
    sound = 2 * cfg.num_text_layers * rows * positions * d * width
    return Case(
        name=f"listen step {rows}x1 {format}",
        function=function,
        inputs=inputs,
        flops=rows * (cfg.num_text_layers * layer + 2 * cfg.vocab_size * d),
        bytes=_bytes(cfg, format, lambda params: params.decoder) + sound,
        dtype=format,
        cold_argnums=(0,),
        donate_argnums=(2,),
        next_inputs=lambda arguments, out: (*arguments[:2], out[1]),
    )


def _params(cfg: Config, format: str) -> Params:
    """Random weights; the format of `Linear`s is as `checkpoint.load` has it."""

    def narrow(part):
        if isinstance(part, Linear):
            return part.replace(weight=part.weight.astype(format))
        return part

    params = model.init(jax.random.key(0), cfg)
    return jax.tree.map(narrow, params, is_leaf=lambda part: isinstance(part, Linear))


def _bytes(cfg: Config, format: str, part) -> int:
    leaves = jax.tree.leaves(part(jax.eval_shape(lambda: _params(cfg, format))))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
