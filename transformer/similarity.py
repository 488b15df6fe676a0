"""Uses of text embeddings: search, classification, comparison and clustering.

These are the uses for which OpenAI released its first embeddings (Neelakantan et al. 2022,
arXiv:2201.10005), as functions of arrays of vectors from any model.

- Search: `nearest`, exact: it compares every vector, which is fast up to some millions of vectors.
- Classification: `zero_shot` with embeddings of the label names; `fit_probe` and `predict` with
  examples, by logistic regression.
- Comparison: `cosine`, and `cluster`, which is spherical k-means (Dhillon & Modha 2001).

Leaves out: approximate indexes, which trade exactness for speed.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct


class SearchResult(NamedTuple):
    """The nearest vectors of each query, nearest first."""

    scores: jax.Array  # [Q, k] float32, cosines
    indices: jax.Array  # [Q, k] int32, rows of the matrix searched


class Probe(struct.PyTreeNode):
    """A linear classifier of D-dimensional vectors into C classes."""

    weight: jax.Array  # [C, D] float32
    bias: jax.Array  # [C] float32


def l2_normalize(vectors: jax.Array) -> jax.Array:
    """Scale vectors [..., D] to length 1; zero vectors stay zero."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """Return the cosine similarity of each row of a and each row of b: float32 [n, m].

    Args:
        a: float32 [n, D].
        b: float32 [m, D].
    """
    return jnp.einsum(
        "nd,md->nm", l2_normalize(a), l2_normalize(b), preferred_element_type=jnp.float32
    )


@partial(jax.jit, static_argnames="k")
def nearest(queries: jax.Array, vectors: jax.Array, k: int) -> SearchResult:
    """Return the k vectors with the largest cosine similarity to each query.

    Args:
        queries: float32 [Q, D].
        vectors: float32 [n, D].
        k: Number of vectors, at most n.

    Returns:
        Similarities and row indices, largest similarity first, ties in the order of the rows.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"k must be between 1 and {len(vectors)}, got {k}")
    return SearchResult(*jax.lax.top_k(cosine(queries, vectors), k))


def zero_shot(vectors: jax.Array, labels: jax.Array, temperature: float = 0.05) -> jax.Array:
    """Classify texts without examples, by the similarity of text and label embeddings.

    Args:
        vectors: Embeddings of the texts, float32 [n, D].
        labels: Embeddings of descriptions of the labels, float32 [C, D]. A sentence ("This is about
            sport.") usually works better than a word.
        temperature: Divisor of the similarities. It changes the confidence, not the ranking.

    Returns:
        Probabilities of the labels, float32 [n, C]; rows sum to 1.
    """
    return jax.nn.softmax(cosine(vectors, labels) / temperature, axis=-1)


def fit_probe(
    vectors: jax.Array,
    labels: jax.Array | np.ndarray | Sequence[int],
    num_classes: int,
    *,
    penalty: float = 1e-3,
    max_steps: int = 200,
) -> Probe:
    """Fit a multinomial logistic regression (a linear probe).

    Minimizes the mean cross-entropy plus `penalty` times the sum of squared weights with L-BFGS.
    The problem is convex, so the starting point does not matter.

    Args:
        vectors: float32 [n, D].
        labels: Class of each vector, int [n], from 0 to num_classes - 1.
        num_classes: C.
        penalty: Strength of the L2 regularization; it must be positive if the classes are linearly
            separable.
        max_steps: Maximum number of steps. The fit stops earlier when the norm of the gradient is
            below 1e-5.

    Returns:
        The classifier.

    Raises:
        ValueError: There is not one label per vector, or a label is out of range.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(vectors),) or not len(labels):
        raise ValueError(
            f"labels must have shape ({len(vectors)},), one label per vector, got {labels.shape}"
        )
    if (invalid := labels[(labels < 0) | (labels >= num_classes)]).size:
        raise ValueError(f"labels must be from 0 to {num_classes - 1}, got {invalid[0]}")
    return _fit(vectors, labels, num_classes, penalty, max_steps)


@partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _fit(vectors, labels, num_classes: int, penalty: float, max_steps: int) -> Probe:
    def loss(probe: Probe) -> jax.Array:
        logits = _logits(probe, vectors)
        cross_entropy = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return cross_entropy + penalty * jnp.sum(probe.weight**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)
    # Any, because the annotations of optax exclude dataclasses, although it takes any tree.
    start: Any = Probe(
        weight=jnp.zeros((num_classes, vectors.shape[-1])), bias=jnp.zeros(num_classes)
    )

    def step(carry: Any) -> Any:
        probe, state, _, count = carry
        value, gradient = value_and_grad(probe, state=state)
        updates, state = optimizer.update(
            gradient, state, probe, value=value, grad=gradient, value_fn=loss
        )
        probe = optax.apply_updates(probe, updates)
        return probe, state, optax.tree.norm(gradient), count + 1

    def is_running(carry):
        *_, gradient_norm, count = carry
        return (count < max_steps) & (gradient_norm > 1e-5)

    probe, *_ = jax.lax.while_loop(is_running, step, (start, optimizer.init(start), jnp.inf, 0))
    return probe


def predict(probe: Probe, vectors: jax.Array) -> jax.Array:
    """Return the probabilities of the classes: [n, D] -> float32 [n, C]; rows sum to 1."""
    return jax.nn.softmax(_logits(probe, vectors), axis=-1)


def _logits(probe: Probe, vectors: jax.Array) -> jax.Array:
    scores = jnp.einsum("nd,cd->nc", vectors, probe.weight, preferred_element_type=jnp.float32)
    return scores + probe.bias


class Clusters(NamedTuple):
    """Result of `cluster`."""

    labels: jax.Array  # [n] int32, from 0 to k - 1
    centers: jax.Array  # [k, D] float32, of length 1
    cohesion: jax.Array  # float32, mean cosine similarity of a vector and its center


@partial(jax.jit, static_argnames=("k", "steps", "tries"))
def cluster(
    key: jax.Array, vectors: jax.Array, k: int, *, steps: int = 50, tries: int = 8
) -> Clusters:
    """Cluster vectors by direction with spherical k-means.

    Each try is initialized with k of the vectors by k-means++ (Arthur & Vassilvitskii 2007), which
    prefers distant ones. The result of the try with the largest cohesion is returned.

    Args:
        key: Random key.
        vectors: float32 [n, D].
        k: Number of clusters, at most n. A cluster may be empty if vectors repeat.
        steps: Number of k-means steps.
        tries: Number of tries.

    Returns:
        Cluster of each vector, centers and cohesion.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"k must be between 1 and {len(vectors)}, got {k}")
    vectors = l2_normalize(vectors)

    def initial_centers(key: jax.Array) -> jax.Array:
        def add_center(i: int, centers: jax.Array) -> jax.Array:
            nearest_cosine = jnp.where(jnp.arange(k) < i, cosine(vectors, centers), -1).max(-1)
            # Log-probabilities proportional to the squared distance, which is 2 (1 - cosine).
            logits = jnp.log(jnp.maximum(1 - nearest_cosine, 1e-12))
            return centers.at[i].set(
                vectors[jax.random.categorical(jax.random.fold_in(key, i), logits)]
            )

        return jax.lax.fori_loop(0, k, add_center, jnp.zeros((k, vectors.shape[-1])))

    def update(_, centers: jax.Array) -> jax.Array:
        assignment = jax.nn.one_hot(cosine(vectors, centers).argmax(-1), k)  # [n, k]
        sums = jnp.einsum("nk,nd->kd", assignment, vectors)
        return jnp.where(assignment.sum(0)[:, None] > 0, l2_normalize(sums), centers)

    def run(key: jax.Array) -> Clusters:
        centers = jax.lax.fori_loop(0, steps, update, initial_centers(key))
        scores = cosine(vectors, centers)
        return Clusters(scores.argmax(-1), centers, scores.max(-1).mean())

    results = jax.lax.map(run, jax.random.split(key, tries))
    best = results.cohesion.argmax()
    return jax.tree.map(lambda leaf: leaf[best], results)
