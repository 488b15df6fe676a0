"""The denoiser: preconditioning and loss around either network, for samplers and training.

The network's input has variance 1. Its output, scaled, is the difference between the clean image
and the best linear estimate of the clean image from the noisy one (`schedule.precondition`; Karras
et al. 2022, arXiv:2206.00364). Times are those of a rectified flow: 0 is noise, 1 is the image.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from diffusion import dit, layers, schedule, unet
from diffusion.config import DiTConfig, UNetConfig
from diffusion.text import PromptEmbeds

Config = UNetConfig | DiTConfig
Params = Any
_NETWORKS = {UNetConfig: unet, DiTConfig: dit}


def init(key: jax.Array, cfg: Config) -> Params:
    """Return randomly initialized float32 weights.

    Args:
        key: a PRNG key.
        cfg: the config; its type selects the network.
    """
    return layers.init(key, _NETWORKS[type(cfg)].abstract(cfg))


@partial(jax.jit, static_argnames="cfg")
def denoise(
    params: Params, cfg: Config, z: jax.Array, t: jax.Array, text: PromptEmbeds, keep: jax.Array
) -> jax.Array:
    """Predict clean images from noisy ones.

    Args:
        params: the weights.
        cfg: the config; its type selects the network.
        z: float32 [B, Y, X, 3], noisy images `t * x + (1 - t) * e` of images x and noise e.
        t: float32 [B], flow times.
        text: the encoded prompts.
        keep: bool [B], False to predict without the prompt.

    Returns:
        float32 [B, Y, X, 3], the clean images; -1 is black and 1 is white.
    """
    c_in, c_skip, c_out = schedule.precondition(t[:, None, None, None], cfg.spread)
    output = _NETWORKS[type(cfg)].forward(params, cfg, c_in * z, t, text, keep)
    return c_skip * z + c_out * output


def flow_loss(
    params: Params,
    cfg: Config,
    x: jax.Array,
    e: jax.Array,
    t: jax.Array,
    text: PromptEmbeds,
    keep: jax.Array,
) -> jax.Array:
    """Return the mean squared error of the velocity, whose target is `x - e`: float32 [B].

    The network predicts x, from which the velocity is computed, so the less noise is left, the more
    an error in x counts (Li & He 2025, arXiv:2511.13720).

    Args:
        params: the weights.
        cfg: the config.
        x: float32 [B, Y, X, 3], clean images.
        e: float32 [B, Y, X, 3], noise.
        t: float32 [B], flow times below 1.
        text: the encoded prompts.
        keep: bool [B], False to predict without the prompt.
    """
    time = t[:, None, None, None]
    predicted = denoise(params, cfg, time * x + (1 - time) * e, t, text, keep)
    return jnp.mean(jnp.square((predicted - x) / (1 - time)), axis=(1, 2, 3))
