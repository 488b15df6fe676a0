"""Probabilities of given labels: scored by likelihood, calibrated, and measured.

A language model answers a question with a fixed set of labels without generating text: the log-
probability of a label is the sum of the log-probabilities of its tokens after the prompt. `trie`
finds the forward passes that this takes: one for each different beginning of a label, whose logits
have the log-probabilities of all next tokens. Labels that differ in their first token need one pass
together. There is no normalization by length: calibration divides it out.

A model prefers labels that are frequent or short, whatever the input is. Contextual calibration
(Zhao et al. 2021, "Calibrate before use", arXiv:2102.09690) measures this preference with inputs
that have no content, and divides it out. A temperature, fitted on labeled examples, makes the
probabilities neither too certain nor too uncertain, and the expected calibration error measures how
far they are from the accuracy (Guo et al. 2017, "On calibration of modern neural networks",
arXiv:1706.04599).

All functions take arrays or lists on the host and run in float64.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

CONTENT_FREE_INPUTS = ("N/A", "", "[MASK]")  # those of Zhao et al.

Tokens = tuple[int, ...]


def trie(labels: Sequence[Tokens]) -> dict[Tokens, Tokens]:
    """Return the beginnings of all labels, each with the tokens that can follow it.

    Args:
        labels: the token ids of each label, at least one id each. No label may be the beginning of
            another one: append an end token to all labels to tell them apart.

    Raises:
        ValueError: a label is empty.
    """
    if not all(labels):
        raise ValueError("a label has no tokens")
    children: dict[Tokens, dict[int, None]] = {}
    for label in labels:
        for i, token in enumerate(label):
            children.setdefault(label[:i], {})[token] = None
    return {prefix: tuple(tokens) for prefix, tokens in children.items()}


def has_prefix(labels: Sequence[Tokens]) -> bool:
    """Return whether a label is the beginning of another, longer label."""
    prefixes = {label[:i] for label in labels for i in range(len(label))}
    return any(label in prefixes for label in labels)


def label_logprobs(
    labels: Sequence[Tokens], logprobs: Mapping[Tokens, Mapping[int, float]]
) -> np.ndarray:
    """Return the log-probability of each label, float64 [N]: the sum over its tokens.

    Args:
        labels: the token ids of N labels.
        logprobs: the log-probability of each next token after each beginning in `trie(labels)`.
    """
    return np.array(
        [sum(logprobs[label[:i]][token] for i, token in enumerate(label)) for label in labels]
    )


def calibrate(logprobs: np.ndarray, content_free: np.ndarray) -> np.ndarray:
    """Divide the prior of the labels out, and return log-probabilities [N] that are normalized.

    The prior is the mean of the probabilities over the content-free inputs, each normalized over
    the labels. In the notation of Zhao et al., W is diag(prior)^-1 and b is 0.

    Args:
        logprobs: log-probabilities of N labels after the prompt, [N].
        content_free: those after the same prompt with M content-free inputs, [M, N].
    """
    log_prior = _logsumexp(log_softmax(content_free), axis=0) - np.log(len(content_free))
    return log_softmax(log_softmax(logprobs) - log_prior)


def log_softmax(logits: np.ndarray, temperature: float = 1.0) -> np.ndarray:
    """Return normalized log-probabilities over the last axis."""
    scaled = np.asarray(logits, np.float64) / temperature
    return scaled - _logsumexp(scaled, axis=-1)[..., None]


def fit_temperature(logprobs: Sequence[np.ndarray], answers: Sequence[int]) -> float:
    """Return the temperature in [0.05, 20] with the least negative log-likelihood of the answers.

    The likelihood has one maximum in 1 / temperature, so golden-section search on the logarithm
    of the temperature finds it.

    Args:
        logprobs: for each example, the log-probabilities of its labels [N]; N can differ.
        answers: the index of the right label of each example.
    """

    def loss(log_temperature: float) -> float:
        temperature = float(np.exp(log_temperature))
        return -sum(
            log_softmax(row, temperature)[answer]
            for row, answer in zip(logprobs, answers, strict=True)
        )

    low, high = np.log(0.05), np.log(20.0)
    ratio = (np.sqrt(5) - 1) / 2
    for _ in range(50):
        a, b = high - ratio * (high - low), low + ratio * (high - low)
        low, high = (low, b) if loss(a) < loss(b) else (a, high)
    return float(np.exp((low + high) / 2))


@dataclass(frozen=True)
class Bin:
    """The examples of a reliability diagram whose confidence is in one interval."""

    count: int
    confidence: float  # mean
    accuracy: float


def reliability(
    confidences: Sequence[float], is_correct: Sequence[bool], num_bins: int = 10
) -> list[Bin]:
    """Return the bins of a reliability diagram, of equal width, without empty ones.

    Args:
        confidences: the probability of the chosen label of each example, in [0, 1].
        is_correct: whether that label is right.
        num_bins: the number of intervals of [0, 1].
    """
    values, correct = np.asarray(confidences, np.float64), np.asarray(is_correct, np.float64)
    indices = np.minimum((values * num_bins).astype(int), num_bins - 1)
    return [
        Bin(int(inside.sum()), float(values[inside].mean()), float(correct[inside].mean()))
        for inside in (indices == i for i in range(num_bins))
        if inside.any()
    ]


def expected_calibration_error(bins: Sequence[Bin]) -> float:
    """Return the mean difference of confidence and accuracy, weighted by the examples of a bin."""
    total = sum(bin.count for bin in bins)
    return sum(bin.count * abs(bin.confidence - bin.accuracy) for bin in bins) / total


def _logsumexp(values: np.ndarray, axis: int) -> np.ndarray:
    top = values.max(axis=axis, keepdims=True)
    return np.log(np.exp(values - top).sum(axis=axis)) + top.squeeze(axis)
