"""A tower that says what a picture of 32 x 32 pixels shows, to judge emoji-64 by.

    python -m training.recipes.clip_judge --packages DIR --pack PACK --out RUN

A small convolutional network gives a picture a vector near that of its caption, which is the frozen
text encoder's, turned by a linear map (Radford et al. 2021, arXiv:2103.00020; frozen words as in
Zhai et al. 2022, arXiv:2111.07991). There are so few captions that each picture is told from all of
them, one a concept, not only from those of its batch.

Who judges must not have learnt from the same hand: the tower sees OpenMoji and EmojiOne 2 and none
of the three vendors that emoji-64 is made of. What it says of real pictures by those three is the
yardstick for drawn ones. So all that differs between vendors is varied (`varied`): colours, sizes,
places, angles, sharpness, noise.

OpenMoji is under a share-alike licence. Its pictures are used here, to evaluate, and nowhere else:
emoji-64 learns nothing from them or from the tower, and the tower's weights are not given away.

Leaves out: learning on from a stopped run with another vendor, and pictures of other sizes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from diffusion import data, layers
from diffusion.data import Concept, EmojiDataset, Package, Style
from diffusion.layers import abstract_linear, rms_norm, space_to_depth
from diffusion.unet import conv
from training import loop
from training.config import TrainConfig as Run
from transformer.decoder import ArrayInfo
from transformer.layers import linear
from transformer.similarity import l2_normalize
from transformer.weights import Linear

IMAGE_SIZE = 32  # pixels, height and width of what the tower sees
CHANNELS = (48, 96, 192)  # of its stages, each half as large as the one before
EMBED_DIM = 256  # D, of the vectors that pictures and captions are compared by
TEXT_EMBED_DIM = 384  # E
VALIDATION_BATCH_SIZE = 100  # pictures in a batch of other vendors


# The network


@struct.dataclass
class Block:
    """A residual block of two convolutions."""

    first: Linear  # [C, 9 C]
    second: Linear


@struct.dataclass
class Params:
    """Weights of the tower."""

    first: Linear  # [C, 9 x 12]
    blocks: tuple[Block, ...]  # one a stage
    shrink: tuple[Linear, ...]  # [C', 4 C], between stages
    picture: Linear  # [D, C]
    words: Linear  # [D, E]
    sharpness: jax.Array  # [], the logarithm of what cosines are multiplied by


def abstract() -> Params:
    """The tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
    return Params(
        first=abstract_linear(CHANNELS[0], 9 * 12),
        blocks=tuple(
            Block(
                abstract_linear(width, 9 * width), abstract_linear(width, 9 * width, is_zero=True)
            )
            for width in CHANNELS
        ),
        shrink=tuple(
            abstract_linear(coarse, 4 * fine)
            for fine, coarse in zip(CHANNELS, CHANNELS[1:], strict=False)
        ),
        picture=abstract_linear(EMBED_DIM, CHANNELS[-1], bias=False),
        words=abstract_linear(EMBED_DIM, TEXT_EMBED_DIM, bias=False),
        sharpness=ArrayInfo((), (), jax.nn.initializers.constant(np.log(20.0))),
    )


def image_features(params: Params, x: jax.Array) -> jax.Array:
    """What a picture looks like: float32 [B, SIZE, SIZE, 3], -1 to 1 -> [B, C], of variance 1."""
    x = conv(space_to_depth(x), params.first)  # [B, Y/2, X/2, C]
    for block, shrink in zip(params.blocks, (*params.shrink, None), strict=True):
        y = conv(jax.nn.silu(rms_norm(x)), block.first)
        x = x + conv(jax.nn.silu(rms_norm(y)), block.second)
        if shrink is not None:
            x = linear(space_to_depth(x), shrink)  # [B, Y/2, X/2, C']
    return rms_norm(jax.nn.silu(rms_norm(x)).mean((1, 2)))


def logits_per_image(params: Params, found: jax.Array, pooled: jax.Array) -> jax.Array:
    """How well captions fit pictures.

    Args:
        found: float32 [B, C], the pictures' `features`.
        pooled: float32 [G, E], the captions, as the text encoder has them.

    Returns:
        float32 [B, G], logits.
    """
    pictures, words = (
        l2_normalize(linear(found, params.picture)),
        l2_normalize(linear(pooled, params.words)),
    )
    return jnp.exp(params.sharpness) * (pictures @ words.T)


@struct.dataclass
class CaptionEmbeddings:
    """Ways to name each concept.

    Attributes:
        pooled: float32 [concepts, K, E].
        shares: float32 [concepts, K], how often each is drawn; 0 where there are fewer than K.
    """

    pooled: jax.Array
    shares: jax.Array


class ContrastiveTask:
    """Telling what a picture shows, as a task for the loop."""

    def init(self, key: jax.Array) -> Params:
        return layers.init(key, abstract())

    def loss(self, weights: Params, frozen: CaptionEmbeddings, batch, key: jax.Array):
        which = jax.random.categorical(key, jnp.log(frozen.shares))  # a caption a concept
        pooled = jnp.take_along_axis(frozen.pooled, which[:, None, None], 1)[:, 0]  # [G, E]
        logits = logits_per_image(weights, image_features(weights, batch["x"]), pooled)
        own = jnp.take_along_axis(logits, batch["concept"][:, None], 1)[:, 0]
        losses = jax.nn.logsumexp(logits, -1) - own
        correct = (logits.argmax(-1) == batch["concept"]).sum()
        return losses.sum(), jnp.float32(len(losses)), {"correct": correct}


# What it learns from


def svg_on_white(file: bytes, size: int) -> np.ndarray:
    """`data.on_white` of an SVG by OpenMoji, less the margin that it leaves around."""
    import resvg_py

    whole = round(size * 72 / 60)
    png = resvg_py.svg_to_bytes(svg_string=file.decode(), width=whole, height=whole)
    edge = (whole - size) // 2
    return data.on_white(bytes(png), whole)[edge : edge + size, edge : edge + size]


VENDORS = (
    (
        Style(
            "OpenMoji",
            Package(
                "openmoji",
                "17.0.0",
                "55ee7d13485dec86e9f38c1f3a645a13382d33ff97c0cd845ee824b0aef45e68",
                "CC-BY-SA-4.0",
            ),
            "package/color/svg/",
            ".svg",
        ),
        svg_on_white,
    ),
    (
        Style(
            "EmojiOne",
            Package(
                "emojione",
                "2.2.7",
                "5fe002738e6e276f49ac37783799d2feab99a6131fdedccfa56569d745449ae5",
                "CC-BY-4.0",  # the pictures of this version, says its LICENSE.md
            ),
            "package/assets/png/",
            ".png",
        ),
        data.on_white,
    ),
)


def vendor_images(packages: Path, concepts: list[Concept]) -> tuple[np.ndarray, np.ndarray]:
    """The vendors' pictures: uint8 [n, 64, 64, 3]; int [n], the concept that each shows."""
    rows = {concept.code: row for row, concept in enumerate(concepts)}
    found, shown = [], []
    for style, decode in VENDORS:
        drawn = data.load_images(packages, style, concepts, decode)
        found += drawn.values()
        shown += [rows[code] for code in drawn]
    return np.stack(found), np.array(shown)


def caption_embeddings(pack: EmojiDataset) -> CaptionEmbeddings:
    """What the captions of each concept of a pack mean."""
    count = max(len(concept.captions) for concept in pack.concepts)
    shares = np.zeros((len(pack.concepts), count), np.float32)
    pooled = np.zeros((*shares.shape, TEXT_EMBED_DIM), np.float32)
    for row, concept in enumerate(pack.concepts):
        rows = [pack.caption_rows[caption] for caption in concept.captions]
        pooled[row, : len(rows)] = pack.pooled[rows]
        shares[row, : len(rows)] = list(concept.captions.values())
    return CaptionEmbeddings(jnp.asarray(pooled), jnp.asarray(shares))


def augment(random: np.random.Generator, images: np.ndarray, can_mirror: np.ndarray) -> np.ndarray:
    """Pictures as another hand might have drawn them.

    Args:
        images: uint8 [B, 64, 64, 3], on white.
        can_mirror: bool [B], whether half of the time left becomes right.

    Returns:
        float32 [B, SIZE, SIZE, 3], -1 to 1.
    """
    from PIL import Image

    count, size = len(images), images.shape[1]
    angle = np.radians(random.normal(0, 8, count))
    scale = 1 / random.uniform(0.7, 1.1, (count, 2))  # of the way back, from target to source
    flip = np.where(can_mirror & (random.random(count) < 0.5), -1, 1)
    shift = random.normal(0, 0.05 * size, (count, 2))
    moved = np.empty_like(images)
    for row in range(count):
        c, s, half = np.cos(angle[row]), np.sin(angle[row]), size / 2
        turn = np.array([[c, -s], [s, c]]) * scale[row] * [[flip[row]], [1]]
        start = half - turn @ (half + shift[row])
        way = (*turn[0], start[0], *turn[1], start[1])
        image = Image.fromarray(images[row])
        moved[row] = image.transform(
            image.size, Image.Transform.AFFINE, way, Image.Resampling.BILINEAR, fillcolor=(255,) * 3
        )
    x = data.downscale(moved, IMAGE_SIZE)
    # Colours change as ink does, so that white stays white.
    ink = np.einsum("byxc,bcd->byxd", 1 - x, _color_matrices(random, count))
    x = 1 - ink
    blurred = _blur(x)
    x = blurred + random.uniform(0, 1.5, (count, 1, 1, 1)) * (x - blurred)
    x = x + random.uniform(0, 0.2, (count, 1, 1, 1)) * random.normal(size=x.shape)
    return np.clip(x, -1, 1).astype(np.float32)


def _color_matrices(random: np.random.Generator, count: int) -> np.ndarray:
    """Linear maps of colours that turn hues, fade or deepen them: [count, 3, 3]."""
    grey = np.full((3, 3), 1 / 3)
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    angle = np.radians(random.normal(0, 12, (count, 1, 1)))
    turn = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * axis
    faded = random.uniform(0.5, 1.3, (count, 1, 1))
    return random.uniform(0.75, 1.25, (count, 1, 1)) * (grey + faded * (turn - grey))


def _blur(x: np.ndarray) -> np.ndarray:
    """Each pixel and its neighbours, in the shares 1, 2, 1 along rows and columns."""
    for axis in (1, 2):
        width = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(x, width, mode="edge")
        first, middle, last = (
            np.take(padded, np.arange(start, start + x.shape[axis]), axis) for start in range(3)
        )
        x = (first + 2 * middle + last) / 4
    return x


# The run


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """What there is to choose."""

    packages: Path
    pack: Path  # of emoji-64: concepts, captions, and pictures by others to validate with
    out: Path
    steps: int = 900
    batch_size: int = 96
    learning_rate: float = 5e-3
    seed: int = 0


def train(settings: JudgeConfig) -> loop.Outcome:
    """Trains the tower, or goes on with it."""
    data.fetch(settings.packages, [style.package for style, _ in VENDORS])
    pack = EmojiDataset(settings.pack)
    images, shown = vendor_images(settings.packages, pack.concepts)
    can_mirror = ~np.array([concept.directed for concept in pack.concepts])[shown]

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        which = random.choice(len(images), settings.batch_size)
        return {
            "x": augment(random, images[which], can_mirror[which]),
            "concept": shown[which].astype(np.int32),
        }

    config = Run(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        schedule="linear",
        final_fraction=0.02,
        warmup_steps=min(50, settings.steps // 20),
        optimizer="muon",
        b1=0.95,
        b2=0.99,
        average_decay=0.99,
        validate_every=200,
    )
    others = np.random.default_rng(0).choice(
        len(pack.images), 5 * VALIDATION_BATCH_SIZE, replace=False
    )
    return loop.train(
        ContrastiveTask(),
        caption_embeddings(pack),
        batch,
        config,
        settings.out,
        validation_batches=[
            {"x": pack.downscaled_images(rows, IMAGE_SIZE), "concept": pack.concept_ids[rows]}
            for rows in others.reshape(5, VALIDATION_BATCH_SIZE)
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Runs the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.recipes.clip_judge")
    for name in ("packages", "pack", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=JudgeConfig.steps)
    parser.add_argument("--batch-size", type=int, default=JudgeConfig.batch_size)
    outcome = train(JudgeConfig(**vars(parser.parse_args(argv))))
    return 0 if outcome.signal is None else 128 + outcome.signal


if __name__ == "__main__":
    sys.exit(main())
