"""An encoder that answers requests: token ids in, vectors out, a batch a turn of the device.

The texts of a request are packed together and with nobody else's, so that the same request gives
the same bits under any load; other requests, and the decoders, take turns between its batches.
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

# A narrower format serves if each vector of the probe points nearly where float32's does.
MAX_DISTANCE = 1e-4  # one minus the cosine


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel:
    """An encoder in memory. Its sibling for generation is `ServedModel`."""

    kind: ClassVar[str] = "encoder"

    id: str
    created: int  # seconds since 1970
    owned_by: str
    tokenizer: bpe.WordPiece
    cfg: Config
    params: Params = field(repr=False)
    fingerprint: str
    dtype: str
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))

    @property
    def context(self) -> int:
        """Tokens an input may have, [CLS] and [SEP] included."""
        return self.cfg.max_tokens

    @property
    def memory(self) -> int:
        """Bytes of weights."""
        return encoder.num_bytes(self.params)

    @property
    def is_idle(self) -> bool:
        """Whether nobody waits for it."""
        return self.work_queue.is_idle

    async def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """The vectors of token ids, special tokens included: float32 [len(texts), D].

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
        """Nothing to end: a batch in hand is short, and who waits is answered."""

    def _compute(self, batch: packing.PackedBatch) -> np.ndarray:
        found = encoder.embed_batch(
            self.params, self.cfg, batch.ids, batch.segments, batch.max_texts
        )
        return np.asarray(found)[batch.rows, batch.slots]


def load_embedding_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    max_tokens: int | None = None,
    notify: Callable[[str], None] = lambda line: None,
) -> EmbeddingModel:
    """Loads an encoder.

    Args:
        path: a sentence-transformers folder with its tokenizer.
        max_tokens: of the longest input; None for what the folder says. See `with_max_tokens`.
        dtype: "float32", "bfloat16", or "auto" for the faster that is good enough here.
        notify: told one line for each thing that takes long.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the tokenizer is of another model.
    """
    enable_compilation_cache()
    chosen = dtypes.parse_dtype(dtype, dtypes.FLOAT_DTYPES)
    words = bpe.load_wordpiece(path)
    weights = fingerprint.hash_weights(path)
    if chosen is None:
        chosen = _choose_dtype(id, path, words, weights, notify)
    params, cfg = bert.load(path, dtype=chosen)
    cfg = with_max_tokens(cfg, max_tokens)
    if len(words) > cfg.vocab_size:
        raise ValueError(
            f"{path}: the tokenizer has ids up to {len(words) - 1}, the model only "
            f"{cfg.vocab_size} tokens: they do not belong together"
        )
    return EmbeddingModel(
        id=id,
        created=int((path / "config.json").stat().st_mtime),
        owned_by=owned_by,
        tokenizer=words,
        cfg=cfg,
        params=params,
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
    )


def with_max_tokens(cfg: Config, max_tokens: int | None) -> Config:
    """A configuration with another longest input; the same for None.

    A model may have more positions than its authors let it read (all-MiniLM: 512, and 256). Those
    beyond were learned in pretraining, not for vectors of texts.

    Raises:
        WrongUsage: the model has fewer positions, or nothing fits between [CLS] and [SEP]; it is
            what a user gave.
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
    words: bpe.WordPiece,
    weights: str,
    notify: Callable[[str], None],
) -> FloatDtype:
    """The faster format on this machine whose vectors are those of float32; remembered."""

    def measure(format: FloatDtype) -> tuple[float, np.ndarray]:
        params, cfg = bert.load(path, dtype=format)
        ids = [
            words.encode(dtypes.PROBE_TEXT, max_length=cfg.max_tokens),
            words.encode(dtypes.PROBE_TEXT[:80]),
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

    name = fingerprint.machine_key(weights)
    return dtypes.fastest_dtype(
        id, name, dtypes.FLOAT_DTYPES, measure, distance, MAX_DISTANCE, notify
    )


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """See `Kind.describe`."""
    max_tokens = options.max_embedding_tokens
    with_max_tokens(bert.read_config(files.path), max_tokens)  # raises now, not at a request

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
