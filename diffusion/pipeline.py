"""From a prompt to a picture: reader, denoiser, sampler and upscaler put together.

    painter = diffusion.load("diffusion/weights/emoji-64", "models/all-minilm-l6-v2")
    pictures = painter.draw(["a red apple", "a happy cat"], seed=0)

`steps` is the same a step at a time, for whoever wants to show the picture as it comes, or to do
something else in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

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
    """How a picture is drawn.

    Raises:
        ValueError: a field is out of range.
    """

    steps: int = 20
    sampler: Sampler = "dpmpp"
    guidance: float = 3.0  # 1: as the prompt says; more: more so
    shift: float = 1.0  # above 1, more of the steps go to where much noise is left

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
    """A model that draws.

    Attributes:
        size: pixels of what it draws, height and width, after the upscaler.
    """

    text_encoder: TextEncoder
    denoiser: model.Params
    cfg: model.Config
    upscaler: upscale.Params
    upscaler_cfg: UpscalerConfig

    @property
    def size(self) -> int:
        return 2 * self.cfg.image_size

    def generate(
        self, prompts: Sequence[str], *, seed: int = 0, options: SamplerOptions | None = None
    ) -> np.ndarray:
        """A picture a prompt: uint8 [B, size, size, 3].

        Number i is drawn from noise of its own, that follows from the seed and i alone.
        """
        keys = sample.image_keys(seed, len(prompts))
        *_, (picture, _) = self.steps(prompts, keys, options or SamplerOptions())
        return self.postprocess(picture)

    def steps(
        self, prompts: Sequence[str], keys: jax.Array, plan: SamplerOptions
    ) -> Iterator[tuple[jax.Array, jax.Array]]:
        """Draws, a step at a time; see `sample.steps`.

        Args:
            keys: [B], one a picture.

        Yields:
            The noisy pictures and the clean ones predicted, each float32 [B, Y, X, 3] at the size
            of the denoiser. Either can be shown, by `finish`; the last noisy ones are the result.
        """
        size = self.cfg.image_size
        z = sample.normal(keys, (size, size, 3))
        denoise = self.guided_denoiser(self.encode_prompts(prompts), plan.guidance)
        levels = schedule.flow_levels(plan.steps, plan.shift)
        for step in sample.steps(denoise, z, levels, plan.sampler, keys=keys):
            yield step.noisy, step.clean

    def encode_prompts(self, prompts: Sequence[str]) -> PromptEmbeds:
        """What the prompts mean."""
        return jax.tree.map(jnp.asarray, self.text_encoder(prompts))

    def guided_denoiser(self, text: PromptEmbeds, guidance: float) -> sample.DenoiseFn:
        """The denoiser as a sampler wants it, for these prompts."""

        def denoise(z: jax.Array, level: NoiseLevel) -> jax.Array:
            t = schedule.to_flow(level)
            z = schedule.rescale(z, level, schedule.from_flow(t))
            return denoise_with_guidance(self.denoiser, self.cfg, z, t, text, guidance)

        return denoise

    def postprocess(self, pictures: jax.Array) -> np.ndarray:
        """Twice as large, and as bytes: float [B, Y, X, 3] -> uint8 [B, 2 Y, 2 X, 3]."""
        pictures = upscale.upscale_2x(self.upscaler, self.upscaler_cfg, jnp.clip(pictures, -1, 1))
        return to_uint8(pictures)

    def trajectory_images(
        self, steps: Sequence[tuple[jax.Array, jax.Array]], row: int = 0, *, most: int = 8
    ) -> np.ndarray:
        """How a picture came, finished: uint8 [2 n, size, size, 3].

        Args:
            steps: all that `steps` has yielded.
            row: which picture.
            most: so many of the steps are shown, evenly spaced.

        Returns:
            n noisy pictures, then the n clean ones predicted from what was before each.
        """
        which = np.linspace(0, len(steps) - 1, min(most, len(steps))).round().astype(int)
        pictures = [steps[i][kind][row] for kind in (0, 1) for i in which]
        return self.postprocess(jnp.stack(pictures))


@partial(jax.jit, static_argnames="cfg")
def denoise_with_guidance(
    params: Any, cfg: model.Config, z, t, text: PromptEmbeds, guidance
) -> jax.Array:
    """The clean pictures, guided; with and without the prompt are read as one batch.

    A row whose prompt says nothing is read twice without.

    Args:
        t: float, the time of a flow, the same for all rows.
    """
    rows = len(z)
    twice = jax.tree.map(lambda a: jnp.concatenate([a, a]), (z, text))
    keep = (jnp.arange(2 * rows) < rows) & twice[1].mask.any(1)
    both = model.denoise(params, cfg, twice[0], jnp.full(2 * rows, t), twice[1], keep)
    return sample.classifier_free_guidance(both[:rows], both[rows:], guidance)


def to_uint8(pictures: Any) -> np.ndarray:
    """-1 to 1 becomes 0 to 255, what lies outside is cut."""
    return np.clip((np.asarray(pictures) + 1) * 127.5 + 0.5, 0, 255).astype(np.uint8)


def make_grid(pictures: np.ndarray, columns: int) -> np.ndarray:
    """Pictures side by side, row after row: uint8 [B, Y, X, C] -> [rows Y, columns X, C]."""
    count, height, width, channels = pictures.shape
    rows = -(-count // columns)
    sheet = np.full((rows * columns, height, width, channels), 255, np.uint8)
    sheet[:count] = pictures
    sheet = sheet.reshape(rows, columns, height, width, channels).transpose(0, 2, 1, 3, 4)
    return sheet.reshape(rows * height, columns * width, channels)


def load(folder: str | Path, encoder: str | Path) -> DiffusionPipeline:
    """Loads a model that draws.

    Args:
        folder: `denoiser/` and `upscaler/`, as the recipe exports them.
        encoder: a sentence-transformers folder, the encoder that the denoiser was trained with.

    Raises:
        OSError: a file is not there.
        ValueError: a file is damaged, or the encoder is of another width.
    """
    denoiser, cfg = checkpoint.load(Path(folder) / "denoiser")
    upscaler, upscaler_cfg = checkpoint.load(Path(folder) / "upscaler")
    reader = TextEncoder(Path(encoder))
    if reader.width != cfg.text_dim:
        raise ValueError(
            f"{encoder}: has states of width {reader.width}, the denoiser reads {cfg.text_dim}"
        )
    return DiffusionPipeline(reader, denoiser, cfg, upscaler, upscaler_cfg)
