"""Optimizers: AdamW or Muon, and the learning rate schedule.

AdamW (Loshchilov & Hutter 2017, arXiv:1711.05101) is that of optax. Muon (Jordan et al. 2024)
orthogonalizes the update of each hidden matrix, so that all singular values of the update are about
equal. Embeddings, the LM head, norms and biases use AdamW. The updates of Muon are scaled to the
RMS of the updates of AdamW (Liu et al. 2025, arXiv:2502.16982), so that both use the same learning
rate.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from training.config import TrainConfig

_A, _B, _C, _NEWTON_SCHULZ_STEPS = 3.4445, -4.775, 2.0315, 5  # of Jordan et al.
_RMS = 0.2  # the approximate root mean square of the updates of AdamW
# Weights whose path contains one of these names are embeddings or the LM head.
_EMBEDDINGS = frozenset({"embed", "positions", "head"})


def schedule(config: TrainConfig) -> optax.Schedule:
    """Return the learning rate schedule: a function from the step, from 0, to the learning rate."""
    peak, warmup = config.learning_rate, config.warmup_steps
    steps, last = config.steps - warmup, peak * config.final_fraction
    if config.schedule == "cosine":
        after = optax.cosine_decay_schedule(peak, steps, config.final_fraction)
    elif config.schedule == "linear":
        after = optax.linear_schedule(peak, last, steps)
    else:
        after = optax.constant_schedule(peak)
    if not warmup:
        return after
    # The learning rate of the first step is 1 / (warmup + 1) of the peak, not 0.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """Return the optimizer as an optax transformation of clipped gradients into updates."""
    rate = schedule(config)
    adamw = optax.adamw(
        rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decay_mask
    )
    if config.optimizer == "adamw":
        return adamw
    muon = optax.chain(
        optax.trace(config.b1, nesterov=True),
        optax.stateless(lambda updates, _: jax.tree.map(orthogonalize, updates)),
        optax.add_decayed_weights(config.weight_decay),
        optax.scale_by_learning_rate(rate),
    )
    return optax.partition({"adamw": adamw, "muon": muon}, _optimizer_labels)


def orthogonalize(gradient: jax.Array) -> jax.Array:
    """Return the approximate orthogonal factor of a gradient, scaled to an RMS of about `_RMS`.

    A step of the Newton-Schulz iteration replaces X by Q X with Q = a I + b X X' + c (X X')^2; five
    steps bring all singular values near 1. Q depends only on X X', a square matrix of the smaller
    side of X. Therefore the iteration updates X X' and the product of all Q, and multiplies X once
    at the end.

    Args:
        gradient: float32 [M, N].

    Returns:
        float32 [M, N].
    """
    is_tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if is_tall else gradient
    x = x / jnp.maximum(jnp.linalg.norm(x), 1e-30)
    identity = jnp.eye(len(x))

    def iterate(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        product, gram = carry
        q = _A * identity + _B * gram + _C * (gram @ gram)
        return q @ product, q @ gram @ q

    product, _ = jax.lax.fori_loop(0, _NEWTON_SCHULZ_STEPS, iterate, (identity, x @ x.T))
    x = product @ x * (_RMS * max(x.shape) ** 0.5)
    return x.T if is_tall else x


def decay_mask(weights: Any) -> Any:
    """Return which weights decay, as a pytree of booleans: matrices do, norms and biases do not."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, weights)


def _optimizer_labels(weights: Any) -> Any:
    """Return the label of each weight, "muon" or "adamw", for the optimizer "muon"."""

    def label(path: tuple, leaf: jax.Array) -> str:
        names = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return "muon" if leaf.ndim == 2 and not _EMBEDDINGS.intersection(names) else "adamw"

    return jax.tree_util.tree_map_with_path(label, weights)
