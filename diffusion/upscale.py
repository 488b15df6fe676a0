"""The upscaler: a small network, trained on emoji, that doubles the height and width of images.

The denoiser generates images of 32 x 32 pixels. In one deterministic pass, the upscaler doubles
every pixel and adds a correction that the network predicts. The network works on blocks of 2 x 2
pixels moved to channels, and moves channels to blocks of 4 x 4 pixels at the end (sub-pixel
convolution; Shi et al. 2016, arXiv:1609.05158). It sharpens edges and adds no content. `resize`
makes larger images with a plain filter, so an image of 1024 x 1024 pixels has no more detail than
one of 64 x 64.

Leaves out: prompts and noise. A cascade of diffusion models (Ho et al. 2021, arXiv:2106.15282)
would generate new detail, at many times the cost.
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
    """Weights of a residual block of two convolutions."""

    first: Linear  # [C, 9 C]
    second: Linear


@struct.dataclass
class Params:
    """Weights of the upscaler."""

    first: Linear  # [C, 9 x 12]
    blocks: tuple[Block, ...]
    last: Linear  # [48, 9 C]


def abstract(cfg: UpscalerConfig) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
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
    """Double the height and width of images: [B, Y, X, 3] -> [B, 2 Y, 2 X, 3].

    Args:
        params: the weights.
        cfg: the config.
        x: float32 [B, Y, X, 3], Y and X even, -1 to 1.
    """
    y = conv(space_to_depth(x), params.first)  # [B, Y/2, X/2, C]
    for block in params.blocks:
        z = conv(jax.nn.silu(rms_norm(y)), block.first)
        y = y + conv(jax.nn.silu(rms_norm(z)), block.second)
    correction = depth_to_space(conv(jax.nn.silu(rms_norm(y)), params.last), 4)  # [B, 2 Y, 2 X, 3]
    return jnp.repeat(jnp.repeat(x, 2, 1), 2, 2) + correction


def resize(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image to a square with a Lanczos filter: uint8 [Y, X, C] -> [size, size, C]."""
    from PIL import Image

    return np.asarray(Image.fromarray(image).resize((size, size), Image.Resampling.LANCZOS))
