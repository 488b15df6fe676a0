"""Encoders: token ids in, embedding vectors out, one packed batch a work item.

The texts of one request are packed together, and never with those of another request, so that a
request gives the same bits under any load. Other models use the device between its batches.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar

import numpy as np

import bpe
from serve.exceptions import WrongUsage
from serve.models import dtypes, fingerprint
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.decoder import weights_file
from serve.models.dtypes import FloatDtype
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of
from transformer import encoder, packing
from transformer.checkpoint import bert
from transformer.encoder import Config, Params
from transformer.engine.device import WorkQueue, default_device

# A narrower dtype is accepted if each vector of the probe has nearly the direction of float32's.
MAX_DISTANCE = 1e-4  # 1 - cosine similarity


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """A loaded encoder.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        tokenizer: its WordPiece tokenizer.
        cfg: its configuration.
        params: its weights.
        fingerprint: changes with weights, dtype and library versions.
        dtype: the dtype of its weights.
        work_queue: its queue of batches on the device.
    """

    kind: ClassVar[str] = "encoder"

    id: str
    created: int
    owned_by: str
    tokenizer: bpe.WordPiece
    cfg: Config
    params: Params = field(repr=False)
    fingerprint: str
    dtype: str
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))

    @property
    def context(self) -> int:
        """Return the maximum tokens of an input, [CLS] and [SEP] included."""
        return self.cfg.max_tokens

    @property
    def memory(self) -> int:
        """Return the bytes of the weights."""
        return encoder.num_bytes(self.params)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.work_queue.is_idle

    async def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the embedding vectors of texts: float32 [len(texts), D].

        Args:
            texts: the token ids of each text, special tokens included.

        Raises:
            Busy: too many batches wait.
        """
        vectors = np.empty((len(texts), self.cfg.d_model), np.float32)
        with self.work_queue.using():
            for batch in packing.pack(texts, self.cfg.max_tokens):
                vectors[batch.text_indices] = await self.work_queue.run(
                    lambda batch=batch: self._compute(batch)
                )
        return vectors

    def close(self, timeout: float) -> None:
        """Do nothing: a batch is short, and waiting requests are still answered."""

    def _compute(self, batch: packing.PackedBatch) -> np.ndarray:
        vectors = encoder.embed_batch(
            self.params, self.cfg, batch.ids, batch.segments, batch.max_texts
        )
        return np.asarray(vectors)[batch.rows, batch.slots]


def load_embedding_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    max_tokens: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> EmbeddingModel:
    """Load an encoder.

    Args:
        id: the id to serve it under.
        path: a sentence-transformers folder with its tokenizer.
        owned_by: the publisher.
        dtype: "float32", "bfloat16", or "auto" for the fastest accurate one on this machine.
        max_tokens: the maximum tokens of an input; None for the model's own maximum. See
            `with_max_tokens`.
        notify: called with a line for each slow operation.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the tokenizer belongs to another
            model.
    """
    enable_compilation_cache()
    chosen = dtypes.parse_dtype(dtype, dtypes.FLOAT_DTYPES)
    tokenizer = bpe.load_wordpiece(path)
    weights = fingerprint.hash_weights(path)
    if chosen is None:
        chosen = _choose_dtype(id, path, tokenizer, weights, notify)
    params, cfg = bert.load(path, dtype=chosen)
    cfg = with_max_tokens(cfg, max_tokens)
    if len(tokenizer) > cfg.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {len(tokenizer) - 1}, but the model has "
            f"{cfg.vocab_size} tokens: use the tokenizer of this model"
        )
    return EmbeddingModel(
        id=id,
        created=int((path / "config.json").stat().st_mtime),
        owned_by=owned_by,
        tokenizer=tokenizer,
        cfg=cfg,
        params=params,
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
    )


def with_max_tokens(cfg: Config, max_tokens: int | None) -> Config:
    """Return a configuration with another maximum input length; `cfg` itself for None.

    A model may have more positions than its authors recommend (all-MiniLM has 512 and recommends
    256). The further positions were learned in pretraining, not for embeddings.

    Raises:
        WrongUsage: the model has fewer positions, or no token fits between [CLS] and [SEP].
    """
    if max_tokens is None:
        return cfg
    if not 3 <= max_tokens <= cfg.max_seq_len:
        raise WrongUsage(
            f"--max-embedding-tokens must be from 3 to {cfg.max_seq_len}, the model's positions: "
            f"got {max_tokens}"
        )
    return replace(cfg, max_tokens=max_tokens)


def _choose_dtype(
    id: str,
    path: Path,
    tokenizer: bpe.WordPiece,
    weights: str,
    notify: Callable[[str], None],
) -> FloatDtype:
    """Return the fastest dtype on this machine whose vectors are close to float32's; cached."""

    def measure(dtype: FloatDtype) -> tuple[float, np.ndarray]:
        params, cfg = bert.load(path, dtype=dtype)
        ids = [
            tokenizer.encode(dtypes.PROBE_TEXT, max_length=cfg.max_tokens),
            tokenizer.encode(dtypes.PROBE_TEXT[:80]),
        ]
        best, vectors = math.inf, np.zeros(0)
        for _ in range(4):  # the first one compiles
            started = time.perf_counter()
            vectors = encoder.embed_all(params, cfg, ids)
            best = min(best, time.perf_counter() - started)
        return best, vectors

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        cosines = (a * b).sum(1) / (np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1))
        return 1 - float(cosines.min())

    key = fingerprint.machine_key(weights)
    return dtypes.fastest_dtype(
        id, key, dtypes.FLOAT_DTYPES, measure, distance, MAX_DISTANCE, notify
    )


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of an encoder; see `Kind.describe`."""
    max_tokens = options.max_embedding_tokens
    with_max_tokens(bert.read_config(files.path), max_tokens)  # raises before the server starts

    def load() -> EmbeddingModel:
        return load_embedding_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=options.dtype if options.dtype in dtypes.FLOAT_DTYPES else "auto",
            max_tokens=max_tokens,
            notify=options.notify,
        )

    return ModelSpec(
        id=files.id,
        created=int(weights_file(files.path).stat().st_mtime),
        owned_by=files.publisher,
        memory=lambda: (files.path / "model.safetensors").stat().st_size,
        load=load,
        stamp=functools.partial(stamp_of, files.path),
        kind="encoder",
    )


def _recognizes(path: Path) -> bool:
    try:
        return bert.is_bert(path)
    except (OSError, ValueError):
        return False


KIND = Kind(
    name="encoder",
    task="make embeddings",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="embeddings",
        call="embeddings.create",
        result="data[0].embedding[:8]",
        fields={"input": "What is the capital of France?"},
    ),
)
