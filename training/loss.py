"""Next-token cross-entropy: the definition, and a version that never stores all logits.

In a model with a small width and a large vocabulary, the logits take most of the memory: 200 MB for
1,024 tokens of SmolLM2, and as much again for their gradient. `cross_entropy` is the definition.
`chunked_cross_entropy` processes a few hundred rows at a time. It also computes the gradient of
each chunk in the forward pass, because the gradient of a loss, softmax minus one-hot, needs the
same logits. The idea is that of "Cut your losses" (Wijmans et al. 2024, arXiv:2411.09009), without
its kernel. Rows of weight 0 are skipped.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp

CHUNK = 256  # rows whose logits are in memory at a time


def cross_entropy(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the weighted sums of the losses and of the correct predictions.

    Args:
        x: the hidden states after the final norm [R, D].
        table: the LM head [V, D], float32 or bfloat16; its dtype is that of the matrix product.
        targets: int32 [R], the target tokens.
        weights: float32 [R], the weight of each row.
        softcap: logits are replaced by softcap * tanh(logit / softcap); None leaves them unchanged.

    Returns:
        The weighted sum of the losses, and the sum of the weights of rows whose most likely token
        is the target; both float32 [].
    """
    logits = _logits(x, table)  # [R, V]
    if softcap is not None:
        logits = softcap * jnp.tanh(logits / softcap)
    losses, is_correct = _losses_and_hits(logits, targets)
    return jnp.sum(losses * weights), jnp.sum(is_correct * weights)


def _logits(x: jax.Array, table: jax.Array) -> jax.Array:
    return jnp.einsum("rd,vd->rv", x.astype(table.dtype), table, preferred_element_type=jnp.float32)


def _losses_and_hits(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    target_logits = jnp.take_along_axis(logits, targets[:, None], axis=1)[:, 0]
    losses = jax.nn.logsumexp(logits, axis=1) - target_logits  # [R]
    return losses, target_logits >= logits.max(axis=1)


def chunked_cross_entropy(
    x: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    dtype: str | None = None,
    chunk: int = CHUNK,
    softcap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the sums of `cross_entropy`, computed `chunk` rows at a time.

    Args:
        x: as for `cross_entropy`.
        table: as for `cross_entropy`.
        targets: as for `cross_entropy`.
        weights: as for `cross_entropy`; there is no gradient with respect to them.
        dtype: the dtype of the matrix product; None for that of the table.
        chunk: the number of rows whose logits are in memory at a time.
        softcap: as for `cross_entropy`.

    Raises:
        ValueError: a gradient with respect to `weights` is requested.
    """
    x, table, targets, weights = map(jnp.asarray, (x, table, targets, weights))
    return _chunked_cross_entropy(
        x, table, targets, weights, jnp.dtype(dtype or table.dtype), min(chunk, len(x)), softcap
    )


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _chunked_cross_entropy(x, table, targets, weights, dtype, chunk, softcap):
    loss, correct, _, _ = _chunked_loss_and_grads(
        x, table, targets, weights, dtype, chunk, softcap, False, False
    )
    return loss, correct


def _forward(x, table, targets, weights, dtype, chunk, softcap):
    if weights.perturbed:
        raise ValueError("the loss has no gradient with respect to weights; use cross_entropy")
    loss, correct, dx, dtable = _chunked_loss_and_grads(
        x.value, table.value, targets.value, weights.value, dtype, chunk, softcap,
        x.perturbed, table.perturbed,
    )  # fmt: skip
    return (loss, correct), (dx, dtable)


def _backward(dtype, chunk, softcap, gradients, cotangents):
    loss, _ = cotangents  # the number of correct predictions has no gradient
    dx, dtable = (g if g is None else g * loss for g in gradients)
    return dx, dtable, None, None


_chunked_cross_entropy.defvjp(_forward, _backward, symbolic_zeros=True)


def _chunked_loss_and_grads(
    x, table, targets, weights, dtype, chunk, softcap, needs_dx, needs_dtable
):
    """Return the sums of `cross_entropy`, and the gradients of the loss for x and the table."""
    num_rows = len(x)
    # Move rows with a nonzero weight to the front; the loop over chunks ends after the last of
    # them.
    order = jnp.argsort(weights == 0)  # [R], stable
    num_chunks = (jnp.count_nonzero(weights) + chunk - 1) // chunk
    padding = -num_rows % chunk
    rows = jnp.pad(x[order].astype(dtype), ((0, padding), (0, 0)))
    weights = jnp.pad(weights[order], (0, padding))
    # A chunk can contain rows of weight 0; replace their targets, which can be invalid indices.
    targets = jnp.where(weights == 0, 0, jnp.pad(targets[order], (0, padding)))
    cast_table = table.astype(dtype)
    # Several columns, because XLA would compute one column by a slower matrix-vector product.
    ones = jnp.ones((len(table), 8), jnp.float32)

    def add_chunk(i, carry):
        loss, correct, dx, dtable = carry
        start = i * chunk
        x_chunk, target, weight = (
            jax.lax.dynamic_slice_in_dim(array, start, chunk) for array in (rows, targets, weights)
        )
        logits = _logits(x_chunk, cast_table)  # [C, V]
        slope = None  # of the cap
        if softcap is not None:
            capped = jnp.tanh(logits / softcap)
            logits, slope = softcap * capped, 1.0 - capped * capped
        max_logits = logits.max(axis=1, keepdims=True)
        target_logits = jnp.take_along_axis(logits, target[:, None], axis=1)  # [C, 1]
        # The exponentials are computed in one pass and summed by a matrix product with ones, which
        # is several times faster in XLA's CPU backend than a reduction that contains an
        # exponential. The exponential of the target is added separately.
        is_target = jnp.arange(logits.shape[1]) == target[:, None]
        others = jnp.where(is_target, 0.0, jnp.exp(logits - max_logits))  # [C, V]
        others_sum = (others @ ones)[:, :1]  # [C, 1]
        total = others_sum + jnp.exp(target_logits - max_logits)
        loss += jnp.sum((jnp.log(total) + max_logits - target_logits)[:, 0] * weight)
        correct += jnp.sum((target_logits >= max_logits)[:, 0] * weight)
        # d loss / d logits is softmax minus one-hot; at the target, that is minus the sum of the
        # softmax over all other tokens.
        scale = weight[:, None] / total
        at_target = -others_sum * scale
        if slope is not None:
            others = others * slope
            at_target = at_target * jnp.take_along_axis(slope, target[:, None], axis=1)
        if needs_dx:
            dx_chunk = jnp.einsum(
                "rv,vd->rd", others.astype(dtype), cast_table, preferred_element_type=jnp.float32
            )
            dx_chunk = dx_chunk * scale + at_target * cast_table[target].astype(jnp.float32)
            dx = jax.lax.dynamic_update_slice_in_dim(dx, dx_chunk, start, axis=0)
        if needs_dtable:
            x_float32 = x_chunk.astype(jnp.float32)
            dtable += jnp.einsum(
                "rv,rd->vd",
                others.astype(dtype),
                (x_float32 * scale).astype(dtype),
                preferred_element_type=jnp.float32,
            )
            dtable = dtable.at[target].add(x_float32 * at_target)
        return loss, correct, dx, dtable

    zero = jnp.zeros((), jnp.float32)
    dx = jnp.zeros(rows.shape, jnp.float32) if needs_dx else None
    dtable = jnp.zeros(table.shape, jnp.float32) if needs_dtable else None
    carry = (zero, zero, dx, dtable)
    loss, correct, dx, dtable = jax.lax.fori_loop(0, num_chunks, add_chunk, carry)
    if needs_dx:
        dx = dx[jnp.argsort(order)].astype(x.dtype)
    return loss, correct, dx, dtable if dtable is None else dtable.astype(table.dtype)
