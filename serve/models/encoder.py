"""Encoders: token ids in, embedding vectors out, one packed batch per work item.

A batch packs texts of one request only, so that the results of a request are bitwise identical
under any load. Between two batches of a request, other requests and models can use the device.
"""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, TypeVar

import jax
import numpy as np

import bpe
from serve.exceptions import WrongUsage
from serve.models import dtypes, fingerprint, long_texts
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.dtypes import FloatDtype
from serve.models.spec import (
    Example,
    Kind,
    LoadedModel,
    LoadOptions,
    ModelFiles,
    ModelSpec,
    stamp_of,
)
from transformer import encoder, packing, pooled_decoder
from transformer.checkpoint import encoders, sentence_transformers
from transformer.encoder import AnyConfig, AnyParams
from transformer.engine.device import WorkQueue, default_device

C = TypeVar("C", bound=AnyConfig)

# bfloat16 is accepted if each probe text has nearly the same embedding as in float32.
MAX_DISTANCE = 1e-4  # 1 - cosine similarity


@dataclass(frozen=True, kw_only=True)
class TextModel:
    """A loaded model that computes packed batches of texts: an embedding model or a cross-encoder.

    Attributes:
        id: the id it is served under.
        created: seconds since 1970.
        owned_by: the publisher.
        tokenizer: its tokenizer.
        cfg: its configuration.
        params: its weights.
        fingerprint: changes with weights, dtype and library versions.
        dtype: the dtype of its weights.
        work_queue: its queue of batches on the device.
    """

    id: str
    created: int
    owned_by: str
    tokenizer: bpe.EncoderTokenizer
    cfg: AnyConfig
    params: AnyParams = field(repr=False)
    fingerprint: str
    dtype: str
    work_queue: WorkQueue = field(default_factory=lambda: WorkQueue(default_device()))

    @property
    def context(self) -> int:
        """Return the maximum tokens of an input, special tokens included."""
        return self.cfg.max_tokens

    @property
    def memory(self) -> int:
        """Return the bytes of the weights."""
        return encoder.num_bytes(self.params)

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.work_queue.is_idle

    def check(self, results: np.ndarray) -> np.ndarray:
        """Return vectors or scores.

        Raises:
            FloatingPointError: one is NaN.
        """
        if np.isnan(results).any():
            raise FloatingPointError(
                f"{self.id}: results are NaN: its weights are damaged, or overflow in {self.dtype}"
            )
        return results

    def close(self, timeout: float) -> None:
        """Do nothing: a batch is short, and waiting requests are still answered."""


@dataclass(frozen=True, kw_only=True)
class EmbeddingModel(TextModel):
    """A loaded embedding model.

    Attributes:
        prompts: texts to put before an input, by prompt name.
        default_prompt: the prompt of an input without a prompt name; usually empty.
    """

    kind: ClassVar[str] = "encoder"

    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str = ""

    @property
    def num_special(self) -> int:
        """Return the number of special tokens around an input."""
        return len(self.tokenizer.prefix_ids) + len(self.tokenizer.suffix_ids)

    def encode(self, text: str, prompt_name: str | None = None) -> list[int]:
        """Return the token ids of a prompt and a text together, special tokens included.

        Args:
            text: the text.
            prompt_name: a key of `prompts`; None for the default prompt.
        """
        prompt = self.default_prompt if prompt_name is None else self.prompts[prompt_name]
        return self.tokenizer.encode(prompt + text)

    def split(self, ids: Sequence[int]) -> list[list[int]]:
        """Split token ids into chunks of at most `context` tokens; see `long_texts.split`."""
        tokenizer = self.tokenizer
        return long_texts.split(
            ids, self.context, len(tokenizer.prefix_ids), len(tokenizer.suffix_ids)
        )

    def truncate(self, ids: Sequence[int], limit: int) -> list[list[int]]:
        """Return token ids as a single chunk, truncated to `limit`; see `long_texts.truncated`."""
        return long_texts.truncated(ids, limit, len(self.tokenizer.suffix_ids))

    def average(self, vectors: np.ndarray, chunks: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """Return the mean vector of each text's chunks; see `long_texts.average`."""
        return long_texts.average(
            vectors, chunks, normalize=self.cfg.normalize, num_special=self.num_special
        )

    async def embed(self, texts: Sequence[Sequence[int]]) -> np.ndarray:
        """Return the embedding vectors of texts: float32 [len(texts), E].

        Args:
            texts: the token ids of each text, special tokens included.

        Raises:
            Busy: too many batches wait.
            FloatingPointError: a vector is NaN.
        """
        vectors = np.empty((len(texts), self.cfg.embedding_width), np.float32)
        with self.work_queue.using():
            for batch in packing.pack(texts, self.cfg.max_tokens):
                vectors[batch.text_indices] = await self.work_queue.run(
                    lambda batch=batch: self._compute(batch)
                )
        return self.check(vectors)

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
        path: a sentence-transformers folder with its tokenizer, or a GGUF file.
        owned_by: the publisher.
        dtype: "float32", "bfloat16", or "auto" for the fastest accurate dtype on this machine.
        max_tokens: the maximum tokens of an input; None for the model's own maximum. See
            `with_max_tokens`.
        notify: called with a message for each slow operation.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged or of an unknown kind, or the tokenizer belongs to another
            model.
    """
    enable_compilation_cache()
    chosen = dtypes.parse_dtype(dtype, dtypes.FLOAT_DTYPES)
    settings = encoders.read_settings(path)
    tokenizer = load_tokenizer(path)
    weights = hash_files(path)
    if chosen is None:
        chosen = _choose_dtype(id, path, tokenizer, weights, notify)
    params, cfg = encoders.load(path, dtype=chosen)
    return EmbeddingModel(
        id=id,
        created=created(path),
        owned_by=owned_by,
        tokenizer=tokenizer,
        cfg=with_max_tokens(cfg, max_tokens),
        params=params,
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
        prompts=settings.prompts,
        default_prompt=settings.default_prompt,
    )


def load_tokenizer(path: Path) -> bpe.EncoderTokenizer:
    """Return the tokenizer of a model's files, without special tokens that have no embedding.

    Raises:
        ValueError: a file is damaged, or an ordinary token has no embedding, so the tokenizer is
            another model's.
    """
    settings, rows = encoders.read_settings(path), encoders.read_config(path).vocab_size
    return bpe.load_encoder_tokenizer(settings.folder, lowercase=settings.lowercase, num_rows=rows)


def created(path: Path) -> int:
    """Return the modification time of config.json or the GGUF file, in seconds since 1970."""
    folder = sentence_transformers.transformer_folder(path) if path.is_dir() else path
    return int((folder / "config.json" if path.is_dir() else path).stat().st_mtime)


def hash_files(path: Path) -> str:
    """Return the SHA-256, in hex, of a model's files and of its sentence-transformers modules."""
    if not path.is_dir():
        return fingerprint.hash_weights(path)
    folders = sentence_transformers.module_folders(path)
    listing = "".join(fingerprint.hash_weights(folder) for folder in folders)
    return hashlib.sha256(listing.encode()).hexdigest()


def stamp(path: Path) -> object:
    """Return a value that changes when a file of the model or of one of its modules changes."""
    folders = sentence_transformers.module_folders(path) if path.is_dir() else [path]
    return stamp_of(*folders)


def float32_bytes(cfg: AnyConfig) -> int:
    """Return the bytes of the weights in float32, the widest dtype."""
    if isinstance(cfg, pooled_decoder.Config):
        return 4 * cfg.decoder.num_params
    shapes = jax.tree.leaves(encoder.abstract(cfg))
    return sum(4 * math.prod(info.shape) for info in shapes)


def with_max_tokens(cfg: C, max_tokens: int | None) -> C:
    """Return a configuration with another maximum input length; `cfg` itself for None.

    A model can have more positions than its authors recommend (all-MiniLM has 512, the authors
    recommend 256). The other positions were trained in pretraining, but not for embeddings.

    Raises:
        WrongUsage: `max_tokens` is less than 3 (two special tokens and one token of the text) or
            greater than the number of positions.
    """
    if max_tokens is None:
        return cfg
    if not 3 <= max_tokens <= cfg.max_seq_len:
        raise WrongUsage(
            f"--max-embedding-tokens must be from 3 to {cfg.max_seq_len}, the number of positions "
            f"of the model: got {max_tokens}"
        )
    return replace(cfg, max_tokens=max_tokens)


def _choose_dtype(
    id: str,
    path: Path,
    tokenizer: bpe.EncoderTokenizer,
    weights: str,
    notify: Callable[[str], None],
) -> FloatDtype:
    """Return the fastest dtype on this machine whose vectors are close to float32's; cached."""

    def measure(dtype: FloatDtype) -> tuple[float, np.ndarray]:
        params, cfg = encoders.load(path, dtype=dtype)
        ids = [
            tokenizer.encode(dtypes.PROBE_TEXT, max_length=cfg.max_tokens),
            tokenizer.encode(dtypes.PROBE_TEXT[:80], max_length=cfg.max_tokens),
        ]
        return dtypes.best_time(lambda: encoder.embed_all(params, cfg, ids))

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
    cfg = with_max_tokens(encoders.read_config(files.path), max_tokens)  # raises before the start

    def load() -> EmbeddingModel:
        return load_embedding_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=options.dtype if options.dtype in dtypes.FLOAT_DTYPES else "auto",
            max_tokens=max_tokens,
            notify=options.notify,
        )

    return text_model_spec(files, cfg, EmbeddingModel.kind, load)


def text_model_spec(
    files: ModelFiles, cfg: AnyConfig, kind: str, load: Callable[[], LoadedModel]
) -> ModelSpec:
    """Return the spec of a `TextModel` that `load` loads."""
    return ModelSpec(
        id=files.id,
        created=created(files.path),
        owned_by=files.publisher,
        memory=lambda: float32_bytes(cfg),
        load=load,
        stamp=functools.partial(stamp, files.path),
        kind=kind,
        context=cfg.max_tokens,
    )


def _recognizes(path: Path) -> bool:
    try:
        return encoders.is_encoder(path)
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
