"""Noise schedules and prediction types of diffusion models, in three equivalent notations.

A noisy image is `z = alpha * x + sigma * e`, with x the clean image and e standard normal noise.
The literature has three notations of alpha and sigma:

- betas: alpha^2 + sigma^2 = 1, defined by n small noising steps (DDPM; Ho et al. 2020,
  arXiv:2006.11239).
- sigma: alpha = 1, sigma from 80 down to 0 (EDM; Karras et al. 2022, arXiv:2206.00364).
- flow: alpha = t, sigma = 1 - t, t from 0 to 1 (rectified flow; Liu et al. 2022, arXiv:2209.03003;
  Lipman et al. 2022, arXiv:2210.02747).

They are equivalent: scaling z does not change its information about x, so only the ratio
sigma / alpha matters. `to_flow`, `from_flow` and the like convert, and a network trained in one
notation can be sampled in any.

A network can predict x, e, or a mixture of both; each can be computed from z and any other
(`clean`, `noise`, `target`). These prediction types weight errors differently: at high noise a
small error in e is a large error in x, at low noise the reverse.

All functions are elementwise over numpy or jax arrays or floats; alpha and sigma must be
broadcastable to the shape of the images.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

PredictionType = Literal["x0", "epsilon", "v", "flow"]
PREDICTION_TYPES = ("x0", "epsilon", "v", "flow")


class NoiseLevel(NamedTuple):
    """A noise level: the coefficients of a noisy image `z = alpha * x + sigma * e`."""

    alpha: Any  # float or array
    sigma: Any

    @property
    def ratio(self) -> Any:
        """Ratio of noise to image, sigma / alpha, which is EDM's sigma."""
        return self.sigma / self.alpha


# The three notations


def from_alpha_bar(alpha_bar: Any) -> NoiseLevel:
    """Convert DDPM's alpha-bar, the share of the image in the variance of z, to a noise level."""
    return NoiseLevel(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)


def from_sigma(sigma: Any) -> NoiseLevel:
    """Convert EDM's sigma to a noise level."""
    return NoiseLevel(sigma * 0 + 1.0, sigma)


def from_flow(t: Any) -> NoiseLevel:
    """Convert a time of a rectified flow (0 is noise, 1 is the image) to a noise level."""
    return NoiseLevel(t, 1 - t)


def to_alpha_bar(level: NoiseLevel) -> Any:
    """Return DDPM's alpha-bar at which sigma / alpha equals that of `level`."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def to_flow(level: NoiseLevel) -> Any:
    """Return the time of a rectified flow at which sigma / alpha equals that of `level`."""
    return level.alpha / (level.alpha + level.sigma)


def rescale(z: Any, source: NoiseLevel, destination: NoiseLevel) -> Any:
    """Return noisy images scaled to another notation of their noise level, such as EDM to flow.

    Args:
        z: noisy images at `source`.
        source: the noise level of `z`.
        destination: a noise level of the same ratio sigma / alpha, in another notation.
    """
    return z * ((destination.alpha + destination.sigma) / (source.alpha + source.sigma))


# Schedules: the noise levels that a sampler goes through


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Return DDPM's linear betas, the variance that each noising step adds: float64 [steps]."""
    return np.linspace(first, last, steps)


def cosine_betas(steps: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """Return the betas of the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672)."""

    def alpha_bar(t: np.ndarray) -> np.ndarray:
        return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = np.arange(steps + 1) / steps
    return np.minimum(1 - alpha_bar(t[1:]) / alpha_bar(t[:-1]), max_beta)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """Return alpha-bar after each noising step, the share of the image in the variance: [steps]."""
    return np.cumprod(1 - betas)


def ddpm_levels(betas: np.ndarray, steps: int) -> list[NoiseLevel]:
    """Return evenly spaced noise levels of a DDPM schedule, from the noisiest to the clean image.

    The last level above 0 is that of the first noising step ("leading" spacing).

    Args:
        betas: from `linear_betas` or `cosine_betas`.
        steps: the number of noise levels above 0; must divide the number of betas.

    Raises:
        ValueError: `steps` does not divide the number of betas.
    """
    if steps < 1 or len(betas) % steps:
        raise ValueError(f"steps must divide the number of betas, {len(betas)}, got {steps}")
    visited = alpha_bars(betas)[:: len(betas) // steps][::-1]
    return [from_alpha_bar(float(a)) for a in visited] + [NoiseLevel(1.0, 0.0)]


def karras_levels(
    steps: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0
) -> list[NoiseLevel]:
    """Return EDM's noise levels, which are denser at low noise and end at the clean image.

    Args:
        steps: the number of noise levels above 0.
        smallest: the last sigma above 0.
        largest: the first sigma.
        rho: exponent; the larger, the denser the levels are at low noise.
    """
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return [from_sigma(float(sigma)) for sigma in sigmas] + [NoiseLevel(1.0, 0.0)]


def flow_levels(steps: int, shift: float = 1.0, *, begin: float = 0.0) -> list[NoiseLevel]:
    """Return the noise levels of a rectified flow at evenly spaced times.

    Args:
        steps: the number of denoising steps; the result has one more level.
        shift: multiplies every ratio of noise to image (Esser et al. 2024, arXiv:2403.03206);
            above 1, more of the steps are at high noise.
        begin: the first time, before the shift; 0 is noise.
    """
    times = [t / (t + shift * (1 - t)) for t in np.linspace(begin, 1, steps + 1).tolist()]
    return [from_flow(t) for t in times]


# Prediction types


def target(kind: PredictionType, x: Any, e: Any, level: NoiseLevel) -> Any:
    """Return the training target of a network of the given prediction type.

    Args:
        kind: the prediction type. "x0" is x; "epsilon" is e; "v" is `alpha * e - sigma * x`
            (Salimans & Ho 2022, arXiv:2202.00512); "flow" is `x - e`, the velocity of a
            rectified flow.
        x: clean images.
        e: noise.
        level: the noise level.

    Raises:
        ValueError: the prediction type is unknown.
    """
    alpha, sigma = level
    if kind == "x0":
        return x
    if kind == "epsilon":
        return e
    if kind == "v":
        return alpha * e - sigma * x
    if kind == "flow":
        return x - e
    raise ValueError(f"kind must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")


def clean(kind: PredictionType, output: Any, z: Any, level: NoiseLevel) -> Any:
    """Compute the clean images from the output of a network for `z`.

    Args:
        kind: the prediction type; "epsilon" needs an alpha above 0.
        output: the output of the network.
        z: noisy images.
        level: the noise level of `z`.

    Raises:
        ValueError: the prediction type is unknown.
    """
    alpha, sigma = level
    if kind == "x0":
        return output
    if kind == "epsilon":
        return (z - sigma * output) / alpha
    if kind == "v":
        return (alpha * z - sigma * output) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (z + sigma * output) / (alpha + sigma)
    raise ValueError(f"kind must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")


def noise(x: Any, z: Any, level: NoiseLevel) -> Any:
    """Compute the noise e in `z` from the clean images x; sigma must not be 0."""
    return (z - level.alpha * x) / level.sigma


def precondition(t: Any, spread: float) -> tuple[Any, Any, Any]:
    """Return the coefficients with which a network has inputs and targets of variance 1 at time t.

    The network's input is `c_in * z`, and the prediction of x is `c_skip * z + c_out * output`.
    `c_skip * z` is the best linear estimate of x, and c_out the standard deviation of its error, so
    the target of the output has variance 1 as well (EDM, section 5, in the notation of a flow). At
    low noise an output of 0 is already accurate; without preconditioning, the network would have to
    copy its input.

    Args:
        t: the flow time, 0 to 1.
        spread: the standard deviation of pixel values.

    Returns:
        c_in, c_skip, c_out, of the shape of `t`.
    """
    variance = (t * spread) ** 2 + (1 - t) ** 2  # of z
    root = jnp.sqrt(variance)
    return 1 / root, t * spread**2 / variance, spread * (1 - t) / root
