"""Turning the residual stream, so that int8 loses little (QuaRot; Ashkboos et al. 2024,
arXiv:2404.00456; the folding of norms after SliceGPT, arXiv:2401.15024).

A token's stream has a few coordinates much larger than the others. With one scale a token, int8
must make room for those, and rounds all others away. An orthogonal matrix Q spreads them: in the
coordinates x Q no number stands out. The model can live in these coordinates for free, because
everything that touches the stream does so through a weight, into which Q goes once, at loading:

    a map that reads the stream    y = (norm(x) * gain) W^T   becomes   W' = (W * gain) Q
    a map that writes to it        x = x + z W^T              becomes   W' = Q^T W
    the token table                x = row                    becomes   row' = row Q

RMS norm divides by a length, which Q does not change, but its gain belongs to the old coordinates:
it moves into the weights that read behind it, and the norm keeps ones. A tied token table becomes
two, because the head needs the gain of the last norm and the table does not.

Q is signs drawn once, then a cosine transform over each axis of the stream written as a rectangle:
orthogonal for every width, and applied in D (a + b) steps for D = a b instead of D * D.

Leaves out: models with layer norms (they subtract a mean, which Q moves) or with norms behind
attention and MLP (see `can_turn`), and the rotations inside heads and MLP that go on in the paper.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from transformer.config import Config
from transformer.decoder import Params
from transformer.weights import Lora, Norm

# Which norm each map reads behind, and which maps write to the stream.
INPUT_PROJECTIONS = dict.fromkeys(("q", "k", "v"), "attn_norm") | dict.fromkeys(
    ("gate", "up"), "mlp_norm"
)
INPUT_PROJECTIONS["head"] = "final_norm"
OUTPUT_PROJECTIONS = ("out", "down")


def can_rotate(cfg: Config) -> bool:
    """Whether this decoder computes the same in turned coordinates."""
    return cfg.norm == "rms" and not cfg.post_norms and cfg.position == "rope"


def int8_skip_modules(cfg: Config) -> tuple[str, ...]:
    """The maps that stay bfloat16 in int8: those that write to a stream that cannot be turned.

    Their inputs have outliers too, and one scale a token cannot hold those.
    """
    return () if can_rotate(cfg) else OUTPUT_PROJECTIONS


def rotate_input_weight(weight: np.ndarray, gain: np.ndarray | None = None) -> np.ndarray:
    """A weight that reads the stream, or rows of one; also rows of the token table, without gain.

    Args:
        weight: float32 [R, D].
        gain: float32 [D], the scale of the norm in front of it.

    Returns:
        float32 [R, D], (weight * gain) Q.
    """
    width = weight.shape[1]
    tall = _short_side(width)
    signs = _random_signs(width) if gain is None else _random_signs(width) * gain
    grid = (weight * signs).reshape(-1, tall, width // tall) @ _dct_matrix(width // tall)
    return (_dct_matrix(tall).T @ grid).reshape(weight.shape)


def rotate_output_weight(weight: np.ndarray) -> np.ndarray:
    """A weight that writes to the stream: float32 [D, R] -> Q^T weight."""
    return rotate_input_weight(weight.T).T


def strip_norm_weights(params: Params) -> Params:
    """Norms of ones, once their gains are in the weights behind them.

    The gains are kept aside, because an adapter that comes later needs them too.
    """
    plain = Norm(scale=jnp.ones_like(params.final_norm.scale))
    gains = [[layer.attn_norm.scale, layer.mlp_norm.scale] for layer in params.layers]
    return params.replace(
        layers=tuple(layer.replace(attn_norm=plain, mlp_norm=plain) for layer in params.layers),
        final_norm=plain,
        folded_norm_weights=jnp.array(gains),
    )


def rotate_lora(lora: Lora, part: str, gains: jax.Array) -> Lora:
    """What an adapter of the part `part` of a layer becomes beside turned weights.

    Args:
        gains: float32 [2, D], of the norms before attention and MLP.
    """
    if part in OUTPUT_PROJECTIONS:
        return lora.replace(b=rotate_output_weight(lora.b))
    return lora.replace(
        a=rotate_input_weight(
            lora.a, gains[("attn_norm", "mlp_norm").index(INPUT_PROJECTIONS[part])]
        )
    )


def _short_side(width: int) -> int:
    """The largest divisor up to the square root."""
    return next(side for side in range(math.isqrt(width), 0, -1) if width % side == 0)


def _random_signs(width: int) -> np.ndarray:
    """Without them Q would gather whatever is alike in all coordinates into one."""
    draw = np.random.Generator(np.random.PCG64(0))
    return draw.integers(0, 2, width).astype(np.float32) * 2 - 1


def _dct_matrix(n: int) -> np.ndarray:
    """The orthonormal cosine transform (DCT-II): float32 [n, n]."""
    places, waves = np.arange(n)[:, None], np.arange(n)
    found = np.cos(np.pi * (2 * places + 1) * waves / (2 * n)) * math.sqrt(2 / n)
    found[:, 0] = 1 / math.sqrt(n)
    return found.astype(np.float32)
