"""One step of training, as a pure function: state and batch in, state and sums out.

The gradient of a mean over a batch is the gradient of a sum, divided once. So a batch may be read
in parts (`micro_batches`) whose sums are added up: the result is that of the whole batch, also
where its parts hold different numbers of tokens. The mean of the parts' means is not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from training import optim
from training.config import TrainConfig
from training.state import State
from training.task import Batch, Task

Sums = dict[str, jax.Array]  # "loss", "weight", and what the task counts


def make_train_step(
    task: Task, config: TrainConfig
) -> Callable[[State, Any, Batch], tuple[State, Sums]]:
    """Compiles, at its first call, the function that takes a step.

    Returns:
        step(state, frozen, batch) -> (state, sums). The memory of the state that goes in becomes
        that of the one that comes out; `sums` also has "grad_norm", before clipping, and "lr".
    """
    optimizer, rate = optim.optimizer(config), optim.schedule(config)

    def step(state: State, frozen: Any, batch: Batch) -> tuple[State, Sums]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, sums = _accumulate(task, config, state.weights, frozen, batch, key)
        with jax.named_scope("update"):
            # A batch in which nothing counts moves nothing.
            share = 1.0 / jnp.maximum(sums["weight"], 1e-30)
            norm = optax.tree.norm(gradients) * share
            if config.clip_norm is not None:
                share *= jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * share, gradients)
            updates, memory = optimizer.update(gradients, state.optimizer, state.weights)
            weights = optax.apply_updates(state.weights, updates)
            average = _update_ema(state, weights, config.average_decay)
        sums |= {"grad_norm": norm, "lr": jnp.asarray(rate(state.step), jnp.float32)}
        return State(state.step + 1, weights, memory, average), sums

    return jax.jit(step, donate_argnums=0)


def make_eval_step(task: Task) -> Callable[[Any, Any, Batch], Sums]:
    """Compiles, at its first call, evaluate(weights, frozen, batch) -> sums."""

    def evaluate(weights: Any, frozen: Any, batch: Batch) -> Sums:
        loss, weight, others = task.loss(weights, frozen, batch, jax.random.key(0))
        return {"loss": loss, "weight": weight, **others}

    return jax.jit(evaluate)


def _accumulate(task: Task, config: TrainConfig, weights: Any, frozen: Any, batch: Batch, key):
    """The gradients of the summed loss, and the sums, over all parts of the batch."""

    def loss(weights: Any, part: Batch, key: jax.Array) -> tuple[jax.Array, Sums]:
        loss, weight, others = task.loss(weights, frozen, part, key)
        return loss, {"loss": loss, "weight": weight, **others}

    def read(part: Batch, key: jax.Array) -> tuple[Any, Sums]:
        return jax.grad(loss, has_aux=True)(weights, part, key)

    if (count := config.micro_batches) == 1:
        return read(batch, key)

    def split(name: str, array: jax.Array) -> jax.Array:
        if array.shape[0] % count:
            raise ValueError(
                f"micro_batches must divide the batch: {name!r} has {array.shape[0]} rows, "
                f"which {count} does not"
            )
        return array.reshape(count, -1, *array.shape[1:])

    parts = {name: split(name, jnp.asarray(array)) for name, array in batch.items()}
    keys = jax.random.split(key, count)
    shapes = jax.eval_shape(read, {name: array[0] for name, array in parts.items()}, keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: tuple[Any, Sums], part: tuple[Batch, jax.Array]):
        return jax.tree.map(jnp.add, total, read(*part)), None

    return jax.lax.scan(add, zeros, (parts, keys))[0]


def _update_ema(state: State, weights: Any, decay: float | None) -> Any | None:
    """The running mean of weights, which early on forgets faster: at first they move most."""
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    decay = jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, new: mean + (1 - decay) * (new - mean), state.average, weights)
