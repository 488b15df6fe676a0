"""Text to image: text encoder, denoiser, sampler and upscaler as one pipeline.

    pipeline = diffusion.load("diffusion/weights/emoji-64", "models/all-minilm-l6-v2")
    images = pipeline.generate(["a red apple", "a happy cat"], seed=0)

`DiffusionPipeline.steps` yields the images after every denoising step, for previews, or so that a
caller can do other work between steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import checkpoint, model, sample, schedule, upscale
from diffusion.config import UpscalerConfig
from diffusion.sample import Sampler
from diffusion.schedule import NoiseLevel
from diffusion.text import PromptEmbeds, TextEncoder


@dataclass(frozen=True, kw_only=True)
class SamplerOptions:
    """Options of the sampler.

    Raises:
        ValueError: a field is out of range.
    """

    steps: int = 20
    sampler: Sampler = "dpmpp"
    guidance: float = 3.0  # scale of classifier-free guidance; 1 means no guidance
    shift: float = 1.0  # above 1, more of the steps are at high noise

    def __post_init__(self) -> None:
        if not isinstance(self.steps, int) or not 1 <= self.steps <= 1000:
            raise ValueError(f"steps must be an integer from 1 to 1000, got {self.steps!r}")
        if self.sampler not in sample.SAMPLERS:
            raise ValueError(
                f"sampler must be one of {', '.join(sample.SAMPLERS)}, got {self.sampler!r}"
            )
        if not 0 <= self.guidance <= 30:
            raise ValueError(f"guidance must be from 0 to 30, got {self.guidance!r}")
        if not 0.1 <= self.shift <= 10:
            raise ValueError(f"shift must be from 0.1 to 10, got {self.shift!r}")


@dataclass(frozen=True)
class DiffusionPipeline:
    """A text-to-image model.

    Attributes:
        text_encoder: encodes prompts.
        denoiser: weights of the denoising network.
        cfg: config of the denoising network.
        upscaler: weights of the upscaler.
        upscaler_cfg: config of the upscaler.
    """

    text_encoder: TextEncoder
    denoiser: model.Params
    cfg: model.Config
    upscaler: upscale.Params
    upscaler_cfg: UpscalerConfig

    @property
    def size(self) -> int:
        """Height and width in pixels of the images after the upscaler."""
        return 2 * self.cfg.image_size

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, options: SamplerOptions | None = None
    ) -> np.ndarray:
        """Generate one image for each prompt: uint8 [B, size, size, 3].

        Args:
            prompts: the prompts; an empty string generates without a prompt.
            seed: the seed of the noise; the noise of image i depends only on the seed and i.
            options: options of the sampler; None for the defaults.
        """
        keys = sample.image_keys(seed, len(prompts))
        *_, (images, _) = self.steps(prompts, keys, options or SamplerOptions())
        return self.postprocess(images)

    def steps(
        self, prompts: Sequence[str], keys: jax.Array, options: SamplerOptions
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Generate images one denoising step at a time; see `sample.steps`.

        Args:
            prompts: B prompts.
            keys: [B] PRNG keys, one per image.
            options: options of the sampler.

        Yields:
            The noisy images and the predicted clean images after each step, each float32
            [B, Y, X, 3] at the size of the denoiser. Both can be passed to `postprocess`. The noisy
            images of the last step are the result.
        """
        size = self.cfg.image_size
        z = sample.normal(keys, (size, size, 3))
        denoise = self.guided_denoiser(self.encode_prompts(prompts), options.guidance)
        levels = schedule.flow_levels(options.steps, options.shift)
        for step in sample.steps(denoise, z, levels, options.sampler, keys=keys):
            yield step.noisy, step.clean

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """Encode prompts with the text encoder.

        Args:
            prompts: B prompts; the tokens of an empty string are all masked.
        """
        return jax.tree.map(jnp.asarray, self.text_encoder(prompts))

    def guided_denoiser(self, text: PromptEmbeds, guidance: float) -> sample.DenoiseFn:
        """Return a denoiser for the given prompts with guidance, to pass to a sampler.

        Args:
            text: the encoded prompts, from `encode_prompts`.
            guidance: scale of classifier-free guidance.
        """

        def denoise(z: jax.Array, level: NoiseLevel) -> jax.Array:
            t = schedule.to_flow(level)
            z = schedule.rescale(z, level, schedule.from_flow(t))
            return denoise_with_guidance(self.denoiser, self.cfg, z, t, text, guidance)

        return denoise

    def postprocess(self, images: jax.Array) -> np.ndarray:
        """Upscale images and convert them to uint8.

        Args:
            images: float [B, Y, X, 3], -1 to 1.

        Returns:
            uint8 [B, 2 Y, 2 X, 3].
        """
        images = upscale.upscale_2x(self.upscaler, self.upscaler_cfg, jnp.clip(images, -1, 1))
        return to_uint8(images)

    def trajectory_images(
        self, steps: Sequence[tuple[jax.Array, jax.Array]], row: int = 0, *, max_steps: int = 8
    ) -> np.ndarray:
        """Return the denoising trajectory of one image, postprocessed.

        Args:
            steps: all items that the method `steps` yielded.
            row: the index of the image.
            max_steps: the number of steps to show, evenly spaced.

        Returns:
            uint8 [2 n, size, size, 3]: the noisy images of n steps, then the clean images that were
            predicted in the same steps.
        """
        indices = np.linspace(0, len(steps) - 1, min(max_steps, len(steps))).round().astype(int)
        images = [steps[i][kind][row] for kind in (0, 1) for i in indices]
        return self.postprocess(jnp.stack(images))


@partial(jax.jit, static_argnames="cfg")
def denoise_with_guidance(
    params: Any, cfg: model.Config, z, t, text: PromptEmbeds, guidance
) -> jax.Array:
    """Predict clean images with classifier-free guidance.

    The predictions with and without the prompt are computed in one batch. For an empty prompt, both
    are made without a prompt.

    Args:
        params: the weights of the denoiser.
        cfg: the config of the denoiser.
        z: float32 [B, Y, X, 3], noisy images `t * x + (1 - t) * e`; see `model.denoise`.
        t: float, the flow time of all images.
        text: the encoded prompts.
        guidance: the guidance scale.

    Returns:
        float32 [B, Y, X, 3].
    """
    rows = len(z)
    z2, text2 = jax.tree.map(lambda a: jnp.concatenate([a, a]), (z, text))
    keep = (jnp.arange(2 * rows) < rows) & text2.mask.any(1)
    predicted = model.denoise(params, cfg, z2, jnp.full(2 * rows, t), text2, keep)
    return sample.classifier_free_guidance(predicted[:rows], predicted[rows:], guidance)


def to_uint8(images: Any) -> np.ndarray:
    """Convert float images from -1 to 1 to uint8 from 0 to 255; values outside are clipped."""
    return np.clip((np.asarray(images) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def make_grid(images: np.ndarray, columns: int) -> np.ndarray:
    """Arrange images in a grid, row by row; empty cells are white.

    Args:
        images: uint8 [B, Y, X, C].
        columns: number of images per row.

    Returns:
        uint8 [rows * Y, columns * X, C].
    """
    count, height, width, channels = images.shape
    rows = -(-count // columns)
    grid = np.full((rows * columns, height, width, channels), 255, np.uint8)
    grid[:count] = images
    grid = grid.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return grid.reshape(rows * height, columns * width, channels)


def load(folder: str | Path, encoder: str | Path) -> DiffusionPipeline:
    """Load a text-to-image model.

    Args:
        folder: holds `denoiser/` and `upscaler/`, as the training recipe exports them.
        encoder: a sentence-transformers folder of the text encoder that the denoiser was trained
            with.

    Raises:
        OSError: a file is missing or cannot be read.
        ValueError: a file is damaged, or the width of the encoder does not match the denoiser.
    """
    denoiser, cfg = checkpoint.load(Path(folder) / "denoiser")
    upscaler, upscaler_cfg = checkpoint.load(Path(folder) / "upscaler")
    cfg = cast(model.Config, cfg)
    text_encoder = TextEncoder(Path(encoder))
    if text_encoder.width != cfg.text_dim:
        raise ValueError(
            f"{encoder}: the width of its states must be {cfg.text_dim} for this denoiser, "
            f"got {text_encoder.width}"
        )
    return DiffusionPipeline(
        text_encoder, denoiser, cfg, upscaler, cast(UpscalerConfig, upscaler_cfg)
    )
