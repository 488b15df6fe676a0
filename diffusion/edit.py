"""Pictures drawn from pictures: variations, and edits of a part.

A variation begins not at noise but at the picture with noise over it, and denoises from there: what
the noise has hidden is drawn anew, what it has left decides the rest (SDEdit; Meng et al. 2021,
arXiv:2108.01073). How much of the way from picture to noise it goes back is its strength.

An edit holds a part fixed: at every level the known part of the noisy picture is replaced by the
original with as much noise (RePaint; Lugmayr et al. 2022, arXiv:2201.09865). The samplers here ask
for the clean picture at each level, so it is enough to tell them the known part of it: with the
noise kept, each of their rules then leaves in that part exactly the original under the noise of
the level, and the network sees it beside what it draws. It goes on from each noisy level several
times, with fresh noise between, because the first time the new part was begun without regard to the
old. (Where lower halves were drawn without a prompt, values jumped by 0.23 at the seam with one
look, by 0.17 with five; three times as many steps changed nothing to be seen.)

The network works on few pixels, the picture may have many. So what was not to be changed is at the
end taken from the original itself (`paste`), bit by bit.

Leaves out: networks trained to fill holes, which see where the hole is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import sample, schedule
from diffusion.image_io import composite_on_white
from diffusion.pipeline import DiffusionPipeline, SamplerOptions
from diffusion.schedule import NoiseLevel

VARIATION_STRENGTH = 0.8  # the strength that changes a picture and leaves it recognisable
RESAMPLING_STEPS = 5  # at each level of an edit
RESAMPLE_UNTIL = 0.5  # the time of the flow from which on one look is enough: outlines are drawn


def steps(
    painter: DiffusionPipeline,
    prompts: Sequence[str],
    keys: jax.Array,
    plan: SamplerOptions,
    *,
    images: np.ndarray | jax.Array,
    masks: np.ndarray | jax.Array | None = None,
    strength: float = 1.0,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Draws from pictures, a step at a time, like `Painter.steps`.

    Args:
        painter: the model.
        prompts: one a picture: what is to be seen at the end, not what is to change. May be empty.
        keys: [B], one a picture.
        plan: of its steps, `strength` times as many are taken.
        pictures: float [B, Y, X, 3] from -1 to 1, at the size of the denoiser; see `fit`.
        masks: float [B, Y, X, 1], 1 where the picture changes and 0 where it is kept; None for
            pictures that change everywhere.
        strength: above 0, up to 1: how much of the way to noise to go back. At 1 nothing is left of
            the picture but what the mask keeps.

    Yields:
        The noisy pictures and the clean ones predicted, each float32 [B, Y, X, 3].

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    size = painter.cfg.image_size
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength!r}")
    _check("pictures", images, (len(prompts), size, size, 3))
    images = jnp.asarray(images, jnp.float32)
    denoise = painter.guided_denoiser(painter.encode_prompts(prompts), plan.guidance)
    if masks is not None:
        _check("masks", masks, (len(prompts), size, size, 1))
        denoise = inpaint_denoiser(denoise, images, jnp.asarray(masks, jnp.float32))
    count = max(1, round(strength * plan.steps))
    levels = schedule.flow_levels(count, plan.shift, begin=1 - strength)
    noise = sample.normal(keys, (size, size, 3))
    z = levels[0].alpha * images + levels[0].sigma * noise
    if masks is not None:
        while len(levels) > 2 and schedule.to_flow(levels[0]) < RESAMPLE_UNTIL:
            here, there, *_ = levels
            for look in range(RESAMPLING_STEPS):
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, look)
                if look > 0:
                    z = renoise(z, there, here, sample.normal(keys, z.shape[1:]))
                (step,) = sample.steps(denoise, z, (here, there), plan.sampler, keys=keys)
                z = step.noisy
            yield step.noisy, step.clean
            levels = levels[1:]
    for step in sample.steps(denoise, z, levels, plan.sampler, keys=keys):
        yield step.noisy, step.clean


def renoise(z: jax.Array, here: NoiseLevel, there: NoiseLevel, fresh: jax.Array) -> jax.Array:
    """A noisy picture at a level of more noise: the noise it has, and fresh noise."""
    kept = there.alpha / here.alpha
    return kept * z + (there.sigma**2 - (kept * here.sigma) ** 2) ** 0.5 * fresh


def inpaint_denoiser(
    denoise: sample.DenoiseFn, pictures: jax.Array, masks: jax.Array
) -> sample.DenoiseFn:
    """A denoiser that knows the pictures where the masks are 0."""

    def informed(z: jax.Array, level: NoiseLevel) -> jax.Array:
        return pictures + masks * (denoise(z, level) - pictures)

    return informed


def preprocess_image(picture: np.ndarray, size: int) -> np.ndarray:
    """A picture as the network sees it: uint8 [Y, X, 3 or 4] -> float32 [size, size, 3], -1 to 1.

    What is transparent becomes white, and so does what a picture lacks of a square, on both sides.
    Every pixel is the mean of those it stands for.
    """
    return (
        _area_resize(_pad_to_square(composite_on_white(picture), 255), size) / np.float32(127.5) - 1
    )


def preprocess_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """A mask for a picture that was fitted: float [Y, X, 1] -> float32 [size, size, 1], 0 or 1.

    A pixel of the network changes if any that it stands for does.
    """
    return (_area_resize(_pad_to_square(mask, 0), size) > 0).astype(np.float32)


def alpha_mask(picture: np.ndarray) -> np.ndarray:
    """The mask that a picture's transparency says: uint8 [Y, X, 4] -> float32 [Y, X, 1].

    1 where nothing is to be seen, which is what changes; in between at soft edges.
    """
    return 1 - picture[..., 3:] / np.float32(255)


def paste(original: np.ndarray, drawn: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """What was drawn, laid into the original; where the mask is 0 that stays bit by bit.

    Args:
        original: uint8 [Y, X, 3 or 4]. If its transparency was the mask, hand over three channels,
            because that is used up.
        drawn: uint8 [S, S, 3], from the original fitted.
        mask: float [Y, X, 1], 1 where the original is replaced.

    Returns:
        Of the original's shape.
    """
    from PIL import Image

    height, width, channels = original.shape
    side = max(height, width)
    image = Image.fromarray(drawn).resize((side, side), Image.Resampling.LANCZOS)
    top, left = _margins(height, width)
    layer = np.full_like(original, 255)
    layer[..., :3] = np.asarray(image)[top : top + height, left : left + width]
    mixed = original + np.asarray(mask, np.float32) * (layer.astype(np.float32) - original)
    return np.where(mask > 0, np.round(mixed).astype(np.uint8), original)


def _margins(height: int, width: int) -> tuple[int, int]:
    """Rows above and columns left of a picture in the middle of the square it fits into."""
    side = max(height, width)
    return (side - height) // 2, (side - width) // 2


def _pad_to_square(picture: np.ndarray, value: float) -> np.ndarray:
    height, width, channels = picture.shape
    side = max(height, width)
    top, left = _margins(height, width)
    square = np.full((side, side, channels), value, picture.dtype)
    square[top : top + height, left : left + width] = picture
    return square


def _area_resize(square: np.ndarray, size: int) -> np.ndarray:
    """A square in another size, each of its pixels the mean of an area: float32 [size, size, C]."""
    from PIL import Image

    shrunk = [
        Image.fromarray(channel.astype(np.float32)).resize((size, size), Image.Resampling.BOX)
        for channel in np.moveaxis(square, -1, 0)  # one at a time: floats of all are a lot
    ]
    return np.stack(shrunk, axis=-1)


def _check(name: str, array: np.ndarray | jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
