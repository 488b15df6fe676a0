"""The interface between the training loop and a model: initial weights and a loss.

A `Task` is any object with the two methods below. Weights are any pytree of arrays; their names in
a checkpoint are their paths in the pytree.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

Weights = Any  # a pytree of float32 arrays: a decoder, an adapter, a U-Net
Batch = dict[str, np.ndarray]  # the first axis of every array is the batch


class Task(Protocol):
    """The interface of a model and its loss, which the training loop calls."""

    def init(self, key: jax.Array) -> Weights:
        """Return the weights before the first step.

        The training loop donates their buffers to the first step, so they must not be used
        afterwards.
        """
        ...

    def loss(
        self, weights: Weights, frozen: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return the loss of a batch as sums, so that the sums of micro-batches can be added.

        Args:
            weights: the trained weights.
            frozen: weights that are not trained.
            batch: a batch or a micro-batch.
            key: a PRNG key for random numbers in the loss; each step and micro-batch has its own.

        Returns:
            The sum of the losses; the sum of their weights, which must not depend on `weights`; and
            other sums for the metrics: "correct" is logged as "accuracy", divided by the sum of
            weights; "tokens" is logged as it is; any other sum is divided by the sum of weights.
        """
        ...
