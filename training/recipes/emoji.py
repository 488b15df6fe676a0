"""emoji-64: a text-to-image model for small images, trained on a CPU in a few hours.

    python -m training.recipes.emoji pack --packages DIR --encoder ENCODER --out DATASET
    python -m training.recipes.emoji denoiser --dataset DATASET --encoder ENCODER --out RUN
    python -m training.recipes.emoji upscaler --dataset DATASET --out RUN2
    python -m training.recipes.emoji export --run RUN --out MODEL/denoiser
    python -m training.recipes.emoji export --run RUN2 --out MODEL/upscaler

A U-Net is trained on images of 32 x 32 pixels by flow matching. A separate upscaler to 64 x 64 is
trained on downscaled real images. The recipe is designed for two cores and a few hours: the text
encoder is frozen and its states are computed once; concepts with common names are sampled more
often; the optimizer is Muon, with which the loss falls faster than with AdamW; the learning rate is
constant, so that a run can be stopped at any point, and decays in a short second run
(`denoiser --init-from MODEL/denoiser --schedule linear --steps 3000`).

`emoji_measures` evaluates the model. Like all recipes, this is a short file to copy and change.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

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
from training.state import State
from training.task import Task

SAMPLE_PROMPTS = (
    "apple", "cat", "heart", "sun", "car", "tree", "pizza", "dog", "house", "fish", "banana",
    "star", "smiling face", "moon", "flower", "book", "bird", "boat", "guitar", "umbrella",
)  # fmt: skip
UNET = UNetConfig(
    image_size=32, channels=(64, 128, 256), blocks=(1, 2, 1), attention=(False, True, True)
)
UPSCALER = UpscalerConfig(width=64, num_blocks=2)
VALIDATION_BATCH_SIZE = 40
SAMPLE_EVERY = 250  # steps between grids of sample images


@dataclass(frozen=True, kw_only=True)
class EmojiConfig:
    """The settings of a run of the denoiser or the upscaler.

    Attributes:
        dataset: the folder of the dataset, as the command `pack` writes it.
        out: the folder of the run.
        init_from: the folder of a denoiser whose weights the run starts from; None for random
            weights.
        steps: the number of updates.
        batch_size: images per step.
        learning_rate: the peak of the learning rate.
        schedule: the learning rate schedule of the denoiser.
        style_shares: the sampling probability of each style.
        common_weight: the factor by which the sampling weight of concepts with a common name is
            multiplied; see `sampling_shares`.
        prompt_dropout: the probability that a training image has no prompt, for classifier-free
            guidance.
        mirror: whether to mirror images with probability 1/2, except those of concepts that are
            `directed`.
        time_mean: the mean of the logit-normal distribution of flow times. If it is negative, times
            of high noise, at which the composition of the image is decided, are sampled more often.
        time_std: the standard deviation of that distribution.
        seed: the seed of weights and batches.
    """

    dataset: Path
    out: Path
    init_from: Path | None = None
    steps: int = 100_000
    batch_size: int = 32
    learning_rate: float = 3e-3
    schedule: Literal["constant", "linear"] = "constant"
    style_shares: tuple[float, ...] = (0.2, 0.6, 0.2)
    common_weight: float = 6.0
    prompt_dropout: float = 0.1
    mirror: bool = False
    time_mean: float = -0.8
    time_std: float = 1.2
    seed: int = 0


# Sampling of the training images


def vocab_words(encoder: Path) -> frozenset[str]:
    """Return the words that are one token in BERT's vocabulary: about 20,000 common words.

    Args:
        encoder: the folder of the text encoder.
    """
    return frozenset(formats.load_wordpiece(encoder).vocab)


def sampling_shares(
    dataset: EmojiDataset, settings: EmojiConfig, common_words: frozenset[str]
) -> np.ndarray:
    """Return the sampling probability of each image; that of held-out images is 0.

    Args:
        dataset: the dataset of N images.
        settings: `style_shares` and `common_weight` are used.
        common_words: a concept is common if its `plain` name is one of these words, or (in nature,
            food and travel) if the last word of its name is.

    Returns:
        float64 [N].
    """
    weights = np.array([concept.weight for concept in dataset.concepts])
    for number, concept in enumerate(dataset.concepts):
        group = data.GROUPS[concept.group][0]
        is_object = group not in ("people", "symbols")
        # "deciduous tree" is not a common name, but its image fits the prompt "tree".
        is_kind = group in ("nature", "food", "travel") and concept.name.split()[-1] in common_words
        is_face = group == "smileys" and "face" in concept.name
        if is_object and not is_face and (concept.plain in common_words or is_kind):
            weights[number] *= settings.common_weight
    style_shares = np.array(settings.style_shares)[dataset.style_ids]
    shares = weights[dataset.concept_ids] * style_shares * ~dataset.held_out
    return shares / shares.sum()


def make_batches(
    dataset: EmojiDataset, settings: EmojiConfig, shares: np.ndarray, size: int
) -> Callable[[int], dict[str, np.ndarray]]:
    """Return the function `batches(step)` for the training loop: random images with captions.

    Args:
        dataset: the dataset of N images.
        settings: `batch_size`, `prompt_dropout`, `mirror` and `seed` are used.
        shares: float [N], the sampling probability of each image.
        size: height and width of the images in pixels.
    """
    cumulative = np.cumsum(shares)
    directed = np.array([concept.directed for concept in dataset.concepts])[dataset.concept_ids]

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        rows = np.searchsorted(cumulative, random.random(settings.batch_size) * cumulative[-1])
        embeds = dataset.caption_embeds([dataset.sample_caption(random, row) for row in rows])
        keep = random.random(settings.batch_size) >= settings.prompt_dropout
        x = dataset.downscaled_images(rows, size)
        if settings.mirror:
            mirrored = (random.random(settings.batch_size) < 0.5) & ~directed[rows]
            x[mirrored] = x[mirrored, :, ::-1]
        return {"x": x, "keep": keep, **embeds}

    return batch


def validation_batches(
    dataset: EmojiDataset, size: int, which: np.ndarray | None = None
) -> list[dict[str, np.ndarray]]:
    """Return batches of held-out images, each with its name and style as the prompt.

    Args:
        dataset: the dataset.
        size: height and width of the images in pixels.
        which: int [n], the indices of the images; None for all held-out images.
    """
    random = np.random.default_rng(0)
    which = random.permutation(np.flatnonzero(dataset.held_out) if which is None else which)
    batches = []
    for start in range(0, len(which) - VALIDATION_BATCH_SIZE + 1, VALIDATION_BATCH_SIZE):
        rows = which[start : start + VALIDATION_BATCH_SIZE]
        captions = [
            data.styled_caption(
                next(iter(dataset.concepts[dataset.concept_ids[i]].captions)),
                int(dataset.style_ids[i]),
            )
            for i in rows
        ]
        x, keep = dataset.downscaled_images(rows, size), np.ones(VALIDATION_BATCH_SIZE, bool)
        batches.append({"x": x, "keep": keep, **dataset.caption_embeds(captions)})
    return batches


# The denoiser


@dataclass(frozen=True)
class DenoisingTask:
    """Flow matching (Lipman et al. 2022, arXiv:2210.02747); implements `Task`.

    Attributes:
        cfg: the configuration of the denoiser.
        time_mean: the mean of the logit-normal distribution of flow times.
        time_std: the standard deviation of that distribution.
        init_params: the initial weights, which are copied; None for random weights.
    """

    cfg: model.Config
    time_mean: float = 0.0
    time_std: float = 1.0
    init_params: Any = None

    def init(self, key: jax.Array) -> model.Params:
        """Return the initial weights."""
        if self.init_params is None:
            return model.init(key, self.cfg)
        return jax.tree.map(lambda leaf: jnp.array(leaf, copy=True), self.init_params)

    def loss(self, weights: model.Params, frozen: None, batch, key: jax.Array):
        """Return the summed flow loss of a batch (see `make_batches`) at random flow times."""
        x = batch["x"]
        time_key, noise_key = jax.random.split(key)
        e = jax.random.normal(noise_key, x.shape)
        # Stratified sampling: one time from each of `count` quantiles, for a smaller variance.
        count = x.shape[0]
        quantiles = (jnp.arange(count) + jax.random.uniform(time_key, (count,))) / count
        normal = jax.scipy.special.ndtri(jnp.clip(quantiles, 1e-3, 1 - 1e-3))
        t = jax.nn.sigmoid(self.time_mean + self.time_std * normal)
        text = PromptEmbeds(batch["states"], batch["mask"], batch["pooled"])
        losses = model.flow_loss(weights, self.cfg, x, e, t, text, batch["keep"])
        return losses.sum(), jnp.float32(count), {}


def train_denoiser(settings: EmojiConfig, encoder: Path) -> loop.Outcome:
    """Train the denoiser, or resume its training; write a grid of sample images periodically.

    Args:
        settings: the settings of the run.
        encoder: the folder of the text encoder.
    """
    dataset = EmojiDataset(settings.dataset)
    init_params: Any = None
    cfg: model.Config = UNET
    if settings.init_from is not None:
        init_params, loaded_cfg = checkpoint.load(settings.init_from)
        cfg = cast(model.Config, loaded_cfg)
    shares = sampling_shares(dataset, settings, vocab_words(encoder))
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

    def write_samples(state: State, record: dict[str, Any]) -> None:
        step = record["step"]
        if step % SAMPLE_EVERY == 0 or step == settings.steps:
            # All prompts have the same noise.
            keys = jnp.repeat(sample.image_keys(0, 1), len(prompts.mask), 0)
            images = generate(state.average, cfg, prompts, keys)
            image_io.save(pipeline.make_grid(images, 10), settings.out / f"grid-{step:06d}.png")

    return loop.train(
        DenoisingTask(cfg, settings.time_mean, settings.time_std, init_params),
        None,
        make_batches(dataset, settings, shares, cfg.image_size),
        config,
        settings.out,
        validation_batches=validation_batches(dataset, cfg.image_size),
        on_step=write_samples,
    )


def generate(
    weights: model.Params,
    cfg: model.Config,
    text: PromptEmbeds,
    keys: jax.Array,
    guidance: float = 3.0,
) -> np.ndarray:
    """Generate one image per prompt, without upscaling.

    Args:
        weights: the weights of the denoiser.
        cfg: the configuration of the denoiser.
        text: the embeddings of B prompts.
        keys: [B] PRNG keys of the initial noise.
        guidance: the scale of classifier-free guidance.

    Returns:
        uint8 [B, Y, X, 3].
    """
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
    """Reconstruction of images from downscaled copies with a little noise; implements `Task`."""

    cfg: UpscalerConfig

    def init(self, key: jax.Array) -> upscale.Params:
        """Return random weights."""
        return layers.init(key, upscale.abstract(self.cfg))

    def loss(self, weights: upscale.Params, frozen: None, batch, key: jax.Array):
        """Return the summed mean absolute error of upscaled images; see `Task.loss`.

        `batch` has "x" float32 [B, Y, X, 3], the images at full size.
        """
        large = batch["x"]
        b, height, width, c = large.shape
        small = large.reshape(b, height // 2, 2, width // 2, 2, c).mean((2, 4))
        scale_key, noise_key = jax.random.split(key)
        noise_scale = 0.1 * jax.random.uniform(scale_key, (b, 1, 1, 1)) ** 2
        small = small + noise_scale * jax.random.normal(noise_key, small.shape)
        upscaled = upscale.upscale_2x(weights, self.cfg, small)
        # The absolute error gives sharp edges; the squared error would favour a mean of both sides.
        return jnp.abs(upscaled - large).mean((1, 2, 3)).sum(), jnp.float32(b), {}


def train_upscaler(settings: EmojiConfig) -> loop.Outcome:
    """Train the upscaler, or resume its training.

    Args:
        settings: the settings of the run.
    """
    dataset = EmojiDataset(settings.dataset)
    train_rows, held_out = np.flatnonzero(~dataset.held_out), np.flatnonzero(dataset.held_out)

    def batch(step: int) -> dict[str, np.ndarray]:
        random = np.random.default_rng((settings.seed, step))
        rows = random.choice(train_rows, settings.batch_size)
        return {"x": dataset.downscaled_images(rows, data.SIZE)}

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
            {"x": dataset.downscaled_images(held_out[:VALIDATION_BATCH_SIZE], data.SIZE)}
        ],
    )


# Files


def write_config(run: Path, values: dict[str, Any]) -> None:
    """Write the kind of network that a run trains to its folder, for `export`.

    Args:
        run: the folder of the run.
        values: {"kind": "unet"} or {"kind": "upscaler"}.
    """
    run.mkdir(parents=True, exist_ok=True)
    (run / "network.json").write_text(json.dumps(values) + "\n", "utf-8")


def load_ema_weights(run: Path, task: Task) -> Any:
    """Load the EMA of the weights from the last checkpoint of a run.

    Args:
        run: the folder of the run.
        task: the task that was trained.

    Raises:
        ValueError: the run has no checkpoint, or the checkpoint is of another task.
    """
    from safetensors.numpy import load_file

    steps = checkpoints.saved_steps(run / "checkpoints")
    if not steps:
        raise ValueError(f"{run}: the run has no checkpoint yet")
    file = run / "checkpoints" / f"step-{steps[-1]:06d}" / "state.safetensors"
    prefix = "average."
    arrays = {
        name.removeprefix(prefix): array
        for name, array in load_file(file).items()
        if name.startswith(prefix)
    }
    return tree_io.from_named(arrays, jax.eval_shape(task.init, jax.random.key(0)))


def export(run: Path, target: Path) -> None:
    """Write the EMA of the weights of a run as a model in float16.

    Args:
        run: the folder of the run.
        target: the folder of the denoiser or upscaler to write.

    Raises:
        ValueError: the run has no checkpoint, or the checkpoint is of another network.
    """
    kind = json.loads((run / "network.json").read_text("utf-8"))["kind"]
    cfg, task = (
        (UNET, DenoisingTask(UNET)) if kind == "unet" else (UPSCALER, UpscalerTask(UPSCALER))
    )
    checkpoint.save(target, load_ema_weights(run, task), cfg, dtype="float16")


def main(argv: list[str] | None = None) -> int:
    """Run a command and return its exit code.

    Args:
        argv: arguments without the program name; None for `sys.argv[1:]`.
    """
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
    values = {name: value for name, value in vars(args).items() if name in names}
    return EmojiConfig(**{name: value for name, value in values.items() if value is not None})


def _exit_status(outcome: loop.Outcome) -> int:
    return 0 if outcome.signal is None else 128 + outcome.signal


_MIRROR_HELP = "mirror half of the images, except those with a left and a right"


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m training.recipes.emoji")
    commands = parser.add_subparsers(required=True)

    def command(name: str, run: Callable[[argparse.Namespace], int], help: str):
        added = commands.add_parser(name, help=help)
        added.add_argument("--out", type=Path, required=True)
        added.set_defaults(run=run)
        return added

    pack = command("pack", _pack, "download the images and build the dataset")
    pack.add_argument("--packages", type=Path, required=True)
    pack.add_argument("--encoder", type=Path, required=True)
    for name, run in (("denoiser", _denoiser), ("upscaler", _upscaler)):
        train = command(name, run, f"train the {name}, or resume its training")
        dataset = train.add_mutually_exclusive_group(required=True)
        dataset.add_argument("--dataset", type=Path)
        dataset.add_argument("--pack", dest="dataset", type=Path, help=argparse.SUPPRESS)  # old
        train.add_argument("--steps", type=int)
        train.add_argument("--batch-size", type=int)
        train.add_argument("--learning-rate", type=float)
        if name == "denoiser":
            train.add_argument("--encoder", type=Path, required=True)
            train.add_argument("--init-from", type=Path, help="a denoiser to start from")
            train.add_argument("--start", dest="init_from", type=Path, help=argparse.SUPPRESS)
            train.add_argument("--schedule", choices=("constant", "linear"))
            train.add_argument("--mirror", action="store_true", help=_MIRROR_HELP)
    export_command = command("export", _export, "write the weights of a run")
    export_command.add_argument("--run", dest="run_folder", type=Path, required=True)
    return parser


if __name__ == "__main__":
    sys.exit(main())
