"""Noise schedules and prediction types of diffusion models, in three equivalent notations.

A noisy image is `z = alpha * x + sigma * e`, with x the clean image and e standard normal noise.
The literature has three notations of alpha and sigma:

    betas  alpha^2 + sigma^2 = 1, given by n small steps (DDPM; Ho et al. 2020, arXiv:2006.11239)
    sigma  alpha = 1, sigma from 80 down to 0 (EDM; Karras et al. 2022, arXiv:2206.00364)
    flow   alpha = t, sigma = 1 - t, t from 0 to 1 (Lipman et al. 2022, arXiv:2210.02747;
           Liu et al. 2022, arXiv:2209.03003)

They are equivalent: scaling z does not change its information about x, so only the ratio
sigma / alpha matters. `to_flow`, `from_flow` and the like convert, and a network trained in one
notation can be sampled in any.

A network may predict x, e, or a mixture of both, and each follows from any other and z (`clean`,
`noise`, `target`). They differ in the weight of errors: at high noise a small error in e is a large
one in x, at low noise the reverse.

All functions are elementwise over numpy or jax arrays or floats; alpha and sigma must broadcast
against the images.
"""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

PredictionType = Literal["x0", "epsilon", "v", "flow"]
PREDICTION_TYPES = ("x0", "epsilon", "v", "flow")


class NoiseLevel(NamedTuple):
    """The noise of an image: `z = alpha * x + sigma * e`."""

    alpha: Any  # float or array
    sigma: Any

    @property
    def ratio(self) -> Any:
        """Ratio of noise to image, sigma / alpha; the sigma of EDM's notation."""
        return self.sigma / self.alpha


# The three notations


def from_alpha_bar(alpha_bar: Any) -> NoiseLevel:
    """Return the level of DDPM's alpha-bar, the image's share of the variance."""
    return NoiseLevel(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)


def from_sigma(sigma: Any) -> NoiseLevel:
    """Return the level of EDM's sigma."""
    return NoiseLevel(sigma * 0 + 1.0, sigma)


def from_flow(t: Any) -> NoiseLevel:
    """Return the level of a time of a straight flow: 0 is noise, 1 is the image."""
    return NoiseLevel(t, 1 - t)


def to_alpha_bar(level: NoiseLevel) -> Any:
    """Return the image's share of the variance, alpha-bar of the level with the same ratio."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def to_flow(level: NoiseLevel) -> Any:
    """Return the time at which a straight flow has the same ratio of noise to image."""
    return level.alpha / (level.alpha + level.sigma)


def rescale(z: Any, source: NoiseLevel, destination: NoiseLevel) -> Any:
    """Convert noisy images to another notation.

    Args:
        z: noisy images at `source`.
        source: a level.
        destination: a level of the same ratio of noise to image.
    """
    return z * ((destination.alpha + destination.sigma) / (source.alpha + source.sigma))


# Schedules: the levels of a sampler


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """Return DDPM's betas, the variance that each noising step adds: float64 [steps]."""
    return np.linspace(first, last, steps)


def cosine_betas(steps: int = 1000, max_beta: float = 0.999) -> np.ndarray:
    """Return the betas of the cosine schedule (Nichol & Dhariwal 2021, arXiv:2102.09672)."""

    def alpha_bar(t: np.ndarray) -> np.ndarray:
        return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = np.arange(steps + 1) / steps
    return np.minimum(1 - alpha_bar(t[1:]) / alpha_bar(t[:-1]), max_beta)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """Return the share of the image's variance left after each noising step: [steps]."""
    return np.cumprod(1 - betas)


def ddpm_levels(betas: np.ndarray, steps: int) -> list[NoiseLevel]:
    """Return evenly spaced levels of a trained schedule, the noisiest first, then the clean image.

    The last noisy level is the first of training ("leading" spacing).

    Args:
        betas: from `linear_betas` or `cosine_betas`.
        steps: the number of levels with noise; must divide the number of betas.

    Raises:
        ValueError: `steps` does not divide the number of betas.
    """
    if steps < 1 or len(betas) % steps:
        raise ValueError(f"steps must divide the {len(betas)} betas, got {steps}")
    visited = alpha_bars(betas)[:: len(betas) // steps][::-1]
    return [from_alpha_bar(float(a)) for a in visited] + [NoiseLevel(1.0, 0.0)]


def karras_levels(
    steps: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0
) -> list[NoiseLevel]:
    """Return EDM's levels, which are denser at low noise, then the clean image.

    Args:
        steps: the number of levels with noise.
        smallest: the last sigma above 0.
        largest: the first sigma.
        rho: the larger, the denser at low noise.
    """
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return [from_sigma(float(sigma)) for sigma in sigmas] + [NoiseLevel(1.0, 0.0)]


def flow_levels(steps: int, shift: float = 1.0, *, begin: float = 0.0) -> list[NoiseLevel]:
    """Return the levels of a flow at evenly spaced times.

    Args:
        steps: the number of steps, one less than levels.
        shift: multiplies every ratio of noise to image (Esser et al. 2024, arXiv:2403.03206);
            above 1, more of the steps are at high noise.
        begin: the first time, before the shift; 0 is noise.
    """
    times = [t / (t + shift * (1 - t)) for t in np.linspace(begin, 1, steps + 1).tolist()]
    return [from_flow(t) for t in times]


# Prediction types


def target(kind: PredictionType, x: Any, e: Any, level: NoiseLevel) -> Any:
    """Return the training target of a network.

    Args:
        kind: "x0" is x; "epsilon" is e; "v" is `alpha * e - sigma * x` (Salimans & Ho 2022,
            arXiv:2202.00512); "flow" is `x - e`, the velocity of a straight flow.
        x: clean images.
        e: noise.
        level: the noise level.

    Raises:
        ValueError: the kind is unknown.
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
    """Return the clean images that follow from a network's output for `z`.

    Args:
        kind: the prediction type; "epsilon" needs an alpha above 0.
        output: the output of the network.
        z: noisy images.
        level: the noise level of `z`.

    Raises:
        ValueError: the kind is unknown.
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
    """Return the noise e in `z`, given the clean images x; sigma must not be 0."""
    return (z - level.alpha * x) / level.sigma


def precondition(t: Any, spread: float) -> tuple[Any, Any, Any]:
    """Return the preconditioning of a network at a flow time, for inputs and targets of variance 1.

    The network's input is `c_in * z`, and the prediction of x is `c_skip * z + c_out * output`.
    `c_skip * z` is the best linear estimate of x, and c_out the standard deviation of its error, so
    the output has variance 1 as well (EDM, section 5, in the notation of a flow). At low noise an
    output of 0 is already accurate, where the network would otherwise have to copy its input.

    Args:
        t: the flow time, 0 to 1.
        spread: the standard deviation of image values.

    Returns:
        c_in, c_skip, c_out.
    """
    variance = (t * spread) ** 2 + (1 - t) ** 2  # of z
    root = jnp.sqrt(variance)
    return 1 / root, t * spread**2 / variance, spread * (1 - t) / root
