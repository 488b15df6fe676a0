"""Tests of search, classification and clustering, against NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import minimize

from tests.naming import naming
from transformer import similarity

pytestmark = pytest.mark.heavy


@pytest.fixture
def rng():
    return np.random.default_rng(0)


def test_nearest_matches_sorting_all_cosines(rng):
    vectors, queries = rng.normal(size=(500, 16)), rng.normal(size=(7, 16))
    result = similarity.nearest(queries, vectors, 5)
    cosines = (queries @ vectors.T) / np.linalg.norm(queries, axis=1)[:, None]
    cosines /= np.linalg.norm(vectors, axis=1)
    order = np.argsort(-cosines, axis=1)[:, :5]
    np.testing.assert_array_equal(result.indices, order)
    np.testing.assert_allclose(result.scores, np.take_along_axis(cosines, order, 1), atol=1e-6)


def test_nearest_ignores_lengths_and_keeps_order_of_ties():
    vectors = jnp.array([[0.0, 2.0], [3.0, 0.0], [1e-3, 0.0], [0.0, 0.0]])
    result = similarity.nearest(jnp.array([[5.0, 0.0]]), vectors, 4)
    assert result.indices[0].tolist() == [1, 2, 0, 3]
    np.testing.assert_allclose(result.scores[0], [1, 1, 0, 0], atol=1e-6)


@pytest.mark.parametrize("k", [0, 5])
def test_k_out_of_range_is_rejected(k):
    vectors = jnp.ones((4, 2))
    with pytest.raises(ValueError, match=naming("k", 4, k)):
        similarity.nearest(vectors, vectors, k)
    with pytest.raises(ValueError, match=naming("k", 4, k)):
        similarity.cluster(jax.random.key(0), vectors, k)


@pytest.mark.parametrize(
    ("labels", "facts"),
    [
        ([0, 1, 0], ["label", 4, "(3,)"]),
        ([0, 1, 2, 0], ["labels", 1, 2]),
        ([0, -1, 1, 0], ["labels", 1, "-1"]),
    ],
)
def test_invalid_labels_are_rejected(labels, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        similarity.fit_probe(jnp.ones((4, 2)), labels, 2)


def test_zero_shot_is_softmax_of_cosines():
    labels = jnp.eye(2)
    result = similarity.zero_shot(jnp.array([[2.0, 0.0], [1.0, 1.0]]), labels, temperature=0.5)
    np.testing.assert_allclose(result[0], [1 / (1 + np.exp(-2)), 1 / (1 + np.exp(2))], rtol=1e-5)
    np.testing.assert_allclose(result[1], [0.5, 0.5], rtol=1e-5)


def test_probe_matches_scipy_optimum(rng):
    vectors = rng.normal(size=(60, 4)).astype(np.float32)
    labels = (vectors @ rng.normal(size=(4, 3))).argmax(1)
    labels[::7] = 0  # not linearly separable
    penalty = 0.01

    def loss(flat):
        weight, bias = flat[:12].reshape(3, 4), flat[12:]
        logits = vectors.astype(np.float64) @ weight.T + bias
        logits -= logits.max(1, keepdims=True)
        logprobs = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        return -logprobs[np.arange(60), labels].mean() + penalty * (weight**2).sum()

    best = minimize(loss, np.zeros(15), method="BFGS").fun
    probe = similarity.fit_probe(vectors, labels, 3, penalty=penalty)
    flat = np.concatenate([np.ravel(probe.weight), probe.bias]).astype(np.float64)
    assert loss(flat) == pytest.approx(best, abs=1e-5)
    probs = similarity.predict(probe, vectors)
    np.testing.assert_allclose(probs.sum(1), 1, rtol=1e-5)
    assert (probs.argmax(1) == labels).mean() > 0.7


def test_larger_l2_penalty_makes_smaller_probe_weights(rng):
    vectors = rng.normal(size=(40, 4)).astype(np.float32)
    labels = (vectors[:, 0] > 0).astype(np.int32)
    sizes = [
        float(jnp.linalg.norm(similarity.fit_probe(vectors, labels, 2, penalty=p).weight))
        for p in (1e-4, 1e-2, 1.0)
    ]
    assert sizes[0] > 2 * sizes[1] > 4 * sizes[2]


def test_cluster_recovers_groups_with_mean_cosine_cohesion(rng):
    middles = np.eye(5)[:4] + 0.05
    groups = rng.integers(0, 4, 120)
    vectors = (middles[groups] + rng.normal(0, 0.1, (120, 5))) * rng.uniform(0.5, 2, (120, 1))
    result = similarity.cluster(jax.random.key(0), vectors, 4)
    names = {(int(ours), int(theirs)) for ours, theirs in zip(result.labels, groups, strict=True)}
    assert len(names) == 4
    np.testing.assert_allclose(np.linalg.norm(result.centers, axis=1), 1, rtol=1e-5)
    cosines = similarity.cosine(vectors, result.centers)
    np.testing.assert_array_equal(cosines.argmax(1), result.labels)
    assert float(result.cohesion) == pytest.approx(float(cosines.max(1).mean()), abs=1e-6)


def test_cluster_into_one_or_n_clusters_has_expected_cohesion(rng):
    vectors = rng.normal(size=(12, 3))
    one = similarity.cluster(jax.random.key(0), vectors, 1)
    each = similarity.cluster(jax.random.key(0), vectors, 12)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    expected = np.linalg.norm(unit.sum(0)) / 12  # cohesion of the best single direction
    assert float(one.cohesion) == pytest.approx(expected, abs=1e-6)
    assert float(each.cohesion) == pytest.approx(1, abs=1e-5)
    assert sorted(each.labels.tolist()) == list(range(12))
