"""emoji-64: text to small pictures, trained on a CPU in a few hours.

    python -m training.recipes.emoji pack --packages DIR --encoder ENCODER --out PACK
    python -m training.recipes.emoji denoiser --pack PACK --encoder ENCODER --out RUN
    python -m training.recipes.emoji upscaler --pack PACK --out RUN2
    python -m training.recipes.emoji export --run RUN --out MODEL/denoiser
    python -m training.recipes.emoji export --run RUN2 --out MODEL/upscaler

A U-Net learns pictures of 32 x 32 pixels by flow matching; the step to 64 x 64 is learnt apart, on
real pictures that were made half as large. Everything here was chosen for two cores and a few
hours: the encoder is frozen and its states are computed once; what people ask for is drawn more
often than what Unicode has most of; Muon, with which the loss falls sooner; a constant
learning rate, so that a run may be stopped anywhere, and a short second run in which it falls
(`denoiser --start MODEL/denoiser --schedule linear --steps 3000`).

What comes of it is measured by `emoji_measures`. Like all recipes a short file to be copied and
changed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from bpe import formats
from diffusion import checkpoint, data, image_io, layers, model, pipeline, sample, schedule, upscale
from diffusion.config import UNetConfig, UpscalerConfig
from diffusion.data import EmojiDataset
from diffusion.text import PromptEmbeds, TextEncoder
from training import checkpoint as checkpoints
from training import loop, tree_io
from training.config import TrainConfig as Run
from training.task import Task

SAMPLE_PROMPTS = (
    "apple", "cat", "heart", "sun", "car", "tree", "pizza", "dog", "house", "fish", "banana",
    "star", "smiling face", "moon", "flower", "book", "bird", "boat", "guitar", "umbrella",
)  # fmt: skip
UNET = UNetConfig(
    image_size=32, channels=(64, 128, 256), blocks=(1, 2, 1), attention=(False, True, True)
)
UPSCALER = UpscalerConfig(width=64, num_blocks=2)
VALIDATION_BATCH_SIZE = 40  # pictures in a batch of those held out
SAMPLE_EVERY = 250  # steps


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """What there is to choose."""

    pack: Path
    out: Path
    start: Path | None = None  # a denoiser to begin from
    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 3e-3
    schedule: Literal["constant", "linear"] = "constant"
    styles: tuple[float, ...] = (0.2, 0.6, 0.2)  # how often each is drawn
    common: float = 6.0  # how much more often what has a plain name is drawn
    dropped: float = 0.1  # share of pictures whose prompt is not shown, for guidance
    mirror: bool = False  # half of the pictures, but none that has a left and a right
    # Times come from a normal distribution, squashed to 0 to 1. Below 0 is more noise than picture:
    # there it is decided what is drawn.
    middle: float = -0.8
    width: float = 1.2
    seed: int = 0


# What is drawn how often


def vocab_words(encoder: Path) -> frozenset[str]:
    """Words that BERT's vocabulary has whole: the 20,000 or so that English uses most."""
    return frozenset(formats.load_wordpiece(encoder).vocab)


def sampling_shares(pack: EmojiDataset, settings: EmojiConfig, known: frozenset[str]) -> np.ndarray:
    """How often each picture is drawn, as shares; never one that is held out."""
    weights = np.array([concept.weight for concept in pack.concepts])
    for number, concept in enumerate(pack.concepts):
        group = data.GROUPS[concept.group][0]
        is_thing = group not in ("people", "symbols")
        # "deciduous tree" has no word of its own, and yet is what "tree" may mean.
        is_kind = group in ("nature", "food", "travel") and concept.name.split()[-1] in known
        is_face = group == "smileys" and "face" in concept.name
        if is_thing and not is_face and (concept.plain in known or is_kind):
            weights[number] *= settings.common
    found = weights[pack.concept_ids] * np.array(settings.styles)[pack.style_ids] * ~pack.held_out
    return found / found.sum()


def make_batches(
    pack: EmojiDataset, settings: EmojiConfig, shares: np.ndarray, size: int
) -> Callable[[int], dict[str, np.ndarray]]:
    """The batch of a step: pictures drawn by their shares, each with a caption."""
    cumulative = np.cumsum(shares)
    directed = np.array([concept.directed for concept in pack.concepts])[pack.concept_ids]

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        which = np.searchsorted(cumulative, random.random(settings.batch_size) * cumulative[-1])
        heard = pack.caption_embeds([pack.sample_caption(random, picture) for picture in which])
        keep = random.random(settings.batch_size) >= settings.dropped
        x = pack.downscaled_images(which, size)
        if settings.mirror:
            turned = (random.random(settings.batch_size) < 0.5) & ~directed[which]
            x[turned] = x[turned, :, ::-1]
        return {"x": x, "keep": keep, **heard}

    return batch


def validation_batches(
    pack: EmojiDataset, size: int, which: np.ndarray | None = None
) -> list[dict[str, np.ndarray]]:
    """Batches of the pictures that are never learnt, each asked for by name and style.

    Args:
        which: other pictures to make such batches of.
    """
    random = np.random.default_rng(0)
    which = random.permutation(np.flatnonzero(pack.held_out) if which is None else which)
    found = []
    for start in range(0, len(which) - VALIDATION_BATCH_SIZE + 1, VALIDATION_BATCH_SIZE):
        rows = which[start : start + VALIDATION_BATCH_SIZE]
        captions = [
            data.styled_caption(
                next(iter(pack.concepts[pack.concept_ids[i]].captions)), int(pack.style_ids[i])
            )
            for i in rows
        ]
        keep = np.ones(VALIDATION_BATCH_SIZE, bool)
        found.append(
            {"x": pack.downscaled_images(rows, size), "keep": keep, **pack.caption_embeds(captions)}
        )
    return found


# The denoiser


@dataclass(frozen=True)
class DenoisingTask:
    """Flow matching, as a task for the loop (Lipman et al. 2022, arXiv:2210.02747)."""

    cfg: model.Config
    time_mean: float = 0.0
    time_std: float = 1.0
    init_params: Any = None

    def init(self, key: jax.Array) -> model.Params:
        if self.init_params is None:
            return model.init(key, self.cfg)
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self.init_params)

    def loss(self, weights: model.Params, frozen: None, batch, key: jax.Array):
        x = batch["x"]
        for_time, for_noise = jax.random.split(key)
        e = jax.random.normal(for_noise, x.shape)
        # Each row draws from a slice of its own of the distribution: the mean varies less.
        count = x.shape[0]
        share = (jnp.arange(count) + jax.random.uniform(for_time, (count,))) / count
        normal = jax.scipy.special.ndtri(jnp.clip(share, 1e-3, 1 - 1e-3))
        t = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        text = PromptEmbeds(batch["states"], batch["mask"], batch["pooled"])
        losses = model.flow_loss(weights, self.cfg, x, e, t, text, batch["keep"])
        return losses.sum(), jnp.float32(count), {}


def train_denoiser(settings: EmojiConfig, encoder: Path) -> loop.Outcome:
    """Trains, or goes on with it; draws a grid of pictures now and then."""
    pack = EmojiDataset(settings.pack)
    start, cfg = (None, UNET) if settings.start is None else checkpoint.load(settings.start)
    shares = sampling_shares(pack, settings, vocab_words(encoder))
    config = Run(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        schedule=settings.schedule,
        final_fraction=0.02,
        warmup_steps=min(200, settings.steps // 20),
        optimizer="muon",
        b1=0.95,
        b2=0.99,
        average_decay=0.999,
        validate_every=500,
        save_every=250,
    )
    write_config(settings.out, {"kind": "unet"})
    prompts = TextEncoder(encoder)(
        [*SAMPLE_PROMPTS, *(data.styled_caption(prompt, 1) for prompt in SAMPLE_PROMPTS)]
    )

    def look(state, line: dict[str, Any]) -> None:
        if line["step"] % SAMPLE_EVERY == 0 or line["step"] == settings.steps:
            keys = jnp.repeat(sample.image_keys(0, 1), len(prompts.mask), 0)  # the same noise
            drawn = generate(state.average, cfg, prompts, keys)
            image_io.save(
                pipeline.make_grid(drawn, 10), settings.out / f"grid-{line['step']:06d}.png"
            )

    return loop.train(
        DenoisingTask(cfg, settings.middle, settings.width, start),
        None,
        make_batches(pack, settings, shares, cfg.image_size),
        config,
        settings.out,
        validation_batches=validation_batches(pack, cfg.image_size),
        on_step=look,
    )


def generate(
    weights: model.Params,
    cfg: model.Config,
    text: PromptEmbeds,
    keys: jax.Array,
    guidance: float = 3.0,
) -> np.ndarray:
    """A picture a prompt: uint8 [B, Y, X, 3], not yet doubled."""
    text = jax.tree.map(jnp.asarray, text)
    z = sample.normal(keys, (cfg.image_size, cfg.image_size, 3))

    def denoise(z: jax.Array, level: schedule.NoiseLevel) -> jax.Array:
        return pipeline.denoise_with_guidance(
            weights, cfg, z, schedule.to_flow(level), text, guidance
        )

    return pipeline.to_uint8(sample.sample(denoise, z, schedule.flow_levels(20), "dpmpp"))


# The upscaler


@dataclass(frozen=True)
class UpscalerTask:
    """From pictures made half as large, a little noisy, to the pictures."""

    cfg: UpscalerConfig

    def init(self, key: jax.Array) -> upscale.Params:
        return layers.init(key, upscale.abstract(self.cfg))

    def loss(self, weights: upscale.Params, frozen: None, batch, key: jax.Array):
        large = batch["x"]
        b, height, width, c = large.shape
        small = large.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))
        for_amount, for_noise = jax.random.split(key)
        amount = 0.1 * jax.random.uniform(for_amount, (b, 1, 1, 1)) ** 2
        small = small + amount * jax.random.normal(for_noise, small.shape)
        found = upscale.upscale_2x(weights, self.cfg, small)
        # Absolute errors: their best guess at an edge is one side of it, squares blur it.
        return jnp.abs(found - large).mean((1, 2, 3)).sum(), jnp.float32(b), {}


def train_upscaler(settings: EmojiConfig) -> loop.Outcome:
    """Trains the network that doubles, or goes on with it."""
    pack = EmojiDataset(settings.pack)
    seen, unseen = np.flatnonzero(~pack.held_out), np.flatnonzero(pack.held_out)

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        return {"x": pack.downscaled_images(random.choice(seen, settings.batch_size), data.SIZE)}

    config = Run(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        schedule="cosine",
        warmup_steps=min(50, settings.steps // 20),
        b2=0.99,
        average_decay=0.998,
        validate_every=500,
        save_every=250,
    )
    write_config(settings.out, {"kind": "upscaler"})
    return loop.train(
        UpscalerTask(UPSCALER),
        None,
        batch,
        config,
        settings.out,
        validation_batches=[
            {"x": pack.downscaled_images(unseen[:VALIDATION_BATCH_SIZE], data.SIZE)}
        ],
    )


# Files


def write_config(run: Path, values: dict[str, Any]) -> None:
    """Notes in a run's folder what it trains, for `export`."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "network.json").write_text(json.dumps(values) + "\n", "utf-8")


def load_ema_weights(run: Path, task: Task) -> Any:
    """The running mean of a run's weights."""
    from safetensors.numpy import load_file

    steps = checkpoints.saved_steps(run / "checkpoints")
    if not steps:
        raise ValueError(f"{run}: has no checkpoint")
    file = run / "checkpoints" / f"step-{steps[-1]:06d}" / "state.safetensors"
    mine = "average."
    arrays = {
        name.removeprefix(mine): array
        for name, array in load_file(file).items()
        if name.startswith(mine)
    }
    return tree_io.from_named(arrays, jax.eval_shape(task.init, jax.random.key(0)))


def export(run: Path, target: Path) -> None:
    """Writes the running mean of a run's weights, in float16."""
    kind = json.loads((run / "network.json").read_text("utf-8"))["kind"]
    cfg, task = (
        (UNET, DenoisingTask(UNET)) if kind == "unet" else (UPSCALER, UpscalerTask(UPSCALER))
    )
    checkpoint.save(target, load_ema_weights(run, task), cfg, dtype="float16")


def main(argv: list[str] | None = None) -> int:
    """Runs a command; returns its exit status."""
    args = _parser().parse_args(argv)
    return args.run(args)


def _pack(args: argparse.Namespace) -> int:
    data.fetch(args.packages)
    data.build_dataset(args.packages, TextEncoder(args.encoder), args.out)
    return 0


def _denoiser(args: argparse.Namespace) -> int:
    return _exit_status(train_denoiser(_settings(args), args.encoder))


def _upscaler(args: argparse.Namespace) -> int:
    return _exit_status(train_upscaler(_settings(args)))


def _export(args: argparse.Namespace) -> int:
    export(args.run_folder, args.out)
    return 0


def _settings(args: argparse.Namespace) -> EmojiConfig:
    names = EmojiConfig.__dataclass_fields__
    given = {name: value for name, value in vars(args).items() if name in names}
    return EmojiConfig(**{name: value for name, value in given.items() if value is not None})


def _exit_status(outcome: loop.Outcome) -> int:
    return 0 if outcome.signal is None else 128 + outcome.signal


_MIRROR = "half of the pictures from the other side, but none that has a left and a right"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.recipes.emoji")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str):
        made = commands.add_parser(name, help=help)
        made.add_argument("--out", type=Path, required=True)
        made.set_defaults(run=run)
        return made

    pack = command("pack", _pack, "fetch pictures and read captions")
    pack.add_argument("--packages", type=Path, required=True)
    pack.add_argument("--encoder", type=Path, required=True)
    for name, run in (("denoiser", _denoiser), ("upscaler", _upscaler)):
        train = command(name, run, "train it, or go on with it")
        train.add_argument("--pack", type=Path, required=True)
        train.add_argument("--steps", type=int)
        train.add_argument("--batch-size", type=int)
        train.add_argument("--learning-rate", type=float)
        if name == "denoiser":
            train.add_argument("--encoder", type=Path, required=True)
            train.add_argument("--start", type=Path)
            train.add_argument("--schedule", choices=("constant", "linear"))
            train.add_argument("--mirror", action="store_true", help=_MIRROR)
    made = command("export", _export, "write the weights of a run")
    made.add_argument("--run", dest="run_folder", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
