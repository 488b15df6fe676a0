"""Image to image: variations, and inpainting.

A variation starts from the image with noise added instead of pure noise, and denoises from there:
details hidden by the noise are generated anew, the rest follows the image (SDEdit; Meng et al.
2021, arXiv:2108.01073). The strength of a variation is the share of the steps from noise to image
that are taken.

Inpainting keeps a part of the image: at every noise level, the known part of the noisy image is
replaced by the original with the same amount of noise (RePaint; Lugmayr et al. 2022,
arXiv:2201.09865). Samplers compute the noisy image from the predicted clean image, so it suffices
to replace the known part of the prediction: there every sampler then yields the original with the
noise of the level, and the network sees it beside the part that it generates. Every level of high
noise is denoised several times, with fresh noise added in between, because the network first
generates the new part without regard to the known part. (Measured on lower halves without a prompt:
pixel values jump by 0.23 at the boundary with one step per level, by 0.17 with five; three times as
many levels make no visible difference.)

The network works at low resolution, and the image can have a higher one. So the unchanged part of
the result is copied from the original (`paste`), with identical pixel values.

Leaves out: networks trained for inpainting, which take the mask as an input.
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

VARIATION_STRENGTH = 0.8  # of a variation by default: visible changes, and still recognizable
RESAMPLING_STEPS = 5  # steps at each noise level that inpainting resamples
RESAMPLE_UNTIL = 0.5  # flow time at which resampling ends, because the outlines no longer change


def steps(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    keys: jax.Array,
    options: SamplerOptions,
    *,
    images: np.ndarray | jax.Array,
    masks: np.ndarray | jax.Array | None = None,
    strength: float = 1.0,
) -> Iterator[tuple[jax.Array, jax.Array]]:
    """Generate images from images, one denoising step at a time, like `DiffusionPipeline.steps`.

    Args:
        pipeline: the model.
        prompts: one per image; each describes the result, not the change. A prompt can be empty.
        keys: [B] PRNG keys, one per image.
        options: options of the sampler; `strength * options.steps` steps are taken.
        images: float [B, Y, X, 3] from -1 to 1, at the size of the denoiser; see
            `preprocess_image`.
        masks: float [B, Y, X, 1], 1 where the image changes and 0 where it stays; None to change
            all of it.
        strength: how far back to pure noise the images are moved, above 0 and at most 1. At 1 only
            the part that a mask keeps influences the result.

    Yields:
        The noisy images and the predicted clean ones, each float32 [B, Y, X, 3].

    Raises:
        ValueError: an argument is out of range or of the wrong shape.
    """
    size = pipeline.cfg.image_size
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, got {strength!r}")
    _check_shape("images", images, (len(prompts), size, size, 3))
    images = jnp.asarray(images, jnp.float32)
    denoise = pipeline.guided_denoiser(pipeline.encode_prompts(prompts), options.guidance)
    if masks is not None:
        _check_shape("masks", masks, (len(prompts), size, size, 1))
        denoise = inpaint_denoiser(denoise, images, jnp.asarray(masks, jnp.float32))
    count = max(1, round(strength * options.steps))
    levels = schedule.flow_levels(count, options.shift, begin=1 - strength)
    noise = sample.normal(keys, (size, size, 3))
    z = levels[0].alpha * images + levels[0].sigma * noise
    if masks is not None:
        while len(levels) > 2 and schedule.to_flow(levels[0]) < RESAMPLE_UNTIL:
            level, next_level, *_ = levels
            for i in range(RESAMPLING_STEPS):
                keys = jax.vmap(jax.random.fold_in, (0, None))(keys, i)
                if i > 0:
                    z = renoise(z, next_level, level, sample.normal(keys, z.shape[1:]))
                (step,) = sample.steps(denoise, z, (level, next_level), options.sampler, keys=keys)
                z = step.noisy
            yield step.noisy, step.clean  # pyright: ignore[reportPossiblyUnboundVariable]  # steps > 0
            levels = levels[1:]
    for step in sample.steps(denoise, z, levels, options.sampler, keys=keys):
        yield step.noisy, step.clean


def renoise(
    z: jax.Array, level: NoiseLevel, noisier_level: NoiseLevel, noise: jax.Array
) -> jax.Array:
    """Return noisy images with fresh noise added, so that they are at a noisier level.

    Args:
        z: noisy images at `level`.
        level: the noise level of `z`.
        noisier_level: the noise level of the result.
        noise: standard normal noise of the shape of `z`.
    """
    scale = noisier_level.alpha / level.alpha
    return scale * z + (noisier_level.sigma**2 - (scale * level.sigma) ** 2) ** 0.5 * noise


def inpaint_denoiser(
    denoise: sample.DenoiseFn, images: jax.Array, masks: jax.Array
) -> sample.DenoiseFn:
    """Return a denoiser whose predictions equal the images where the masks are 0.

    Args:
        denoise: the denoiser to wrap.
        images: float32 [B, Y, X, 3], clean images.
        masks: float32 [B, Y, X, 1], 1 where the denoiser predicts.
    """

    def masked_denoise(z: jax.Array, level: NoiseLevel) -> jax.Array:
        return images + masks * (denoise(z, level) - images)

    return masked_denoise


def preprocess_image(image: np.ndarray, size: int) -> np.ndarray:
    """Convert an image to the input of the denoiser.

    The image is composited on white, padded to a square with white on both sides, and resized by
    area averaging.

    Args:
        image: uint8 [Y, X, 3 or 4].
        size: height and width of the result.

    Returns:
        float32 [size, size, 3], -1 to 1.
    """
    square = _pad_to_square(composite_on_white(image), 255)
    return _area_resize(square, size) / np.float32(127.5) - 1


def preprocess_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Pad and resize the mask of an image as `preprocess_image` does with the image.

    A pixel of the result is 1 if any pixel of its area is above 0.

    Args:
        mask: float [Y, X, 1].
        size: height and width of the result.

    Returns:
        float32 [size, size, 1], 0 or 1.
    """
    return (_area_resize(_pad_to_square(mask, 0), size) > 0).astype(np.float32)


def alpha_mask(image: np.ndarray) -> np.ndarray:
    """Return the mask of an image's transparency: uint8 [Y, X, 4] -> float32 [Y, X, 1].

    The mask is 1 where the image is transparent (the part to change), 0 where it is opaque.
    """
    return 1 - image[..., 3:] / np.float32(255)


def paste(original: np.ndarray, generated: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Paste a generated image into the original; pixels where the mask is 0 are copied unchanged.

    Args:
        original: uint8 [Y, X, 3 or 4]. If the mask was made from its alpha channel (`alpha_mask`),
            pass the first three channels only.
        generated: uint8 [S, S, 3], generated from `preprocess_image(original)`.
        mask: float [Y, X, 1], 1 where the original is replaced.

    Returns:
        uint8, of the original's shape.
    """
    from PIL import Image

    height, width, _ = original.shape
    side = max(height, width)
    image = Image.fromarray(generated).resize((side, side), Image.Resampling.LANCZOS)
    top, left = _margins(height, width)
    layer = np.full_like(original, 255)
    layer[..., :3] = np.asarray(image)[top : top + height, left : left + width]
    blended = original + np.asarray(mask, np.float32) * (layer.astype(np.float32) - original)
    return np.where(mask > 0, np.round(blended).astype(np.uint8), original)


def _margins(height: int, width: int) -> tuple[int, int]:
    """Return the numbers of rows above and columns left of an image centred in its square."""
    side = max(height, width)
    return (side - height) // 2, (side - width) // 2


def _pad_to_square(image: np.ndarray, value: float) -> np.ndarray:
    """Return an image centred in a square that is filled with `value`."""
    height, width, channels = image.shape
    side = max(height, width)
    top, left = _margins(height, width)
    square = np.full((side, side, channels), value, image.dtype)
    square[top : top + height, left : left + width] = image
    return square


def _area_resize(square: np.ndarray, size: int) -> np.ndarray:
    """Resize a square image by area averaging: float32 [size, size, C]."""
    from PIL import Image

    resized = []
    for channel in np.moveaxis(square, -1, 0):  # one channel at a time, to save memory
        image = Image.fromarray(channel.astype(np.float32))
        resized.append(np.asarray(image.resize((size, size), Image.Resampling.BOX)))
    return np.stack(resized, axis=-1)


def _check_shape(name: str, array: np.ndarray | jax.Array, shape: tuple[int, ...]) -> None:
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(array.shape)}")
