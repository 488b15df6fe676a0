"""A small decoder from nothing but text: learn a vocabulary, then predict the next token.

    python -m training pretrain --data books.txt --out mine
    pellucid complete --model mine=mine/model "Once upon a time"

The text becomes one long stream of tokens, with a token between documents. A step reads rows of it
that begin anywhere; which, follows from the seed and the number of the step. Documents that meet in
a row do not see each other. What stands in the last twentieth is kept for validation.

Like all recipes a short file to be copied and changed.
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

END_OF_TEXT = "<|endoftext|>"  # of a document
VALIDATION_SHARE = 1 / 20  # of the stream


@dataclass(frozen=True, kw_only=True)
class PretrainConfig:
    """What there is to choose.

    Raises:
        ValueError: a number is not above zero, or width is no multiple of 64.
    """

    data: Path  # a text file, one document; or .jsonl with {"text": ...} a line
    out: Path
    vocab_size: int = 2048
    layers: int = 4
    width: int = 128  # of the model, in heads of 64
    length: int = 128  # tokens of a row
    batch_size: int = 8  # rows of a step
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
    """How a run ended; `job` is what stands in job.json."""

    reason: Literal["finished", "signal"]
    job: dict[str, Any]
    signal: int | None = None


def run(
    settings: PretrainConfig,
    *,
    notify: Callable[[str], None] = lambda line: None,
    progress: bool = False,
) -> Result:
    """Trains, or goes on with it; leaves `model/` in Hugging Face's layout.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: the text is too short or damaged, or `out` holds a run with other settings.
        FloatingPointError: the loss is no number any more.
    """
    out = settings.out
    given = run_dir.config_record(settings)
    job = run_dir.read_job(out / "job.json", given)
    if job is not None and (out / "model").exists():
        return Result("finished", job)
    encoding = trainer.train(
        documents(settings.data), vocab_size=settings.vocab_size, special_tokens=(END_OF_TEXT,)
    )
    stream = to_stream(documents(settings.data), encoding)
    cut = int(len(stream) * (1 - VALIDATION_SHARE))
    if len(stream) - cut <= settings.length:
        raise ValueError(
            f"{settings.data}: {len(stream)} tokens are too few for rows of {settings.length}; it "
            f"takes {int(settings.length / VALIDATION_SHARE) + 20}"
        )
    cfg = model_config(settings, encoding.n_vocab)
    task = DecoderTask(cfg=cfg)
    sizes = jax.tree.leaves(jax.eval_shape(task.init, jax.random.key(0)))
    job = {
        "given": given,
        "steps": settings.steps,
        "tokens": len(stream),
        "parameters": sum(leaf.size for leaf in sizes),
        "vocab_size": encoding.n_vocab,
    }
    run_dir.write_job(out / "job.json", job)
    notify(f"{job['parameters']} weights; {len(stream)} tokens of {encoding.n_vocab} kinds")
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
    """A Llama of the sizes that were asked for."""
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
    """The texts of a file.

    Raises:
        ValueError: a line is not {"text": ...}, or the file is not UTF-8.
    """
    if path.suffix != ".jsonl":
        yield path.read_text("utf-8")
        return
    for number, line in examples.lines(path):
        if not line.strip():
            continue
        row = examples.parse(line)
        for fault in [row] if isinstance(row, Fault) else examples.faults(row, "text"):
            raise ValueError(f"{path}:{number}: {fault.message}")
        yield row["text"]


def to_stream(texts: Iterator[str], encoding: Encoding) -> np.ndarray:
    """All texts one behind another, each with `END` behind it: int32 [n]."""
    end = [encoding.special_tokens[END_OF_TEXT]]
    return np.concatenate(
        [np.array(encoding.encode_ordinary(text) + end, np.int32) for text in texts]
    )


def sample_batch(
    stream: np.ndarray, settings: PretrainConfig, end: int, step: int
) -> dict[str, np.ndarray]:
    """The batch of a step: rows that begin anywhere in the stream; see `decoder` for its keys."""
    shape = settings.batch_size, settings.length
    starts = np.random.default_rng((settings.seed, step)).integers(
        0, len(stream) - settings.length, settings.batch_size, endpoint=True
    )
    ids = stream[starts[:, None] + np.arange(settings.length)]
    is_end = (ids == end).astype(np.int32)
    segments = 1 + np.cumsum(is_end, axis=1, dtype=np.int32) - is_end  # the end is its document's
    return {"ids": ids, "segments": segments, "weights": np.ones(shape, np.float32)}
