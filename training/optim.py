"""From gradients to updates: AdamW or Muon, and the learning rate of each step.

AdamW is Loshchilov & Hutter 2017, arXiv:1711.05101, as optax has it. Muon (Jordan et al. 2024)
makes the update of each hidden matrix nearly orthogonal, so that all its directions move alike; the
token table, the head, norms and biases stay with AdamW, and updates are scaled to the size AdamW's
have (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from training.config import TrainConfig

_A, _B, _C, _NEWTON_SCHULZ_STEPS = 3.4445, -4.775, 2.0315, 5  # of Jordan's iteration
_RMS = 0.2  # about the root mean square of AdamW's updates
# Matrices that are tables of vectors, or read out by rows: parts of their names.
_EMBEDDINGS = frozenset({"embed", "positions", "head"})


def schedule(config: TrainConfig) -> optax.Schedule:
    """The learning rate of each step, counted from 0."""
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
    # The first step moves too: it is 1/(warmup + 1) of the way up.
    rise = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([rise, after], [warmup])


def optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """What turns gradients, already clipped, into updates."""
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
    """The nearly orthogonal matrix next to a gradient, with entries about as large as `_RMS`.

    Newton-Schulz: X becomes Q X with Q = a I + b X X' + c (X X')^2, five times, which brings all
    singular values near 1. Only X X' decides what Q is; so that small square matrix goes through
    the five rounds, and X, which may be many times as wide, is multiplied once at the end.
    """
    is_tall = gradient.shape[0] > gradient.shape[1]
    x = gradient.T if is_tall else gradient
    x = x / jnp.maximum(jnp.linalg.norm(x), 1e-30)
    identity = jnp.eye(len(x))

    def turn(_, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, gram = carry
        q = _A * identity + _B * gram + _C * (gram @ gram)
        return q @ total, q @ gram @ q

    total, _ = jax.lax.fori_loop(0, _NEWTON_SCHULZ_STEPS, turn, (identity, x @ x.T))
    x = total @ x * (_RMS * max(x.shape) ** 0.5)
    return x.T if is_tall else x


def decay_mask(weights: Any) -> Any:
    """Which leaves weight decay pulls to zero: matrices; norms and biases stay where they are."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, weights)


def _optimizer_labels(weights: Any) -> Any:
    """For each leaf, by which of the two it moves when the optimiser is Muon."""

    def name(path: tuple, leaf: jax.Array) -> str:
        steps = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return "muon" if leaf.ndim == 2 and not _EMBEDDINGS.intersection(steps) else "adamw"

    return jax.tree_util.tree_map_with_path(name, weights)
