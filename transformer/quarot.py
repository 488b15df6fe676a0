"""Rotate the weights of a decoder, so that int8 activations have no outlier channels (QuaRot).

After QuaRot (Ashkboos et al. 2024, arXiv:2404.00456); norm weights are folded as in SliceGPT
(arXiv:2401.15024).

A few channels of the residual stream are much larger than the others. With one int8 scale per
token, they determine the scale, and the other channels are rounded coarsely. An orthogonal matrix Q
distributes the outliers over all channels of x Q. The rotation is free at inference, because the
residual stream is read and written only through weights, into which Q is multiplied at load time:

    input projection     y = (norm(x) * scale) W^T   becomes   W' = (W * scale) Q
    output projection    x = x + z W^T               becomes   W' = Q^T W
    token embedding      x = row                     becomes   row' = row Q

RMS norm divides by a length, which Q does not change. Its weights, however, apply to the original
channels, so they are folded into the input projections that follow, and the norm keeps ones. Tied
embeddings are untied, because the head needs the weights of the final norm and the embedding does
not.

Q is a diagonal of random signs followed by a cosine transform over each axis of the channels
reshaped to an a x b grid. It is orthogonal for every width D = a b and costs D (a + b) operations
instead of D^2.

Not supported: models with layer norms (they subtract a mean, which Q changes) or with norms after
attention and MLP (see `can_rotate`), and the paper's rotations inside heads and MLP.
"""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import Config
from transformer.decoder import Params
from transformer.weights import Lora, Norm

# The norm before each input projection, and the output projections.
INPUT_PROJECTIONS: dict[str, str] = {
    **dict.fromkeys(("q", "k", "v"), "attn_norm"),
    **dict.fromkeys(("router", "gate", "up"), "mlp_norm"),
    "head": "final_norm",
}
OUTPUT_PROJECTIONS = ("out", "down")


def can_rotate(cfg: Config) -> bool:
    """Return whether a decoder of this config computes the same function with rotated weights."""
    return cfg.norm == "rms" and not cfg.post_norms and cfg.position == "rope"


def int8_skip_modules(cfg: Config) -> tuple[str, ...]:
    """Return the names of the linear maps that stay bfloat16 in an int8 model.

    These are the output projections if the weights cannot be rotated, because the inputs of output
    projections have outlier channels too.
    """
    return () if can_rotate(cfg) else OUTPUT_PROJECTIONS


def rotate_input_weight(weight: Any, norm_weight: Any = None) -> Any:
    """Rotate an input projection or the token embedding, or some rows of either.

    Args:
        weight: NumPy or JAX array, float32 [R, D].
        norm_weight: Weights of the preceding norm, float32 [D]; None for the token embedding.

    Returns:
        (weight * norm_weight) Q, float32 [R, D]: a JAX array if an argument is one, else NumPy.
    """
    width = weight.shape[1]
    height = _short_side(width)
    signs = _random_signs(width) if norm_weight is None else _random_signs(width) * norm_weight
    grid = (weight * signs).reshape(-1, height, width // height) @ _dct_matrix(width // height)
    return (_dct_matrix(height).T @ grid).reshape(weight.shape)


def rotate_output_weight(weight: Any) -> Any:
    """Rotate an output projection: weight, float32 [D, R] -> Q^T weight, float32 [D, R]."""
    return rotate_input_weight(weight.T).T


def strip_norm_weights(params: Params) -> Params:
    """Replace the norm weights by ones, after they were folded into the projections.

    The original weights are stored in `folded_norm_weights`, because a LoRA adapter that is applied
    later needs them.
    """
    ones = Norm(scale=jnp.ones_like(params.final_norm.scale))
    norms: Any = [[layer.attn_norm, layer.mlp_norm] for layer in params.layers]
    norm_weights = [[norm.scale for norm in pair] for pair in norms]
    return params.replace(
        layers=tuple(layer.replace(attn_norm=ones, mlp_norm=ones) for layer in params.layers),
        final_norm=ones,
        folded_norm_weights=jnp.array(norm_weights),
    )


def rotate_lora(lora: Lora, module: str, norm_weights: jax.Array) -> Lora:
    """Rotate a LoRA adapter, so that it fits rotated weights.

    Args:
        lora: Adapter of one linear map.
        module: Name of the linear map in its layer, for example "q".
        norm_weights: Weights of the layer's norms before attention and MLP, float32 [2, D].

    Returns:
        The adapter for the rotated linear map.
    """
    if module in OUTPUT_PROJECTIONS:
        return lora.replace(b=rotate_output_weight(lora.b))
    return lora.replace(
        a=rotate_input_weight(
            lora.a, norm_weights[("attn_norm", "mlp_norm").index(INPUT_PROJECTIONS[module])]
        )
    )


def _short_side(width: int) -> int:
    """Return the largest divisor of `width` that is at most its square root."""
    return next(side for side in range(math.isqrt(width), 0, -1) if width % side == 0)


def _random_signs(width: int) -> np.ndarray:
    """Return fixed random signs; without them Q would map a constant vector to one channel."""
    rng = np.random.Generator(np.random.PCG64(0))
    return rng.integers(0, 2, width).astype(np.float32) * 2 - 1


def _dct_matrix(n: int) -> np.ndarray:
    """Return the orthonormal cosine transform (DCT-II): float32 [n, n]."""
    samples, frequencies = np.arange(n)[:, None], np.arange(n)
    matrix = np.cos(np.pi * (2 * samples + 1) * frequencies / (2 * n)) * math.sqrt(2 / n)
    matrix[:, 0] = 1 / math.sqrt(n)
    return matrix.astype(np.float32)
