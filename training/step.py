"""One training step as a pure function: from state and batch to state and sums.

The gradient of the mean loss is the gradient of the summed loss divided by the sum of weights.
Therefore a batch can be split into micro-batches whose sums are added: the result equals that of
the whole batch, even if the micro-batches have different numbers of tokens. The mean of their mean
losses would differ.
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

Sums = dict[str, jax.Array]  # "loss", "weight", and the other sums of the task


def make_train_step(
    task: Task, config: TrainConfig
) -> Callable[[State, Any, Batch], tuple[State, Sums]]:
    """Return the jitted function that computes a training step.

    Args:
        task: the model and its loss.
        config: the settings of the run.

    Returns:
        step(state, frozen, batch) -> (state, sums). The buffers of the input state are donated.
        `sums` also has "grad_norm", before clipping, and "lr".
    """
    optimizer, rate = optim.optimizer(config), optim.schedule(config)

    def step(state: State, frozen: Any, batch: dict[str, jax.Array]) -> tuple[State, Sums]:
        key = jax.random.fold_in(jax.random.key(config.seed), state.step)
        gradients, sums = _accumulate(task, config, state.weights, frozen, batch, key)
        with jax.named_scope("update"):
            # If all loss weights of a batch are 0, the gradients must be 0, not NaN.
            share = 1.0 / jnp.maximum(sums["weight"], 1e-30)
            norm = optax.tree.norm(gradients) * share
            if config.clip_norm is not None:
                share *= jnp.minimum(1.0, config.clip_norm / jnp.maximum(norm, 1e-30))
            gradients = jax.tree.map(lambda g: g * share, gradients)
            updates, optimizer_state = optimizer.update(gradients, state.optimizer, state.weights)
            weights = optax.apply_updates(state.weights, updates)
            average = _update_ema(state, weights, config.average_decay)
        sums |= {"grad_norm": norm, "lr": jnp.asarray(rate(state.step), jnp.float32)}
        return State(state.step + 1, weights, optimizer_state, average), sums

    return jax.jit(step, donate_argnums=0)


def make_eval_step(task: Task) -> Callable[[Any, Any, Batch], Sums]:
    """Return the jitted function evaluate(weights, frozen, batch) -> sums, for validation.

    Args:
        task: the model and its loss.
    """

    def evaluate(weights: Any, frozen: Any, batch: dict[str, jax.Array]) -> Sums:
        loss, weight, others = task.loss(weights, frozen, batch, jax.random.key(0))
        return {"loss": loss, "weight": weight, **others}

    return jax.jit(evaluate)


def _accumulate(
    task: Task,
    config: TrainConfig,
    weights: Any,
    frozen: Any,
    batch: dict[str, jax.Array],
    key: jax.Array,
) -> tuple[Any, Sums]:
    """Return the gradients of the summed loss, and the sums, each added over all micro-batches."""

    def loss(
        weights: Any, micro_batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, Sums]:
        loss, weight, others = task.loss(weights, frozen, micro_batch, key)
        return loss, {"loss": loss, "weight": weight, **others}

    def grads(micro_batch: dict[str, jax.Array], key: jax.Array) -> tuple[Any, Sums]:
        return jax.grad(loss, has_aux=True)(weights, micro_batch, key)

    if (count := config.micro_batches) == 1:
        return grads(batch, key)

    def split(name: str, array: jax.Array) -> jax.Array:
        if array.shape[0] % count:
            raise ValueError(
                f"micro_batches must divide the number of rows: {name!r} has {array.shape[0]} "
                f"rows, micro_batches is {count}"
            )
        return array.reshape(count, -1, *array.shape[1:])

    micro_batches = {name: split(name, jnp.asarray(array)) for name, array in batch.items()}
    keys = jax.random.split(key, count)
    first = {name: array[0] for name, array in micro_batches.items()}
    shapes = jax.eval_shape(grads, first, keys[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)

    def add(total: tuple[Any, Sums], inputs: tuple[dict[str, jax.Array], jax.Array]):
        return jax.tree.map(jnp.add, total, grads(*inputs)), None

    return jax.lax.scan(add, zeros, (micro_batches, keys))[0]


def _update_ema(state: State, weights: Any, decay: float | None) -> Any | None:
    """Return the updated EMA of the weights; the decay is smaller in the first steps."""
    if decay is None:
        return None
    step = state.step.astype(jnp.float32)
    rate = 1 - jnp.minimum(decay, (1 + step) / (10 + step))
    return jax.tree.map(lambda mean, new: mean + rate * (new - mean), state.average, weights)
