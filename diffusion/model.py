"""A denoiser as the samplers and the recipe know it, whichever network it is.

The network looks at a picture of variance 1 and says what a linear guess of the clean picture lacks
(`schedule.precondition`). Times are those of a straight flow: 0 is noise, 1 the picture.
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
    """Fresh float32 weights."""
    return layers.init(key, _NETWORKS[type(cfg)].abstract(cfg))


@partial(jax.jit, static_argnames="cfg")
def denoise(
    params: Params, cfg: Config, z: jax.Array, t: jax.Array, text: PromptEmbeds, keep: jax.Array
) -> jax.Array:
    """The clean picture behind a noisy one.

    Args:
        z: float32 [B, Y, X, 3], `t * x + (1 - t) * e`.
        t: float32 [B].
        text: the prompts.
        keep: bool [B], False where the prompt is not to be seen.

    Returns:
        float32 [B, Y, X, 3]; -1 is black and 1 is white.
    """
    c_in, c_skip, c_out = schedule.precondition(t[:, None, None, None], cfg.spread)
    said = _NETWORKS[type(cfg)].forward(params, cfg, c_in * z, t, text, keep)
    return c_skip * z + c_out * said


def flow_loss(
    params: Params,
    cfg: Config,
    x: jax.Array,
    e: jax.Array,
    t: jax.Array,
    text: PromptEmbeds,
    keep: jax.Array,
) -> jax.Array:
    """How far the flow that the network sees is from the true one, `x - e`: float32 [B].

    The network predicts x; what counts is the velocity that follows, so that errors weigh more the
    less noise is left (Li & He 2025, arXiv:2511.13720).

    Args:
        x: float32 [B, Y, X, 3], pictures.
        e: noise of the same shape.
        t: float32 [B], below 1.
    """
    time = t[:, None, None, None]
    found = denoise(params, cfg, time * x + (1 - time) * e, t, text, keep)
    return jnp.mean(jnp.square((found - x) / (1 - time)), axis=(1, 2, 3))
