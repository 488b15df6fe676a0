"""What can be said of drawn pictures with numbers: four estimators, as functions of arrays.

- `kernel_distance`: do they come from the same distribution as real ones? (KID; Binkowski et al.
  2018, arXiv:1801.01401.) Unlike Frechet's distance it has no bias where pictures are few.
- `coverage`: of the kinds of real pictures, how many are drawn at all? (Naeem et al. 2020,
  arXiv:2002.09797.) A model that draws one perfect apple has a small distance for apples.
- `retrieval`: do they show what was asked for? The right caption must score highest among a hundred
  (Radford et al. 2021, arXiv:2103.00020, ask whole classifiers so).
- `memorisation`: are they copies of what was learnt?

The first three look at pictures through the features or scores of a network that was trained for
something else; whose, is the caller's business. The last one looks at pixels.

Leaves out: Frechet's distance, precision and recall, and what people think of the pictures, which
no number here replaces.
"""

from __future__ import annotations

from math import comb

import numpy as np


def kernel_distance(real: np.ndarray, drawn: np.ndarray) -> float:
    """How far apart two distributions are, by a sample of each; 0 on average if they are the same.

    The squared maximum mean discrepancy under the kernel (x.y / D + 1)^3, which sees differences in
    the first three moments. It has no bias, so that it can come out a little below 0.

    Args:
        real: [n, D], n at least 2.
        drawn: [m, D], m at least 2.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        """The mean over pairs of two different rows."""
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(within(real) + within(drawn) - 2 * kernel(real, drawn).mean())


def coverage(real: np.ndarray, drawn: np.ndarray, k: int = 5) -> float:
    """The share of real pictures that have a drawn one near.

    Near is what lies no farther than the k-th nearest other real picture. If both come from the
    same distribution and are equally many, the share is about 1 - 2^-k.

    Args:
        real: [n, D], n above k.
        drawn: [m, D].

    Raises:
        ValueError: there are not more than k real ones.
    """
    if not 1 <= k < len(real):
        raise ValueError(f"k must be from 1 to {len(real) - 1} for {len(real)} real, got {k}")
    among_real = _squared_distances(real, real)
    np.fill_diagonal(among_real, np.inf)
    reach = np.partition(among_real, k - 1, axis=1)[:, k - 1]  # [n]
    return float((_squared_distances(real, drawn).min(1) <= reach).mean())


def retrieval(scores: np.ndarray, right: np.ndarray, k: int, among: int = 100) -> float:
    """How often the right caption is among the k best of some captions.

    The wrong ones are drawn from all others; what comes out is the mean over all ways to draw them,
    counted and not tried. Chance is k / among.

    Args:
        scores: [n, G], of each caption for each picture. An equal score counts as a better one.
        right: int [n], the captions that should have won.
        among: captions to choose from, the right one included, at most G.

    Raises:
        ValueError: there are fewer than `among` captions.
    """
    wrong = scores.shape[1] - 1
    if not 1 <= among <= wrong + 1:
        raise ValueError(f"among must be from 1 to {wrong + 1} captions, got {among}")
    own = np.take_along_axis(scores, np.asarray(right)[:, None], 1)
    better = (scores >= own).sum(1) - 1  # [n]
    ways = comb(wrong, among - 1)

    def share(count: int) -> float:
        """Of all ways to draw wrong captions, those with fewer than k of the better ones."""
        few = range(min(k, among))
        return sum(comb(count, i) * comb(wrong - count, among - 1 - i) for i in few) / ways

    return float(np.mean([share(int(count)) for count in better]))


def nearest_distances(pictures: np.ndarray, others: np.ndarray) -> np.ndarray:
    """How far each picture is from the nearest of others: root mean square of pixels, [n].

    Args:
        pictures: [n, Y, X, C].
        others: [m, Y, X, C].
    """
    size = pictures[0].size
    squares = _squared_distances(pictures.reshape(-1, size), others.reshape(-1, size))
    return np.sqrt(squares.min(1) / size)


def memorisation(drawn: np.ndarray, real: np.ndarray, learnt: np.ndarray) -> float:
    """How near drawn pictures come to what was learnt, compared with real ones that were not.

    Args:
        drawn: [n, Y, X, C].
        real: [m, Y, X, C], pictures of the same kind that were held out.
        learnt: [l, Y, X, C].

    Returns:
        The mean distance to the nearest learnt picture, of the drawn over that of the real. 0:
        copies; 1: as far away as the pictures that were never seen.
    """
    return float(nearest_distances(drawn, learnt).mean() / nearest_distances(real, learnt).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Squared distances, float64 [n, m]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)
    return np.maximum(squares, 0)
