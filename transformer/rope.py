"""Rotary position embeddings (RoPE; Su et al. 2021, arXiv:2104.09864), and how they are stretched.

Each pair of channels of a query or key is turned by an angle that grows with its position, so that
the dot product of a query and a key depends on their distance alone. Pairs are (i, i + H/2), the
layout of Hugging Face checkpoints; GGUF files of the Llama family interleave them, and the loader
undoes that. Here are the angles; `kernels.rotate` turns.

A model that shall read further than it was trained for has its slow frequencies lowered, so that
no pair turns further than it ever did in training, while the fast ones, which tell neighbours
apart, stay: Llama 3's rule, and YaRN (Peng et al. 2023, arXiv:2309.00071), which also sharpens the
scores. The oldest way, linear, lowers all (Chen et al. 2023, arXiv:2306.15595).
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from transformer.config import RopeScaling


def frequencies(head_dim: int, theta: float, scaling: RopeScaling | None = None) -> jax.Array:
    """Radians that each channel pair turns from one position to the next: float32 [H/2]."""
    exponent = jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim
    frequency = 1.0 / jnp.power(jnp.float32(theta), exponent)  # [H/2]
    if scaling is None:
        return frequency
    if scaling.rope_type == "linear":
        return frequency / scaling.factor
    if scaling.rope_type == "llama3":
        turns = scaling.original_max_seq_len * frequency / (2 * math.pi)  # in the first context
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        kept = jnp.clip((turns - low) / (high - low), 0.0, 1.0)
    else:  # YaRN draws the same ramp over the pairs' numbers

        def pair(turns: float) -> float:  # the pair that makes so many turns in the first context
            wavelength = scaling.original_max_seq_len / turns
            return head_dim * math.log(wavelength / (2 * math.pi)) / (2 * math.log(theta))

        first, last = pair(scaling.beta_fast), pair(scaling.beta_slow)
        if scaling.truncate:
            first, last = math.floor(first), math.ceil(last)
        first, last = max(first, 0), min(last, head_dim - 1)
        ramp = (jnp.arange(head_dim // 2) - first) / max(last - first, 0.001)
        kept = 1.0 - jnp.clip(ramp, 0.0, 1.0)
    return frequency * (kept + (1.0 - kept) / scaling.factor)


def angles(
    positions: jax.Array, head_dim: int, theta: float, scaling: RopeScaling | None = None
) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines for each position and channel pair.

    Args:
        positions: integer positions, [B, T].
        head_dim: H, even.
        theta: base of the geometric sequence of wavelengths.
        scaling: how the sequence is stretched.

    Returns:
        cos and sin, each float32 [B, T, 1, H/2], ready to broadcast over heads.
    """
    frequency = frequencies(head_dim, theta, scaling)  # [H/2]
    angle = positions.astype(jnp.float32)[..., None, None] * frequency  # [B, T, 1, H/2]
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    if scaling is not None and scaling.attention_factor is not None:
        return cos * scaling.attention_factor, sin * scaling.attention_factor
    return cos, sin
