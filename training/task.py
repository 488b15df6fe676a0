"""The interface between the training loop and a model: initial weights and a loss.

A `Task` is any object with these two methods. Weights are any tree of arrays; their names in a
checkpoint are their paths in the tree.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

Weights = Any  # a tree of float32 arrays: a decoder, an adapter, a U-Net
Batch = dict[str, np.ndarray]  # the first axis of every array is the batch


class Task(Protocol):
    """A model and its loss."""

    def init(self, key: jax.Array) -> Weights:
        """Return the weights before the first step.

        The loop donates their buffers to the first step: callers must not use them afterwards.
        """
        ...

    def loss(
        self, weights: Weights, frozen: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """Return the loss of a batch as sums, so that micro-batches add up to the whole batch.

        Args:
            weights: the trained weights.
            frozen: weights without a gradient.
            batch: a batch or a micro-batch.
            key: for random numbers of the loss; it differs between steps and micro-batches.

        Returns:
            The sum of the losses; the sum of their weights, which must not depend on `weights`; and
            other sums for the metrics: "correct" becomes the accuracy, "tokens" the number of
            tokens, any other name a mean.
        """
        ...
