"""What vectors of texts are for: finding, sorting into kinds, comparing.

The three uses that OpenAI's first embeddings were sold for (Neelakantan et al. 2022,
arXiv:2201.10005), as functions of arrays. Nothing here knows where a vector came from.

- search: `nearest`, exact: every vector is compared, which is fast up to some millions of them.
- classify: `zero_shot` by the vectors of the labels' own names; `fit_probe` and `predict` from
  examples, by logistic regression.
- compare: `cosine`, and `cluster`, which is k-means on the sphere (Dhillon & Modha 2001).

Leaves out: approximate indexes, which trade exactness for speed.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import struct


class SearchResult(NamedTuple):
    """The nearest vectors, the nearest first."""

    scores: jax.Array  # [Q, k] float32, cosines
    indices: jax.Array  # [Q, k] int32, rows of the matrix searched


@struct.dataclass
class Probe:
    """A linear classifier."""

    weight: jax.Array  # [C, D] float32
    bias: jax.Array  # [C] float32


def l2_normalize(vectors: jax.Array) -> jax.Array:
    """Vectors of length 1 in the same directions; zero stays zero. [..., D] -> [..., D]."""
    return vectors / jnp.maximum(jnp.linalg.norm(vectors, axis=-1, keepdims=True), 1e-12)


def cosine(a: jax.Array, b: jax.Array) -> jax.Array:
    """How alike each of some vectors is to each of others: [n, D], [m, D] -> float32 [n, m]."""
    return jnp.einsum(
        "nd,md->nm", l2_normalize(a), l2_normalize(b), preferred_element_type=jnp.float32
    )


@partial(jax.jit, static_argnames="k")
def nearest(queries: jax.Array, vectors: jax.Array, k: int) -> SearchResult:
    """The k vectors with the largest cosine to each query; the first of equal ones comes first.

    Args:
        queries: float32 [Q, D].
        vectors: float32 [n, D].
        k: at most n.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"k must be between 1 and {len(vectors)}, got {k}")
    return SearchResult(*jax.lax.top_k(cosine(queries, vectors), k))


def zero_shot(vectors: jax.Array, labels: jax.Array, temperature: float = 0.05) -> jax.Array:
    """Probabilities of labels for texts, from the vectors of both and without an example.

    Args:
        vectors: float32 [n, D], of the texts.
        labels: float32 [C, D], of what the labels say; a sentence ("This is about sport.") is
            usually better than a word.
        temperature: cosines are divided by it. It moves how sure the answer is, not which.

    Returns:
        float32 [n, C]; rows sum to 1.
    """
    return jax.nn.softmax(cosine(vectors, labels) / temperature, axis=-1)


def fit_probe(
    vectors: jax.Array,
    labels: jax.Array,
    num_classes: int,
    *,
    penalty: float = 1e-3,
    max_steps: int = 200,
) -> Probe:
    """Logistic regression: the linear map under which the labels are likeliest.

    Minimises the mean cross-entropy plus `penalty` times the sum of squared weights with L-BFGS.
    The problem is convex, so where one starts does not matter.

    Args:
        vectors: float32 [n, D].
        labels: int [n], from 0 to num_classes - 1.
        penalty: larger ones keep the weights smaller; needed where classes can be parted perfectly.
        max_steps: it stops earlier once the gradient is below 1e-5.

    Raises:
        ValueError: there is not one label a vector, or one is not among the classes.
    """
    labels = np.asarray(labels)
    if labels.shape != (len(vectors),) or not len(labels):
        raise ValueError(
            f"there must be a label for each of {len(vectors)} vectors, got {labels.shape}"
        )
    if (strange := labels[(labels < 0) | (labels >= num_classes)]).size:
        raise ValueError(f"labels go from 0 to {num_classes - 1}, got {strange[0]}")
    return _fit(vectors, labels, num_classes, penalty, max_steps)


@partial(jax.jit, static_argnames=("num_classes", "max_steps"))
def _fit(vectors, labels, num_classes: int, penalty: jax.Array, max_steps: int) -> Probe:
    def loss(probe: Probe) -> jax.Array:
        logits = _logits(probe, vectors)
        fit = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
        return fit + penalty * jnp.sum(probe.weight**2)

    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(loss)
    start = Probe(weight=jnp.zeros((num_classes, vectors.shape[-1])), bias=jnp.zeros(num_classes))

    def step(carry):
        probe, state, _, count = carry
        value, gradient = value_and_grad(probe, state=state)
        updates, state = optimizer.update(
            gradient, state, probe, value=value, grad=gradient, value_fn=loss
        )
        probe = optax.apply_updates(probe, updates)
        return probe, state, optax.tree.norm(gradient), count + 1

    def goes_on(carry):
        *_, steepness, count = carry
        return (count < max_steps) & (steepness > 1e-5)

    probe, *_ = jax.lax.while_loop(goes_on, step, (start, optimizer.init(start), jnp.inf, 0))
    return probe


def predict(probe: Probe, vectors: jax.Array) -> jax.Array:
    """Probabilities of the classes: [n, D] -> float32 [n, C]."""
    return jax.nn.softmax(_logits(probe, vectors), axis=-1)


def _logits(probe: Probe, vectors: jax.Array) -> jax.Array:
    scores = jnp.einsum("nd,cd->nc", vectors, probe.weight, preferred_element_type=jnp.float32)
    return scores + probe.bias


class Clusters(NamedTuple):
    """Which vectors belong together."""

    labels: jax.Array  # [n] int32, from 0 to k - 1
    centers: jax.Array  # [k, D] float32, of length 1
    cohesion: jax.Array  # float32, the mean cosine of a vector to its center


@partial(jax.jit, static_argnames=("k", "steps", "tries"))
def cluster(
    key: jax.Array, vectors: jax.Array, k: int, *, steps: int = 50, tries: int = 8
) -> Clusters:
    """Groups vectors by direction: k-means on the sphere.

    Each try begins with k of the vectors, drawn so that far ones are likelier (k-means++, Arthur &
    Vassilvitskii 2007); the most cohesive one is kept.

    Args:
        vectors: float32 [n, D].
        k: how many groups, at most n. One may end up empty if vectors repeat.

    Raises:
        ValueError: k is not between 1 and n.
    """
    if not 1 <= k <= len(vectors):
        raise ValueError(f"k must be between 1 and {len(vectors)}, got {k}")
    vectors = l2_normalize(vectors)

    def draw(key: jax.Array) -> jax.Array:
        def add(i: int, centers: jax.Array) -> jax.Array:
            best = jnp.where(jnp.arange(k) < i, cosine(vectors, centers), -1).max(-1)
            far = jnp.log(jnp.maximum(1 - best, 1e-12))  # squared distance, halved
            return centers.at[i].set(
                vectors[jax.random.categorical(jax.random.fold_in(key, i), far)]
            )

        return jax.lax.fori_loop(0, k, add, jnp.zeros((k, vectors.shape[-1])))

    def improve(_, centers: jax.Array) -> jax.Array:
        belongs = jax.nn.one_hot(cosine(vectors, centers).argmax(-1), k)  # [n, k]
        sums = jnp.einsum("nk,nd->kd", belongs, vectors)
        return jnp.where(belongs.sum(0)[:, None] > 0, l2_normalize(sums), centers)

    def attempt(key: jax.Array) -> Clusters:
        centers = jax.lax.fori_loop(0, steps, improve, draw(key))
        scores = cosine(vectors, centers)
        return Clusters(scores.argmax(-1), centers, scores.max(-1).mean())

    found = jax.lax.map(attempt, jax.random.split(key, tries))
    best = found.cohesion.argmax()
    return jax.tree.map(lambda leaf: leaf[best], found)
