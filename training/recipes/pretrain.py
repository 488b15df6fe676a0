"""Pretraining of a small decoder on text: train a tokenizer, then predict the next token.

    python -m training pretrain --data books.txt --out mine
    pellucid complete --model mine=mine/model "Once upon a time"

The documents are concatenated to one stream of tokens, each followed by an end token. The rows of a
batch start at random positions of the stream, which depend on the seed and the number of the step.
Documents in the same row do not attend to each other. The last twentieth of the stream is for
validation.

Like all recipes, this is a short file to copy and change.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from bpe import trainer
from bpe.encoding import Encoding
from bpe.formats import Tokenizer
from training import examples, loop
from training.config import TrainConfig
from training.examples import Fault
from training.recipes import run_dir
from training.recipes.decoder import DecoderTask
from transformer import checkpoint
from transformer.config import Config as Model

END_OF_TEXT = "<|endoftext|>"  # the token that follows each document
VALIDATION_SHARE = 1 / 20  # of the token stream


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """The settings of a pretraining run.

    Attributes:
        data: a text file, which is one document, or a .jsonl file with {"text": ...} in each line.
        out: the folder of the run.
        vocab_size: the number of tokens of the vocabulary to train.
        layers: the number of layers.
        width: the dimension of the model; a multiple of 64, which is the dimension of a head.
        length: the number of tokens per row, and the context length of the model.
        batch_size: rows per step.
        steps: the number of updates.
        learning_rate: the peak of the learning rate.
        seed: the seed of weights and batches.

    Raises:
        ValueError: a number is not above zero, or `width` is not a multiple of 64.
    """

    data: Path
    out: Path
    vocab_size: int = 2048
    layers: int = 4
    width: int = 128
    length: int = 128
    batch_size: int = 8
    steps: int = 500
    learning_rate: float = 3e-3
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("data", "out"):
            object.__setattr__(self, name, Path(getattr(self, name)))
        for name in ("layers", "width", "length", "batch_size", "steps", "learning_rate"):
            if not (value := getattr(self, name)) > 0:
                raise ValueError(f"{name} must be above 0, got {value!r}")
        if self.width % 64:
            raise ValueError(f"width must be a multiple of 64, got {self.width}")


@dataclass(frozen=True)
class Result:
    """The result of a pretraining run.

    Attributes:
        reason: "finished", or "signal" if a signal stopped the run after it saved its state.
        job: the contents of job.json.
        signal: the number of the signal that stopped the run; None if none did.
    """

    reason: Literal["finished", "signal"]
    job: dict[str, Any]
    signal: int | None = None


def run(
    settings: PretrainConfig,
    *,
    notify: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Result:
    """Train a model, or resume its training; write `model/` as a Hugging Face folder.

    Args:
        settings: the settings of the run.
        notify: called with each progress message, a line of text.
        progress: whether to show a progress bar if standard error is a terminal.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the text is too short or not valid, or `out` contains a run with other settings.
        FloatingPointError: the loss or the gradient is NaN or infinite.
    """
    out = settings.out
    record = run_dir.config_record(settings)
    job = run_dir.read_job(out / "job.json", record)
    if job is not None and (out / "model").exists():
        return Result("finished", job)
    encoding = trainer.train(
        documents(settings.data), vocab_size=settings.vocab_size, special_tokens=(END_OF_TEXT,)
    )
    stream = to_stream(documents(settings.data), encoding)
    cut = int(len(stream) * (1 - VALIDATION_SHARE))
    if len(stream) - cut <= settings.length:
        raise ValueError(
            f"{settings.data}: {len(stream)} tokens are too few for rows of {settings.length}; "
            f"use at least {int(settings.length / VALIDATION_SHARE) + 20} tokens, or shorter rows"
        )
    cfg = model_config(settings, encoding.n_vocab)
    task = DecoderTask(cfg=cfg)
    sizes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    job = {
        "given": record,
        "steps": settings.steps,
        "tokens": len(stream),
        "parameters": sum(leaf.size for leaf in sizes),
        "vocab_size": encoding.n_vocab,
    }
    run_dir.write_job(out / "job.json", job)
    notify(
        f"{job['parameters']} parameters; {len(stream)} tokens, vocabulary of {encoding.n_vocab}"
    )
    config = TrainConfig(
        steps=settings.steps,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        warmup_steps=settings.steps // 20,
        b2=0.95,
        weight_decay=0.1,
        validate_every=max(1, settings.steps // 10),
    )
    end = encoding.special_tokens[END_OF_TEXT]
    notify("compiling the training step ...")
    outcome = loop.train(
        task,
        None,
        lambda step: sample_batch(stream[:cut], settings, end, step),
        config,
        out,
        validation_batches=[sample_batch(stream[cut:], settings, end, step) for step in range(4)],
        flops_per_token=task.flops_per_token(settings.length),
        progress=progress,
    )
    if outcome.reason == "signal":
        return Result("signal", job, outcome.signal)

    def write(folder: Path) -> None:
        checkpoint.save(folder, outcome.state.weights, cfg)
        run_dir.save_tokenizer(folder, Tokenizer(encoding=encoding, eos_id=end))

    run_dir.write_dir_atomic(out / "model", write)
    return Result("finished", job)


def model_config(settings: PretrainConfig, vocab_size: int) -> Model:
    """Return the configuration of a Llama decoder with the sizes of the settings."""
    return Model(
        num_layers=settings.layers,
        num_heads=settings.width // 64,
        num_kv_heads=settings.width // 64,
        head_dim=64,
        d_model=settings.width,
        d_ff=-(-settings.width * 8 // 3 // 32) * 32,
        vocab_size=vocab_size,
        max_seq_len=settings.length,
    )


def documents(path: Path) -> Iterator[str]:
    """Yield the documents of a file; see `PretrainConfig.data`.

    Raises:
        ValueError: a line of a .jsonl file is not {"text": ...}, or the file is not UTF-8.
    """
    if path.suffix != ".jsonl":
        yield path.read_text("utf-8")
        return
    for number, line in examples.lines(path):
        if not line.strip():
            continue
        row = examples.parse(line)
        if isinstance(row, Fault):
            raise ValueError(f"{path}:{number}: {row.message}")
        for fault in examples.faults(row, "text"):
            raise ValueError(f"{path}:{number}: {fault.message}")
        yield row["text"]


def to_stream(texts: Iterator[str], encoding: Encoding) -> np.ndarray:
    """Return the token ids of all texts, each followed by `END_OF_TEXT`: int32 [n]."""
    end = [encoding.special_tokens[END_OF_TEXT]]
    return np.concatenate(
        [np.array(encoding.encode_ordinary(text) + end, np.int32) for text in texts]
    )


def sample_batch(
    stream: np.ndarray, settings: PretrainConfig, end: int, step: int
) -> dict[str, np.ndarray]:
    """Return the batch of a step: rows from random positions of the stream.

    Args:
        stream: int32 [n], the token ids.
        settings: `length`, `batch_size` and `seed` are used.
        end: the token id of `END_OF_TEXT`.
        step: the number of the step.

    Returns:
        "ids", "segments" and "weights"; see training/recipes/decoder.py.
    """
    shape = settings.batch_size, settings.length
    starts = np.random.default_rng((settings.seed, step)).integers(
        0, len(stream) - settings.length, settings.batch_size, endpoint=True
    )
    ids = stream[starts[:, None] + np.arange(settings.length)]
    is_end = (ids == end).astype(np.int32)
    # An end token belongs to the document before it.
    segments = 1 + np.cumsum(is_end, axis=1, dtype=np.int32) - is_end
    return {"ids": ids, "segments": segments, "weights": np.ones(shape, np.float32)}
