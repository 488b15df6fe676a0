"""Embed texts that are longer than a model reads, as averages over their chunks.

The method is that of OpenAI's cookbook ("Embedding texts that are longer than the model's maximum
context length"): a text is split into chunks of maximum length, each chunk is embedded, and the
mean of the vectors, weighted by the tokens of each chunk, is normalized to length 1. Nomic's API
calls it ``long_text_mode: mean``.

Leaves out: overlapping chunks, and chunks that end at sentence boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split(ids: Sequence[int], limit: int) -> list[list[int]]:
    """Return the chunks of a text, each between the first and last special token of the text.

    Args:
        ids: the token ids of the text, [CLS] first and [SEP] last.
        limit: the maximum tokens of a chunk, special tokens included; at least 3.

    >>> split([101, 1, 2, 3, 4, 5, 102], 4)
    [[101, 1, 2, 102], [101, 3, 4, 102], [101, 5, 102]]
    """
    if len(ids) <= limit:
        return [list(ids)]
    first, *inner, last = ids
    step = limit - 2
    return [[first, *inner[i : i + step], last] for i in range(0, len(inner), step)]


def truncated(ids: Sequence[int], limit: int) -> list[list[int]]:
    """Return the text as one chunk, truncated to `limit` tokens.

    >>> truncated([101, 1, 2, 3, 102], 4)
    [[101, 1, 2, 102]]
    """
    return [list(ids) if len(ids) <= limit else [*ids[: limit - 1], ids[-1]]]


def average(
    vectors: np.ndarray, chunks: Sequence[Sequence[Sequence[int]]], *, normalize: bool
) -> np.ndarray:
    """Return a vector for each text, the weighted mean of the vectors of its chunks.

    Args:
        vectors: float32 [N, D], of all chunks of all texts, in order.
        chunks: the chunks of each text.
        normalize: whether to normalize a mean of several vectors to length 1, as the model
            normalizes its vectors.

    Returns:
        float32 [len(chunks), D]. The vector of a text with one chunk is copied unchanged.
    """
    means = np.empty((len(chunks), vectors.shape[1]), np.float32)
    start = 0
    for number, text in enumerate(chunks):
        parts = vectors[start : start + len(text)]
        start += len(text)
        if len(text) == 1:
            means[number] = parts[0]
            continue
        weights = np.array([len(chunk) - 2 for chunk in text], np.float32)
        mean = weights @ parts / weights.sum()
        means[number] = mean / max(float(np.linalg.norm(mean)), 1e-12) if normalize else mean
    return means
