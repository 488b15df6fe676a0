"""Bench cases of speech to text: encoding one window, and one decoding step.

`pellucid bench listen` runs these with the harness of `transformer/bench`. The sizes are those of
whisper-tiny.en and the weights are random, so nothing is downloaded. `tests/bench/bench_speech.py`
compares end-to-end transcription with faster-whisper.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from audio import model
from audio.config import Config
from audio.model import Params
from transformer.bench import Case
from transformer.weights import Linear

DTYPES = ("float32", "bfloat16")
_TEXT_LEN = 64  # text positions in the KV cache of a decoding step


def cases(cfg: Config | None = None) -> Iterator[Case]:
    """Yield the bench cases of each dtype.

    They are encoding one window, a decoding step with one row, and a decoding step with four rows.

    Args:
        cfg: the sizes of the model; None for whisper-tiny.en.
    """
    cfg = Config.of_size("tiny.en") if cfg is None else cfg
    for dtype in DTYPES:
        yield _encode(cfg, dtype)
        for rows in (1, 4):
            yield _step(cfg, dtype, rows)


def _encode(cfg: Config, dtype: str) -> Case:
    def inputs() -> tuple:
        return _params(cfg, dtype), _normal(1, cfg.num_frames, cfg.num_mels)

    t, d, m = cfg.max_audio_len, cfg.d_model, cfg.num_mels
    layer = 8 * t * d * d + 4 * t * d * cfg.d_ff + 4 * t * t * d
    convolutions = 2 * 3 * cfg.num_frames * m * d + 2 * 3 * t * d * d
    return Case(
        name=f"listen encode {dtype}",
        function=lambda params, mel: model.encode(params, cfg, mel)[0],
        inputs=inputs,
        flops=cfg.num_audio_layers * layer + convolutions,
        bytes=_bytes(cfg, dtype, lambda params: params.encoder) + 4 * (cfg.num_frames * m + t * d),
        dtype=dtype,
    )


def _step(cfg: Config, dtype: str, rows: int) -> Case:
    def inputs() -> tuple:
        params = _params(cfg, dtype)
        audio_features = _normal(rows, cfg.max_audio_len, cfg.d_model)
        cache = jax.jit(functools.partial(model.init_cache, cfg=cfg, size=_TEXT_LEN))(
            params, audio_features=audio_features
        )
        return params, jnp.full((rows, 1), 100, jnp.int32), cache

    def function(params, ids, cache):
        positions = jnp.zeros(1, jnp.int32)
        logits, cache, _ = model.forward_cached(
            params, cfg, ids, cache, jnp.int32(_TEXT_LEN // 2), positions
        )
        return logits, cache

    d, audio_len = cfg.d_model, cfg.max_audio_len
    layer = 2 * (6 * d * d + 2 * d * cfg.d_ff) + 4 * d * (audio_len + _TEXT_LEN)
    width = jnp.dtype(dtype).itemsize
    cross_bytes = 2 * cfg.num_text_layers * rows * audio_len * d * width
    return Case(
        name=f"listen step {rows}x1 {dtype}",
        function=function,
        inputs=inputs,
        flops=rows * (cfg.num_text_layers * layer + 2 * cfg.vocab_size * d),
        bytes=_bytes(cfg, dtype, lambda params: params.decoder) + cross_bytes,
        dtype=dtype,
        cold_argnums=(0,),
        donate_argnums=(2,),
        next_inputs=lambda arguments, out: (*arguments[:2], out[1]),
    )


def _params(cfg: Config, dtype: str) -> Params:
    """Return random weights with the dtypes that `checkpoint.load` gives them."""

    def cast(leaf):
        if isinstance(leaf, Linear):
            return replace(leaf, weight=leaf.weight.astype(dtype))
        return leaf

    params = model.init(jax.random.key(0), cfg)
    return jax.tree.map(cast, params, is_leaf=lambda leaf: isinstance(leaf, Linear))


def _bytes(cfg: Config, dtype: str, select: Callable[[Params], Any]) -> int:
    leaves = jax.tree.leaves(select(jax.eval_shape(lambda: _params(cfg, dtype))))
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _normal(*shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(0).normal(size=shape).astype(np.float32))
