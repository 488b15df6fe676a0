"""The operations, one function each, which looks up an implementation and calls it.

The lookup happens while a program is traced, so it costs nothing when the program runs.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from transformer.kernels import registry
from transformer.weights import BlockWeight, Linear


def matmul(
    rows: jax.Array,
    weight: jax.Array | BlockWeight,
    scale: jax.Array | None = None,
    *,
    impl: str | None = None,
) -> jax.Array:
    """Compute `rows @ (weight * scale).T`, accumulated in float32 (int32 for integers).

    Args:
        rows: float32 [R, in].
        weight: float32, bfloat16, int8 or blocks [out, in], the dtype of the product.
        scale: Scale per output row of int8 weights, float32 [out].
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [R, out].
    """
    count = (
        ", one row" if len(rows) == 1 else ", many rows" if len(rows) >= registry.MANY_ROWS else ""
    )
    kind = "blocks" if isinstance(weight, BlockWeight) else f"{weight.dtype}{count}"
    with jax.named_scope("matmul"):
        return _resolve_impl("matmul", f"matmul {kind}", impl)(rows, weight, scale)


def norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, *, impl: str | None = None
) -> jax.Array:
    """Apply layer norm to the last axis, or RMS norm if `bias` is None.

    Args:
        x: float32 [..., D].
        scale: float32 [D].
        bias: float32 [D] or None.
        eps: Added to the variance (layer norm) or to the mean of squares (RMS norm).
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [..., D].
    """
    with jax.named_scope("norm"):
        return _resolve_impl("norm", "norm", impl)(x, scale, bias, eps)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, impl: str | None = None) -> jax.Array:
    """Rotate the channel pairs (i, i + R/2) of the first R channels of each head.

    Args:
        x: Queries or keys, float32 [B, T, N, H].
        cos: Cosines of the angles, float32 [B, T, 1, R/2]; the other H - R channels stay.
        sin: Sines of the angles, float32 [B, T, 1, R/2].
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [B, T, N, H].
    """
    with jax.named_scope("rotate"):
        function, size = _resolve_impl("rotate", "rotate", impl), 2 * cos.shape[-1]
        if size == x.shape[-1]:
            return function(x, cos, sin)
        return jnp.concatenate([function(x[..., :size], cos, sin), x[..., size:]], axis=-1)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Compute causal attention of whole sequences.

    Args:
        q: Queries, float32 [B, T, N, H].
        k: Keys, float32 [B, T, K, H].
        v: Values, float32 [B, T, K, H].
        window: Number of positions a query attends to, including its own position. None means all
            positions up to its own.
        segments: Text number of each position where several texts share a row, int32 [B, T]. A
            query attends to positions of its own text only. None means one text per row.
        softcap: Scores become softcap * tanh(score / softcap) before the softmax; None: no cap.
        sinks: Score of each head for attending to no position, float32 [N]; None: no sinks.
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [B, T, N, H].
    """
    with jax.named_scope("attend"):
        function = _resolve_impl("attend", "attend", impl)
        options = _without_none(softcap=softcap, sinks=sinks)
        return function(q, k, v, window=window, segments=segments, **options)


def attend_cached(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None = None,
    softcap: float | None = None,
    sinks: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Compute causal attention of new queries over the cached positions of their rows.

    The pools are those of one layer of `transformer.cache`, which defines their layout.

    Args:
        q: New queries, float32 [B, T, N, H]; query t of row b has position starts[b] + t.
        keys: Pool of keys, float32 or the bits of bfloat16 in uint16, [P, K, H, BLOCK_SIZE].
        values: Pool of values, of the same dtype, [P, K, BLOCK_SIZE, H].
        tables: The blocks of each row in order, int32 [B, S/BLOCK_SIZE].
        starts: Position of the first query of each row, int32 [B].
        window: As in `attend`.
        softcap: As in `attend`.
        sinks: As in `attend`.
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [B, T, N, H].
    """
    with jax.named_scope("attend_cached"):
        function = _resolve_impl("attend_cached", "attend_cached", impl)
        options = _without_none(softcap=softcap, sinks=sinks)
        return function(q, keys, values, tables, starts, window=window, **options)


def gated_mlp(
    x: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    *,
    limit: float | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Compute `down(activation(gate(x)) * up(x))`, a gated linear unit.

    After Shazeer 2020, arXiv:2002.05202.

    Args:
        x: float32 [..., D].
        gate: Linear map [F, D].
        up: Linear map [F, D].
        down: Linear map [D, F].
        kind: "swiglu" (SiLU), "geglu" (tanh approximation of GELU), or "swiglu_oai" (gpt-oss): the
            activation is g * sigmoid(1.702 g), up(x) + 1 takes the place of up(x), and both maps
            are clipped.
        limit: Only for "swiglu_oai": gate(x) is at most this, up(x) between its negative and it.
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [..., D].
    """
    with jax.named_scope("gated_mlp"):
        function = _resolve_impl("gated_mlp", "gated_mlp", impl)
        return function(x, gate, up, down, kind, **_without_none(limit=limit))


def experts(
    x: jax.Array,
    weights: jax.Array,
    chosen: jax.Array,
    gate: Linear,
    up: Linear,
    down: Linear,
    kind: str,
    *,
    limit: float | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Compute the weighted sum of the gated MLPs that each token has chosen.

    Args:
        x: float32 [B, T, D].
        weights: Weight of each chosen expert, float32 [B, T, k].
        chosen: Index of each chosen expert, int32 [B, T, k]; the k indices of a token differ.
        gate: Linear maps [E, F, D], whose biases are [E, F].
        up: Linear maps [E, F, D].
        down: Linear maps [E, D, F].
        kind: As in `gated_mlp`.
        limit: As in `gated_mlp`.
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [B, T, D].
    """
    with jax.named_scope("experts"):
        function = _resolve_impl("experts", "experts", impl)
        rows, k = jnp.asarray(x).reshape(-1, x.shape[-1]), weights.shape[-1]
        pairs = weights.reshape(-1, k), chosen.reshape(-1, k)
        y = function(rows, *pairs, gate, up, down, kind, **_without_none(limit=limit))
        return y.reshape(x.shape)


def truncate(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    impl: str | None = None,
) -> jax.Array:
    """Set the logits of tokens that top-k, top-p or min-p exclude to -inf.

    Tokens tied with the last kept token are kept too.

    Args:
        logits: float32 [V].
        top_k: Number of tokens to keep, int32; 0 keeps all.
        top_p: Keep the most likely tokens until their total probability reaches this; 1 keeps all.
        min_p: Keep tokens of at least this probability relative to the most likely one.
        impl: Name of the implementation; None means the default.

    Returns:
        float32 [V].
    """
    with jax.named_scope("truncate"):
        return _resolve_impl("truncate", "truncate", impl)(logits, top_k, top_p, min_p)


def linear(x: jax.Array, p: Linear) -> jax.Array:
    """Apply a linear map and its LoRA adapter, if any, to the last axis of `x`.

    Args:
        x: float32 [..., in].
        p: Weights of the linear map.

    Returns:
        float32 [..., out].
    """
    rows = x.reshape(-1, x.shape[-1])  # [R, in]
    y = matmul(rows, p.weight, p.scale)  # [R, out]
    if p.bias is not None:
        y = y + p.bias
    if p.lora is not None:
        inner = matmul(rows, p.lora.a)  # [R, r]
        y = y + matmul(inner, p.lora.b) * p.lora.scale
    return y.reshape(*x.shape[:-1], -1)


def _without_none(**arguments: Any) -> dict[str, Any]:
    """Return the arguments that are not None, so that implementations need not take the others."""
    return {name: value for name, value in arguments.items() if value is not None}


def _resolve_impl(operation: str, kind: str, impl: str | None) -> registry.Implementation:
    return registry.get_impl(operation, impl or registry.select_impl(kind))
