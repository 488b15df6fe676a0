"""Everything that changes while training: one tree, the argument and the result of a step."""

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
    """Where a run stands. Nothing else does: data and keys follow from the number of the step."""

    step: jax.Array  # int32 [], updates so far
    weights: Any  # float32, the masters, whatever the products are computed in
    optimizer: Any  # optax's state
    average: Any | None  # the running mean of weights; None where none is kept


def init(task: Task, config: TrainConfig) -> State:
    """The state before the first step."""
    weights = task.init(jax.random.key(config.seed))
    return State(
        step=jnp.zeros((), jnp.int32),
        weights=weights,
        optimizer=optim.optimizer(config).init(weights),
        average=None if config.average_decay is None else jax.tree.map(jnp.copy, weights),
    )
