"""The CLIP judge: a model that scores captions for images of 32 x 32 pixels, to evaluate emoji-64.

    python -m training.recipes.clip_judge --packages DIR --dataset DATASET --out RUN

A small convolutional network is trained to embed an image close to its caption, which is embedded
by a frozen text encoder and a linear projection (CLIP: Radford et al. 2021, arXiv:2103.00020; the
frozen text encoder as in LiT: Zhai et al. 2022, arXiv:2111.07991). There are few concepts,
so the contrastive loss compares an image with a caption of every concept, not only of those in the
batch.

The judge must not be trained on the styles that it evaluates: its training images are by OpenMoji
and EmojiOne 2, and those of emoji-64 by three other vendors. The scores of real images by these
three vendors are the reference for generated images. `augment` varies the properties that differ
between vendors: colours, sizes, positions, angles, sharpness and noise.

OpenMoji has a share-alike licence. Its images are used only here, for evaluation: emoji-64 is not
trained on them or on the judge, and the weights of the judge are not distributed.

Left out: resuming a stopped run with images of other vendors, and images of other sizes.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

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

IMAGE_SIZE = 32  # height and width of the input in pixels
CHANNELS = (48, 96, 192)  # per stage; each stage has half the resolution of the previous one
EMBED_DIM = 256  # D, the dimension of the common embedding space of images and captions
TEXT_EMBED_DIM = 384  # E, the dimension of the text encoder
VALIDATION_BATCH_SIZE = 100


# The network


@struct.dataclass
class Block:
    """A residual block of two convolutions."""

    first: Linear  # [C, 9 C]
    second: Linear


@struct.dataclass
class Params:
    """The weights of the CLIP judge; the field names are the tensor names in checkpoints."""

    first: Linear  # [C, 9 x 12]
    blocks: tuple[Block, ...]  # one per stage
    shrink: tuple[Linear, ...]  # [C', 4 C], between stages
    picture: Linear  # [D, C], the projection of images
    words: Linear  # [D, E], the projection of captions
    sharpness: jax.Array  # [], the logarithm of the scale of the cosines (CLIP: logit_scale)


def abstract() -> Params:
    """Return the tree of `Params` with an `ArrayInfo` at each leaf; every leaf is float32."""
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
        sharpness=cast(Any, ArrayInfo((), (), jax.nn.initializers.constant(np.log(20.0)))),
    )


def image_features(params: Params, x: jax.Array) -> jax.Array:
    """Return the features of images before the projection to the embedding space.

    Args:
        params: the weights.
        x: float32 [B, IMAGE_SIZE, IMAGE_SIZE, 3], from -1 to 1.

    Returns:
        float32 [B, C], normalized to an RMS of 1.
    """
    x = conv(space_to_depth(x), params.first)  # [B, Y/2, X/2, C]
    for block, shrink in zip(params.blocks, (*params.shrink, None), strict=True):
        y = conv(jax.nn.silu(rms_norm(x)), block.first)
        x = x + conv(jax.nn.silu(rms_norm(y)), block.second)
        if shrink is not None:
            x = linear(space_to_depth(x), shrink)  # [B, Y/2, X/2, C']
    return rms_norm(jax.nn.silu(rms_norm(x)).mean((1, 2)))


def logits_per_image(
    params: Params, features: jax.Array | np.ndarray, pooled: jax.Array | np.ndarray
) -> jax.Array:
    """Return the scaled cosine similarities of images and captions.

    Args:
        params: the weights.
        features: float32 [B, C], from `image_features`.
        pooled: float32 [G, E], embeddings of the captions, from the text encoder.

    Returns:
        float32 [B, G], logits.
    """
    image_embeds, text_embeds = (
        l2_normalize(linear(jnp.asarray(features), params.picture)),
        l2_normalize(linear(jnp.asarray(pooled), params.words)),
    )
    return jnp.exp(params.sharpness) * (image_embeds @ text_embeds.T)


@struct.dataclass
class CaptionEmbeddings:
    """The embeddings of the captions of each concept.

    Attributes:
        pooled: float32 [concepts, K, E], padded to K captions per concept.
        shares: float32 [concepts, K], the sampling probability of each caption; 0 for padding.
    """

    pooled: jax.Array
    shares: jax.Array


class ContrastiveTask:
    """The contrastive loss of images and captions; implements `Task`."""

    def init(self, key: jax.Array) -> Params:
        """Return random weights."""
        return layers.init(key, abstract())

    def loss(self, weights: Params, frozen: CaptionEmbeddings, batch, key: jax.Array):
        """Return the cross-entropy of each image's concept among all concepts.

        A concept is represented by one of its captions, sampled anew at each step.

        `batch` has "x" float32 [B, IMAGE_SIZE, IMAGE_SIZE, 3] and "concept" int32 [B]; see
        `Task.loss`.
        """
        captions = jax.random.categorical(key, jnp.log(frozen.shares))  # one per concept
        pooled = jnp.take_along_axis(frozen.pooled, captions[:, None, None], 1)[:, 0]  # [G, E]
        logits = logits_per_image(weights, image_features(weights, batch["x"]), pooled)
        target_logits = jnp.take_along_axis(logits, batch["concept"][:, None], 1)[:, 0]
        losses = jax.nn.logsumexp(logits, -1) - target_logits
        correct = (logits.argmax(-1) == batch["concept"]).sum()
        return losses.sum(), jnp.float32(len(losses)), {"correct": correct}


# Training data


def svg_on_white(file: bytes, size: int) -> np.ndarray:
    """Render an SVG of OpenMoji on white, without its margin.

    Args:
        file: the bytes of the SVG file.
        size: height and width of the result in pixels.

    Returns:
        uint8 [size, size, 3].
    """
    import resvg_py  # pyright: ignore[reportMissingImports] - in extra `parity`

    full_size = round(size * 72 / 60)
    png = resvg_py.svg_to_bytes(svg_string=file.decode(), width=full_size, height=full_size)
    margin = (full_size - size) // 2
    return data.on_white(bytes(png), full_size)[margin : margin + size, margin : margin + size]


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
                "CC-BY-4.0",  # of the images of this version, according to its LICENSE.md
            ),
            "package/assets/png/",
            ".png",
        ),
        data.on_white,
    ),
)


def vendor_images(packages: Path, concepts: list[Concept]) -> tuple[np.ndarray, np.ndarray]:
    """Load the images of the vendors that the judge is trained on.

    Args:
        packages: the folder of the packages; see `data.fetch`.
        concepts: the concepts of the emoji-64 dataset.

    Returns:
        The images, uint8 [n, 64, 64, 3], and the index of the concept of each, int [n].
    """
    rows = {concept.code: row for row, concept in enumerate(concepts)}
    images, concept_ids = [], []
    for style, decode in VENDORS:
        images_by_code = data.load_images(packages, style, concepts, decode)
        images += images_by_code.values()
        concept_ids += [rows[code] for code in images_by_code]
    return np.stack(images), np.array(concept_ids)


def caption_embeddings(dataset: EmojiDataset) -> CaptionEmbeddings:
    """Return the embeddings of the captions of a dataset."""
    count = max(len(concept.captions) for concept in dataset.concepts)
    shares = np.zeros((len(dataset.concepts), count), np.float32)
    pooled = np.zeros((*shares.shape, TEXT_EMBED_DIM), np.float32)
    for row, concept in enumerate(dataset.concepts):
        rows = [dataset.caption_rows[caption] for caption in concept.captions]
        pooled[row, : len(rows)] = dataset.pooled[rows]
        shares[row, : len(rows)] = list(concept.captions.values())
    return CaptionEmbeddings(jnp.asarray(pooled), jnp.asarray(shares))


def augment(random: np.random.Generator, images: np.ndarray, can_mirror: np.ndarray) -> np.ndarray:
    """Augment images at random, to imitate the styles of other vendors.

    Args:
        random: the random number generator.
        images: uint8 [B, 64, 64, 3], on white.
        can_mirror: bool [B], whether each image can be mirrored without changing its meaning.

    Returns:
        float32 [B, IMAGE_SIZE, IMAGE_SIZE, 3], from -1 to 1.
    """
    from PIL import Image

    count, size = len(images), images.shape[1]
    angle = np.radians(random.normal(0, 8, count))
    scale = 1 / random.uniform(0.7, 1.1, (count, 2))  # of the inverse map, from target to source
    flip = np.where(can_mirror & (random.random(count) < 0.5), -1, 1)
    shift = random.normal(0, 0.05 * size, (count, 2))
    transformed = np.empty_like(images)
    for row in range(count):
        c, s, half = np.cos(angle[row]), np.sin(angle[row]), size / 2
        matrix = np.array([[c, -s], [s, c]]) * scale[row] * [[flip[row]], [1]]
        offset = half - matrix @ (half + shift[row])
        coefficients = (*matrix[0], offset[0], *matrix[1], offset[1])
        image = Image.fromarray(images[row])
        transformed[row] = image.transform(
            image.size,
            Image.Transform.AFFINE,
            coefficients,
            Image.Resampling.BILINEAR,
            fillcolor=(255,) * 3,
        )
    x = data.downscale(transformed, IMAGE_SIZE)
    # Apply the colour matrix to the difference from white, so that white stays white.
    x = 1 - np.einsum("byxc,bcd->byxd", 1 - x, _color_matrices(random, count))
    blurred = _blur(x)
    x = blurred + random.uniform(0, 1.5, (count, 1, 1, 1)) * (x - blurred)
    x = x + random.uniform(0, 0.2, (count, 1, 1, 1)) * random.normal(size=x.shape)
    return np.clip(x, -1, 1).astype(np.float32)


def _color_matrices(random: np.random.Generator, count: int) -> np.ndarray:
    """Return random matrices [n, 3, 3] that change hue, saturation and contrast of RGB colours."""
    grey = np.full((3, 3), 1 / 3)
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    angle = np.radians(random.normal(0, 12, (count, 1, 1)))
    hue = grey + np.cos(angle) * (np.eye(3) - grey) + np.sin(angle) * axis
    saturation = random.uniform(0.5, 1.3, (count, 1, 1))
    return random.uniform(0.75, 1.25, (count, 1, 1)) * (grey + saturation * (hue - grey))


def _blur(x: np.ndarray) -> np.ndarray:
    """Blur images with the kernel (1, 2, 1) / 4 along rows and columns."""
    for axis in (1, 2):
        width = [(1, 1) if i == axis else (0, 0) for i in range(4)]
        padded = np.pad(x, width, mode="edge")
        first, middle, last = (
            np.take(padded, np.arange(start, start + x.shape[axis]), axis) for start in range(3)
        )
        x = (first + 2 * middle + last) / 4
    return x


# The training run


@dataclass(frozen=True, kw_only=True)
class JudgeConfig:
    """The settings of a training run of the CLIP judge.

    Attributes:
        packages: the folder for the packages of the vendors; missing ones are downloaded.
        dataset: the folder of the emoji-64 dataset, for concepts, captions and validation images.
        out: the folder of the run.
        steps: the number of updates.
        batch_size: images per step.
        learning_rate: the peak of the learning rate.
        seed: the seed of weights, batches and augmentation.
    """

    packages: Path
    dataset: Path
    out: Path
    steps: int = 900
    batch_size: int = 96
    learning_rate: float = 5e-3
    seed: int = 0


def train(settings: JudgeConfig) -> loop.Outcome:
    """Train the CLIP judge, or resume its training.

    Args:
        settings: the settings of the run.
    """
    data.fetch(settings.packages, [style.package for style, _ in VENDORS])
    dataset = EmojiDataset(settings.dataset)
    images, concept_ids = vendor_images(settings.packages, dataset.concepts)
    can_mirror = ~np.array([concept.directed for concept in dataset.concepts])[concept_ids]

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        rows = random.choice(len(images), settings.batch_size)
        return {
            "x": augment(random, images[rows], can_mirror[rows]),
            "concept": concept_ids[rows].astype(np.int32),
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
    validation_rows = np.random.default_rng(0).choice(
        len(dataset.images), 5 * VALIDATION_BATCH_SIZE, replace=False
    )
    return loop.train(
        ContrastiveTask(),
        caption_embeddings(dataset),
        batch,
        config,
        settings.out,
        validation_batches=[
            {"x": dataset.downscaled_images(rows, IMAGE_SIZE), "concept": dataset.concept_ids[rows]}
            for rows in validation_rows.reshape(5, VALIDATION_BATCH_SIZE)
        ],
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command and return its exit code.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.
    """
    parser = argparse.ArgumentParser(prog="python -m training.recipes.clip_judge")
    parser.add_argument("--packages", type=Path, required=True)
    dataset = parser.add_mutually_exclusive_group(required=True)
    dataset.add_argument("--dataset", type=Path)
    dataset.add_argument("--pack", dest="dataset", type=Path, help=argparse.SUPPRESS)  # old name
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=JudgeConfig.steps)
    parser.add_argument("--batch-size", type=int, default=JudgeConfig.batch_size)
    outcome = train(JudgeConfig(**vars(parser.parse_args(argv))))
    return 0 if outcome.signal is None else 128 + outcome.signal


if __name__ == "__main__":
    sys.exit(main())
