"""From noise to a picture: one loop, and the rules that may take its steps.

A sampler visits levels of falling noise. At each it asks the network for the clean picture behind
the noisy one, and goes on to the next level in a way that the rules differ in:

    ddim    keeps the noise it sees (Song et al. 2020, arXiv:2010.02502). On the levels of a flow
            this is Euler's method, since both walk a straight line from noise to picture.
    ddpm    replaces part of it by fresh noise (Ho et al. 2020, arXiv:2006.11239): DDIM's eta = 1.
    heun    looks at the next level too, and averages (Karras et al. 2022, arXiv:2206.00364); in the
            notation of a flow.
    dpmpp   remembers what it saw at the last level instead ("2M" of DPM-Solver++; Lu et al. 2022,
            arXiv:2211.01095).

Here is the loop with the rules, then guidance (Ho & Salimans 2022, arXiv:2207.12598): what the
prompt adds to the picture is multiplied.

Leaves out: samplers of few steps that need a network distilled for them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp

from diffusion import schedule
from diffusion.schedule import NoiseLevel

DenoiseFn = Callable[
    [jax.Array, NoiseLevel], jax.Array
]  # noisy picture, its level -> clean picture
Sampler = Literal["euler", "ddim", "ddpm", "heun", "dpmpp"]
SAMPLERS: tuple[str, ...] = get_args(Sampler)


class Step(NamedTuple):
    """Where a sampler is.

    Attributes:
        number: of levels left behind, from 1.
        noisy: [B, Y, X, 3], at the level just reached.
        clean: [B, Y, X, 3], the picture that the network saw behind the last one.
    """

    number: int
    noisy: jax.Array
    clean: jax.Array


def steps(
    denoise: DenoiseFn,
    z: jax.Array,
    levels: Sequence[NoiseLevel],
    rule: Sampler = "dpmpp",
    *,
    keys: jax.Array | None = None,
) -> Iterator[Step]:
    """Walks from noise to a picture, a level at a time.

    Args:
        denoise: the network.
        z: [B, Y, X, 3], at the first level: noise, or a picture with noise over it.
        levels: at least two, of falling noise; the last is the clean picture, (1, 0), as a rule.
        rule: how to go from one level to the next.
        keys: [B], one a row, for the fresh noise of "ddpm". Every row has noise of its own, so that
            a picture does not depend on what else is in the batch.

    Yields:
        One `Step` a level after the first. The last one's `noisy` is the picture.

    Raises:
        ValueError: an unknown rule, too few levels, rising noise, or no keys where they are needed.
    """
    if rule not in _SAMPLERS:
        raise ValueError(f"rule must be one of {', '.join(_SAMPLERS)}, got {rule!r}")
    if len(levels) < 2:
        raise ValueError(f"there must be two levels or more, got {len(levels)}")
    for here, there in zip(levels, levels[1:], strict=False):
        if here.sigma * there.alpha <= there.sigma * here.alpha:
            raise ValueError(f"noise must fall from level to level, got {here} before {there}")
    if rule == "ddpm" and keys is None:
        raise ValueError("ddpm draws fresh noise: it needs keys")
    memory = None
    for number, (here, there) in enumerate(zip(levels, levels[1:], strict=False), 1):
        fresh = None
        if rule == "ddpm":
            fresh = normal(jax.vmap(jax.random.fold_in, (0, None))(keys, number), z.shape[1:])
        z, clean, memory = _SAMPLERS[rule](denoise, z, here, there, memory, fresh)
        yield Step(number, z, clean)


def sample(
    denoise: DenoiseFn, z: jax.Array, levels: Sequence[NoiseLevel], rule: Sampler = "dpmpp", **kw
):
    """The picture at the end of `steps`."""
    for step in steps(denoise, z, levels, rule, **kw):
        z = step.noisy
    return z


def image_keys(seed: int, count: int) -> jax.Array:
    """Keys for the pictures of a request: number i has the same for every `count`."""
    return jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(seed), jnp.arange(count))


def normal(keys: jax.Array, shape: Sequence[int]) -> jax.Array:
    """Standard noise, a picture a key: [B, *shape]."""
    return jax.vmap(lambda key: jax.random.normal(key, shape))(keys)


# The rules: from `here` to `there`. Each returns the next noisy picture, the clean one it saw, and
# what it wants to remember.


def _ddim(denoise, z, here: NoiseLevel, there: NoiseLevel, memory, fresh):
    x = denoise(z, here)
    return there.alpha * x + there.sigma * schedule.noise(x, z, here), x, None


def _ddpm(denoise, z, here: NoiseLevel, there: NoiseLevel, memory, fresh):
    x = denoise(z, here)
    # Of the noise that will be left, so much is new; the rest is what was seen.
    new = there.sigma / here.sigma
    new *= math.sqrt(1 - (here.alpha / there.alpha) ** 2)
    old = math.sqrt(max(there.sigma**2 - new**2, 0.0))
    return there.alpha * x + old * schedule.noise(x, z, here) + new * fresh, x, None


def _heun(denoise, z, here: NoiseLevel, there: NoiseLevel, memory, fresh):
    begin, end = (schedule.from_flow(schedule.to_flow(level)) for level in (here, there))
    y = schedule.rescale(z, here, begin)
    x = denoise(z, here)
    velocity = x - schedule.noise(x, y, begin)
    ahead = y + (end.alpha - begin.alpha) * velocity
    if there.sigma > 0:  # there, no velocity can be seen any more
        seen = denoise(schedule.rescale(ahead, end, there), there)
        velocity = (velocity + seen - schedule.noise(seen, ahead, end)) / 2
        ahead = y + (end.alpha - begin.alpha) * velocity
    return schedule.rescale(ahead, end, there), x, None


def _dpmpp(denoise, z, here: NoiseLevel, there: NoiseLevel, memory, fresh):
    x = denoise(z, here)
    if there.sigma == 0:
        return there.alpha * x, x, None
    if here.alpha == 0:  # pure noise: the logarithm of its ratio is infinite
        return there.alpha * x + there.sigma * schedule.noise(x, z, here), x, None
    stride = math.log(here.ratio / there.ratio)
    guess = x  # what the next level will probably show: this one's picture, and its trend
    if memory is not None:
        before, last_stride = memory
        guess = x + (x - before) * (stride / last_stride / 2)
    shrunk = there.sigma / here.sigma
    z = shrunk * z + (there.alpha - shrunk * here.alpha) * guess
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
    """What the prompt adds, multiplied; at scale 1 the picture with the prompt itself."""
    return without + scale * (with_prompt - without)
