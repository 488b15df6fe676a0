"""Noise: how much of it there is when, and what a network may say about it.

A noisy picture is `z = alpha * x + sigma * e`, x the clean picture and e standard noise. That is
all of it; the rest is notation, and the literature has three:

    betas  alpha^2 + sigma^2 = 1, given by n small steps (DDPM; Ho et al. 2020, arXiv:2006.11239)
    sigma  alpha = 1, sigma from 80 down to 0 (EDM; Karras et al. 2022, arXiv:2206.00364)
    flow   alpha = t, sigma = 1 - t, t from 0 to 1 (Lipman et al. 2022, arXiv:2210.02747;
           Liu et al. 2022, arXiv:2209.03003)

They are one: scaling z does not change what can be known about x, so that only the ratio
sigma / alpha counts, and each notation names a ratio in its own way. `to_flow` and its siblings
translate; a network trained in one is sampled in any.

A network may be asked for x, for e, or for a mixture, and each follows from any other as long as z
is known (`clean`, `noise`, `target`). They differ in what an error costs: at high noise a small
error in e is a large one in x, at low noise the reverse.

Everything is elementwise over numpy or jax arrays, or plain floats; alpha and sigma must broadcast
against the pictures.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import jax.numpy as jnp
import numpy as np

PredictionType = Literal["x0", "epsilon", "v", "flow"]
PREDICTION_TYPES = ("x0", "epsilon", "v", "flow")


class NoiseLevel(NamedTuple):
    """How noisy a picture is: `z = alpha * x + sigma * e`."""

    alpha: float | np.ndarray
    sigma: float | np.ndarray

    @property
    def ratio(self):
        """Noise to picture, the sigma of EDM's notation."""
        return self.sigma / self.alpha


# The three notations


def from_alpha_bar(alpha_bar) -> NoiseLevel:
    """From DDPM's alpha-bar, the share of the picture in the variance."""
    return NoiseLevel(alpha_bar**0.5, (1 - alpha_bar) ** 0.5)


def from_sigma(sigma) -> NoiseLevel:
    """From EDM's sigma."""
    return NoiseLevel(sigma * 0 + 1.0, sigma)


def from_flow(t) -> NoiseLevel:
    """From the time of a straight flow: 0 is noise, 1 is the picture."""
    return NoiseLevel(t, 1 - t)


def to_alpha_bar(level: NoiseLevel):
    """The share of the picture in the variance; alpha-bar of the level with the same ratio."""
    return level.alpha**2 / (level.alpha**2 + level.sigma**2)


def to_flow(level: NoiseLevel):
    """The time at which a straight flow has the same ratio of noise to picture."""
    return level.alpha / (level.alpha + level.sigma)


def rescale(z, here: NoiseLevel, there: NoiseLevel):
    """The noisy picture in another notation; the ratios of the two levels must be equal."""
    return z * ((there.alpha + there.sigma) / (here.alpha + here.sigma))


# Schedules: the levels that a sampler visits


def linear_betas(steps: int = 1000, first: float = 1e-4, last: float = 0.02) -> np.ndarray:
    """DDPM's betas: float64 [steps], each the variance that one step of noising adds."""
    return np.linspace(first, last, steps)


def cosine_betas(steps: int = 1000, most: float = 0.999) -> np.ndarray:
    """Betas that destroy a picture more evenly (Nichol & Dhariwal 2021, arXiv:2102.09672)."""

    def alpha_bar(t: np.ndarray) -> np.ndarray:
        return np.cos((t + 0.008) / 1.008 * math.pi / 2) ** 2

    t = np.arange(steps + 1) / steps
    return np.minimum(1 - alpha_bar(t[1:]) / alpha_bar(t[:-1]), most)


def alpha_bars(betas: np.ndarray) -> np.ndarray:
    """What is left of the picture's variance after each step of noising: [steps]."""
    return np.cumprod(1 - betas)


def ddpm_levels(betas: np.ndarray, steps: int) -> list[NoiseLevel]:
    """Evenly spaced steps of a trained schedule, the noisiest first, then the clean picture.

    Spaced so that the last step visited is the first of training ("leading"; n must divide).

    Raises:
        ValueError: `steps` does not divide the number of betas.
    """
    if steps < 1 or len(betas) % steps:
        raise ValueError(f"steps must divide {len(betas)}, got {steps}")
    visited = alpha_bars(betas)[:: len(betas) // steps][::-1]
    return [from_alpha_bar(float(a)) for a in visited] + [NoiseLevel(1.0, 0.0)]


def karras_levels(
    steps: int, smallest: float = 0.002, largest: float = 80.0, rho: float = 7.0
) -> list[NoiseLevel]:
    """EDM's sigmas, which spend more steps where little noise is left, then the clean picture."""
    ramp = np.linspace(0, 1, steps) if steps > 1 else np.zeros(1)
    low, high = smallest ** (1 / rho), largest ** (1 / rho)
    sigmas = (high + ramp * (low - high)) ** rho
    return [from_sigma(float(sigma)) for sigma in sigmas] + [NoiseLevel(1.0, 0.0)]


def flow_levels(steps: int, shift: float = 1.0, *, begin: float = 0.0) -> list[NoiseLevel]:
    """Times from 0 to 1, evenly; a shift above 1 spends more steps where much noise is left.

    The shift multiplies every ratio of noise to picture (Esser et al. 2024, arXiv:2403.03206).
    `begin` leaves out that part of the way: at 0 it starts from noise.
    """
    times = [t / (t + shift * (1 - t)) for t in np.linspace(begin, 1, steps + 1).tolist()]
    return [from_flow(t) for t in times]


# What a network says


def target(kind: PredictionType, x, e, level: NoiseLevel):
    """What a network of this kind should say: x, e, or a mixture of both.

    "v" is `alpha * e - sigma * x` (Salimans & Ho 2022, arXiv:2202.00512), "flow" the velocity
    `x - e` at which a straight flow moves.
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


def clean(kind: PredictionType, said, z, level: NoiseLevel):
    """The clean picture that follows from what a network said of `z`.

    From "epsilon" it does not where alpha is 0: pure noise tells nothing of x.
    """
    alpha, sigma = level
    if kind == "x0":
        return said
    if kind == "epsilon":
        return (z - sigma * said) / alpha
    if kind == "v":
        return (alpha * z - sigma * said) / (alpha**2 + sigma**2)
    if kind == "flow":
        return (z + sigma * said) / (alpha + sigma)
    raise ValueError(f"kind must be one of {', '.join(PREDICTION_TYPES)}, got {kind!r}")


def noise(x, z, level: NoiseLevel):
    """The noise in `z`, when the clean picture is known; sigma must not be 0."""
    return (z - level.alpha * x) / level.sigma


def precondition(t, spread: float):
    """How to ask a network for x at time `t` of a flow, so that every level is equally hard.

    The network is given `c_in * z`, of variance 1, and `c_skip * z + c_out * said` is taken for x.
    c_skip is the best linear guess of x and c_out the deviation it leaves, so what is left to say
    has variance 1 too (EDM, section 5, in the notation of a flow). A network that says 0 is then
    already right at low noise, where it would first have to learn to copy its input.

    Args:
        t: the time, 0 to 1.
        spread: the standard deviation of pictures' values.

    Returns:
        c_in, c_skip, c_out.
    """
    variance = (t * spread) ** 2 + (1 - t) ** 2  # of z
    root = jnp.sqrt(variance)
    return 1 / root, t * spread**2 / variance, spread * (1 - t) / root
