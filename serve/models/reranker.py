"""Cross-encoders: a question and a document in, the relevance of the document out.

The pairs of a request are packed into batches as the texts of an embedding request are
(`encoder.py`). The activation function of the logits is that of sentence-transformers'
`CrossEncoder`: the one that the model's files name, else the sigmoid. A model with two labels was
trained as a classifier (monoBERT; Nogueira & Cho 2019, arXiv:1901.04085); its score is the
probability of the second label.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

import bpe
from serve.models import dtypes, fingerprint
from serve.models.compilation_cache import enable_compilation_cache
from serve.models.dtypes import FloatDtype
from serve.models.encoder import (
    TextModel,
    created,
    hash_files,
    load_tokenizer,
    text_model_spec,
)
from serve.models.spec import Example, Kind, LoadOptions, ModelFiles, ModelSpec
from transformer import encoder, packing
from transformer.checkpoint import bert, sentence_transformers
from transformer.encoder import Config, Params
from transformer.pooling import ACTIVATIONS

MAX_LOGIT_ERROR = 0.02  # of bfloat16, relative to the largest absolute logit in float32
PROBE_DOCUMENTS = 3


@dataclass(frozen=True, kw_only=True)
class RerankModel(TextModel):
    """A loaded cross-encoder.

    Attributes:
        activation: the activation function of a model with one label, a key of
            `pooling.ACTIVATIONS`.
        prompt: the text to put before a question; usually empty.
    """

    kind: ClassVar[str] = "reranker"

    cfg: Config
    params: Params = field(repr=False)
    activation: str
    prompt: str

    def encode(self, text: str, *, is_question: bool = False) -> list[int]:
        """Return the token ids of a question or document, without special tokens."""
        prompt = self.prompt if is_question else ""
        return self.tokenizer.encode(prompt + text, add_special_tokens=False)

    async def score(self, pairs: Sequence[tuple[list[int], list[int]]]) -> np.ndarray:
        """Return the relevance of the document of each pair: float32 [len(pairs)].

        Args:
            pairs: the token ids of each pair, special tokens included, and the token type ids
                (BERT's segment ids).

        Raises:
            Busy: too many batches wait.
            FloatingPointError: a score is NaN.
        """
        scores = np.empty(len(pairs), np.float32)
        ids, types = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        with self.work_queue.using():
            for batch in packing.pack(ids, self.cfg.max_tokens):
                scores[batch.text_indices] = await self.work_queue.run(
                    lambda batch=batch: self._compute(batch, types)
                )
        return self.check(scores)

    def _compute(self, batch: packing.PackedBatch, types: Sequence[Sequence[int]]) -> np.ndarray:
        logits = encoder.score_batch(
            self.params, self.cfg, batch.ids, batch.segments, batch.fill(types), batch.max_texts
        )
        return relevance(np.asarray(logits)[batch.rows, batch.slots], self.activation)


def relevance(logits: np.ndarray, activation: str) -> np.ndarray:
    """Return the relevance of N documents from their logits, float32 [N, 1 or 2] -> [N]."""
    if logits.shape[1] == 2:  # the softmax of two is the sigmoid of their difference
        return np.asarray(jax.nn.sigmoid(logits[:, 1] - logits[:, 0]))
    return np.asarray(ACTIVATIONS[activation](jnp.asarray(logits[:, 0])))


def load_rerank_model(
    id: str,
    path: Path,
    *,
    owned_by: str,
    dtype: str = "auto",
    notify: Callable[[str], None] = lambda line: None,
) -> RerankModel:
    """Load a cross-encoder; arguments and errors are those of `load_embedding_model`."""
    enable_compilation_cache()
    chosen = dtypes.parse_dtype(dtype, dtypes.FLOAT_DTYPES)
    tokenizer = load_tokenizer(path)
    weights = hash_files(path)
    if chosen is None:
        chosen = _choose_dtype(id, path, tokenizer, weights, notify)
    params, cfg = bert.load(path, dtype=chosen)
    activation, prompt = sentence_transformers.read_cross_encoder_settings(path)
    return RerankModel(
        id=id,
        created=created(path),
        owned_by=owned_by,
        tokenizer=tokenizer,
        cfg=cfg,
        params=params,
        activation=activation or "sigmoid",
        prompt=prompt,
        fingerprint=fingerprint.system_fingerprint(weights, chosen),
        dtype=chosen,
    )


def _choose_dtype(
    id: str,
    path: Path,
    tokenizer: bpe.EncoderTokenizer,
    weights: str,
    notify: Callable[[str], None],
) -> FloatDtype:
    """Return the fastest dtype on this machine whose logits are close to float32's; cached."""
    words = dtypes.PROBE_TEXT.split()
    step = len(words) // PROBE_DOCUMENTS
    documents = [" ".join(words[i * step : (i + 1) * step]) for i in range(PROBE_DOCUMENTS)]

    def measure(dtype: FloatDtype) -> tuple[float, np.ndarray]:
        params, cfg = bert.load(path, dtype=dtype)
        pairs = [
            tokenizer.encode_pair(documents[0], text, max_length=cfg.max_tokens)
            for text in documents
        ]
        return dtypes.best_time(lambda: encoder.score_all(params, cfg, pairs))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.abs(a - b).max() / max(float(np.abs(a).max()), 1.0))

    key = fingerprint.machine_key(weights)
    return dtypes.fastest_dtype(
        id, key, dtypes.FLOAT_DTYPES, measure, distance, MAX_LOGIT_ERROR, notify
    )


def describe(files: ModelFiles, options: LoadOptions) -> ModelSpec:
    """Return the spec of a cross-encoder; see `Kind.describe`."""
    cfg = bert.read_config(files.path)
    sentence_transformers.read_cross_encoder_settings(files.path)
    assert cfg.head is not None
    if cfg.head.num_labels > 2:
        raise ValueError(
            f"{files.path}: to rank documents, num_labels must be 1, or 2 for a classifier, got "
            f"{cfg.head.num_labels}"
        )

    def load() -> RerankModel:
        return load_rerank_model(
            files.id,
            files.path,
            owned_by=files.publisher,
            dtype=options.dtype if options.dtype in dtypes.FLOAT_DTYPES else "auto",
            notify=options.notify,
        )

    return text_model_spec(files, cfg, RerankModel.kind, load)


def _recognizes(path: Path) -> bool:
    try:
        return bert.is_cross_encoder(path)
    except (OSError, ValueError):
        return False


KIND = Kind(
    name="reranker",
    task="rank documents",
    recognizes=_recognizes,
    describe=describe,
    example=lambda model: Example(
        route="rerank",
        call="",
        result="",
        fields={"query": "What is the capital of France?", "documents": ["Paris", "Rome"]},
    ),
)
