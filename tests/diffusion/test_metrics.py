"""Metrics on distributions with known values, and on examples computed by hand."""

from itertools import combinations

import numpy as np
import pytest

from diffusion import metrics
from tests.naming import naming


def test_kernel_distance_of_two_pairs_equals_manual_result():
    """Within: (1 * -1 + 1)^3 = 0 and (0 * 2 + 1)^3 = 1; across: 1, 27, 1 and -1, mean 7."""
    real, generated = np.array([[1.0], [-1.0]]), np.array([[0.0], [2.0]])
    assert metrics.kernel_distance(real, generated) == pytest.approx(0 + 1 - 2 * 7)


def test_kernel_distance_of_few_samples_is_unbiased():
    """For N(0, 1) and N(1, 1) the distance is 4 + 32 - 2 * 7, by moments of products of normals."""
    random = np.random.default_rng(0)
    normal = random.normal(size=(3, 3000, 20, 1))
    for generated, expected in ((normal[1], 0.0), (normal[1] + 1, 22.0)):
        pairs = zip(normal[0], generated, strict=True)
        distances = np.array([metrics.kernel_distance(x, y) for x, y in pairs])
        error = distances.std() / np.sqrt(len(distances))
        assert error < 0.8 and abs(distances.mean() - expected) < 4 * error


def test_coverage_of_four_points_equals_manual_result():
    """The distances to the nearest other point are 1, 1, 1 and 8."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    for generated, covered in (
        ([[1.5]], 2),
        ([[2.0]], 3),
        ([[1.5], [9.0]], 3),
        ([[-0.5], [2.5]], 3),
    ):
        assert metrics.coverage(real, np.array(generated), k=1) == covered / 4
    with pytest.raises(ValueError, match=naming("k", 3, 4)):
        metrics.coverage(real, real, k=4)


def test_coverage_of_one_mode_of_two_is_half():
    """The k nearest of n real points are missed by n samples with a probability of about 2^-k."""
    random = np.random.default_rng(0)
    real, generated = random.normal(size=(2, 600, 3))
    assert metrics.coverage(real, generated) == pytest.approx(1 - 2**-5, abs=0.03)
    real[:300] += 100
    generated[:150] += 100
    assert metrics.coverage(real, generated) > 0.85
    assert metrics.coverage(real, generated[150:]) == pytest.approx(0.5, abs=0.02)


def test_retrieval_equals_mean_over_all_samples_of_wrong_captions():
    random = np.random.default_rng(0)
    scores, right = random.normal(size=(5, 7)), np.array([3, 0, 6, 2, 2])
    for k, among in ((1, 4), (2, 4), (3, 3), (1, 7), (1, 1)):
        hits = []
        for row, answer in zip(scores, right, strict=True):
            for wrong in combinations(np.delete(np.arange(7), answer), among - 1):
                hits.append((row[list(wrong)] >= row[answer]).sum() < k)
        assert metrics.retrieval(scores, right, k, among) == pytest.approx(np.mean(hits))
    with pytest.raises(ValueError, match=naming("among", 7, 100)):
        metrics.retrieval(scores, right, 1)


def test_retrieval_of_random_scores_is_chance_and_of_ties_zero():
    random = np.random.default_rng(0)
    right = random.integers(0, 300, 2000)
    scores = random.normal(size=(2000, 300))
    assert metrics.retrieval(scores, right, 5) == pytest.approx(0.05, abs=0.015)
    assert metrics.retrieval(np.zeros((2000, 300)), right, 5) == 0
    scores[np.arange(2000), right] = 9
    assert metrics.retrieval(scores, right, 1) == 1


def test_memorisation_of_copies_is_0_and_of_held_out_images_1():
    random = np.random.default_rng(0)
    train, real = random.uniform(-1, 1, (2, 30, 4, 4, 3)).astype(np.float32)
    assert metrics.memorisation(train[:10], real, train) == pytest.approx(0, abs=1e-6)
    assert metrics.memorisation(real, real, train) == 1
    between = (train[:10] + real[:10]) / 2
    assert 0.3 < metrics.memorisation(between, real, train) < 0.8


def test_nearest_distances_equal_manual_result():
    images = np.zeros((2, 2, 1, 3), np.float32)
    images[1] = 1
    others = np.full((2, 2, 1, 3), 0.75, np.float32)
    others[1, 0] = 0.25  # half of the pixels
    distances = metrics.nearest_distances(images, others)
    np.testing.assert_allclose(distances, [np.sqrt((0.75**2 + 0.25**2) / 2), 0.25], rtol=1e-6)
