"""Golden arrays, a dummy network and tiny models for the tests of diffusion."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import diffusion
from diffusion import checkpoint, layers, model, upscale
from diffusion.config import UNetConfig, UpscalerConfig

with np.load(Path(__file__).parents[1] / "golden" / "diffusion" / "schedulers.npz") as arrays:
    GOLDEN = dict(arrays)

CFG = UNetConfig.debug(text_dim=384)
UPSCALER = UpscalerConfig(width=8, num_blocks=1)


def dummy(z, level):
    """Predict clean images like the dummy network of the golden files; see make_diffusion.py."""
    total = level.alpha + level.sigma
    pattern = jnp.linspace(-1, 1, z[0].size).reshape(z.shape[1:])
    return 0.7 * jnp.tanh(1.5 * z / total + level.sigma / total * pattern)


def image_size(path):
    with Image.open(path) as image:
        return image.size


def shapes(cfg):
    return jax.eval_shape(lambda: model.init(jax.random.key(0), cfg))


def random_params(cfg, seed=0):
    """Return random weights without zeros, so that no branch is multiplied by a zero gate."""
    random = np.random.default_rng(seed)

    def sample_leaf(leaf):  # matrices preserve the variance of activations
        size = leaf.shape[-1] ** -0.5 if leaf.ndim == 2 else 0.3
        return jnp.asarray(size * random.standard_normal(leaf.shape), jnp.float32)

    return jax.tree.map(sample_leaf, shapes(cfg))


def save_tiny(path: Path) -> Path:
    """Save a model with random weights that generates 16 x 16 pixels; return its folder."""
    checkpoint.save(path / "denoiser", random_params(CFG), CFG)
    weights = layers.init(jax.random.key(0), upscale.abstract(UPSCALER))
    checkpoint.save(path / "upscaler", weights, UPSCALER)
    return path


@pytest.fixture(scope="session")
def encoder(model_file):
    return model_file("all-minilm-l6-v2")


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """Return the folder of a model with random weights."""
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="session")
def tiny(folder, encoder):
    """Return the pipeline of a model with random weights."""
    return diffusion.load(folder, encoder)
