"""Rotary position embeddings (RoPE; Su et al. 2021, arXiv:2104.09864) and their context extension.

Each pair of channels of a query or key is rotated by an angle proportional to its position, so that
the dot product of a query and a key depends only on their distance. Pairs are (i, i + H/2), the
layout of Hugging Face checkpoints; GGUF files of the Llama family interleave them, and the loader
converts them. This file computes the angles; `kernels.rotate` applies them.

To extend the context beyond the pretraining length, RoPE scaling lowers the low frequencies, so
that no angle exceeds the range of pretraining. High frequencies, which distinguish neighbouring
positions, are not changed. This is the rule of Llama 3 and of YaRN (Peng et al. 2023,
arXiv:2309.00071); YaRN also multiplies the attention scores. Linear scaling lowers all frequencies
(Chen et al. 2023, arXiv:2306.15595). LongRoPE (Ding et al. 2024, arXiv:2402.13753) divides each
frequency by a factor found by search, and has two lists of factors: one for sequences up to the
original context, one for longer sequences.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import RopeScaling


def frequencies(
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    length: jax.Array | int | None = None,
) -> jax.Array:
    """Return the rotation of each channel pair from one position to the next.

    Args:
        head_dim: H, the number of rotated channels, even.
        theta: Base of the geometric sequence of wavelengths.
        scaling: RoPE scaling, or None.
        length: Number of positions of the sequences, int [...], which selects the factors of
            LongRoPE; other types ignore it. None selects the factors of short sequences.

    Returns:
        Radians per position, float32 [H/2]; with LongRoPE and an array `length` [..., H/2].
    """
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.power(jnp.float32(theta), exponent)  # [H/2]
    if scaling is None:
        return frequency
    fields: Any = scaling  # RopeScaling checks that the fields of a type are not None
    if scaling.rope_type == "linear":
        return frequency / fields.factor
    if scaling.rope_type == "longrope":
        short, long = (jnp.array(x, jnp.float32) for x in (fields.short_factor, fields.long_factor))
        is_long = jnp.asarray(0 if length is None else length) > fields.original_max_seq_len
        return frequency / jnp.where(is_long[..., None], long, short)
    if scaling.rope_type == "llama3":
        # Rotations of each pair within the original context.
        num_rotations = fields.original_max_seq_len * frequency / (2 * math.pi)
        low, high = fields.low_freq_factor, fields.high_freq_factor
        unscaled = jnp.clip((num_rotations - low) / (high - low), 0.0, 1.0)
    else:  # YaRN interpolates over the indices of the pairs instead

        def pair_index(num_rotations: float) -> float:
            """Return the index, a float, of the channel pair that makes `num_rotations` rotations.

            The rotations are those within the original context.
            """
            wavelength = fields.original_max_seq_len / num_rotations
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first, last = pair_index(fields.beta_fast), pair_index(fields.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (jnp.arange(head_dim // 2) - first) / max(last - first, 0.001)
        unscaled = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    return frequency * (unscaled + (1.0 - unscaled) / fields.factor)


def angles(
    positions: jax.Array | np.ndarray,
    head_dim: int,
    theta: float,
    scaling: RopeScaling | None = None,
    max_length: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Return the cosine and sine for each position and channel pair.

    Args:
        positions: Positions, int [B, T].
        head_dim: H, the number of rotated channels, even.
        theta: Base of the geometric sequence of wavelengths.
        scaling: RoPE scaling, or None.
        max_length: Number of positions that the sequences can reach, which selects the factors of
            LongRoPE. None: the largest position of each row selects them.

    Returns:
        (cos, sin), each float32 [B, T, 1, H/2], which broadcast over heads.
    """
    length: Any = max_length
    if max_length is None and scaling is not None and scaling.rope_type == "longrope":
        length = positions.max(axis=1)[:, None, None] + 1  # [B, 1, 1]
    frequency = frequencies(head_dim, theta, scaling, length)  # [H/2]
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.attention_factor is not None:
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin
