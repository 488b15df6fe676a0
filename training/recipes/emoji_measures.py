"""What can be said of emoji-64: numbers, and a sheet of pictures for people to name.

    python -m training.recipes.emoji_measures numbers --model MODEL --encoder ENCODER \\
        --pack PACK --tower TOWER_RUN --out FOLDER
    python -m training.recipes.emoji_measures sheet --model MODEL --encoder ENCODER --out FOLDER

`numbers` writes measures.json (see `measure` for what is in it), flow_loss.png and samples.png:
real and drawn pictures of the same prompts by turns. `sheet` writes grid.png and grid-numbered.png:
the prompts of `SHOWN`, four pictures each, those of the seeds 0 to 3, nothing picked. Who is to
name the pictures gets the numbered one, without having read the prompts.
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

MAX_LEARNT, MAX_HELD_OUT = 280, 120  # pictures asked for, at most
BATCH_SIZE = 40  # pictures at a time
SEEDS = (0, 1, 2, 3)  # of the sheet
NUM_PAIRS = 24  # of real and drawn pictures in samples.png, of what was learnt and of what was not


# Numbers


def measure(
    painter: DiffusionPipeline, pack: EmojiDataset, judge: clip_judge.Params, shares: np.ndarray
) -> tuple[dict[str, Any], np.ndarray]:
    """Asks for pictures of the pack by name and style, and compares them with the real ones.

    Args:
        judge: the tower, which has seen no picture of the pack.
        shares: how often training draws each picture of the pack, and how often it is asked for.

    Returns:
        What is measured; and uint8 [n, 32, 32, 3], real and drawn by turns. "learnt" are prompts
        whose picture was learnt, "held_out" ask for a thing in a style in which it was never seen.
        "real" is what the real pictures of the same prompts get, as a perfect painter's would.

        - flow_loss: by time.
        - text_match: how often the tower finds the right name among 100, first and among the first
          five; "of_real" is the share that drawn pictures reach of the latter.
        - style: how often a held-out picture has the style asked for, says a linear classifier of
          the tower's features.
        - kernel_distance, coverage: against other real pictures, by the tower's features.
        - memorisation: how near pictures come to learnt ones, over how near real ones do that were
          held out.
    """
    random = np.random.default_rng(0)
    seen = np.flatnonzero(~pack.held_out)
    unseen = random.permutation(np.flatnonzero(pack.held_out))[:MAX_HELD_OUT]
    count = min(MAX_LEARNT, int((shares > 0).sum()) // 2)
    asked, others = np.split(random.choice(len(shares), 2 * count, replace=False, p=shares), 2)

    rows = {"learnt": asked, "held_out": unseen}
    real = {
        name: pack.downscaled_images(which, clip_judge.IMAGE_SIZE) for name, which in rows.items()
    }
    drawn = {
        name: data.downscale(
            generate(painter, [prompt(pack, row) for row in which]), clip_judge.IMAGE_SIZE
        )
        for name, which in rows.items()
    }
    learnt_pictures = pack.downscaled_images(seen, clip_judge.IMAGE_SIZE)
    styles = similarity.fit_probe(
        image_features(judge, learnt_pictures), pack.style_ids[seen], len(data.STYLES)
    )
    other = image_features(judge, pack.downscaled_images(others, clip_judge.IMAGE_SIZE))
    names = np.stack(
        [pack.pooled[pack.caption_rows[name_of(concept)]] for concept in pack.concepts]
    )
    features = {
        name: {
            "drawn": image_features(judge, drawn[name]),
            "real": image_features(judge, real[name]),
        }
        for name in rows
    }

    def compare(estimate: Callable[[np.ndarray], Any], name: str) -> dict[str, Any]:
        return {who: estimate(found) for who, found in features[name].items()}

    def retrieved(which: np.ndarray, found: np.ndarray) -> dict[str, float]:
        scores = np.asarray(clip_judge.logits_per_image(judge, found, names))
        right = pack.concept_ids[which]
        return {f"top{k}": metrics.retrieval(scores, right, k) for k in (1, 5)}

    def in_style(found: np.ndarray) -> float:
        return float(
            (similarity.predict(styles, found).argmax(-1) == pack.style_ids[unseen]).mean()
        )

    text_match = {name: compare(partial(retrieved, rows[name]), name) for name in rows}
    for values in text_match.values():
        values["of_real"] = values["drawn"]["top5"] / values["real"]["top5"]
    pairs = [np.stack([real[name][:NUM_PAIRS], drawn[name][:NUM_PAIRS]], 1) for name in rows]
    return {
        "pictures": {name: len(which) for name, which in rows.items()},
        "flow_loss": {
            "held_out": loss_by_time(painter, validation_batches(pack, painter.cfg.image_size)),
            "learnt": loss_by_time(
                painter, validation_batches(pack, painter.cfg.image_size, which=asked)
            ),
        },
        "text_match": {**text_match, "chance": {"top1": 0.01, "top5": 0.05}},
        "style": {**compare(in_style, "held_out"), "chance": 1 / len(data.STYLES)},
        "kernel_distance": compare(partial(metrics.kernel_distance, other), "learnt"),
        "coverage": compare(partial(metrics.coverage, other), "learnt"),
        "memorisation": {
            name: metrics.memorisation(drawn[name], real["held_out"], learnt_pictures)
            for name in rows
        },
    }, to_uint8(np.concatenate(pairs).reshape(-1, *real["learnt"].shape[1:]))


def name_of(concept: data.Concept) -> str:
    """The first of its captions."""
    return next(iter(concept.captions))


def prompt(pack: EmojiDataset, row: int) -> str:
    """Asks for a picture of the pack: "red apple, flat style"."""
    return data.styled_caption(
        name_of(pack.concepts[pack.concept_ids[row]]), int(pack.style_ids[row])
    )


def generate(painter: DiffusionPipeline, prompts: Sequence[str]) -> np.ndarray:
    """A picture a prompt, each from noise of its own: uint8 [n, Y, X, 3]."""
    keys, found = sample.image_keys(0, len(prompts)), []
    for start in range(0, len(prompts), BATCH_SIZE):
        rows = np.arange(start, start + BATCH_SIZE) % len(prompts)  # all batches have one shape
        *_, (last, _) = painter.steps([prompts[row] for row in rows], keys[rows], SamplerOptions())
        found.append(painter.postprocess(last))
    return np.concatenate(found)[: len(prompts)]


def image_features(judge: clip_judge.Params, pictures: np.ndarray) -> np.ndarray:
    """What the tower makes of pictures of its size: float32 [n, C]."""
    see, found = jax.jit(clip_judge.image_features), []
    for start in range(0, len(pictures), BATCH_SIZE):
        rows = np.arange(start, start + BATCH_SIZE) % len(pictures)
        found.append(np.asarray(see(judge, pictures[rows])))
    return np.concatenate(found)[: len(pictures)]


def loss_by_time(
    painter: DiffusionPipeline, batches: list[dict[str, np.ndarray]]
) -> dict[str, float]:
    """The flow loss at fixed times; the noise is the same whatever the weights."""
    found: dict[str, float] = {}
    for t in (0.05, 0.2, 0.35, 0.5, 0.65, 0.8, 0.95):
        losses = []
        for number, batch in enumerate(batches):
            x, keep = batch["x"], batch["keep"]
            e = jax.random.normal(jax.random.key(number), x.shape)
            text = PromptEmbeds(batch["states"], batch["mask"], batch["pooled"])
            times = jnp.full(len(x), t)
            losses.append(model.flow_loss(painter.denoiser, painter.cfg, x, e, times, text, keep))
        found[f"{t}"] = float(jnp.concatenate(losses).mean())
    return found


def plot_losses(losses: dict[str, dict[str, float]], target: Path) -> None:
    """Draws the flow loss by time, what was learnt and what was held out, into a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, values in losses.items():
        axes.plot([float(t) for t in values], list(values.values()), "o-", label=name)
    axes.set(xlabel="time, from noise (0) to picture (1)", ylabel="flow loss", ylim=(0, None))
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(target, dpi=120)


# The sheet


def labelled_grid(pictures: np.ndarray, labels: Sequence[str]) -> np.ndarray:
    """Rows of pictures, each with its label before it, in two columns of rows.

    Args:
        pictures: uint8 [rows, columns, Y, X, 3].
        labels: one a row.

    Returns:
        uint8 [height, width, 3].
    """
    from PIL import Image, ImageDraw, ImageFont

    rows, columns, height, width, _ = pictures.shape
    gap, font = 4, ImageFont.load_default(15)
    before = 3 * gap + max(round(font.getlength(label)) for label in labels)
    half = -(-rows // 2)
    across = before + columns * (width + gap)
    image = Image.new("RGB", (2 * across, half * (height + gap) + gap), "white")
    pen = ImageDraw.Draw(image)
    for row, label in enumerate(labels):
        left, top = across * (row // half), gap + row % half * (height + gap)
        pen.text((left + before - 2 * gap, top + height // 2), label, "black", font, anchor="rm")
        for column, found in enumerate(pictures[row]):
            image.paste(Image.fromarray(found), (left + before + column * (width + gap), top))
    return np.asarray(image)


def generate_samples(painter: DiffusionPipeline, ending: str = "") -> np.ndarray:
    """What each prompt of `SHOWN` gives with each seed, alone: uint8 [prompts, seeds, Y, X, 3]."""
    prompts = [word + ending for word in SAMPLE_PROMPTS]
    found = []
    for seed in SEEDS:
        keys = jnp.repeat(sample.image_keys(seed, 1), len(prompts), 0)
        *_, (last, _) = painter.steps(prompts, keys, SamplerOptions())
        found.append(painter.postprocess(last))
    return np.stack(found, 1)


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="python -m training.recipes.emoji_measures")
    commands = parser.add_subparsers(required=True)
    for name, run in (("numbers", _numbers), ("sheet", _sheet)):
        command = commands.add_parser(name)
        command.set_defaults(run=run)
        command.add_argument("--model", type=Path, required=True, help="denoiser/ and upscaler/")
        command.add_argument("--encoder", type=Path, required=True)
        command.add_argument("--out", type=Path, required=True, help="a folder")
        if name == "numbers":
            command.add_argument("--pack", type=Path, required=True)
            command.add_argument("--tower", type=Path, required=True, help="its run")
        else:
            command.add_argument("--ending", default="", help='after each prompt: ", flat style"')
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    args.run(args)
    return 0


def _numbers(args: argparse.Namespace) -> None:
    pack = EmojiDataset(args.pack)
    settings = EmojiConfig(pack=args.pack, out=args.out)
    shares = sampling_shares(pack, settings, vocab_words(args.encoder))
    judge = load_ema_weights(args.tower, clip_judge.ContrastiveTask())
    found, pairs = measure(load(args.model, args.encoder), pack, judge, shares)
    (args.out / "measures.json").write_text(json.dumps(found, indent=2) + "\n", "utf-8")
    image_io.save(make_grid(pairs, 16), args.out / "samples.png")
    plot_losses(found["flow_loss"], args.out / "flow_loss.png")


def _sheet(args: argparse.Namespace) -> None:
    found = generate_samples(load(args.model, args.encoder), args.ending)
    numbers = [str(number) for number in range(1, len(SAMPLE_PROMPTS) + 1)]
    image_io.save(
        labelled_grid(found, [word + args.ending for word in SAMPLE_PROMPTS]), args.out / "grid.png"
    )
    image_io.save(labelled_grid(found, numbers), args.out / "grid-numbered.png")


if __name__ == "__main__":
    sys.exit(main())
