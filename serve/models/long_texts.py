"""Embed texts that are longer than a model's context, as averages over their chunks.

The method is that of OpenAI's cookbook ("Embedding texts that are longer than the model's maximum
context length"): a text is split into chunks of maximum length, each chunk is embedded, and the
mean of the vectors, weighted by the tokens of each chunk, is normalized to length 1. Nomic's API
calls it ``long_text_mode: mean``.

Leaves out: overlapping chunks, and chunks that end at sentence boundaries.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def split(
    ids: Sequence[int], limit: int, num_prefix: int = 1, num_suffix: int = 1
) -> list[list[int]]:
    """Split the token ids of a text into chunks, each with the special tokens around it.

    Args:
        ids: the token ids of the text, special tokens included.
        limit: the maximum tokens of a chunk, special tokens included.
        num_prefix: the number of special tokens before the text.
        num_suffix: the number of special tokens after the text.

    >>> split([101, 1, 2, 3, 4, 5, 102], 4)
    [[101, 1, 2, 102], [101, 3, 4, 102], [101, 5, 102]]
    >>> split([1, 2, 3, 0], 3, 0, 1)
    [[1, 2, 0], [3, 0]]
    """
    if len(ids) <= limit:
        return [list(ids)]
    end = len(ids) - num_suffix
    prefix, inner, suffix = ids[:num_prefix], ids[num_prefix:end], ids[end:]
    step = limit - num_prefix - num_suffix
    return [[*prefix, *inner[i : i + step], *suffix] for i in range(0, len(inner), step)]


def truncated(ids: Sequence[int], limit: int, num_suffix: int = 1) -> list[list[int]]:
    """Return a text as one chunk of at most `limit` tokens. The final special tokens are kept.

    >>> truncated([101, 1, 2, 3, 102], 4)
    [[101, 1, 2, 102]]
    """
    end = len(ids) - num_suffix
    return [list(ids) if len(ids) <= limit else [*ids[: limit - num_suffix], *ids[end:]]]


def average(
    vectors: np.ndarray,
    chunks: Sequence[Sequence[Sequence[int]]],
    *,
    normalize: bool,
    num_special: int = 2,
) -> np.ndarray:
    """Return one vector per text: the weighted mean of the vectors of its chunks.

    Args:
        vectors: float32 [N, D], of all chunks of all texts, in order.
        chunks: the chunks of each text, as token ids.
        normalize: whether to normalize a mean of several vectors to length 1, as the model
            normalizes its vectors.
        num_special: the number of special tokens of a chunk, which do not count for its weight.

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
        weights = np.array([len(chunk) - num_special for chunk in text], np.float32)
        mean = weights @ parts / weights.sum()
        means[number] = mean / max(float(np.linalg.norm(mean)), 1e-12) if normalize else mean
    return means
