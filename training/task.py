"""What the loop knows of a model: where its weights begin, and what is to become small.

A `Task` may be any object with these two functions. Weights are any tree of arrays; their names in
a checkpoint are their paths in the tree.
"""

from __future__ import annotations

from typing import Any, Protocol

import jax
import numpy as np

Weights = Any  # a tree of float32 arrays: a decoder, an adapter, a U-Net
Batch = dict[str, np.ndarray]  # every array with the examples along its first axis


class Task(Protocol):
    """A model and what it is to learn."""

    def init(self, key: jax.Array) -> Weights:
        """The weights before the first step.

        The loop gives their memory away: they must not be used elsewhere afterwards.
        """
        ...

    def loss(
        self, weights: Weights, frozen: Any, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[jax.Array, jax.Array, dict[str, jax.Array]]:
        """The loss of a batch, as sums, so that the parts of a batch add up to the whole exactly.

        Args:
            weights: what is trained.
            frozen: what is not; no gradient of it is computed.
            key: for what the loss draws; another one each step and each part of a batch.

        Returns:
            The sum of the losses; the sum of their weights, which must not depend on what is
            trained; and other sums for the metrics. "correct" is told as the accuracy, "tokens" as
            the number of tokens that were read, any other name as a mean.
        """
        ...
