"""A diffusion transformer (DiT): image patches and prompt tokens in one sequence.

Patches of pixels are tokens (Dosovitskiy et al. 2020, arXiv:2010.11929) of a transformer (Peebles &
Xie 2022, arXiv:2212.09748). The encoder states of the prompt are appended to the
sequence, so that self-attention covers both. The embedding of time and prompt scales, shifts and
gates every branch; the gates are initialized to zero ("adaLN-Zero"). As in recent language models,
the blocks have RMS norms, normalized queries and keys, gated MLPs and rotary positions: half of
each head is rotated by the row, half by the column. Large patches work because the network predicts
the clean image (Li & He 2025, arXiv:2511.13720).

A transformer needs more training images than a U-Net, which has locality built in, so emoji-64 is a
U-Net.

Leaves out: overlapping patches, and register tokens.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import struct

from diffusion import layers
from diffusion.config import DiTConfig
from diffusion.layers import (
    Condition,
    abstract_linear,
    array_info,
    depth_to_space,
    rms_norm,
    space_to_depth,
)
from diffusion.text import PromptEmbeds
from transformer import kernels, rope
from transformer.layers import linear
from transformer.weights import Linear


@struct.dataclass
class Layer:
    """Weights of one block."""

    q: Linear  # [D, D], as are k, v and out
    k: Linear
    v: Linear
    q_scale: jax.Array  # [H]
    k_scale: jax.Array
    out: Linear
    gate: Linear  # [F, D], as is up
    up: Linear
    down: Linear  # [D, F]
    modulation: Linear  # [6 D, d_cond]: scale, shift and gate of both branches


@struct.dataclass
class Params:
    """Weights of the transformer."""

    condition: Condition
    patch: Linear  # [D, p p 3], for patches of p x p pixels
    word: Linear  # [D, E], for prompt tokens
    layers: tuple[Layer, ...]
    modulation: Linear  # [2 D, d_cond]: scale and shift before `last`
    last: Linear  # [p p 3, D]


def abstract(cfg: DiTConfig) -> Params:
    """Return the tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    d, f = cfg.d_model, cfg.d_ff
    square = abstract_linear(d, d, bias=False)
    scale = array_info((cfg.head_dim,), ("head",), jax.nn.initializers.ones)
    layer = Layer(
        q=square,
        k=square,
        v=square,
        q_scale=scale,
        k_scale=scale,
        out=square,
        gate=abstract_linear(f, d, bias=False),
        up=abstract_linear(f, d, bias=False),
        down=abstract_linear(d, f, bias=False),
        modulation=abstract_linear(6 * d, cfg.d_cond, is_zero=True),
    )
    return Params(
        condition=layers.abstract_condition(cfg.d_cond, cfg.text_dim),
        patch=abstract_linear(d, cfg.patch**2 * 3),
        word=abstract_linear(d, cfg.text_dim),
        layers=(layer,) * cfg.num_layers,
        modulation=abstract_linear(2 * d, cfg.d_cond, is_zero=True),
        last=abstract_linear(cfg.patch**2 * 3, d, is_zero=True),
    )


def forward(
    params: Params, cfg: DiTConfig, x: jax.Array, t: jax.Array, text: PromptEmbeds, keep: jax.Array
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
    patches = space_to_depth(x, cfg.patch)  # [B, Y/p, X/p, p p 3]
    b, height, width, _ = patches.shape
    count = height * width
    tokens = linear(patches.reshape(b, count, -1), params.patch)  # [B, T, D]
    h = jnp.concatenate([tokens, linear(words, params.word)], 1)  # [B, T + S, D]
    attention_mask = jnp.concatenate([jnp.ones((b, count), bool), mask], 1)
    angles = rotary_angles(height, width, words.shape[1], cfg)
    for layer in params.layers:
        h = block(h, layer, cfg, cond, angles, attention_mask)
    scale, shift = jnp.split(linear(cond, params.modulation)[:, None], 2, -1)
    output = linear(rms_norm(h[:, :count]) * (1 + scale) + shift, params.last)
    return depth_to_space(output.reshape(patches.shape), cfg.patch)


def rotary_angles(
    height: int, width: int, words: int, cfg: DiTConfig
) -> tuple[jax.Array, jax.Array]:
    """Return the cosines and the sines of the rotary angles, each float32 [1, T + S, 1, H/2].

    The first half of the channel pairs is rotated by the row, the second by the column. Prompt
    tokens are not rotated.

    Args:
        height: number of rows of patches.
        width: number of columns of patches; T = height * width.
        words: S, the number of prompt tokens.
        cfg: the config.
    """
    frequency = rope.frequencies(cfg.head_dim // 2, cfg.rope_theta)  # [H/4]
    row, column = jnp.divmod(jnp.arange(height * width), width)
    angle = jnp.concatenate([row[:, None] * frequency, column[:, None] * frequency], -1)
    angle = jnp.pad(angle, ((0, words), (0, 0)))[None, :, None]  # [1, T + S, 1, H/2]
    return jnp.cos(angle), jnp.sin(angle)


def block(
    h: jax.Array,
    p: Layer,
    cfg: DiTConfig,
    cond: jax.Array,
    angles: tuple[jax.Array, jax.Array],
    attention_mask: jax.Array,
) -> jax.Array:
    """Apply a block: attention and MLP with adaLN modulation; return float32 [B, T + S, D].

    Args:
        h: float32 [B, T + S, D], patches and prompt tokens.
        p: weights of the block.
        cfg: the config.
        cond: float32 [B, d_cond], from `layers.condition`.
        angles: from `rotary_angles`.
        attention_mask: bool [B, T + S], True for tokens to attend to.
    """
    b, length, d = h.shape
    scale, shift, gate, scale_mlp, shift_mlp, gate_mlp = jnp.split(
        linear(cond, p.modulation)[:, None], 6, -1
    )

    def split(a: jax.Array) -> jax.Array:
        return a.reshape(b, length, cfg.num_heads, cfg.head_dim)

    with jax.named_scope("attention"):
        y = rms_norm(h) * (1 + scale) + shift
        query = kernels.rotate(rms_norm(split(linear(y, p.q))) * p.q_scale, *angles)
        key = kernels.rotate(rms_norm(split(linear(y, p.k))) * p.k_scale, *angles)
        y = layers.attend(query, key, split(linear(y, p.v)), attention_mask).reshape(b, length, d)
        h = h + gate * linear(y, p.out)
    with jax.named_scope("mlp"):
        y = rms_norm(h) * (1 + scale_mlp) + shift_mlp
        y = jax.nn.silu(linear(y, p.gate)) * linear(y, p.up)
        return h + gate_mlp * linear(y, p.down)
