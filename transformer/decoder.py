"""A decoder-only transformer: token ids in, logits out.

Read `block` first: norm, attention, add; norm, MLP, add. One function serves every family. Where
families differ, a field of the config selects the variant, or a part of a layer is None.

- `forward` processes whole sequences without a cache, for scoring and interpretability.
  `hidden_states` is the same without the head, for training: the loss computes the logits in
  chunks, to save the memory of the logits of a whole batch.
- `forward_cached` processes the next tokens of sequences whose earlier tokens are in a cache. With
  one row and many tokens it is prefill, with many rows and one token each it is a decoding step.

Weights are a tree of arrays (`Params`). `abstract` describes that tree (shapes, logical axes,
initializers) without allocating memory, and `init` fills it.
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
from transformer.config import GATED_MLPS, Config
from transformer.kernels.registry import register
from transformer.layers import embed, linear, norm
from transformer.remat import recompute
from transformer.weights import BlockWeight, Linear, Norm


class Layer(struct.PyTreeNode):
    """Weights of one block.

    The projections of queries, keys and values are separate matrices, as are gate and up: the code
    is simpler, and fused matrix products were never faster when measured.
    """

    attn_norm: Norm | None  # None where cfg.pre_norms is False
    q: Linear  # [N * H, D]
    k: Linear  # [K * H, D]
    v: Linear  # [K * H, D]
    q_norm: Norm | None  # [H] over each head, or [N * H]; None where cfg.qk_norm is False
    k_norm: Norm | None  # [H] over each head, or [K * H]
    sinks: jax.Array | None  # [N] float32 scores; None where cfg.attention_sinks is False
    out: Linear  # [D, N * H]
    attn_post_norm: Norm | None  # of the attention output; None where cfg.post_norms is False
    mlp_norm: Norm | None  # None where cfg.pre_norms is False
    # [E, D] float32 in every dtype, because a small error can choose another expert; None where the
    # layer has one MLP. With experts, gate, up and down have a leading axis E.
    router: jax.Array | None
    router_bias: jax.Array | None  # [E] float32; None without biases
    gate: Linear | None  # [F, D]; None where the kind of MLP has no gate
    up: Linear  # [F, D]
    down: Linear  # [D, F]
    mlp_post_norm: Norm | None  # of the MLP output; None where cfg.post_norms is False


class Params(struct.PyTreeNode):
    """Weights of the whole decoder."""

    embed: Linear  # [V, D], one row per token
    positions: jax.Array | None  # [max_seq_len, D] where positions are learned
    layers: tuple[Layer, ...]
    final_norm: Norm
    head: Linear | None  # [V, D]; None where the head is the embedding table
    # [L, 2, D], the norm weights that are folded into a rotated model; see quarot.py
    folded_norm_weights: jax.Array | None = None


@dataclass(frozen=True)
class ArrayInfo:
    """Description of a leaf of `Params` before it is allocated."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical names, for sharding
    initializer: Callable[..., jax.Array]


def abstract(cfg: Config) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` of a float32 array at each leaf."""
    normal = jax.nn.initializers.normal(0.02)
    # The output projections start smaller, so that the variance of the residual stream does not
    # grow with depth (GPT-2, section 2.3).
    residual = jax.nn.initializers.normal(0.02 / (2 * cfg.num_layers) ** 0.5)
    zeros, ones = jax.nn.initializers.zeros, jax.nn.initializers.ones
    leaf: Any = ArrayInfo  # takes the place of an array in the tree

    def abstract_linear(
        out: int, inner: int, axes: tuple[str, str], has_bias: bool, initializer=normal
    ) -> Linear:
        return Linear(
            weight=leaf((out, inner), axes, initializer),
            bias=leaf((out,), axes[:1], zeros) if has_bias else None,
        )

    def per_expert(linear: Linear) -> Linear:
        if cfg.num_experts is None:
            return linear
        return jax.tree.map(
            lambda info: leaf(
                (cfg.num_experts, *info.shape), ("experts", *info.axes), info.initializer
            ),
            linear,
        )

    def abstract_norm(width: int = cfg.d_model, axis: str = "model") -> Norm:
        bias = leaf((width,), (axis,), zeros) if cfg.norm == "layer" else None
        neutral = zeros if cfg.norm == "unit_rms" else ones
        return Norm(scale=leaf((width,), (axis,), neutral), bias=bias)

    heads, kv_heads = cfg.num_heads * cfg.head_dim, cfg.num_kv_heads * cfg.head_dim
    up = abstract_linear(cfg.d_ff, cfg.d_model, ("ff", "model"), cfg.linear_bias)
    kv = abstract_linear(kv_heads, cfg.d_model, ("kv_heads", "model"), cfg.qkv_bias)
    q_norm = k_norm = None
    if cfg.qk_norm and cfg.qk_norm_over == "head":
        q_norm = k_norm = abstract_norm(cfg.head_dim, "head")
    elif cfg.qk_norm:
        q_norm, k_norm = abstract_norm(heads, "heads"), abstract_norm(kv_heads, "kv_heads")
    pre_norm = abstract_norm() if cfg.pre_norms else None
    post_norm = abstract_norm() if cfg.post_norms else None
    down = abstract_linear(cfg.d_model, cfg.d_ff, ("model", "ff"), cfg.linear_bias, residual)
    layer = Layer(
        attn_norm=pre_norm,
        q=abstract_linear(heads, cfg.d_model, ("heads", "model"), cfg.qkv_bias),
        k=kv,
        v=kv,
        q_norm=q_norm,
        k_norm=k_norm,
        sinks=leaf((cfg.num_heads,), ("heads",), normal) if cfg.attention_sinks else None,
        out=abstract_linear(cfg.d_model, heads, ("model", "heads"), cfg.linear_bias, residual),
        attn_post_norm=post_norm,
        mlp_norm=pre_norm,
        router=None
        if cfg.num_experts is None
        else leaf((cfg.num_experts, cfg.d_model), ("experts", "model"), normal),
        router_bias=leaf((cfg.num_experts,), ("experts",), zeros)
        if cfg.num_experts is not None and cfg.linear_bias
        else None,
        gate=per_expert(up) if cfg.mlp in GATED_MLPS else None,
        up=per_expert(up),
        down=per_expert(down),
        mlp_post_norm=post_norm,
    )
    embedding = abstract_linear(cfg.vocab_size, cfg.d_model, ("vocab", "model"), False)
    return Params(
        embed=embedding,
        positions=leaf((cfg.max_seq_len, cfg.d_model), ("seq", "model"), normal)
        if cfg.position == "learned"
        else None,
        layers=(layer,) * cfg.num_layers,
        final_norm=abstract_norm(),
        head=None if cfg.tie_embeddings else embedding,
    )


def init(key: jax.Array, cfg: Config) -> Params:
    """Return random initial weights in float32."""
    return initialize(key, abstract(cfg))


def initialize(key: jax.Array, tree: Any) -> Any:
    """Return random float32 arrays for a tree of `ArrayInfo`, with one random key per array."""
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
    """Apply one transformer block.

    Args:
        x: The residual stream, float32 [B, T, D].
        layer: Weights of the block.
        cfg: Config of the decoder.
        angles: Rotary cosines and sines of the positions, as from `rope.angles`; None for a layer
            without rotation.
        attend: Attention function: q [B, T, N, H], k and v [B, T, K, H] -> [B, T, N, H].

    Returns:
        The residual stream after the block, float32 [B, T, D].
    """
    with jax.named_scope("attention"):
        y = _norm(x, layer.attn_norm, cfg)
        y = _norm(self_attention(y, layer, cfg, angles, attend), layer.attn_post_norm, cfg)
        after = x + _scale(y, cfg.residual_multiplier)
    with jax.named_scope("mlp"):
        y = _norm(x if cfg.parallel_residual else after, layer.mlp_norm, cfg)
        y = _norm(mlp(y, layer, cfg), layer.mlp_post_norm, cfg)
        return after + _scale(y, cfg.residual_multiplier)


def self_attention(
    y: jax.Array,
    layer: Layer,
    cfg: Config,
    angles: tuple[jax.Array, jax.Array] | None,
    attend: Callable[[jax.Array, jax.Array, jax.Array], jax.Array],
) -> jax.Array:
    """Return the output of the attention sublayer.

    Args:
        y: The normed residual stream, float32 [B, T, D].
        layer: Weights of the block.
        cfg: Config of the decoder.
        angles: As in `block`.
        attend: As in `block`.

    Returns:
        The output of the projection `out`, float32 [B, T, D].
    """
    batch, length, _ = y.shape
    n, k, h = cfg.num_heads, cfg.num_kv_heads, cfg.head_dim

    def project(p: Linear, p_norm: Norm | None, heads: int) -> jax.Array:
        x = linear(y, p)
        if cfg.qk_norm_over == "projection":
            x = _norm(x, p_norm, cfg)
        return x.reshape(batch, length, heads, h)

    query = project(layer.q, layer.q_norm, n)  # [B, T, N, H]
    key = project(layer.k, layer.k_norm, k)  # [B, T, K, H]
    value = project(layer.v, None, k)  # [B, T, K, H]
    if cfg.qk_norm_over == "head":
        query, key = _norm(query, layer.q_norm, cfg), _norm(key, layer.k_norm, cfg)
    if angles is not None:
        query, key = kernels.rotate(query, *angles), kernels.rotate(key, *angles)
    # `attend` divides by the square root of H.
    if cfg.query_scalar is not None:
        query = query * (h / cfg.query_scalar) ** 0.5
    if cfg.attention_multiplier is not None:
        query = query * (cfg.attention_multiplier * h**0.5)
    y = attend(query, key, value)  # [B, T, N, H]
    return linear(y.reshape(batch, length, n * h), layer.out)


def attention_options(layer: Layer, cfg: Config, window: int | None) -> dict[str, Any]:
    """Return the keyword arguments of `attend` that are the same with and without a cache."""
    return dict(window=window, softcap=cfg.attn_logit_softcap, sinks=layer.sinks)


def mlp(y: jax.Array, layer: Layer, cfg: Config) -> jax.Array:
    """Return the output of the MLP: normed residual stream, float32 [B, T, D] -> [B, T, D].

    With a gate, the MLP is a gated linear unit (Shazeer 2020, arXiv:2002.05202). With a router, it
    is the weighted sum of a few of many such units, the experts (Shazeer et al. 2017,
    arXiv:1701.06538).
    """
    if layer.gate is None:
        is_tanh = cfg.mlp == "gelu"
        return linear(jax.nn.gelu(linear(y, layer.up), approximate=is_tanh), layer.down)
    maps = (layer.gate, layer.up, layer.down)
    if layer.router is None:
        return kernels.gated_mlp(y, *maps, cfg.mlp, limit=cfg.swiglu_limit)
    weights, experts = route(y, layer.router, cfg, layer.router_bias)
    return kernels.experts(y, weights, experts, *maps, cfg.mlp, limit=cfg.swiglu_limit)


def route(
    y: jax.Array, router: jax.Array, cfg: Config, bias: jax.Array | None = None
) -> tuple[jax.Array, jax.Array]:
    """Choose the experts of each token.

    Args:
        y: The normed residual stream, float32 [B, T, D].
        router: Weights of the router, float32 [E, D].
        cfg: Config of the decoder.
        bias: Bias of the router, float32 [E] or None.

    Returns:
        The weights of the k = cfg.num_experts_per_tok most likely experts, float32 [B, T, k], and
        their indices, int32 [B, T, k], the most likely first. The weights are the probabilities
        over all experts, divided by their sum if cfg.norm_topk_prob.
    """
    assert cfg.num_experts_per_tok is not None
    with jax.named_scope("route"):
        probabilities = jax.nn.softmax(linear(y, Linear(router, bias)), axis=-1)  # [B, T, E]
        weights, experts = jax.lax.top_k(probabilities, cfg.num_experts_per_tok)
        if cfg.norm_topk_prob:
            weights = weights / weights.sum(-1, keepdims=True)
        return weights, experts


def _scale(x: jax.Array, factor: float) -> jax.Array:
    return x if factor == 1 else x * factor


def _norm(x: jax.Array, p: Norm | None, cfg: Config) -> jax.Array:
    """Apply the norm of the config to the last axis; return `x` where `p` is None."""
    if p is None:
        return x
    if cfg.norm == "unit_rms":
        p = p.replace(scale=1.0 + p.scale)
    return norm(x, p, cfg.norm_eps)


def embed_tokens(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    positions: jax.Array,
    max_length: int | None = None,
) -> tuple[jax.Array, tuple[tuple[jax.Array, jax.Array] | None, ...]]:
    """Return the input of the first block, and the rotary angles of each block.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids, int32 [B, T].
        positions: Position of each token, int32 [B, T].
        max_length: Number of positions that each row can reach by generation, which selects the
            factors of LongRoPE; None: each row's largest position selects them.

    Returns:
        The residual stream, float32 [B, T, D], and for each layer the cosines and sines of
        `rope.angles`, or None for a layer without rotation.
    """
    x = embed(params.embed, ids)  # [B, T, D]
    if cfg.scale_embeddings:
        x = x * cfg.d_model**0.5
    x = _scale(x, cfg.embedding_multiplier)
    layers = range(cfg.num_layers)
    if cfg.position == "learned":
        assert params.positions is not None
        return x + params.positions[positions], tuple(None for _ in layers)
    size = cfg.rotary_dim or cfg.head_dim
    angles = rope.angles(positions, size, cfg.rope_theta, cfg.rope_scaling, max_length)
    if cfg.local_rope_theta is None:
        return x, tuple(angles if cfg.has_rope(i) else None for i in layers)
    local_angles = rope.angles(positions, size, cfg.local_rope_theta)

    def layer_angles(i: int) -> tuple[jax.Array, jax.Array] | None:
        if not cfg.has_rope(i):
            return None
        return angles if cfg.window(i) is None else local_angles

    return x, tuple(layer_angles(i) for i in layers)


def unembed(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Apply the final norm and the head: float32 [..., D] -> logits, float32 [..., V]."""
    with jax.named_scope("unembed"):
        return scale_logits(linear(final_norm(params, cfg, x), lm_head(params)), cfg)


def scale_logits(logits: jax.Array, cfg: Config) -> jax.Array:
    """Apply the scaling and the soft cap of the config to the outputs of the head."""
    if cfg.logits_scaling != 1:
        logits = logits / cfg.logits_scaling
    if cfg.final_logit_softcap is not None:
        logits = attention.soft_cap(logits, cfg.final_logit_softcap)
    return logits


def final_norm(params: Params, cfg: Config, x: jax.Array) -> jax.Array:
    """Apply the norm before the head: float32 [..., D] -> [..., D]."""
    return _norm(x, params.final_norm, cfg)


def lm_head(params: Params) -> Linear:
    """Return the language-model head [V, D]: the embedding table where embeddings are tied."""
    return params.embed if params.head is None else params.head


def forward(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    *,
    segments: jax.Array | None = None,
    taps: Collection[str] = (),
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the logits of every position of whole sequences, without a cache.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids, int32 [B, T].
        segments: Number of the text that each token belongs to, if several texts share a row, int32
            [B, T]: 1, 2, ... and 0 for padding. Positions are counted in each text from 0, and a
            token attends to tokens of the same text only. None means one text per row.
        taps: Names of intermediates to return: "residual" (the residual stream before each block
            and after the last, [L + 1, B, T, D]), "attention" (attention weights,
            [L, B, N, T, T]) and "logits" (the logit lens: the final norm and the head applied to
            each entry of "residual", [L + 1, B, T, V]). An unused tap costs nothing.

    Returns:
        Logits, float32 [B, T, V], and a dictionary with exactly the named taps.

    Raises:
        ValueError: A tap is unknown, or there are more tokens than learned positions.
    """
    if unknown := set(taps) - {"residual", "attention", "logits"}:
        raise ValueError(f"taps must be among residual, attention, logits; got {sorted(unknown)}")
    x, angles = embed_tokens(params, cfg, ids, _positions(cfg, ids, segments))
    residual, attentions = [x], []
    for i, layer in enumerate(params.layers):
        x, weights = _forward_layer(
            x,
            layer,
            angles[i],
            segments,
            cfg=cfg,
            window=cfg.window(i),
            output_attentions="attention" in taps,
        )
        residual.append(x)
        attentions.append(weights)
    outputs: dict[str, jax.Array] = {}
    if "residual" in taps:
        outputs["residual"] = jnp.stack(residual)
    if "attention" in taps:
        outputs["attention"] = jnp.stack(attentions)
    if "logits" in taps:
        outputs["logits"] = jnp.stack([unembed(params, cfg, x) for x in residual])
    return unembed(params, cfg, x), outputs


def hidden_states(
    params: Params,
    cfg: Config,
    ids: jax.Array,
    segments: jax.Array | None = None,
    *,
    remat: bool = False,
) -> jax.Array:
    """Return the residual stream after the last block and the final norm, for the loss.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        ids: Token ids, int32 [B, T].
        segments: As in `forward`.
        remat: Rematerialization: for the gradient, store only the input of each block and recompute
            its intermediates. This costs a third more arithmetic and saves most of the memory.

    Returns:
        The input of the head, float32 [B, T, D].

    Raises:
        ValueError: There are more tokens than learned positions.
    """
    x, angles = embed_tokens(params, cfg, ids, _positions(cfg, ids, segments))
    for i, layer in enumerate(params.layers):
        forward_layer = partial(_forward_layer, cfg=cfg, window=cfg.window(i))
        x, _ = (recompute(forward_layer) if remat else forward_layer)(x, layer, angles[i], segments)
    return final_norm(params, cfg, x)


# A nested jit, so that layers of the same shapes are traced and differentiated once.
@partial(jax.jit, static_argnames=("cfg", "window", "output_attentions"))
def _forward_layer(x, layer, angles, segments, *, cfg, window, output_attentions=False):
    """Apply a block; return its output, and attention weights [B, N, T, T] if requested."""
    weights = None

    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal weights
        options: Any = dict(segments=segments, **attention_options(layer, cfg, window))
        if not output_attentions:
            return kernels.attend(q, k, v, **options)
        out, weights = attention.attend(q, k, v, **options)
        return out

    return block(x, layer, cfg, angles, attend), weights


def _positions(cfg: Config, ids: jax.Array, segments: jax.Array | None) -> jax.Array:
    if segments is None:
        if cfg.position == "learned" and ids.shape[1] > cfg.max_seq_len:
            raise ValueError(
                f"a row must have at most {cfg.max_seq_len} tokens, the number of learned "
                f"positions, got {ids.shape[1]}"
            )
        return jnp.broadcast_to(jnp.arange(ids.shape[1]), ids.shape)
    return position_ids(segments)


def position_ids(segments: jax.Array) -> jax.Array:
    """Return the position of each token within its text.

    Args:
        segments: Index of the text that each token belongs to, int32 [B, T], as in `forward`.

    Returns:
        Positions counted from 0 in each text, int32 [B, T].
    """
    column = jnp.arange(segments.shape[1])
    previous = jnp.pad(segments[:, :-1], ((0, 0), (1, 0)), constant_values=-1)
    starts = jnp.where(segments != previous, column, 0)  # column of the first token of a text
    return column - jax.lax.cummax(starts, axis=1)


def forward_cached(
    params: Params,
    cfg: Config,
    kv_cache: cache.KVCache,
    ids: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Process the next tokens of each row and append their keys and values to the cache.

    Args:
        params: Weights of the decoder.
        cfg: Config of the decoder.
        kv_cache: The cache; donate the argument in `jax.jit`, so that it is updated in place.
        ids: The new tokens, int32 [B, T].
        tables: The cache blocks of each row, int32 [B, S/BLOCK_SIZE]. S, the longest sequence that
            they can hold, selects the factors of LongRoPE.
        starts: Number of tokens of each row that are in the cache already, int32 [B].

    Returns:
        The residual stream after the last block, float32 [B, T, D], and the updated cache. Pass the
        positions whose logits you need to `unembed`.
    """
    positions = starts[:, None] + jnp.arange(ids.shape[1])  # [B, T]
    # A row uses the same factors of LongRoPE while it grows, so that its cached keys stay valid.
    max_length = min(cfg.max_seq_len, tables.shape[1] * cache.BLOCK_SIZE)
    x, angles = embed_tokens(params, cfg, ids, positions, max_length)
    is_native = ids.shape[1] == 1 and has_native_step(params, cfg)
    apply_layers = native if is_native else one_by_one
    return apply_layers(x, params.layers, cfg, kv_cache, angles, tables, starts)


@register("decode_layers", "reference")
def one_by_one(
    x: jax.Array,
    layers: tuple[Layer, ...],
    cfg: Config,
    kv_cache: cache.KVCache,
    angles: tuple[tuple[jax.Array, jax.Array] | None, ...],
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Apply all layers to the next tokens of each row, one operation after another.

    Args:
        x: The residual stream, float32 [B, T, D].
        layers: Weights of the layers.
        cfg: Config of the decoder.
        kv_cache: The cache.
        angles: Rotary angles of each layer, as from `embed_tokens`.
        tables: As in `forward_cached`.
        starts: As in `forward_cached`.

    Returns:
        The residual stream after the last layer, float32 [B, T, D], and the updated cache.
    """
    keys, values = [], []
    for i, layer in enumerate(layers):
        k, v = kv_cache.keys[i], kv_cache.values[i]
        x, k, v = _forward_layer_cached(
            x, layer, k, v, cfg, angles[i], tables, starts, window=cfg.window(i)
        )
        keys.append(k)
        values.append(v)
    return x, cache.KVCache(keys=tuple(keys), values=tuple(values))


@register("decode_layers")
def native(
    x: jax.Array,
    layers: tuple[Layer, ...],
    cfg: Config,
    kv_cache: cache.KVCache,
    angles: tuple[tuple[jax.Array, jax.Array] | None, ...],
    tables: jax.Array,
    starts: jax.Array,
) -> tuple[jax.Array, cache.KVCache]:
    """Apply all layers to one new token of each row as one Numba kernel; see `native/step.py`."""
    step = kernels.native_module("step")
    return step.decode_layers(x, layers, cfg, kv_cache, angles, tables, starts)


def has_native_step(params: Params, cfg: Config) -> bool:
    """Whether a decoding step runs all layers as one native call (`native/step.py`)."""
    if not isinstance(params.layers[0].q.weight, BlockWeight):
        return False  # and Numba is not imported
    if kernels.select_impl("decode_layers") != "native":
        return False
    return kernels.native_module("step").is_supported(params.layers, cfg)


# A nested jit, so that layers of the same shapes are traced once.
@partial(jax.jit, static_argnames=("cfg", "window"))
def _forward_layer_cached(x, layer, keys, values, cfg, angles, tables, starts, *, window):
    def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
        nonlocal keys, values
        keys, values = cache.append(keys, values, k, v, tables, starts)
        options = attention_options(layer, cfg, window)
        return cache.attend(q, keys, values, tables, starts, **options)

    return block(x, layer, cfg, angles, attend), keys, values


def stack_layers(layers: tuple[Layer, ...]) -> Layer:
    """Stack the layers into one tree of [L, ...] leaves, for `jax.lax.scan` or layer sharding."""
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers)


def unstack_layers(stacked: Layer) -> tuple[Layer, ...]:
    """Return the layers of a tree made by `stack_layers`."""
    num_layers = len(jax.tree.leaves(stacked)[0])
    return tuple(jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(num_layers))


def num_matmul_weights(cfg: Config) -> int:
    """Return the number of weights in the matrix products that process one token in all layers.

    Embeddings and head do not count. Of the experts of a layer, num_experts_per_tok count.
    """
    total = 0
    for leaf in jax.tree.leaves(abstract(cfg).layers):
        size = int(np.prod(leaf.shape))
        if len(leaf.shape) == 3:
            total += size // leaf.shape[0] * (cfg.num_experts_per_tok or 1)
        elif len(leaf.shape) == 2:
            total += size
    return total


def num_bytes(params: Params) -> int:
    """Return the size of the weights in bytes."""
    return sum(np.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))
