"""A decoder-only transformer: token ids in, logits out.

Read `block` first: norm, attention, add; norm, MLP, add. Everything else arranges who calls it.

- `forward` reads whole sequences at once, with no cache: training, scoring, looking inside.
- `extend` reads the next tokens of sequences whose past stands in a cache. With one row and many
  tokens it is prefill, with many rows and one token it is a decoding step: the same function.

Weights are a tree of arrays (`Params`); `abstract` describes that tree (shapes, logical axes,
initial values) without allocating anything, and `init` fills it.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from transformer import attention, cache, rope
from transformer.config import Config
from transformer.layers import Linear, Norm, embed, linear, norm


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
    out: Linear  # [D, N * H]
    mlp_norm: Norm
    gate: Linear | None  # [F, D] for swiglu; None for gelu
    up: Linear  # [F, D]
    down: Linear  # [D, F]


@struct.dataclass
class Params:
    """Weights of the whole decoder."""

    embed: Linear  # [V, D], one row a token
    positions: jax.Array | None  # [max_seq_len, D] where positions are learned
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear | None  # [V, D]; None where the embedding table serves


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

    def norm_() -> Norm:
        bias = ArrayInfo((cfg.d_model,), ("model",), zeros) if cfg.norm == "layer" else None
        return Norm(scale=ArrayInfo((cfg.d_model,), ("model",), ones), bias=bias)

    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    up = matrix(cfg.d_ff, cfg.d_model, ("ff", "model"), cfg.linear_bias)
    kv = matrix(kv_heads, cfg.d_model, ("kv_heads", "model"), cfg.qkv_bias)
    layer = Layer(
        attn_norm=norm_(),
        q=matrix(heads, cfg.d_model, ("heads", "model"), cfg.qkv_bias),
        k=kv,
        v=kv,
        out=matrix(cfg.d_model, heads, ("model", "heads"), cfg.linear_bias, residual),
        mlp_norm=norm_(),
        gate=up if cfg.mlp == "swiglu" else None,
        up=up,
        down=matrix(cfg.d_model, cfg.d_ff, ("model", "ff"), cfg.linear_bias, residual),
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
    infos, tree = jax.tree.flatten(abstract(cfg))
    keys = jax.random.split(key, len(infos))
    arrays = [
        info.initializer(key, info.shape, jnp.float32)
        for key, info in zip(keys, infos, strict=True)
    ]
    return jax.tree.unflatten(tree, arrays)


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
    batch, length, _ = x.shape
    n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim
    with jax.named_scope("attention"):
        y = norm(x, layer.attn_norm, cfg.norm_eps)
        query = linear(y, layer.q).reshape(batch, length, n, h)  # [B, T, N, H]
        key = linear(y, layer.k).reshape(batch, length, k, h)  # [B, T, K, H]
        value = linear(y, layer.v).reshape(batch, length, k, h)  # [B, T, K, H]
        if angles is not None:
            query, key = rope.rotate(query, *angles), rope.rotate(key, *angles)
        y = attend(query, key, value)  # [B, T, N, H]
        x = x + linear(y.reshape(batch, length, n * h), layer.out)
    with jax.named_scope("mlp"):
        y = norm(x, layer.mlp_norm, cfg.norm_eps)
        if layer.gate is not None:
            y = jax.nn.silu(linear(y, layer.gate)) * linear(y, layer.up)  # [B, T, F]
        else:
            y = jax.nn.gelu(linear(y, layer.up), approximate=True)  # [B, T, F]
        return x + linear(y, layer.down)


def embed_tokens(params: Params, cfg: Config, ids: jax.Array, positions: jax.Array):
    """The stream before the first block [B, T, D], and the rotary angles for every block."""
    x = embed(params.embed, ids)  # [B, T, D]
    if cfg.position == "learned":
        return x + params.positions[positions], None
    return x, rope.angles(positions, cfg.head_dim, cfg.rope_theta)


def unembed(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Logits of the stream after the last block: float32 [..., D] -> float32 [..., V]."""
    with jax.named_scope("unembed"):
        x = norm(x, params.final_norm, cfg.norm_eps)
        return linear(x, params.embed if params.head is None else params.head)


def forward(
    params: Params, cfg: Config, ids: jax.Array, *, taps: Collection[str] = ()
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Logits for every position of whole sequences, without a cache.

    Args:
        ids: int32 [B, T].
        taps: names of intermediates to return: "residual" (the stream entering each block and
            leaving the last, [L + 1, B, T, D]), "attention" (weights, [L, B, N, T, T]) and
            "logits" (of each block's stream through the final norm and head, [L + 1, B, T, V]:
            the logit lens). An unused tap costs nothing.

    Returns:
        Logits float32 [B, T, V], and a dictionary with exactly the named taps.
    """
    if unknown := set(taps) - {"residual", "attention", "logits"}:
        raise ValueError(f"taps must be among residual, attention, logits; got {sorted(unknown)}")
    positions = jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    x, angles = embed_tokens(params, cfg, ids, positions)
    residual, weights = [x], []

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        out, w = attention.attend(q, k, v)
        weights.append(w)
        return out

    for layer in params.layers:
        x = block(x, layer, cfg, angles, attend)
        residual.append(x)
    found: dict[str, jax.Array] = {}
    if "residual" in taps:
        found["residual"] = jnp.stack(residual)
    if "attention" in taps:
        found["attention"] = jnp.stack(weights)
    if "logits" in taps:
        found["logits"] = jnp.stack([unembed(params, cfg, x) for x in residual])
    return unembed(params, cfg, x), found


def extend(
    params: Params,
    cfg: Config,
    memory: cache.Cache,
    ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.Cache]:
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
    for layer, k, v in zip(params.layers, memory.keys, memory.values, strict=True):
        x, k, v = _extend_layer(x, layer, k, v, cfg, angles, tables, starts)
        keys.append(k)
        values.append(v)
    return x, cache.Cache(keys=tuple(keys), values=tuple(values))


@partial(jax.jit, static_argnames="cfg")  # so that the layers, all alike, are traced once
def _extend_layer(x, layer, keys, values, cfg, angles, tables, starts):
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal keys, values
        keys, values = cache.append(keys, values, k, v, tables, starts)
        return cache.attend(q, keys, values, tables, starts)

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
