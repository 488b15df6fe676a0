"""What the tests of diffusion share."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import diffusion
from diffusion import checkpoint, layers, model, upscale
from diffusion.config import UNetConfig, UpscalerConfig

with np.load(Path(__file__).parents[1] / "golden" / "diffusion" / "schedulers.npz") as arrays:
    GOLDEN = dict(arrays)

CFG = UNetConfig.debug(text_dim=384)
UPSCALER = UpscalerConfig(width=8, num_blocks=1)


def dummy(z, level):
    """The network that the golden files were made with: see make_diffusion.py."""
    total = level.alpha + level.sigma
    pattern = jnp.linspace(-1, 1, z[0].size).reshape(z.shape[1:])
    return 0.7 * jnp.tanh(1.5 * z / total + level.sigma / total * pattern)


def shapes(cfg):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))


def random_params(cfg, seed=0):
    """Weights none of which are zero, so that nothing is hidden behind a gate."""
    random = np.random.default_rng(seed)

    def draw(leaf):  # matrices keep the size of what goes through them
        size = leaf.shape[-1] ** -0.5 if leaf.ndim == 2 else 0.3
        return jnp.asarray(size * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(draw, shapes(cfg))


def save_tiny(path: Path) -> Path:
    """A model of random weights that draws 16 x 16 pixels, in a folder."""
    checkpoint.save(path / "denoiser", random_params(CFG), CFG)
    weights = layers.init(jax.random.key(0), upscale.abstract(UPSCALER))
    checkpoint.save(path / "upscaler", weights, UPSCALER)
    return path


@pytest.fixture(scope="session")
def encoder(model_file):
    return model_file("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A model of random weights."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny(folder, encoder):
    """The same, loaded."""
    return diffusion.load(folder, encoder)
