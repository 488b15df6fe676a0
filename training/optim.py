"""From gradients to updates: AdamW or Muon, and the learning rate of each step.

AdamW is Loshchilov & Hutter 2017, arXiv:1711.05101, as optax has it. Muon (Jordan et al. 2024)
makes the update of each hidden matrix nearly orthogonal, so that all its directions move alike; the
token table, the head, norms and biases stay with AdamW, and updates are scaled to the size AdamW's
have (Liu et al. 2025, arXiv:2502.16982), so that one learning rate serves both.
"""

from __future__ import annotations

from typing import Any

import jax
import optax
from optax import contrib

from training.config import Config

_RMS = 0.2  # about the root mean square of AdamW's updates
# Matrices that are tables of vectors, or read out by rows: parts of their names.
_TABLES = frozenset({"embed", "positions", "head"})


def schedule(config: Config) -> optax.Schedule:
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


def optimizer(config: Config) -> optax.GradientTransformation:
    """What turns gradients, already clipped, into updates."""
    rate = schedule(config)
    adamw = optax.adamw(
        rate, config.b1, config.b2, config.eps, weight_decay=config.weight_decay, mask=decays
    )
    if config.optimizer == "adamw":
        return adamw
    muon = contrib.muon(
        rate,
        beta=config.b1,
        eps=config.eps,
        weight_decay=config.weight_decay,
        consistent_rms=_RMS,
    )
    return optax.partition({"adamw": adamw, "muon": muon}, _whose)


def decays(weights: Any) -> Any:
    """Which leaves weight decay pulls to zero: matrices; norms and biases stay where they are."""
    return jax.tree.map(lambda leaf: leaf.ndim >= 2, weights)


def _whose(weights: Any) -> Any:
    """For each leaf, by which of the two it moves when the optimiser is Muon."""

    def name(path: tuple, leaf: jax.Array) -> str:
        steps = jax.tree_util.keystr(path, simple=True, separator=".").split(".")
        return "muon" if leaf.ndim == 2 and not _TABLES.intersection(steps) else "adamw"

    return jax.tree_util.tree_map_with_path(name, weights)
