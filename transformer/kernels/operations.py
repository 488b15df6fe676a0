"""The operations: one function each, which finds its form in the table and calls it.

The choice is made while a program is traced, so it costs nothing when the program runs.
"""

from __future__ import annotations

import jax

from transformer.kernels import registry
from transformer.weights import Linear


def matmul(
    rows: jax.Array, weight: jax.Array, scale: jax.Array | None = None, *, impl: str | None = None
) -> jax.Array:
    """`rows @ (weight * scale).T`, accumulated in float32 (int32 for int8): [R, in] -> [R, out].

    Args:
        rows: [R, in].
        weight: float32, bfloat16 or int8 [out, in]; its dtype is the format of the product.
        scale: [out], of int8 weights.
    """
    count = (
        ", one row" if len(rows) == 1 else ", many rows" if len(rows) >= registry.MANY_ROWS else ""
    )
    with jax.named_scope("matmul"):
        return _resolve_impl("matmul", f"matmul {weight.dtype}{count}", impl)(rows, weight, scale)


def norm(
    x: jax.Array, scale: jax.Array, bias: jax.Array | None, eps: float, *, impl: str | None = None
) -> jax.Array:
    """Layer norm over the last axis of [..., D]; where `bias` is None, RMS norm.

    Args:
        scale, bias: [D].
    """
    with jax.named_scope("norm"):
        return _resolve_impl("norm", "norm", impl)(x, scale, bias, eps)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array, *, impl: str | None = None) -> jax.Array:
    """Turns the channel pairs (i, i + H/2) of [B, T, N, H] by given angles.

    Args:
        cos, sin: [B, T, 1, H/2].
    """
    with jax.named_scope("rotate"):
        return _resolve_impl("rotate", "rotate", impl)(x, cos, sin)


def attend(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None = None,
    segments: jax.Array | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Causal attention of whole sequences: [B, T, N, H].

    Args:
        q: [B, T, N, H].
        k, v: [B, T, K, H].
        window: how many positions a query sees, its own among them; None: all before it.
        segments: int32 [B, T], which of several texts in a row a position belongs to; it sees those
            of its own. None: a row is one text.
    """
    with jax.named_scope("attend"):
        return _resolve_impl("attend", "attend", impl)(q, k, v, window=window, segments=segments)


def attend_cached(
    q: jax.Array,
    keys: jax.Array,
    values: jax.Array,
    tables: jax.Array,
    starts: jax.Array,
    *,
    window: int | None = None,
    impl: str | None = None,
) -> jax.Array:
    """Causal attention of new queries over the cached past of their rows: [B, T, N, H].

    The pools are those of one layer of `transformer.cache`, which says how they are laid out.

    Args:
        q: [B, T, N, H]; query t of row b stands at position starts[b] + t.
        keys: float32, or bfloat16 as its bits in uint16, [P, K, H, BLOCK].
        values: the same, [P, K, BLOCK, H].
        tables: int32 [B, S/BLOCK], the blocks of each row in order.
        starts: int32 [B].
        window: as in `attend`.
    """
    with jax.named_scope("attend_cached"):
        form = _resolve_impl("attend_cached", "attend_cached", impl)
        return form(q, keys, values, tables, starts, window=window)


def gated_mlp(
    x: jax.Array, gate: Linear, up: Linear, down: Linear, kind: str, *, impl: str | None = None
) -> jax.Array:
    """`down(activation(gate(x)) * up(x))`, a gated linear unit: [..., D] -> [..., D].

    After Shazeer 2020, arXiv:2002.05202.

    Args:
        gate, up: `Linear` [F, D].
        down: `Linear` [D, F].
        kind: "swiglu" (SiLU) or "geglu" (GELU, by its tanh approximation).
    """
    with jax.named_scope("gated_mlp"):
        return _resolve_impl("gated_mlp", "gated_mlp", impl)(x, gate, up, down, kind)


def truncate(
    logits: jax.Array,
    top_k: jax.Array,
    top_p: jax.Array,
    min_p: jax.Array,
    *,
    impl: str | None = None,
) -> jax.Array:
    """-inf where top-k, top-p or min-p leave a token out: [V] -> [V].

    Tokens as likely as the last one that stays, stay too.

    Args:
        top_k: int32, keep so many; 0 keeps all.
        top_p: keep the likeliest tokens that hold this much probability; 1 keeps all.
        min_p: keep tokens at least this likely, relative to the likeliest.
    """
    with jax.named_scope("truncate"):
        return _resolve_impl("truncate", "truncate", impl)(logits, top_k, top_p, min_p)


def linear(x: jax.Array, p: Linear) -> jax.Array:
    """Applies `p` to the last axis: float32 [..., in] -> float32 [..., out]."""
    rows = x.reshape(-1, x.shape[-1])  # [R, in]
    y = matmul(rows, p.weight, p.scale)  # [R, out]
    if p.bias is not None:
        y = y + p.bias
    if p.lora is not None:
        inner = matmul(rows, p.lora.a)  # [R, r]
        y = y + matmul(inner, p.lora.b) * p.lora.scale
    return y.reshape(*x.shape[:-1], -1)


def _resolve_impl(operation: str, kind: str, impl: str | None) -> registry.Implementation:
    return registry.get_impl(operation, impl or registry.select_impl(kind))
