r"""Evaluation of emoji-64: metrics, and a grid of images that people are asked to name.

    python -m training.recipes.emoji_measures numbers --model MODEL --encoder ENCODER \
        --dataset DATASET --judge JUDGE_RUN --out FOLDER
    python -m training.recipes.emoji_measures sheet --model MODEL --encoder ENCODER --out FOLDER

`numbers` writes measures.json (see `measure`), flow_loss.png, and samples.png, in which real and
generated images of the same prompts alternate. `sheet` writes grid.png and grid-numbered.png with
the images of `SAMPLE_PROMPTS` for the seeds 0 to 3, without selection. People name the images of
the numbered grid before they see the prompts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from diffusion import data, image_io, metrics, model, sample
from diffusion.data import EmojiDataset
from diffusion.pipeline import DiffusionPipeline, SamplerOptions, load, make_grid, to_uint8
from diffusion.text import PromptEmbeds
from training.recipes import clip_judge
from training.recipes.emoji import (
    SAMPLE_PROMPTS,
    EmojiConfig,
    load_ema_weights,
    sampling_shares,
    validation_batches,
    vocab_words,
)
from transformer import similarity

MAX_LEARNT, MAX_HELD_OUT = 280, 120  # maximum number of training and of held-out images to compare
BATCH_SIZE = 40
SEEDS = (0, 1, 2, 3)  # of the grid
NUM_PAIRS = 24  # pairs in samples.png for training images, and as many for held-out images


# Metrics


def measure(
    pipeline: DiffusionPipeline,
    dataset: EmojiDataset,
    judge: clip_judge.Params,
    shares: np.ndarray,
) -> tuple[dict[str, Any], np.ndarray]:
    """Generate images for the names and styles of a dataset, and compare them with the real images.

    Args:
        pipeline: the model to evaluate.
        dataset: the dataset of N images.
        judge: the weights of the CLIP judge, which is not trained on the dataset.
        shares: float [N], the probability of sampling each training image, in training and here.

    Returns:
        The metrics as a JSON object; and pairs of a real and a generated image, uint8
        [n, 32, 32, 3]. In the metrics, "learnt" means prompts of training images, and "held_out"
        means prompts of held-out images (a known concept in a style that it is not trained in).
        "drawn" is the value for generated images, and "real" the value for real images of the same
        prompts, which a perfect model would have.

        - flow_loss: by flow time.
        - text_match: top-1 and top-5 accuracy with which the judge finds the name among 100 names;
          "of_real" is the top-5 accuracy of generated images divided by that of real images.
        - style: the share of images in the requested style, according to a linear probe on the
          features of the judge, for held-out prompts.
        - kernel_distance, coverage: compared with other training images, in the features of the
          judge.
        - memorisation: the distance of generated images to training images, divided by the distance
          of real held-out images to them.
    """
    random = np.random.default_rng(0)
    train_rows = np.flatnonzero(~dataset.held_out)
    held_out = random.permutation(np.flatnonzero(dataset.held_out))[:MAX_HELD_OUT]
    count = min(MAX_LEARNT, int((shares > 0).sum()) // 2)
    learnt, others = np.split(random.choice(len(shares), 2 * count, replace=False, p=shares), 2)

    rows = {"learnt": learnt, "held_out": held_out}
    size = clip_judge.IMAGE_SIZE
    real = {name: dataset.downscaled_images(which, size) for name, which in rows.items()}
    generated = {
        name: data.downscale(generate(pipeline, [prompt(dataset, row) for row in which]), size)
        for name, which in rows.items()
    }
    train_images = dataset.downscaled_images(train_rows, size)
    style_probe = similarity.fit_probe(
        jnp.asarray(image_features(judge, train_images)),
        jnp.asarray(dataset.style_ids[train_rows]),
        len(data.STYLES),
    )
    reference = image_features(judge, dataset.downscaled_images(others, size))
    names = np.stack(
        [dataset.pooled[dataset.caption_rows[name_of(concept)]] for concept in dataset.concepts]
    )
    features = {
        name: {
            "drawn": image_features(judge, generated[name]),
            "real": image_features(judge, real[name]),
        }
        for name in rows
    }

    def compare(metric: Callable[[np.ndarray], Any], name: str) -> dict[str, Any]:
        return {source: metric(values) for source, values in features[name].items()}

    def retrieval(which: np.ndarray, values: np.ndarray) -> dict[str, float]:
        scores = np.asarray(clip_judge.logits_per_image(judge, values, names))
        targets = dataset.concept_ids[which]
        return {f"top{k}": metrics.retrieval(scores, targets, k) for k in (1, 5)}

    def style_accuracy(values: np.ndarray) -> float:
        predicted = similarity.predict(style_probe, jnp.asarray(values)).argmax(-1)
        return float((predicted == dataset.style_ids[held_out]).mean())

    text_match = {name: compare(partial(retrieval, rows[name]), name) for name in rows}
    for values in text_match.values():
        values["of_real"] = values["drawn"]["top5"] / values["real"]["top5"]
    pairs = [np.stack([real[name][:NUM_PAIRS], generated[name][:NUM_PAIRS]], 1) for name in rows]
    image_size = pipeline.cfg.image_size
    return {
        "pictures": {name: len(which) for name, which in rows.items()},
        "flow_loss": {
            "held_out": loss_by_time(pipeline, validation_batches(dataset, image_size)),
            "learnt": loss_by_time(pipeline, validation_batches(dataset, image_size, which=learnt)),
        },
        "text_match": {**text_match, "chance": {"top1": 0.01, "top5": 0.05}},
        "style": {**compare(style_accuracy, "held_out"), "chance": 1 / len(data.STYLES)},
        "kernel_distance": compare(partial(metrics.kernel_distance, reference), "learnt"),
        "coverage": compare(partial(metrics.coverage, reference), "learnt"),
        "memorisation": {
            name: metrics.memorisation(generated[name], real["held_out"], train_images)
            for name in rows
        },
    }, to_uint8(np.concatenate(pairs).reshape(-1, *real["learnt"].shape[1:]))


def name_of(concept: data.Concept) -> str:
    """Return the name of a concept: its first caption."""
    return next(iter(concept.captions))


def prompt(dataset: EmojiDataset, row: int) -> str:
    """Return the name and style of an image as a prompt, such as "red apple, flat style"."""
    return data.styled_caption(
        name_of(dataset.concepts[dataset.concept_ids[row]]), int(dataset.style_ids[row])
    )


def generate(pipeline: DiffusionPipeline, prompts: Sequence[str]) -> np.ndarray:
    """Generate one image per prompt, each from its own noise: uint8 [n, Y, X, 3]."""
    keys, batches = sample.image_keys(0, len(prompts)), []
    for start in range(0, len(prompts), BATCH_SIZE):
        # The last batch is filled up, so that all batches have the same shape.
        rows = np.arange(start, start + BATCH_SIZE) % len(prompts)
        batch = [prompts[row] for row in rows.tolist()]
        *_, (last, _) = pipeline.steps(batch, keys[rows], SamplerOptions())
        batches.append(pipeline.postprocess(last))
    return np.concatenate(batches)[: len(prompts)]


def image_features(judge: clip_judge.Params, images: np.ndarray) -> np.ndarray:
    """Return the features that the judge computes for images, in batches.

    Args:
        judge: the weights of the judge.
        images: float32 [n, IMAGE_SIZE, IMAGE_SIZE, 3], from -1 to 1.

    Returns:
        float32 [n, C].
    """
    compute, batches = jax.jit(clip_judge.image_features), []
    for start in range(0, len(images), BATCH_SIZE):
        rows = np.arange(start, start + BATCH_SIZE) % len(images)
        batches.append(np.asarray(compute(judge, images[rows])))
    return np.concatenate(batches)[: len(images)]


def loss_by_time(
    pipeline: DiffusionPipeline, batches: list[dict[str, np.ndarray]]
) -> dict[str, float]:
    """Return a dict from flow times, as strings, to the mean flow loss.

    The noise is the same for every model, so the losses of different models can be compared.

    Args:
        pipeline: the model to evaluate.
        batches: from `validation_batches`.
    """
    means: dict[str, float] = {}
    for t in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        losses = []
        for number, arrays in enumerate(batches):
            batch = {name: jnp.asarray(array) for name, array in arrays.items()}
            x, keep = batch["x"], batch["keep"]
            e = jax.random.normal(jax.random.key(number), x.shape)
            text = PromptEmbeds(batch["states"], batch["mask"], batch["pooled"])
            times = jnp.full(len(x), t)
            losses.append(model.flow_loss(pipeline.denoiser, pipeline.cfg, x, e, times, text, keep))
        means[f"{t}"] = float(jnp.concatenate(losses).mean())
    return means


def plot_losses(losses: dict[str, dict[str, float]], target: Path) -> None:
    """Plot the flow loss by flow time.

    Args:
        losses: a dict from the label of each curve to its losses, from `loss_by_time`.
        target: the PNG file to write.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot([float(t) for t in values], list(values.values()), "o-", label=name)
    axes.set(xlabel="time, from noise (0) to image (1)", ylabel="flow loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=120)


# The grid


def labelled_grid(images: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Arrange rows of images in two columns, each row with a label on its left.

    Args:
        images: uint8 [rows, columns, Y, X, 3].
        labels: one label per row.

    Returns:
        uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns, height, width, _ = images.shape
    gap, font = 4, ImageFont.load_default(15)
    label_width = 3 * gap + max(round(font.getlength(label)) for label in labels)
    rows_per_column = -(-rows // 2)
    column_width = label_width + columns * (width + gap)
    grid_size = 2 * column_width, rows_per_column * (height + gap) + gap
    grid = Image.new("RGB", grid_size, "white")
    draw = ImageDraw.Draw(grid)
    for row, label in enumerate(labels):
        left = column_width * (row // rows_per_column)
        top = gap + row % rows_per_column * (height + gap)
        label_end = left + label_width - 2 * gap, top + height // 2
        draw.text(label_end, label, "black", font, anchor="rm")
        for column, image in enumerate(images[row]):
            x = left + label_width + column * (width + gap)
            grid.paste(Image.fromarray(image), (x, top))
    return np.asarray(grid)


def generate_samples(pipeline: DiffusionPipeline, prompt_suffix: str = "") -> np.ndarray:
    """Generate an image for each prompt of `SAMPLE_PROMPTS` and each seed of `SEEDS`.

    Args:
        pipeline: the model.
        prompt_suffix: text to append to each prompt.

    Returns:
        uint8 [prompts, seeds, Y, X, 3].
    """
    prompts = [word + prompt_suffix for word in SAMPLE_PROMPTS]
    images = []
    for seed in SEEDS:
        keys = jnp.repeat(sample.image_keys(seed, 1), len(prompts), 0)
        *_, (last, _) = pipeline.steps(prompts, keys, SamplerOptions())
        images.append(pipeline.postprocess(last))
    return np.stack(images, 1)


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.
    """
    parser = argparse.ArgumentParser(prog="python -m training.recipes.emoji_measures")
    commands = parser.add_subparsers(required=True)
    for name, run in (("numbers", _numbers), ("sheet", _sheet)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument(
            "--model", type=Path, required=True, help="folder with denoiser/ and upscaler/"
        )
        command.add_argument("--encoder", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True, help="a folder")
        if name == "numbers":
            dataset = command.add_mutually_exclusive_group(required=True)
            dataset.add_argument("--dataset", type=Path)
            dataset.add_argument("--pack", dest="dataset", type=Path, help=argparse.SUPPRESS)  # old
            judge = command.add_mutually_exclusive_group(required=True)
            judge.add_argument("--judge", type=Path, help="the run of the CLIP judge")
            judge.add_argument("--tower", dest="judge", type=Path, help=argparse.SUPPRESS)  # old
        else:
            command.add_argument(
                "--prompt-suffix",
                default="",
                help='text appended to each prompt, such as ", flat style"',
            )
            command.add_argument("--ending", dest="prompt_suffix", help=argparse.SUPPRESS)  # old
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.run(args)
    return 0


def _numbers(args: argparse.Namespace) -> None:
    dataset = EmojiDataset(args.dataset)
    settings = EmojiConfig(dataset=args.dataset, out=args.out)
    shares = sampling_shares(dataset, settings, vocab_words(args.encoder))
    judge = load_ema_weights(args.judge, clip_judge.ContrastiveTask())
    values, pairs = measure(load(args.model, args.encoder), dataset, judge, shares)
    (args.out / "measures.json").write_text(json.dumps(values, indent=2) + "\n", "utf-8")
    image_io.save(make_grid(pairs, 16), args.out / "samples.png")
    plot_losses(values["flow_loss"], args.out / "flow_loss.png")


def _sheet(args: argparse.Namespace) -> None:
    images = generate_samples(load(args.model, args.encoder), args.prompt_suffix)
    prompts = [word + args.prompt_suffix for word in SAMPLE_PROMPTS]
    numbers = [str(number) for number in range(1, len(SAMPLE_PROMPTS) + 1)]
    image_io.save(labelled_grid(images, prompts), args.out / "grid.png")
    image_io.save(labelled_grid(images, numbers), args.out / "grid-numbered.png")


if __name__ == "__main__":
    sys.exit(main())
