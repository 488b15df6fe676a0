"""Train a small moderation model: logistic regression on sentence embeddings.

    python -m training.recipes.moderation ENCODER OUTPUT

ENCODER is the folder of a sentence-transformers model (`pellucid pull all-minilm-l6-v2` prints it).
OUTPUT gets `model.safetensors` (the weights and biases), `config.json` (the categories, their
thresholds, and precision and recall on held-out sentences).

The encoder is not trained: each category is a linear classifier on its vectors, which Newton's
method fits in a few steps (iteratively reweighted least squares; Bishop, Pattern Recognition and
Machine Learning, section 4.3.3). The sentences were written for this recipe, in groups that share
a thought; a group is wholly in the training part or wholly in the held-out part.

A category is assessed if its classifier reaches `MIN_PRECISION` and `MIN_RECALL` on at least
`MIN_POSITIVES` held-out sentences. The others, and always those of `NEVER_ASSESSED`, have no
classifier: nothing is claimed about them.
"""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bpe.encoder_tokenizer import load_encoder_tokenizer
from transformer import encoder
from transformer.checkpoint import bert, safetensors

SENTENCES = Path(__file__).with_name("data") / "moderation.txt"
CATEGORIES = (  # of OpenAI's moderation API, in its order
    "harassment", "harassment/threatening", "hate", "hate/threatening", "illicit",
    "illicit/violent", "self-harm", "self-harm/intent", "self-harm/instructions", "sexual",
    "sexual/minors", "violence", "violence/graphic",
)  # fmt: skip
# A wrong answer in either direction does too much harm; no sentences were written for them.
NEVER_ASSESSED = ("self-harm/intent", "self-harm/instructions", "sexual/minors")
MIN_PRECISION, MIN_RECALL, MIN_POSITIVES = 0.8, 0.6, 20
HELD_OUT = 3  # one of three groups
FOLDS = 5  # of the training part, to choose the threshold
# Weight of half the squared norm in the loss, a sum over sentences: of 0.3, 1, 3, 10 and 20 the one
# with the least loss in cross-validation on the training part.
L2 = 3.0
SCALE = 10.0  # of the vectors, whose norm is 1


@dataclass(frozen=True)
class Dataset:
    """Sentences, with the group and the labels of each.

    Attributes:
        texts: N sentences.
        groups: the number of the group of each, int [N].
        labels: whether a category applies, bool [N, C], in the order of `CATEGORIES`.
    """

    texts: Sequence[str]
    groups: np.ndarray
    labels: np.ndarray


def read_sentences(path: Path = SENTENCES) -> Dataset:
    """Read a file of sentences.

    A section starts with a line of labels in brackets; a line is a group, whose sentences are
    separated by "|".

    Raises:
        ValueError: a label is not a category.
    """
    texts: list[str] = []
    groups: list[int] = []
    labels: list[list[bool]] = []
    current: list[bool] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines()):
        if not line.strip() or line.startswith("#"):
            continue
        if line.startswith("["):
            names = line.strip("[]").split()
            if unknown := set(names) - set(CATEGORIES):
                raise ValueError(f"{path}:{number + 1}: {min(unknown)!r} is not a category")
            current = [category in names for category in CATEGORIES]
            continue
        for text in line.split("|"):
            texts.append(text.strip())
            groups.append(number)
            labels.append(current)
    return Dataset(texts, np.array(groups), np.array(labels))


def is_held_out(data: Dataset) -> np.ndarray:
    """Return which sentences are held out, bool [N]: a third of the groups of each section."""
    held_out = np.zeros(len(data.texts), bool)
    for labels in np.unique(data.labels, axis=0):
        section = (data.labels == labels).all(1)
        groups = sorted(np.unique(data.groups[section]), key=_shuffled)
        held_out |= section & np.isin(data.groups, groups[::HELD_OUT])
    return held_out


def _shuffled(group: int) -> str:
    """Return a sort key that puts groups in an order without meaning, the same everywhere."""
    return hashlib.sha256(str(group).encode()).hexdigest()


def embed(folder: Path, texts: Sequence[str]) -> np.ndarray:
    """Return the vectors of texts by the encoder in a folder, float32 [N, E]."""
    params, cfg = bert.load(folder, dtype="float32")
    tokenizer = load_encoder_tokenizer(folder)
    return encoder.embed_all(params, cfg, [tokenizer.encode(text) for text in texts])


def fit(vectors: np.ndarray, labels: np.ndarray, *, steps: int = 12) -> tuple[np.ndarray, float]:
    """Fit a logistic regression.

    Args:
        vectors: the features, [N, E].
        labels: the classes, bool [N].
        steps: the steps of Newton's method; it converges quadratically.

    Returns:
        The weights, float32 [E], and the bias, for vectors of norm 1.
    """
    x = np.concatenate(
        [SCALE * vectors, np.ones((len(vectors), 1))], 1, dtype=np.float64
    )  # [N, E+1]
    penalty = np.full(x.shape[1], L2)
    penalty[-1] = 0  # of the bias
    theta = np.zeros(x.shape[1])
    for _ in range(steps):
        p = sigmoid(x @ theta)
        gradient = x.T @ (p - labels) + penalty * theta
        hessian = (x.T * (p * (1 - p))) @ x + np.diag(penalty + 1e-9)
        theta -= np.linalg.solve(hessian, gradient)
    return (SCALE * theta[:-1]).astype(np.float32), float(theta[-1])


def sigmoid(x: np.ndarray) -> np.ndarray:
    """Return 1 / (1 + exp(-x)), without overflow."""
    return 0.5 * (1 + np.tanh(0.5 * x))


def choose_threshold(vectors: np.ndarray, labels: np.ndarray, groups: np.ndarray) -> float:
    """Return the threshold with the best F0.5 score in cross-validation.

    F0.5 counts precision twice as much as recall: a false alarm accuses somebody.
    """
    scores = np.empty(len(labels))
    order = sorted(np.unique(groups), key=_shuffled)
    for fold in range(FOLDS):
        test = np.isin(groups, order[fold::FOLDS])
        weights, bias = fit(vectors[~test], labels[~test])
        scores[test] = sigmoid(vectors[test] @ weights + bias)
    candidates = np.arange(0.1, 0.95, 0.05)
    f = [_f_half(*precision_recall(scores >= threshold, labels)) for threshold in candidates]
    return round(float(candidates[int(np.argmax(f))]), 2)


def precision_recall(flags: np.ndarray, labels: np.ndarray) -> tuple[float, float]:
    """Return precision and recall of flags, bool [N]; 0 where there is nothing to count."""
    hits = int((flags & labels).sum())
    return hits / max(int(flags.sum()), 1), hits / max(int(labels.sum()), 1)


def _f_half(precision: float, recall: float) -> float:
    return 1.25 * precision * recall / max(0.25 * precision + recall, 1e-9)


def train(vectors: np.ndarray, data: Dataset) -> tuple[dict[str, np.ndarray], dict]:
    """Fit a classifier for each category, and measure it on the held-out sentences.

    Args:
        vectors: the vectors of the sentences, float32 [N, E].
        data: the sentences.

    Returns:
        The tensors "weight" float32 [K, E] and "bias" float32 [K] of the K assessed categories,
        and the configuration.
    """
    held_out = is_held_out(data)
    results, weights, biases = {}, [], []
    is_harmless = ~data.labels[held_out].any(1)
    is_flagged = np.zeros(int(held_out.sum()), bool)
    for index, category in enumerate(CATEGORIES):
        labels = data.labels[:, index]
        if category in NEVER_ASSESSED or not labels.any():
            continue
        train_labels = labels[~held_out]
        weight, bias = fit(vectors[~held_out], train_labels)
        threshold = choose_threshold(vectors[~held_out], train_labels, data.groups[~held_out])
        flags = sigmoid(vectors[held_out] @ weight + bias) >= threshold
        precision, recall = precision_recall(flags, labels[held_out])
        positives = int(labels[held_out].sum())
        is_assessed = (
            precision >= MIN_PRECISION and recall >= MIN_RECALL and positives >= MIN_POSITIVES
        )
        results[category] = {
            "is_assessed": is_assessed,
            "threshold": threshold,
            "precision": round(precision, 3),
            "recall": round(recall, 3),
            "positives": positives,
        }
        if is_assessed:
            is_flagged |= flags
            weights.append(weight)
            biases.append(bias)
    config = {
        "model_type": "moderation",
        "held_out_sentences": int(held_out.sum()),
        "harmless_sentences": int(is_harmless.sum()),
        "harmless_flagged": int((is_flagged & is_harmless).sum()),
        "categories": results,
    }
    return {"weight": np.stack(weights), "bias": np.array(biases, np.float32)}, config


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.recipes.moderation",
        description="Train the moderation model on the vectors of a sentence encoder.",
    )
    parser.add_argument("encoder", type=Path, help="folder of a sentence-transformers model")
    parser.add_argument("output", type=Path, help="folder for the weights")
    args = parser.parse_args(arguments)
    data = read_sentences()
    tensors, config = train(embed(args.encoder, data.texts), data)
    safetensors.write(args.output, config, tensors)
    print(f"{'category':24} assessed  threshold  precision  recall  held-out positives")
    for name, row in config["categories"].items():
        print(
            f"{name:24} {'yes' if row['is_assessed'] else 'no':8}  {row['threshold']:<9}  "
            f"{row['precision']:<9}  {row['recall']:<6}  {row['positives']}"
        )


if __name__ == "__main__":
    main()
