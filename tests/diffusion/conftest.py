"""What the tests of diffusion share."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np

with np.load(Path(__file__).parents[1] / "golden" / "diffusion" / "schedulers.npz") as arrays:
    GOLDEN = dict(arrays)


def dummy(z, level):
    """The network that the golden files were made with: see make_diffusion.py."""
    total = level.alpha + level.sigma
    pattern = jnp.linspace(-1, 1, z[0].size).reshape(z.shape[1:])
    return 0.7 * jnp.tanh(1.5 * z / total + level.sigma / total * pattern)
