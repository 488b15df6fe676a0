"""Whisper: an encoder of log-mel spectrograms and a decoder of text with cross-attention.

Radford et al. 2022, "Robust Speech Recognition via Large-Scale Weak Supervision",
arXiv:2212.04356; both halves are pre-norm transformers (Vaswani et al. 2017). The encoder's two
convolutions are linear maps of three neighbouring frames; the second has stride two, so the 3000
frames of 30 seconds become 1500 positions.

The decoder attends to its earlier tokens, through a `Cache` that grows with the text, and to the
encoder's output (`audio_features`), whose keys and values are computed once per window. Several
rows can share the keys and values of one window (the beams of a beam search).

A matrix product is computed in the dtype of its weight, as in `transformer.layers`. The encoder's
self-attention and the cross-attention are computed in the dtype of the weight of `q` (bfloat16 if
that is int8). All other intermediates are float32.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from audio.config import Config
from transformer.decoder import ArrayInfo
from transformer.layers import embed, linear, norm
from transformer.weights import Linear, Norm

EPS = 1e-5
_MAX_DECODE_QUERIES = 8  # up to this many queries use `_cross_attend_decode`


@struct.dataclass
class Attention:
    """Weights of one attention sublayer with its pre-norm."""

    norm: Norm
    q: Linear  # [D, D], as are k, v and out
    k: Linear  # no bias: the softmax would cancel it
    v: Linear
    out: Linear


@struct.dataclass
class Mlp:
    """Weights of one MLP sublayer with its pre-norm."""

    norm: Norm
    up: Linear  # [F, D]
    down: Linear  # [D, F]


@struct.dataclass
class AudioLayer:
    """Weights of one block of the encoder."""

    attn: Attention
    mlp: Mlp


@struct.dataclass
class TextLayer:
    """Weights of one block of the decoder: self-attention, cross-attention, MLP."""

    attn: Attention
    cross_attn: Attention
    mlp: Mlp


@struct.dataclass
class Encoder:
    """Weights of the encoder: spectrogram to audio features."""

    conv1: Linear  # [D, 3 M]
    conv2: Linear  # [D, 3 D]
    positions: jax.Array  # [max_audio_len, D] float32
    layers: tuple[AudioLayer, ...]
    norm: Norm


@struct.dataclass
class Decoder:
    """Weights of the decoder: token ids and audio features to logits."""

    embed: Linear  # [V, D], one row per token; also the output projection
    positions: jax.Array  # [max_text_len, D] float32
    layers: tuple[TextLayer, ...]
    norm: Norm


@struct.dataclass
class Params:
    """Weights of the whole model."""

    encoder: Encoder
    decoder: Decoder


@struct.dataclass
class Cache:
    """KV cache of the decoder; each tuple has one array per layer.

    B rows share the audio features of A windows, B / A adjacent rows each.
    """

    keys: tuple[jax.Array, ...]  # [B, N, S, H] float32, of self-attention
    values: tuple[jax.Array, ...]
    cross_keys: tuple[jax.Array, ...]  # [A, max_audio_len, D], of cross-attention
    cross_values: tuple[jax.Array, ...]  # [A, D, max_audio_len]

    @property
    def size(self) -> int:
        """S, the number of text positions that the cache has room for."""
        return self.keys[0].shape[2]


def abstract(cfg: Config) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    normal = jax.nn.initializers.normal(0.02)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    d = cfg.d_model

    def linear_info(out_dim: int, in_dim: int, axes: tuple[str, str], bias: bool = True) -> Linear:
        return Linear(
            weight=_info((out_dim, in_dim), axes, normal),
            bias=_info((out_dim,), axes[:1], zeros) if bias else None,
        )

    norm_info = Norm(scale=_info((d,), ("model",), ones), bias=_info((d,), ("model",), zeros))
    attention = Attention(
        norm=norm_info,
        q=linear_info(d, d, ("heads", "model")),
        k=linear_info(d, d, ("heads", "model"), bias=False),
        v=linear_info(d, d, ("heads", "model")),
        out=linear_info(d, d, ("model", "heads")),
    )
    mlp = Mlp(
        norm=norm_info,
        up=linear_info(cfg.d_ff, d, ("ff", "model")),
        down=linear_info(d, cfg.d_ff, ("model", "ff")),
    )
    return Params(
        encoder=Encoder(
            conv1=linear_info(d, 3 * cfg.num_mels, ("model", "mels")),
            conv2=linear_info(d, 3 * d, ("model", "model")),
            positions=_info((cfg.max_audio_len, d), ("sound", "model"), _sinusoids),
            layers=(AudioLayer(attn=attention, mlp=mlp),) * cfg.num_audio_layers,
            norm=norm_info,
        ),
        decoder=Decoder(
            embed=Linear(weight=_info((cfg.vocab_size, d), ("vocab", "model"), normal)),
            positions=_info((cfg.max_text_len, d), ("text", "model"), normal),
            layers=(TextLayer(attn=attention, cross_attn=attention, mlp=mlp),)
            * cfg.num_text_layers,
            norm=norm_info,
        ),
    )


def _info(shape: tuple[int, ...], axes: tuple[str, ...], initializer: Any) -> Any:
    """Return an `ArrayInfo`, typed as `Any` so that it can be the value of an array field."""
    return ArrayInfo(shape, axes, initializer)


def _sinusoids(key: jax.Array, shape: tuple[int, int], dtype=jnp.float32) -> jax.Array:
    """Return position embeddings [T, D]: sines, then cosines, of wavelengths 2 pi to 20,000 pi.

    `key` is not used; the parameter is there because initializers have it.
    """
    length, width = shape
    rates = jnp.exp(-math.log(10_000) / (width // 2 - 1) * jnp.arange(width // 2))
    angles = jnp.arange(length)[:, None] * rates
    return jnp.concatenate([jnp.sin(angles), jnp.cos(angles)], axis=1).astype(dtype)


def init(key: jax.Array, cfg: Config) -> Params:
    """Return randomly initialized float32 weights."""
    infos, tree = jax.tree.flatten(abstract(cfg))
    keys = jax.random.split(key, len(infos))
    return jax.tree.unflatten(
        tree,
        [
            info.initializer(key, info.shape, jnp.float32)
            for key, info in zip(keys, infos, strict=True)
        ],
    )


# Encoder


@partial(jax.jit, static_argnames=("cfg", "taps"))
def encode(
    params: Params, cfg: Config, mel: jax.Array, *, taps: tuple[str, ...] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Encode windows of a spectrogram, one per row.

    Args:
        params: weights of the model.
        cfg: sizes of the model.
        mel: float32 [B, num_frames, M], from `mel.log_mel`, padded with zeros.
        taps: names of intermediates to return: "residual" (the residual stream entering each block
            and leaving the last, [L + 1, B, T, D]) and "attention" (weights, [L, B, N, T, T]).

    Returns:
        Audio features, float32 [B, max_audio_len, D], and a dictionary of the requested taps.

    Raises:
        ValueError: `mel` has another shape, or a tap is unknown.
    """
    _check_taps(taps, ("residual", "attention"))
    if mel.shape[1:] != (cfg.num_frames, cfg.num_mels):
        raise ValueError(
            f"mel must have shape [B, {cfg.num_frames}, {cfg.num_mels}], got {mel.shape}"
        )
    p = params.encoder
    with jax.named_scope("convolve"):
        x = _gelu(linear(_conv_patches(mel), p.conv1))  # [B, frames, D]
        x = _gelu(linear(_conv_patches(x)[:, ::2], p.conv2))  # [B, T, D]
        x = x + p.positions
    residual, weights = [x], []
    for layer in p.layers:
        x, w = _audio_block(x, layer, cfg, "attention" in taps)
        residual.append(x)
        weights.append(w)
    tapped = {}
    if "residual" in taps:
        tapped["residual"] = jnp.stack(residual)
    if "attention" in taps:
        tapped["attention"] = jnp.stack(weights)
    return norm(x, p.norm, EPS), tapped


@partial(jax.jit, static_argnames=("cfg", "with_weights"))  # so that equal layers are traced once
def _audio_block(
    x: jax.Array, layer: AudioLayer, cfg: Config, with_weights: bool
) -> tuple[jax.Array, jax.Array | None]:
    with jax.named_scope("attention"):
        y, weights = norm(x, layer.attn.norm, EPS), None
        dtype = _attention_dtype(layer.attn.q)
        q, k, v = (
            _split_heads(linear(y, w), cfg).astype(dtype)
            for w in (layer.attn.q, layer.attn.k, layer.attn.v)
        )
        if with_weights:
            y, weights = _softmax_weighted_sum(_scores(q, k), v)  # [B, N, T, H], [B, N, T, T]
        else:
            y = _attend(q, k, v)
        x = x + linear(_merge_heads(y), layer.attn.out)
    with jax.named_scope("mlp"):
        return _mlp(x, layer.mlp), weights


def _attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """Return the encoder's self-attention, without a mask; q, k, v and result are [B, N, T, H]."""
    if jax.default_backend() != "cpu":
        return _softmax_weighted_sum(_scores(q, k), v)[0]
    # Half of a head's queries at a time, so that their 4.5 MB of scores stay in the CPU's cache
    # through the softmax. Measured: one head at a time is 2.2 times as fast as all heads at once,
    # and half a head is 1.4 times as fast as one.
    b, n, t, h = q.shape
    num_chunks = 2 if t % 2 == 0 else 1
    queries = q.reshape(b * n * num_chunks, 1, 1, t // num_chunks, h)
    keys, values = (x.reshape(b * n, 1, 1, t, h) for x in (k, v))

    def attend(item: tuple[jax.Array, jax.Array]) -> jax.Array:
        query, head = item
        return _softmax_weighted_sum(_scores(query, keys[head]), values[head])[0]

    return jax.lax.map(attend, (queries, jnp.arange(b * n * num_chunks) // num_chunks)).reshape(
        q.shape
    )


def _conv_patches(x: jax.Array) -> jax.Array:
    """Concatenate each frame with its two neighbours: [B, T, D] -> [B, T, 3 D]."""
    x = jnp.pad(x, ((0, 0), (1, 1), (0, 0)))
    return jnp.concatenate([x[:, :-2], x[:, 1:-1], x[:, 2:]], axis=-1)


# Decoder


@partial(jax.jit, static_argnames=("cfg", "size", "rows_per_audio"))
def init_cache(
    params: Params, cfg: Config, audio_features: jax.Array, *, size: int, rows_per_audio: int = 1
) -> Cache:
    """Return a cache with the cross-attention keys and values of the windows and no text yet.

    Args:
        params: weights of the model.
        cfg: sizes of the model.
        audio_features: float32 [A, max_audio_len, D], from `encode`.
        size: S, the number of text positions to allocate.
        rows_per_audio: rows of text per window; B = A * rows_per_audio.
    """
    cross_keys, cross_values = [], []
    for layer in params.decoder.layers:
        dtype = _attention_dtype(layer.cross_attn.q)
        cross_keys.append(linear(audio_features, layer.cross_attn.k).astype(dtype))
        cross_values.append(linear(audio_features, layer.cross_attn.v).astype(dtype).swapaxes(1, 2))
    shape = (len(audio_features) * rows_per_audio, cfg.num_heads, size, cfg.head_dim)
    empty = tuple(jnp.zeros(shape, jnp.float32) for _ in cross_keys)
    return Cache(
        keys=empty,
        values=tuple(jnp.zeros_like(x) for x in empty),
        cross_keys=tuple(cross_keys),
        cross_values=tuple(cross_values),
    )


def grow_cache(cache: Cache, size: int) -> Cache:
    """Return the cache enlarged to `size` text positions, which must not be fewer than before."""
    pad = ((0, 0), (0, 0), (0, size - cache.size), (0, 0))
    keys, values = jax.tree.map(lambda x: jnp.pad(x, pad), (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


def reorder_cache(cache: Cache, rows: jax.Array) -> Cache:
    """Return a cache whose row i is row `rows[i]` of `cache`.

    Args:
        cache: the cache of B rows.
        rows: int32 [B]; row `rows[i]` must belong to the same window as row i.
    """
    keys, values = jax.tree.map(lambda x: x[rows], (cache.keys, cache.values))
    return replace(cache, keys=keys, values=values)


def forward_cached(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    cache: Cache,
    length: jax.Array,
    at: jax.Array,
    *,
    taps: Collection[str] = (),
) -> tuple[jax.Array, Cache, dict[str, jax.Array]]:
    """Run the decoder on new tokens; return logits of the tokens after them, and the cache.

    Args:
        params: weights of the model.
        cfg: sizes of the model.
        ids: int32 [B, T], tokens for the positions from `length` on. They can end in padding, which
            earlier tokens do not attend to and later calls overwrite.
        cache: keys and values of the first `length` tokens; continue with the returned cache.
        length: int32 [], the number of tokens in the cache.
        at: int32 [P], the indices among the T tokens after which to return logits.
        taps: "alignment" returns the cross-attention scores of the alignment heads before the
            softmax, [B, heads, T, max_audio_len].

    Returns:
        Logits float32 [B, P, V], the updated cache, and a dictionary of the requested taps.

    Raises:
        ValueError: a tap is unknown.
    """
    _check_taps(taps, ("alignment",))
    p, num_new = params.decoder, ids.shape[1]
    with jax.named_scope("embed"):
        position_ids = length + jnp.arange(num_new)  # [T]
        x = embed(p.embed, ids) + p.positions[position_ids]  # [B, T, D]
    causal_mask = jnp.arange(cache.size) <= position_ids[:, None]  # [T, S]
    keys, values, head_scores = list(cache.keys), list(cache.values), {}
    for i, layer in enumerate(p.layers):
        with jax.named_scope("attention"):
            y = norm(x, layer.attn.norm, EPS)
            q, k, v = (
                _split_heads(linear(y, w), cfg) for w in (layer.attn.q, layer.attn.k, layer.attn.v)
            )
            keys[i] = jax.lax.dynamic_update_slice_in_dim(keys[i], k, length, axis=2)
            values[i] = jax.lax.dynamic_update_slice_in_dim(values[i], v, length, axis=2)
            scores = jnp.where(causal_mask, _scores(q, keys[i]), -jnp.inf)  # [B, N, T, S]
            y, _ = _softmax_weighted_sum(scores, values[i])
            x = x + linear(_merge_heads(y), layer.attn.out)
        with jax.named_scope("cross_attention"):
            q = _split_heads(linear(norm(x, layer.cross_attn.norm, EPS), layer.cross_attn.q), cfg)
            y, scores = _cross_attend(q, cache.cross_keys[i], cache.cross_values[i])
            x = x + linear(_merge_heads(y), layer.cross_attn.out)
            if "alignment" in taps:
                head_scores |= {(i, n): scores[:, n] for n in range(cfg.num_heads)}
        with jax.named_scope("mlp"):
            x = _mlp(x, layer.mlp)
    with jax.named_scope("unembed"):
        logits = linear(norm(x[:, at], p.norm, EPS), p.embed)  # [B, P, V]
    tapped = {}
    if "alignment" in taps:
        tapped["alignment"] = jnp.stack([head_scores[head] for head in cfg.timing_heads], axis=1)
    return logits, replace(cache, keys=tuple(keys), values=tuple(values)), tapped


@partial(jax.jit, static_argnames=("cfg", "taps"))
def forward(
    params: Params,
    cfg: Config,
    audio_features: jax.Array,
    ids: jax.Array,
    *,
    taps: tuple[str, ...] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the logits at every position of a whole text, without a cache from earlier calls.

    Args:
        params: weights of the model.
        cfg: sizes of the model.
        audio_features: float32 [B, max_audio_len, D], from `encode`.
        ids: int32 [B, T].
        taps: see `forward_cached`.

    Returns:
        Logits float32 [B, T, V], and a dictionary of the requested taps.
    """
    cache = init_cache(params, cfg, audio_features, size=ids.shape[1])
    length, at = jnp.zeros((), jnp.int32), jnp.arange(ids.shape[1])
    logits, _, tapped = forward_cached(params, cfg, ids, cache, length, at, taps=taps)
    return logits, tapped


def _cross_attend(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cross-attention of queries [B, N, T, H] over keys [A, S, D] and values [A, D, S].

    Returns:
        float32 [B, N, T, H], and the scores [B, N, T, S].
    """
    (b, n, t, h), a = q.shape, len(k)
    # The B / A rows of a window are treated as additional queries to that window.
    q = q.reshape(a, b // a, n, t, h).swapaxes(1, 2).reshape(a, n, -1, h).astype(k.dtype)
    y, scores = (
        _cross_attend_decode if q.shape[2] <= _MAX_DECODE_QUERIES else _cross_attend_prefill
    )(q, k, v)  # [A, N, B/A * T, H or S]

    def split_rows(x: jax.Array) -> jax.Array:
        return x.reshape(a, n, b // a, t, -1).swapaxes(1, 2).reshape(b, n, t, -1)

    return split_rows(y), split_rows(scores)


def _cross_attend_prefill(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cross-attention of many queries [A, N, T, H], computed head by head."""
    a, n, _, h = q.shape
    keys = k.reshape(a, -1, n, h).swapaxes(1, 2)  # [A, N, S, H]
    values = v.reshape(a, n, h, -1).swapaxes(2, 3)  # [A, N, S, H]
    scores = _scores(q, keys)
    return _softmax_weighted_sum(scores, values)[0], scores


def _cross_attend_decode(q: jax.Array, k: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return cross-attention of few queries [A, N, T, H], all heads in one matrix product.

    The queries are arranged block-diagonally over D, so that keys and values are multiplied in the
    layout of the cache. Head by head, XLA's CPU backend repacks keys and values at every step,
    which takes 2.5 times the CPU time and 4 times the wall time.
    """
    a, n, t, h = q.shape
    head_mask = jnp.eye(n, dtype=q.dtype)
    q = q * h**-0.5
    wide = jnp.einsum("anth,nm->anhmt", q, head_mask).reshape(a, n * h, n * t)  # [A, D, N * T]
    scores = jnp.einsum("asd,adt->ast", k, wide, preferred_element_type=jnp.float32)
    unnormed = jnp.exp(scores - scores.max(1, keepdims=True)).astype(v.dtype)
    total = unnormed.sum(1, dtype=jnp.float32)  # [A, N * T]
    y = jnp.einsum("ads,ast->adt", v, unnormed, preferred_element_type=jnp.float32)
    y = (y / total[:, None]).reshape(a, n, h, n, t)
    y = jnp.einsum("anhnt->anth", y)
    return y, scores.swapaxes(1, 2).reshape(a, n, t, -1)


# Shared by encoder and decoder


def _mlp(x: jax.Array, p: Mlp) -> jax.Array:
    return x + linear(_gelu(linear(norm(x, p.norm, EPS), p.up)), p.down)


def _gelu(x: jax.Array) -> jax.Array:
    # Equals jax.nn.gelu(approximate=False), which uses erfc and is half as fast on a CPU.
    return 0.5 * x * (1 + jax.lax.erf(x * math.sqrt(0.5)))


def _split_heads(x: jax.Array, cfg: Config) -> jax.Array:
    """Split the last axis into heads: [B, T, N * H] -> [B, N, T, H]."""
    return x.reshape(*x.shape[:2], cfg.num_heads, -1).swapaxes(1, 2)


def _merge_heads(x: jax.Array) -> jax.Array:
    """Merge the heads into the last axis: [B, N, T, H] -> [B, T, N * H]."""
    x = x.swapaxes(1, 2)
    return x.reshape(*x.shape[:2], -1)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """Return scaled dot products: [B, N, T, H], [B, N, S, H] -> float32 [B, N, T, S]."""
    q = q * q.shape[-1] ** -0.5
    return jnp.einsum("bnth,bnsh->bnts", q, k, preferred_element_type=jnp.float32)


def _softmax_weighted_sum(scores: jax.Array, v: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Return softmax(scores) @ v, float32 [B, N, T, H], and softmax(scores) [B, N, T, S]."""
    # Rounded to the dtype of the values before the sum, which saves a pass over the scores.
    unnormed = jnp.exp(scores - scores.max(-1, keepdims=True)).astype(v.dtype)
    total = unnormed.sum(-1, keepdims=True, dtype=jnp.float32)
    # Divided after the product: H divisions per query instead of S.
    y = jnp.einsum("bnts,bnsh->bnth", unnormed, v, preferred_element_type=jnp.float32)
    return y / total, unnormed / total


def _attention_dtype(p: Linear):
    """Return the dtype that attention is computed in, given the weights of its query projection."""
    return jnp.bfloat16 if p.weight.dtype == jnp.int8 else p.weight.dtype


def _check_taps(taps: Collection[str], known: tuple[str, ...]) -> None:
    if unknown := set(taps) - set(known):
        raise ValueError(f"taps must be among {', '.join(known)}; got {sorted(unknown)}")
