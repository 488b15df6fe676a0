"""Configs of the two denoisers, a U-Net and a diffusion transformer, and of the upscaler."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, kw_only=True)
class UNetConfig:
    """Sizes of the U-Net.

    Every stage halves height and width. The first one halves them before its convolutions, by
    moving blocks of 2 x 2 pixels to channels: convolutions at full size would cost more than all
    others together.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    image_size: int  # height and width in pixels
    channels: tuple[int, ...]  # of each stage, the finest (largest images) first
    blocks: tuple[int, ...]  # residual blocks of each stage, both on the way down and up
    attention: tuple[bool, ...]  # whether the pixels of a stage attend to pixels and prompt tokens
    head_dim: int = 32  # H
    spread: float = 0.6  # standard deviation of pixel values (-1 to 1); see schedule.precondition
    d_cond: int = 256  # width of the joint embedding of time and prompt
    text_dim: int = 384  # E, width of the text encoder's states

    def __post_init__(self) -> None:
        for name in ("image_size", "head_dim", "d_cond", "text_dim"):
            _positive(name, getattr(self, name))
        _above_zero("spread", self.spread)
        if not len(self.channels) == len(self.blocks) == len(self.attention) >= 1:
            raise ValueError(
                "channels, blocks and attention must have one item per stage, got "
                f"{self.channels}, {self.blocks} and {self.attention}"
            )
        for stage, count in zip(self.channels, self.blocks, strict=True):
            _positive("channels", stage)
            _positive("blocks", count)
        if self.image_size % 2 ** len(self.channels):
            raise ValueError(
                f"image_size must be a multiple of {2 ** len(self.channels)} for "
                f"{len(self.channels)} stages, got {self.image_size}"
            )
        for width, attends in zip(self.channels, self.attention, strict=True):
            if attends and width % self.head_dim:
                raise ValueError(
                    f"channels of a stage with attention must be a multiple of head_dim "
                    f"({self.head_dim}), got {width}"
                )

    @classmethod
    def debug(cls, **changes: Any) -> UNetConfig:
        """Return the config of a U-Net with fewer than 50,000 weights, for tests.

        Args:
            **changes: fields to replace, with their values.
        """
        fields: dict[str, Any] = dict(
            image_size=8,
            channels=(8, 16),
            blocks=(1, 1),
            attention=(False, True),
            head_dim=8,
            d_cond=16,
            text_dim=12,
        )
        return cls(**(fields | changes))


@dataclass(frozen=True, kw_only=True)
class DiTConfig:
    """Sizes of the diffusion transformer.

    Raises:
        ValueError: a field is out of range, or two fields contradict each other.
    """

    image_size: int  # height and width in pixels
    patch: int  # height and width in pixels of the patch that is one token
    num_layers: int  # L
    num_heads: int  # N
    d_model: int  # D
    d_ff: int  # F
    rope_theta: float = 100.0
    spread: float = 0.6  # standard deviation of pixel values (-1 to 1); see schedule.precondition
    d_cond: int = 256  # width of the joint embedding of time and prompt
    text_dim: int = 384  # E, width of the text encoder's states

    def __post_init__(self) -> None:
        for name in ("image_size", "patch", "num_layers", "num_heads", "d_model", "d_ff", "d_cond",
                     "text_dim"):  # fmt: skip
            _positive(name, getattr(self, name))
        for name in ("rope_theta", "spread"):
            _above_zero(name, getattr(self, name))
        if self.image_size % self.patch:
            raise ValueError(
                f"image_size must be a multiple of patch, got {self.image_size} and {self.patch}"
            )
        if self.d_model % (4 * self.num_heads):
            raise ValueError(
                "d_model must be a multiple of 4 * num_heads, because half of a head's channel "
                "pairs are rotated by row and half by column; got "
                f"{self.d_model} and {self.num_heads}"
            )

    @property
    def head_dim(self) -> int:
        """Width of a head, H."""
        return self.d_model // self.num_heads

    @classmethod
    def debug(cls, **changes: Any) -> DiTConfig:
        """Return the config of a transformer with fewer than 50,000 weights, for tests.

        Args:
            **changes: fields to replace, with their values.
        """
        fields: dict[str, Any] = dict(
            image_size=8,
            patch=2,
            num_layers=2,
            num_heads=2,
            d_model=16,
            d_ff=32,
            d_cond=16,
            text_dim=12,
        )
        return cls(**(fields | changes))


@dataclass(frozen=True, kw_only=True)
class UpscalerConfig:
    """Sizes of the network that doubles an image's height and width.

    Raises:
        ValueError: a field is out of range.
    """

    width: int  # C, channels
    num_blocks: int  # residual blocks

    def __post_init__(self) -> None:
        _positive("width", self.width)
        _positive("num_blocks", self.num_blocks)


def _above_zero(name: str, value: Any) -> None:
    if not isinstance(value, float) or not 0 < value < float("inf"):
        raise ValueError(f"{name} must be a positive float, got {value!r}")


def _positive(name: str, value: Any) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be a positive integer, got {value!r}")
