"""A decoder-only transformer: token ids in, logits out.

Read `block` first: norm, attention, add; norm, MLP, add. Everything else arranges who calls it.
One function serves every family; where they differ, the config says which form is meant, or a part
of a layer is None.

- `forward` reads whole sequences at once, with no cache: scoring, looking inside. `hidden` is the
  same up to the head, for training, whose loss must not hold the logits of a whole batch.
- `extend` reads the next tokens of sequences whose past stands in a cache. With one row and many
  tokens it is prefill, with many rows and one token it is a decoding step: the same function.

Weights are a tree of arrays (`Params`); `abstract` describes that tree (shapes, logical axes,
initial values) without allocating anything, and `init` fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import attention, cache, kernels, rope
from transformer.config import Config
from transformer.layers import embed, linear, norm
from transformer.remat import recompute
from transformer.weights import Linear, Norm


@struct.dataclass
class Layer:
    """Weights of one block.

    Queries, keys and values stay separate products, as do gate and up: it reads plainly, and fused
    ones were never faster (ARCHITECTURE.md has the measurements).
    """

    attn_norm: Norm
    q: Linear  # [N * H, D]
    k: Linear  # [K * H, D]
    v: Linear  # [K * H, D]
    q_norm: Norm | None  # [H], over each head's query; None where cfg.qk_norm is False
    k_norm: Norm | None
    out: Linear  # [D, N * H]
    attn_post_norm: Norm | None  # of what attention adds; None where cfg.post_norms is False
    mlp_norm: Norm
    gate: Linear | None  # [F, D] for swiglu and geglu; None for gelu
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    mlp_post_norm: Norm | None


@struct.dataclass
class Params:
    """Weights of the whole decoder."""

    embed: Linear  # [V, D], one row a token
    positions: jax.Array | None  # [max_seq_len, D] where positions are learned
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear | None  # [V, D]; None where the embedding table serves
    folded_norm_weights: jax.Array | None = (
        None  # [L, 2, D] of a model whose stream is turned; see rotation.py
    )


@dataclass(frozen=True)
class ArrayInfo:
    """What a leaf of `Params` will be, before it is."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names, for sharding
    initializer: Callable[..., jax.Array]


def abstract(cfg: Config) -> Params:
    """The tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    normal = jax.nn.initializers.normal(0.02)
    # Residual branches start smaller, so that depth does not inflate the stream (GPT-2, 2.3).
    residual = jax.nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones

    def matrix(
        out: int, inner: int, axes: tuple[str, str], bias: bool, initializer=normal
    ) -> Linear:
        return Linear(
            weight=ArrayInfo((out, inner), axes, initializer),
            bias=ArrayInfo((out,), axes[:1], zeros) if bias else None,
        )

    def norm_(width: int = cfg.d_model, axis: str = "model") -> Norm:
        bias = ArrayInfo((width,), (axis,), zeros) if cfg.norm == "layer" else None
        neutral = zeros if cfg.norm == "unit_rms" else ones
        return Norm(scale=ArrayInfo((width,), (axis,), neutral), bias=bias)

    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    up = matrix(cfg.d_ff, cfg.d_model, ("ff", "model"), cfg.linear_bias)
    kv = matrix(kv_heads, cfg.d_model, ("kv_heads", "model"), cfg.qkv_bias)
    head_norm = norm_(cfg.head_dim, "head") if cfg.qk_norm else None
    post_norm = norm_() if cfg.post_norms else None
    layer = Layer(
        attn_norm=norm_(),
        q=matrix(heads, cfg.d_model, ("heads", "model"), cfg.qkv_bias),
        k=kv,
        v=kv,
        q_norm=head_norm,
        k_norm=head_norm,
        out=matrix(cfg.d_model, heads, ("model", "heads"), cfg.linear_bias, residual),
        attn_post_norm=post_norm,
        mlp_norm=norm_(),
        gate=None if cfg.mlp == "gelu" else up,
        up=up,
        down=matrix(cfg.d_model, cfg.d_ff, ("model", "ff"), cfg.linear_bias, residual),
        mlp_post_norm=post_norm,
    )
    table = matrix(cfg.vocab_size, cfg.d_model, ("vocab", "model"), False)
    return Params(
        embed=table,
        positions=ArrayInfo((cfg.max_seq_len, cfg.d_model), ("seq", "model"), normal)
        if cfg.position == "learned"
        else None,
        layers=(layer,) * cfg.num_layers,
        final_norm=norm_(),
        head=None if cfg.tie_embeddings else table,
    )


def init(key: jax.Array, cfg: Config) -> Params:
    """Fresh float32 weights."""
    return initialize(key, abstract(cfg))


def initialize(key: jax.Array, tree: Any) -> Any:
    """The arrays that a tree of `ArrayInfo` describes, each from a key of its own."""
    infos, structure = jax.tree.flatten(tree)
    keys = jax.random.split(key, len(infos))
    arrays = [
        info.initializer(key, info.shape, jnp.float32)
        for key, info in zip(keys, infos, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def block(
    x: jax.Array,
    layer: Layer,
    cfg: Config,
    angles: tuple[jax.Array, jax.Array] | None,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """One transformer block.

    Args:
        x: the residual stream, float32 [B, T, D].
        angles: rotary cosines and sines of the positions, or None where positions are learned.
        attend: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Returns:
        float32 [B, T, D].
    """
    with jax.named_scope("attention"):
        y = _norm(x, layer.attn_norm, cfg)
        x = x + _norm(self_attention(y, layer, cfg, angles, attend), layer.attn_post_norm, cfg)
    with jax.named_scope("mlp"):
        y = _norm(x, layer.mlp_norm, cfg)
        return x + _norm(mlp(y, layer, cfg), layer.mlp_post_norm, cfg)


def self_attention(y: jax.Array, layer: Layer, cfg: Config, angles, attend) -> jax.Array:
    """What attention adds to the stream, of its normed copy `y` [B, T, D]; see `block`."""
    batch, length, _ = y.shape
    n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    query = linear(y, layer.q).reshape(batch, length, n, h)  # [B, T, N, H]
    key = linear(y, layer.k).reshape(batch, length, k, h)  # [B, T, K, H]
    value = linear(y, layer.v).reshape(batch, length, k, h)  # [B, T, K, H]
    query, key = _norm(query, layer.q_norm, cfg), _norm(key, layer.k_norm, cfg)
    if angles is not None:
        query, key = kernels.rotate(query, *angles), kernels.rotate(key, *angles)
    if cfg.query_scalar is not None:  # `attend` divides by the root of H
        query = query * (h / cfg.query_scalar) ** 0.5
    y = attend(query, key, value)  # [B, T, N, H]
    return linear(y.reshape(batch, length, n * h), layer.out)


def mlp(y: jax.Array, layer: Layer, cfg: Config) -> jax.Array:
    """What the MLP adds to the stream, of its normed copy: float32 [B, T, D] -> [B, T, D].

    With a gate it is a gated linear unit (Shazeer 2020, arXiv:2002.05202).
    """
    if layer.gate is None:
        return linear(jax.nn.gelu(linear(y, layer.up), approximate=True), layer.down)
    return kernels.gated_mlp(y, layer.gate, layer.up, layer.down, cfg.mlp)


def _norm(x: jax.Array, p: Norm | None, cfg: Config) -> jax.Array:
    """The config's norm over the last axis; nothing where this decoder has none."""
    if p is None:
        return x
    if cfg.norm == "unit_rms":
        p = p.replace(scale=1.0 + p.scale)
    return norm(x, p, cfg.norm_eps)


def embed_tokens(params: Params, cfg: Config, ids: jax.Array, positions: jax.Array):
    """The stream before the first block [B, T, D], and for each block its rotary angles."""
    x = embed(params.embed, ids)  # [B, T, D]
    if cfg.scale_embeddings:
        x = x * cfg.d_model**0.5
    layers = range(cfg.num_layers)
    if cfg.position == "learned":
        return x + params.positions[positions], tuple(None for _ in layers)
    turns = rope.angles(positions, cfg.head_dim, cfg.rope_theta, cfg.rope_scaling)
    if cfg.local_rope_theta is None:
        return x, tuple(turns for _ in layers)
    local = rope.angles(positions, cfg.head_dim, cfg.local_rope_theta)
    return x, tuple(turns if cfg.window(i) is None else local for i in layers)


def unembed(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Logits of the stream after the last block: float32 [..., D] -> float32 [..., V]."""
    with jax.named_scope("unembed"):
        return linear(_norm(x, params.final_norm, cfg), lm_head(params))


def lm_head(params: Params) -> Linear:
    """What makes logits of the stream, once it is normed: [V, D]."""
    return params.embed if params.head is None else params.head


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    *,
    segments: jax.Array | None = None,
    taps: Collection[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits for every position of whole sequences, without a cache.

    Args:
        ids: int32 [B, T].
        segments: int32 [B, T], which of several texts in a row a token belongs to: 1, 2, ... and 0
            for padding. Texts neither see nor shift each other. None: a row is one text.
        taps: names of intermediates to return: "residual" (the stream entering each block and
            leaving the last, [L + 1, B, T, D]), "attention" (weights, [L, B, N, T, T]) and
            "logits" (of each block's stream through the final norm and head, [L + 1, B, T, V]:
            the logit lens). An unused tap costs nothing.

    Returns:
        Logits float32 [B, T, V], and a dictionary with exactly the named taps.

    Raises:
        ValueError: an unknown tap, or more tokens than learned positions.
    """
    if unknown := set(taps) - {"residual", "attention", "logits"}:
        raise ValueError(f"taps must be among residual, attention, logits; got {sorted(unknown)}")
    x, angles = embed_tokens(params, cfg, ids, _positions(cfg, ids, segments))
    residual, weights = [x], []
    for i, layer in enumerate(params.layers):
        x, seen = _forward_layer(
            x, layer, angles[i], segments, cfg=cfg, window=cfg.window(i), watch="attention" in taps
        )
        residual.append(x)
        weights.append(seen)
    found: dict[str, jax.Array] = {}
    if "residual" in taps:
        found["residual"] = jnp.stack(residual)
    if "attention" in taps:
        found["attention"] = jnp.stack(weights)
    if "logits" in taps:
        found["logits"] = jnp.stack([unembed(params, cfg, x) for x in residual])
    return unembed(params, cfg, x), found


def hidden_states(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """The stream after the last block and the final norm: what `head` is multiplied with.

    Args:
        ids: int32 [B, T].
        segments: as in `forward`.
        remat: when differentiated, keep of each block only what entered it and compute the rest
            again: a third more arithmetic for a fraction of the memory.

    Returns:
        float32 [B, T, D].
    """
    x, angles = embed_tokens(params, cfg, ids, _positions(cfg, ids, segments))
    for i, layer in enumerate(params.layers):
        read = partial(_forward_layer, cfg=cfg, window=cfg.window(i))
        x, _ = (recompute(read) if remat else read)(x, layer, angles[i], segments)
    return _norm(x, params.final_norm, cfg)


# Jitted inside, so that layers that are alike are traced, and differentiated, once.
@partial(jax.jit, static_argnames=("cfg", "window", "output_attentions"))
def _forward_layer(x, layer, angles, segments, *, cfg, window, output_attentions=False):
    """The stream behind a block, and with `watch` its attention weights [B, N, T, T], else None."""
    weights = None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal weights
        if not output_attentions:
            return kernels.attend(q, k, v, window=window, segments=segments)
        out, weights = attention.attend(q, k, v, window=window, segments=segments)
        return out

    return block(x, layer, cfg, angles, attend), weights


def _positions(cfg: Config, ids: jax.Array, segments: jax.Array | None) -> jax.Array:
    if segments is None:
        if cfg.position == "learned" and ids.shape[1] > cfg.max_seq_len:
            raise ValueError(
                f"a row may have {cfg.max_seq_len} tokens, as many as positions were learned, "
                f"got {ids.shape[1]}"
            )
        return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return position_ids(segments)


def position_ids(segments: jax.Array) -> jax.Array:
    """The place of each token within its text: int32 [B, T], of segments as `forward` has them."""
    place = jnp.arange(segments.shape[1])
    before = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != before, place, 0)  # where a text begins, else 0
    return place - jax.lax.cummax(starts, axis=1)


def forward_cached(
    params: Params,
    cfg: Config,
    kv_cache: cache.KVCache,
    ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Reads the next tokens of each row and remembers them.

    Args:
        memory: the cache; donate it, it is updated in place.
        ids: int32 [B, T], the new tokens.
        tables: int32 [B, S/BLOCK], the cache blocks of each row.
        starts: int32 [B], how many tokens each row already holds.

    Returns:
        The stream after the last block, float32 [B, T, D] (`unembed` the positions you need), and
        the cache.
    """
    positions = starts[:, None] + jnp.arange(ids.shape[1])  # [B, T]
    x, angles = embed_tokens(params, cfg, ids, positions)
    keys, values = [], []
    for i, layer in enumerate(params.layers):
        k, v = kv_cache.keys[i], kv_cache.values[i]
        x, k, v = _forward_layer_cached(
            x, layer, k, v, cfg, angles[i], tables, starts, window=cfg.window(i)
        )
        keys.append(k)
        values.append(v)
    return x, cache.KVCache(keys=tuple(keys), values=tuple(values))


# Jitted inside, so that layers that are alike are traced once.
@partial(jax.jit, static_argnames=("cfg", "window"))
def _forward_layer_cached(x, layer, keys, values, cfg, angles, tables, starts, *, window):
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal keys, values
        keys, values = cache.append(keys, values, k, v, tables, starts)
        return cache.attend(q, keys, values, tables, starts, window=window)

    return block(x, layer, cfg, angles, attend), keys, values


def stack_layers(layers: tuple[Layer, ...]) -> Layer:
    """One tree whose leaves are [L, ...], for `jax.lax.scan` and for sharding over layers."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack_layers(stacked: Layer) -> tuple[Layer, ...]:
    """The inverse of `stack_layers`."""
    count = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(count))


def num_bytes(params: Params) -> int:
    """Memory the weights take."""
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
