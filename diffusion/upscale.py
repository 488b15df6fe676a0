"""Twice the size: a small network that has learnt how edges of emoji go on between pixels.

The denoiser draws 32 x 32 pixels, and this makes 64 x 64 of them in one look, without chance: the
picture with every pixel doubled, and a correction on top. It works on blocks of pixels folded into
channels and unfolds them finer (Shi et al. 2016, arXiv:1609.05158). It sharpens what is there and
invents nothing, so that whatever is larger still, `enlarge` makes with a plain filter, and a
picture of 1024 pixels is one of 64 seen large. Nothing pretends to be drawn at that size.

Leaves out: prompts, noise. A cascade of diffusion models (Ho et al. 2021, arXiv:2106.15282) would
draw new detail, at many times the cost.
"""

from __future__ import annotations

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion.config import UpscalerConfig
from diffusion.layers import abstract_linear, depth_to_space, rms_norm, space_to_depth
from diffusion.unet import conv
from transformer.weights import Linear


@struct.dataclass
class Block:
    """A residual block of two convolutions."""

    first: Linear  # [C, 9 C]
    second: Linear


@struct.dataclass
class Params:
    """Weights of the upscaler."""

    first: Linear  # [C, 9 x 12]
    blocks: tuple[Block, ...]
    last: Linear  # [48, 9 C]


def abstract(cfg: UpscalerConfig) -> Params:
    """The tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    width = cfg.width
    block = Block(
        first=abstract_linear(width, 9 * width),
        second=abstract_linear(width, 9 * width, is_zero=True),
    )
    return Params(
        first=abstract_linear(width, 9 * 12),
        blocks=(block,) * cfg.num_blocks,
        last=abstract_linear(48, 9 * width, is_zero=True),
    )


@partial(jax.jit, static_argnames="cfg")
def upscale_2x(params: Params, cfg: UpscalerConfig, x: jax.Array) -> jax.Array:
    """Pictures of any even size, twice as large: float32 [B, Y, X, 3] -> [B, 2 Y, 2 X, 3]."""
    y = conv(space_to_depth(x), params.first)  # [B, Y/2, X/2, C]
    for block in params.blocks:
        z = conv(jax.nn.silu(rms_norm(y)), block.first)
        y = y + conv(jax.nn.silu(rms_norm(z)), block.second)
    correction = depth_to_space(conv(jax.nn.silu(rms_norm(y)), params.last), 4)  # [B, 2 Y, 2 X, 3]
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2) + correction


def resize(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture at any size, by Lanczos's filter: uint8 [Y, X, C] -> [size, size, C]."""
    from PIL import Image

    return np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.LANCZOS))
