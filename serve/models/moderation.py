"""Moderation models: texts in, the scores of harmful categories out.

A moderation model is a linear classifier for each category on the vectors of a sentence encoder;
`training/recipes/moderation.py` trains it, and writes what it measured on held-out sentences to
config.json. It was trained on single sentences, so a text is split into sentences, and has the
maximum of their scores. A harm that only several sentences together express is not found.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from serve.models import fingerprint
from serve.models.encoder import EmbeddingModel, load_embedding_model
from serve.models.encoder import describe as describe_encoder
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec, stamp_of
from transformer.checkpoint.safetensors import read_json_object, read_tensors

_SENTENCE_END = re.compile(r"(?<=[.!?…。！？])\s+|\n+")


@dataclass(frozen=True, kw_only=True)
class ModerationModel:
    """A loaded moderation model.

    Attributes:
        encoder: the sentence encoder.
        weight: the weights of the K assessed categories, float32 [K, E].
        bias: their biases, float32 [K].
        thresholds: the score from which a category is flagged, by assessed category, in the order
            of the rows of `weight`.
    """

    kind: ClassVar[str] = "moderation"

    id: str
    created: int
    owned_by: str
    fingerprint: str
    encoder: EmbeddingModel
    weight: np.ndarray = field(repr=False)
    bias: np.ndarray
    thresholds: Mapping[str, float]

    @property
    def context(self) -> int:
        """Return the maximum tokens of a sentence."""
        return self.encoder.context

    @property
    def dtype(self) -> str:
        """Return the dtype of the encoder's weights."""
        return self.encoder.dtype

    @property
    def memory(self) -> int:
        """Return the bytes of the weights."""
        return self.encoder.memory + self.weight.nbytes

    @property
    def is_idle(self) -> bool:
        """Whether no request waits or runs."""
        return self.encoder.is_idle

    def close(self, timeout: float) -> None:
        """Do nothing: a batch is short, and waiting requests are still answered."""

    def encode(self, text: str) -> list[list[int]]:
        """Return the sentences of a text as token ids, special tokens included.

        A sentence that exceeds the context is split into windows.
        """
        sentences = [part for part in _SENTENCE_END.split(text) if part.strip()]
        return [
            window
            for sentence in sentences or [text]
            for window in self.encoder.split(self.encoder.encode(sentence))
        ]

    async def score(self, texts: Sequence[Sequence[Sequence[int]]]) -> np.ndarray:
        """Return the probability of each assessed category: float32 [len(texts), K].

        Args:
            texts: the sentences of each text, from `encode`.

        Raises:
            Busy: too many batches wait.
            FloatingPointError: a vector is NaN.
        """
        vectors = await self.encoder.embed([sentence for text in texts for sentence in text])
        logits = vectors @ self.weight.T + self.bias  # [sentences, K]
        first = np.cumsum([0, *map(len, texts)])[:-1]
        return np.asarray(0.5 * (1 + np.tanh(0.5 * np.maximum.reduceat(logits, first))))


def load_moderation_model(
    id: str,
    path: Path,
    encoder: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> ModerationModel:
    """Load a moderation model.

    Args:
        id: the id to serve it under.
        path: a folder that `training.recipes.moderation` wrote.
        encoder: the folder of the sentence encoder that it was trained on.
        owned_by: the publisher.
        dtype: the dtype of the encoder; see `load_embedding_model`.
        notify: called with a message for each slow operation.

    Raises:
        OSError: a file cannot be read.
        ValueError: a file is damaged, or the encoder's width is wrong.
    """
    thresholds = {
        name: float(row["threshold"])
        for name, row in read_config(path)["categories"].items()
        if row["is_assessed"]
    }
    tensors = read_tensors(path / "model.safetensors")
    if tensors.keys() != {"weight", "bias"}:
        raise ValueError(f"{path}: expected the tensors weight and bias, got {sorted(tensors)}")
    embedder = load_embedding_model(id, encoder, owned_by=owned_by, dtype=dtype, notify=notify)
    shape = (len(thresholds), embedder.cfg.embedding_width)
    for name, expected in (("weight", shape), ("bias", shape[:1])):
        if tensors[name].shape != expected:
            raise ValueError(
                f"{path}: {name} has the shape {tensors[name].shape}; for {shape[0]} assessed "
                f"categories and vectors of the encoder {encoder} it must have {expected}"
            )
    weight, bias = (tensors[name].read(0, shape[0]) for name in ("weight", "bias"))
    if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
        raise ValueError(f"{path}: a weight is not finite: train the model again")
    return ModerationModel(
        id=id,
        created=int((path / "config.json").stat().st_mtime),
        owned_by=owned_by,
        fingerprint=fingerprint.system_fingerprint(
            fingerprint.hash_weights(path) + embedder.fingerprint, embedder.dtype
        ),
        encoder=embedder,
        weight=weight,
        bias=bias,
        thresholds=thresholds,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Return the config.json of a moderation model.

    Raises:
        OSError: it cannot be read.
        ValueError: it is no moderation model's.
    """
    config = read_json_object(path / "config.json")
    rows = config.get("categories")
    if config.get("model_type") != "moderation" or not isinstance(rows, dict):
        raise ValueError(f"{path / 'config.json'}: expected the model_type 'moderation'")
    for name, row in rows.items():
        if not isinstance(row, dict) or not row.keys() >= {"is_assessed", "threshold"}:
            raise ValueError(f"{path / 'config.json'}: categories.{name} has no threshold")
    return config


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of a moderation model; see `Kind.describe`."""
    path, encoder = files.path, files.encoder
    assert encoder is not None
    config = read_config(path)
    embedder = describe_encoder(ModelFiles(files.id, encoder, files.publisher), options)

    def load() -> ModerationModel:
        dtype = options.dtype if options.dtype in ("bfloat16", "float32") else "auto"
        return load_moderation_model(
            files.id, path, encoder, owned_by=files.publisher, dtype=dtype, notify=options.notify
        )

    return ModelSpec(
        id=files.id,
        created=int((path / "config.json").stat().st_mtime),
        owned_by=files.publisher,
        memory=embedder.memory,
        load=load,
        stamp=functools.partial(stamp_of, path, encoder),
        kind=ModerationModel.kind,
        context=embedder.context,
        evaluation={key: value for key, value in config.items() if key != "model_type"},
    )


def _recognizes(path: Path) -> bool:
    try:
        return bool(read_config(path))
    except (OSError, ValueError):
        return False


KIND = Kind(
    name=ModerationModel.kind,
    task="moderate texts",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="moderations",
        call="moderations.create",
        result="results[0].flagged",
        fields={"input": "You are useless and everybody knows it."},
    ),
    has_encoder=True,
)
