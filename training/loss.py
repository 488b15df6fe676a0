"""Next-token cross-entropy, plainly and without ever holding the logits of a batch.

A model with a small width and a large vocabulary spends its memory on logits: 1,024 tokens of
SmolLM2 make 200 MB of them, and as much again for their gradient. `cross_entropy` is the
definition. `chunked` takes the rows some hundred at a time, and computes in the same breath what
the backward pass will want: the gradient of a row's loss, softmax minus one-hot, needs the logits
that are at hand. It is the idea of "Cut your losses" (Wijmans et al. 2024, arXiv:2411.09009),
without its kernel. Rows of weight 0 are never multiplied with the table at all.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

CHUNK = 256  # rows whose logits are held at a time


def cross_entropy(
    x: jax.Array, table: jax.Array, targets: jax.Array, weights: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """The definition.

    Args:
        x: the normed stream [R, D].
        table: [V, D], float32 or bfloat16: the format of the product.
        targets: int32 [R].
        weights: float32 [R], how much each row counts.

    Returns:
        The weighted sum of the losses and of the rows whose likeliest token is the target.
    """
    logits = _logits(x, table)  # [R, V]
    losses, is_right = _losses_and_hits(logits, targets)
    return jnp.sum(losses * weights), jnp.sum(is_right * weights)


def _logits(x: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("rd,vd->rv", x.astype(table.dtype), table, preferred_element_type=jnp.float32)


def _losses_and_hits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    chosen = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - chosen  # [R]
    return losses, chosen >= logits.max(axis=1)


def chunked_cross_entropy(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    dtype: str | None = None,
    chunk: int = CHUNK,
) -> tuple[jax.Array, jax.Array]:
    """The same as `cross_entropy`, `chunk` rows at a time.

    Args:
        weights: are data: to differentiate by them raises ValueError.
        dtype: of the product; None: that of the table.
    """
    x, table, targets, weights = map(jnp.asarray, (x, table, targets, weights))
    return _chunked_cross_entropy(
        x, table, targets, weights, jnp.dtype(dtype or table.dtype), min(chunk, len(x))
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def _chunked_cross_entropy(x, table, targets, weights, dtype, chunk):
    loss, right, _, _ = _chunked_loss_and_grads(
        x, table, targets, weights, dtype, chunk, False, False
    )
    return loss, right


def _forward(x, table, targets, weights, dtype, chunk):
    if weights.perturbed:
        raise ValueError("the weights of a loss are data: it cannot be differentiated by them")
    loss, right, dx, dtable = _chunked_loss_and_grads(
        x.value, table.value, targets.value, weights.value, dtype, chunk,
        x.perturbed, table.perturbed,
    )  # fmt: skip
    return (loss, right), (dx, dtable)


def _backward(dtype, chunk, gradients, cotangents):
    loss, _ = cotangents  # of what is right there is no gradient
    dx, dtable = (g if g is None else g * loss for g in gradients)
    return dx, dtable, None, None


_chunked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked_loss_and_grads(x, table, targets, weights, dtype, chunk, wants_dx, wants_dtable):
    """Sums of losses and of right answers, and the gradients of the first that are wanted."""
    num_rows = len(x)
    # Rows that count go first; the loop ends with the last of them.
    order = jnp.argsort(weights == 0)  # [R], stable
    num_chunks = (jnp.count_nonzero(weights) + chunk - 1) // chunk
    padding = -num_rows % chunk
    rows = jnp.pad(x[order].astype(dtype), ((0, padding), (0, 0)))
    weights = jnp.pad(weights[order], (0, padding))
    # A row of no weight may share a chunk with others; whatever its target is, it must be a number.
    targets = jnp.where(weights == 0, 0, jnp.pad(targets[order], (0, padding)))
    narrow = table.astype(dtype)
    ones = jnp.ones((len(table), 8), jnp.float32)  # one column would take a slower path

    def read(i, carry):
        loss, right, dx, dtable = carry
        at = i * chunk
        part, target, weight = (
            jax.lax.dynamic_slice_in_dim(array, at, chunk) for array in (rows, targets, weights)
        )
        logits = _logits(part, narrow)  # [C, V]
        most = logits.max(axis=1, keepdims=True)
        chosen = jnp.take_along_axis(logits, target[:, None], axis=1)  # [C, 1]
        # One pass computes the exps; sums are products with ones, which XLA's CPU backend makes
        # several times as fast as a reduction with an exp in it. The target's own stands apart.
        is_target = jnp.arange(logits.shape[1]) == target[:, None]
        others = jnp.where(is_target, 0.0, jnp.exp(logits - most))  # [C, V]
        rest = (others @ ones)[:, :1]  # [C, 1]
        total = rest + jnp.exp(chosen - most)
        loss += jnp.sum((jnp.log(total) + most - chosen)[:, 0] * weight)
        right += jnp.sum((chosen >= most)[:, 0] * weight)
        # d loss / d logits: softmax minus one-hot, which for the target is minus all the others.
        share = weight[:, None] / total
        at_target = -rest * share
        if wants_dx:
            change = jnp.einsum(
                "rv,vd->rd", others.astype(dtype), narrow, preferred_element_type=jnp.float32
            )
            change = change * share + at_target * narrow[target].astype(jnp.float32)
            dx = jax.lax.dynamic_update_slice_in_dim(dx, change, at, axis=0)
        if wants_dtable:
            wide = part.astype(jnp.float32)
            dtable += jnp.einsum(
                "rv,rd->vd",
                others.astype(dtype),
                (wide * share).astype(dtype),
                preferred_element_type=jnp.float32,
            )
            dtable = dtable.at[target].add(wide * at_target)
        return loss, right, dx, dtable

    zero = jnp.zeros((), jnp.float32)
    dx = jnp.zeros(rows.shape, jnp.float32) if wants_dx else None
    dtable = jnp.zeros(table.shape, jnp.float32) if wants_dtable else None
    carry = (zero, zero, dx, dtable)
    loss, right, dx, dtable = jax.lax.fori_loop(0, num_chunks, read, carry)
    if wants_dx:
        dx = dx[jnp.argsort(order)].astype(x.dtype)
    return loss, right, dx, dtable if dtable is None else dtable.astype(table.dtype)
