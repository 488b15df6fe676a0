"""Estimators on distributions whose numbers are known, and on examples done by hand."""

from itertools import combinations

import numpy as np
import pytest

from diffusion import metrics
from tests.naming import naming


def test_a_kernel_distance_by_hand():
    """Pairs give (1 * -1 + 1)^3 = 0 and (0 * 2 + 1)^3 = 1; across 1, 27, 1 and -1, on average 7."""
    real, drawn = np.array([[1.0], [-1.0]]), np.array([[0.0], [2.0]])
    assert metrics.kernel_distance(real, drawn) == pytest.approx(0 + 1 - 2 * 7)


def test_kernel_distances_are_right_on_average_however_few_the_pictures():
    """Between N(0, 1) and N(1, 1) it is 4 + 32 - 2 * 7: moments of products of two normals."""
    random = np.random.default_rng(0)
    normal = random.normal(size=(3, 3000, 20, 1))
    for drawn, expected in ((normal[1], 0.0), (normal[1] + 1, 22.0)):
        pairs = zip(normal[0], drawn, strict=True)
        found = np.array([metrics.kernel_distance(x, y) for x, y in pairs])
        error = found.std() / np.sqrt(len(found))
        assert error < 0.8 and abs(found.mean() - expected) < 4 * error


def test_a_coverage_by_hand():
    """The nearest other is 1, 1, 1 and 8 away."""
    real = np.array([[0.0], [1.0], [2.0], [10.0]])
    for drawn, covered in (([[1.5]], 2), ([[2.0]], 3), ([[1.5], [9.0]], 3), ([[-0.5], [2.5]], 3)):
        assert metrics.coverage(real, np.array(drawn), k=1) == covered / 4
    with pytest.raises(ValueError, match=naming("k", 3, 4)):
        metrics.coverage(real, real, k=4)


def test_who_draws_one_kind_only_covers_one_kind():
    """n draws among n real ones miss the k nearest of one with a chance of about 2^-k."""
    random = np.random.default_rng(0)
    real, drawn = random.normal(size=(2, 600, 3))
    assert metrics.coverage(real, drawn) == pytest.approx(1 - 2**-5, abs=0.03)
    real[:300] += 100
    drawn[:150] += 100
    assert metrics.coverage(real, drawn) > 0.85
    assert metrics.coverage(real, drawn[150:]) == pytest.approx(0.5, abs=0.02)


def test_retrieval_is_the_mean_over_all_ways_to_draw_the_wrong_captions():
    random = np.random.default_rng(0)
    scores, right = random.normal(size=(5, 7)), np.array([3, 0, 6, 2, 2])
    for k, among in ((1, 4), (2, 4), (3, 3), (1, 7), (1, 1)):
        hits = []
        for row, own in zip(scores, right, strict=True):
            for wrong in combinations(np.delete(np.arange(7), own), among - 1):
                hits.append((row[list(wrong)] >= row[own]).sum() < k)
        assert metrics.retrieval(scores, right, k, among) == pytest.approx(np.mean(hits))
    with pytest.raises(ValueError, match=naming("among", 7, 100)):
        metrics.retrieval(scores, right, 1)


def test_retrieval_of_who_knows_nothing_is_chance_and_never_a_gift():
    random = np.random.default_rng(0)
    right = random.integers(0, 300, 2000)
    scores = random.normal(size=(2000, 300))
    assert metrics.retrieval(scores, right, 5) == pytest.approx(0.05, abs=0.015)
    assert metrics.retrieval(np.zeros((2000, 300)), right, 5) == 0
    scores[np.arange(2000), right] = 9
    assert metrics.retrieval(scores, right, 1) == 1


def test_copies_have_a_ratio_of_0_and_what_was_never_seen_of_1():
    random = np.random.default_rng(0)
    learnt, real = random.uniform(-1, 1, (2, 30, 4, 4, 3)).astype(np.float32)
    assert metrics.memorisation(learnt[:10], real, learnt) == pytest.approx(0, abs=1e-6)
    assert metrics.memorisation(real, real, learnt) == 1
    between = (learnt[:10] + real[:10]) / 2
    assert 0.3 < metrics.memorisation(between, real, learnt) < 0.8


def test_the_nearest_picture():
    pictures = np.zeros((2, 2, 1, 3), np.float32)
    pictures[1] = 1
    others = np.full((2, 2, 1, 3), 0.75, np.float32)
    others[1, 0] = 0.25  # half of the pixels
    found = metrics.nearest_distances(pictures, others)
    np.testing.assert_allclose(found, [np.sqrt((0.75**2 + 0.25**2) / 2), 0.25], rtol=1e-6)
