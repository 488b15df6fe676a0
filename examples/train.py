"""Fit y = w x with the training loop: `python examples/train.py RUN_FOLDER`."""

import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np

import training


class LinearModel:
    def init(self, key):
        return {"w": jnp.zeros(())}

    def loss(self, weights, frozen, batch, key):
        errors = (weights["w"] * batch["x"] - batch["y"]) ** 2
        # The sum of the losses, the number of examples, and other sums to log.
        return errors.sum(), jnp.float32(len(errors)), {}


x = np.arange(1, 9, dtype=np.float32) / 8
batch = {"x": x, "y": 3 * x}
config = training.TrainConfig(steps=200, learning_rate=0.1)
outcome = training.train(LinearModel(), None, lambda step: batch, config, Path(sys.argv[1]))
print(f"w = {float(outcome.state.weights['w']):.2f}")
