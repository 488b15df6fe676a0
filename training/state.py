"""The training state: one pytree that a training step takes and returns."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from training import optim
from training.config import TrainConfig
from training.task import Task


@struct.dataclass
class State:
    """The complete state of a run; batches and random keys are computed from the step number.

    Attributes:
        step: int32 [], the number of updates so far.
        weights: float32 master weights, for any dtype of the matrix products.
        optimizer: the state of optax.
        average: the exponential moving average (EMA) of the weights; None if
            `TrainConfig.average_decay` is None.
    """

    step: jax.Array
    weights: Any
    optimizer: Any
    average: Any | None


def init(task: Task, config: TrainConfig) -> State:
    """Return the state before the first step."""
    weights = task.init(jax.random.key(config.seed))
    return State(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        optimizer=optim.optimizer(config).init(weights),
        average=None if config.average_decay is None else jax.tree.map(jnp.copy, weights),
    )
