"""Samplers: from noise to an image, in one loop over interchangeable step functions.

A sampler goes through levels of decreasing noise. At each level the network predicts the clean
image, from which the sampler computes the noisy image at the next level:

    ddim    using the predicted noise (Song et al. 2020, arXiv:2010.02502). On the levels of a flow
            this equals Euler's method, "euler".
    ddpm    replacing part of the predicted noise by fresh noise (Ho et al. 2020,
            arXiv:2006.11239): DDIM with eta = 1.
    heun    using the mean velocity at this and the next level (Karras et al. 2022,
            arXiv:2206.00364), in the notation of a flow.
    dpmpp   using a prediction extrapolated from the previous level ("2M" of DPM-Solver++; Lu et al.
            2022, arXiv:2211.01095).

Classifier-free guidance (Ho & Salimans 2022, arXiv:2207.12598) amplifies the difference that the
prompt makes.

Leaves out: samplers of few steps that need a distilled network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from diffusion import schedule
from diffusion.schedule import NoiseLevel

# Takes noisy images and their noise level, and returns the predicted clean images.
DenoiseFn = Callable[[jax.Array, NoiseLevel], jax.Array]
Sampler = Literal["euler", "ddim", "ddpm", "heun", "dpmpp"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)


class Step(NamedTuple):
    """The state of a sampler after a denoising step.

    Attributes:
        number: the number of steps taken so far, from 1.
        noisy: [B, Y, X, 3], the noisy images at the noise level just reached.
        clean: [B, Y, X, 3], the clean images predicted in this step, at the previous noise level.
    """

    number: int
    noisy: jax.Array
    clean: jax.Array


def steps(
    denoise: DenoiseFn,
    z: jax.Array,
    levels: Sequence[NoiseLevel],
    sampler: Sampler = "dpmpp",
    *,
    keys: jax.Array | None = None,
) -> Iterator[Step]:
    """Denoise images from noise level to noise level.

    Args:
        denoise: predicts clean images from noisy images and their noise level.
        z: [B, Y, X, 3], images at the first noise level: noise, or images with noise added.
        levels: at least two noise levels, of decreasing noise; the last is usually that of a clean
            image, `NoiseLevel(1, 0)`.
        sampler: the name of the step function, one of `SAMPLERS`.
        keys: [B] PRNG keys, one per image, for the fresh noise of "ddpm". So an image does not
            depend on the other images of the batch.

    Yields:
        One `Step` for each noise level after the first. `noisy` of the last step is the result.

    Raises:
        ValueError: the sampler is unknown, there are fewer than two levels, their noise does not
            decrease, or `keys` is None with "ddpm".
    """
    if sampler not in _SAMPLERS:
        raise ValueError(f"sampler must be one of {', '.join(_SAMPLERS)}, got {sampler!r}")
    if len(levels) < 2:
        raise ValueError(f"levels must have at least 2 noise levels, got {len(levels)}")
    for level, next_level in zip(levels, levels[1:], strict=False):
        if level.sigma * next_level.alpha <= next_level.sigma * level.alpha:
            raise ValueError(f"levels must have decreasing noise, got {level} before {next_level}")
    if sampler == "ddpm" and keys is None:
        raise ValueError("keys must not be None with ddpm, which adds fresh noise")
    history = None
    for number, (level, next_level) in enumerate(zip(levels, levels[1:], strict=False), 1):
        fresh = None
        if sampler == "ddpm" and keys is not None:
            fresh = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), z.shape[1:])
        z, clean, history = _SAMPLERS[sampler](denoise, z, level, next_level, history, fresh)
        yield Step(number, z, clean)


def sample(
    denoise: DenoiseFn,
    z: jax.Array,
    levels: Sequence[NoiseLevel],
    sampler: Sampler = "dpmpp",
    *,
    keys: jax.Array | None = None,
) -> jax.Array:
    """Return the images after the last denoising step; see `steps` for the arguments."""
    for step in steps(denoise, z, levels, sampler, keys=keys):
        z = step.noisy
    return z


def image_keys(seed: int, count: int) -> jax.Array:
    """Return [count] PRNG keys; key i is `fold_in(key(seed), i)` for every `count`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def normal(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Return standard normal noise [*shape] for each of B keys: float32 [B, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


# Step functions, from `level` to `next_level`. Each returns the next noisy images, the predicted
# clean images, and what the next call takes as `history`. `fresh` is the noise for "ddpm".


def _ddim(denoise, z, level: NoiseLevel, next_level: NoiseLevel, history, fresh):
    x = denoise(z, level)
    return next_level.alpha * x + next_level.sigma * schedule.noise(x, z, level), x, None


def _ddpm(denoise, z, level: NoiseLevel, next_level: NoiseLevel, history, fresh):
    x = denoise(z, level)
    # Standard deviations of the fresh noise (new) and of the remaining predicted noise (old).
    new = next_level.sigma / level.sigma
    new *= math.sqrt(1 - (level.alpha / next_level.alpha) ** 2)
    old = math.sqrt(max(next_level.sigma**2 - new**2, 0.0))
    return next_level.alpha * x + old * schedule.noise(x, z, level) + new * fresh, x, None


def _heun(denoise, z, level: NoiseLevel, next_level: NoiseLevel, history, fresh):
    begin, end = (schedule.from_flow(schedule.to_flow(each)) for each in (level, next_level))
    y = schedule.rescale(z, level, begin)
    x = denoise(z, level)
    velocity = x - schedule.noise(x, y, begin)
    ahead = y + (end.alpha - begin.alpha) * velocity
    if next_level.sigma > 0:  # at sigma = 0 the velocity is undefined
        next_x = denoise(schedule.rescale(ahead, end, next_level), next_level)
        velocity = (velocity + next_x - schedule.noise(next_x, ahead, end)) / 2
        ahead = y + (end.alpha - begin.alpha) * velocity
    return schedule.rescale(ahead, end, next_level), x, None


def _dpmpp(denoise, z, level: NoiseLevel, next_level: NoiseLevel, history, fresh):
    x = denoise(z, level)
    if next_level.sigma == 0:
        return next_level.alpha * x, x, None
    if level.alpha == 0:  # pure noise: log(sigma / alpha) is infinite
        return next_level.alpha * x + next_level.sigma * schedule.noise(x, z, level), x, None
    stride = math.log(level.ratio / next_level.ratio)
    extrapolated = x  # linearly in log(sigma / alpha), from this and the previous prediction
    if history is not None:
        last_x, last_stride = history
        extrapolated = x + (x - last_x) * (stride / last_stride / 2)
    shrink = next_level.sigma / level.sigma
    z = shrink * z + (next_level.alpha - shrink * level.alpha) * extrapolated
    return z, x, (x, stride)


_SAMPLERS: dict[str, Any] = {
    "euler": _ddim,
    "ddim": _ddim,
    "ddpm": _ddpm,
    "heun": _heun,
    "dpmpp": _dpmpp,
}


def classifier_free_guidance(
    with_prompt: jax.Array, without: jax.Array, scale: float | jax.Array
) -> jax.Array:
    """Extrapolate from the prediction without the prompt through the prediction with the prompt.

    Args:
        with_prompt: [B, Y, X, 3], predicted with the prompt.
        without: [B, Y, X, 3], predicted without the prompt.
        scale: 1 returns `with_prompt`; larger values amplify the prompt.
    """
    return without + scale * (with_prompt - without)
