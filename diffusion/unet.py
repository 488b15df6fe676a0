"""The U-Net: a denoising network that takes noisy images, times and prompts.

On the way down, the stages halve the image and widen the channels; on the way up, skip connections
add the activations of the same stage on the way down (Ronneberger et al. 2015, arXiv:1505.04597;
for diffusion Ho et al. 2020, arXiv:2006.11239). The embedding of time and prompt scales and shifts
the channels of every block (FiLM; Perez et al. 2018, arXiv:1709.07871; Dhariwal & Nichol 2021,
arXiv:2105.05233). The coarse stages have attention: a pixel's query attends to all pixels and all
prompt tokens at once. `plan`, a linear map of the embedding, is added to the coarsest activations;
it is small because the image is only a few pixels wide there, and trains fast.

The sizes suit a CPU. Every stage costs the same (half the height and width, twice the channels),
and the first moves blocks of 2 x 2 pixels to channels, since XLA's convolutions, and above all the
gradients of their kernels, are slow on large images with few channels.

Leaves out: dropout, and attention at full size.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from diffusion import layers
from diffusion.config import UNetConfig
from diffusion.layers import (
    Condition,
    abstract_linear,
    array_info,
    depth_to_space,
    rms_norm,
    space_to_depth,
)
from diffusion.text import PromptEmbeds
from transformer.layers import linear
from transformer.weights import Linear


@struct.dataclass
class Block:
    """Weights of a residual block: two convolutions with FiLM between them."""

    first: Linear  # [C, 9 C]: a 3 x 3 convolution as a linear map
    film: Linear  # [2 C, d_cond]
    second: Linear  # [C, 9 C]


@struct.dataclass
class Attention:
    """Weights of attention of pixels to pixels and prompt tokens."""

    q: Linear  # [C, C], as are k, v and out
    k: Linear
    v: Linear
    text_k: Linear  # [C, E], as is text_v
    text_v: Linear
    q_scale: jax.Array  # [H]
    k_scale: jax.Array
    out: Linear


@struct.dataclass
class Stage:
    """Weights of a stage: the blocks at one image size, on the way down and up."""

    down: tuple[Block, ...]
    up: tuple[Block, ...]
    attention_down: Attention | None
    attention_up: Attention | None
    # Linear maps to the next coarser stage and back, and of the skip connection; None at the
    # coarsest stage. C' is the number of channels of the next stage.
    shrink: Linear | None  # [C', 4 C]
    grow: Linear | None  # [4 C, C']
    skip: Linear | None  # [C, C]


@struct.dataclass
class Params:
    """Weights of the U-Net."""

    condition: Condition
    plan: Linear  # [y x C, d_cond], for y by x pixels at the coarsest stage
    first: Linear  # [C, 9 x 12]
    stages: tuple[Stage, ...]
    last: Linear  # [12, 9 C]


def abstract(cfg: UNetConfig) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    ones = jax.nn.initializers.ones

    def block(width: int) -> Block:
        return Block(
            first=abstract_linear(width, 9 * width),
            film=abstract_linear(2 * width, cfg.d_cond, is_zero=True),
            second=abstract_linear(width, 9 * width, is_zero=True),
        )

    def attention(width: int) -> Attention:
        square = abstract_linear(width, width, bias=False)
        from_text = abstract_linear(width, cfg.text_dim, bias=False)
        scale = array_info((cfg.head_dim,), ("head",), ones)
        return Attention(
            q=square,
            k=square,
            v=square,
            text_k=from_text,
            text_v=from_text,
            q_scale=scale,
            k_scale=scale,
            out=abstract_linear(width, width, bias=False, is_zero=True),
        )

    stages = []
    for i, (width, count) in enumerate(zip(cfg.channels, cfg.blocks, strict=True)):
        coarser = cfg.channels[i + 1] if i + 1 < len(cfg.channels) else None
        attn = attention(width) if cfg.attention[i] else None
        stages.append(
            Stage(
                down=(block(width),) * count,
                up=(block(width),) * count,
                attention_down=attn,
                attention_up=attn,
                shrink=None if coarser is None else abstract_linear(coarser, 4 * width),
                grow=None if coarser is None else abstract_linear(4 * width, coarser),
                skip=None if coarser is None else abstract_linear(width, width, bias=False),
            )
        )
    coarsest = cfg.image_size // 2 ** len(cfg.channels)
    return Params(
        condition=layers.abstract_condition(cfg.d_cond, cfg.text_dim),
        plan=abstract_linear(coarsest**2 * cfg.channels[-1], cfg.d_cond),
        first=abstract_linear(cfg.channels[0], 9 * 12),
        stages=tuple(stages),
        last=abstract_linear(12, 9 * cfg.channels[0], is_zero=True),
    )


def forward(
    params: Params, cfg: UNetConfig, x: jax.Array, t: jax.Array, text: PromptEmbeds, keep: jax.Array
) -> jax.Array:
    """Return the output of the network for noisy images.

    Args:
        params: the weights.
        cfg: the config.
        x: float32 [B, Y, X, 3], the noisy images, scaled to variance 1.
        t: float32 [B], flow times: 0 is noise, 1 the clean image.
        text: the encoded prompts.
        keep: bool [B], False to predict without the prompt.

    Returns:
        float32 [B, Y, X, 3]; `model.denoise` computes the clean images from it.
    """
    with jax.named_scope("condition"):
        cond, words, mask = layers.condition(params.condition, t, text, keep)
    x = conv(space_to_depth(x), params.first)  # [B, Y/2, X/2, C]
    skips = []
    for stage in params.stages:
        with jax.named_scope("down"):
            if stage.shrink is None:
                x = x + linear(cond, params.plan).reshape(x.shape)
            for block in stage.down:
                x = residual_block(x, block, cond)
            if stage.attention_down is not None:
                x = attend(x, stage.attention_down, cfg, words, mask)
            skips.append(x)
            if stage.shrink is not None:
                x = linear(space_to_depth(x), stage.shrink)  # [B, Y/2, X/2, C']
    for stage, skip in zip(reversed(params.stages), reversed(skips), strict=True):
        with jax.named_scope("up"):
            if stage.grow is not None and stage.skip is not None:
                x = depth_to_space(linear(x, stage.grow)) + linear(skip, stage.skip)
            for block in stage.up:
                x = residual_block(x, block, cond)
            if stage.attention_up is not None:
                x = attend(x, stage.attention_up, cfg, words, mask)
    return depth_to_space(conv(jax.nn.silu(rms_norm(x)), params.last))


def residual_block(x: jax.Array, p: Block, cond: jax.Array) -> jax.Array:
    """Apply a residual block; return float32 [B, Y, X, C].

    Args:
        x: float32 [B, Y, X, C].
        p: weights of the block.
        cond: float32 [B, d_cond], from `layers.condition`.
    """
    scale, shift = jnp.split(linear(cond, p.film)[:, None, None], 2, -1)
    y = conv(jax.nn.silu(rms_norm(x)), p.first)
    y = conv(jax.nn.silu(rms_norm(y) * (1 + scale) + shift), p.second)
    return x + y


def attend(
    x: jax.Array, p: Attention, cfg: UNetConfig, words: jax.Array, mask: jax.Array
) -> jax.Array:
    """Apply attention from every pixel to all pixels and prompt tokens; return [B, Y, X, C].

    Args:
        x: float32 [B, Y, X, C].
        p: weights of the attention.
        cfg: the config.
        words: float32 [B, S, E], states of the prompt tokens.
        mask: bool [B, S], False for padding.
    """
    b, height, width, c = x.shape
    y = rms_norm(x).reshape(b, height * width, c)  # [B, T, C]

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(b, -1, c // cfg.head_dim, cfg.head_dim)

    query = rms_norm(split(linear(y, p.q))) * p.q_scale  # [B, T, N, H]
    keys = jnp.concatenate([linear(y, p.k), linear(words, p.text_k)], 1)
    keys = rms_norm(split(keys)) * p.k_scale  # [B, T + S, N, H]
    values = split(jnp.concatenate([linear(y, p.v), linear(words, p.text_v)], 1))
    key_mask = jnp.concatenate([jnp.ones((b, height * width), bool), mask], 1)
    y = layers.attend(query, keys, values, key_mask).reshape(x.shape)
    return x + linear(y, p.out)


def conv(x: jax.Array, p: Linear) -> jax.Array:
    """Apply a 3 x 3 convolution with zero padding: [B, Y, X, I] -> [B, Y, X, O]."""
    kernel = p.weight.reshape(-1, 3, 3, x.shape[-1]).transpose(1, 2, 3, 0)  # [3, 3, I, O]
    y = jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    return y + p.bias  # pyright: ignore[reportOperatorIssue]  # convolutions have a bias
