"""Metrics of generated images: four estimators, as functions of arrays.

- `kernel_distance`: whether generated and real images have the same distribution (KID; Binkowski et
  al. 2018, arXiv:1801.01401). Unlike the Frechet distance (FID) it is unbiased for few images.
- `coverage`: the share of real images that have a similar generated image (Naeem et al. 2020,
  arXiv:2002.09797). A model that only generates one perfect apple has low coverage.
- `retrieval`: whether images match their prompts: how often the right caption has one of the
  highest scores among a hundred captions, as in zero-shot classification (Radford et al. 2021,
  arXiv:2103.00020).
- `memorisation`: whether generated images are copies of training images.

The first three take features or scores that the caller computes with another trained network, such
as CLIP. The last compares pixels.

Leaves out: FID, precision and recall, and human judgement, which no metric here replaces.
"""

from __future__ import annotations

from math import comb

import numpy as np


def kernel_distance(real: np.ndarray, generated: np.ndarray) -> float:
    """Estimate the kernel distance of two distributions; the expected value is 0 if they are equal.

    The kernel distance is the squared maximum mean discrepancy under the kernel (x.y / D + 1)^3,
    which depends on the first three moments. The estimate is unbiased, so it can be slightly below
    0.

    Args:
        real: features [n, D], n at least 2.
        generated: features [m, D], m at least 2.
    """

    def kernel(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return (x.astype(np.float64) @ y.astype(np.float64).T / x.shape[1] + 1) ** 3

    def within(x: np.ndarray) -> float:
        """Return the mean kernel value over all pairs of two different rows."""
        values = kernel(x, x)
        return (values.sum() - values.trace()) / (len(x) * (len(x) - 1))

    return float(within(real) + within(generated) - 2 * kernel(real, generated).mean())


def coverage(real: np.ndarray, generated: np.ndarray, k: int = 5) -> float:
    """Return the share of real images that have a generated image in their neighbourhood.

    The neighbourhood of a real image extends to its k-th nearest other real image. For equal
    distributions and n = m, the share is about 1 - 2^-k.

    Args:
        real: features [n, D], n above k.
        generated: features [m, D].
        k: which nearest neighbour bounds the neighbourhood, from 1.

    Raises:
        ValueError: k is not from 1 to n - 1.
    """
    if not 1 <= k < len(real):
        raise ValueError(
            f"k must be from 1 to {len(real) - 1} for {len(real)} real images, got {k}"
        )
    distances = _squared_distances(real, real)
    np.fill_diagonal(distances, np.inf)
    radii = np.partition(distances, k - 1, axis=1)[:, k - 1]  # [n]
    return float((_squared_distances(real, generated).min(1) <= radii).mean())


def retrieval(scores: np.ndarray, right: np.ndarray, k: int, among: int = 100) -> float:
    """Return how often the right caption of an image is among the k best of `among` captions.

    The other captions are sampled from all wrong ones; the result is the exact mean over all
    samples. Random scores give k / among.

    Args:
        scores: [n, G], the score of each caption for each image. A wrong caption of equal score
            ranks above the right one.
        right: int [n], the index of the right caption of each image.
        k: the number of top ranks that count as found.
        among: the number of captions to rank, the right one included, at most G.

    Raises:
        ValueError: `among` is not from 1 to G.
    """
    wrong = scores.shape[1] - 1
    if not 1 <= among <= wrong + 1:
        raise ValueError(
            f"among (the number of captions to rank) must be from 1 to {wrong + 1}, got {among}"
        )
    right_scores = np.take_along_axis(scores, np.asarray(right)[:, None], 1)
    num_better = (scores >= right_scores).sum(1) - 1  # [n]
    num_samples = comb(wrong, among - 1)

    def share(count: int) -> float:
        """Return the share of samples in which the right caption is among the k best.

        `count` is the number of wrong captions that score higher than the right one.
        """
        hits = sum(
            comb(count, i) * comb(wrong - count, among - 1 - i) for i in range(min(k, among))
        )
        return hits / num_samples

    return float(np.mean([share(int(count)) for count in num_better]))


def nearest_distances(images: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Return the root mean square distance of each image to the nearest other image: float [n].

    Args:
        images: [n, Y, X, C].
        others: [m, Y, X, C], the images to find the nearest among.
    """
    size = images[0].size
    squares = _squared_distances(images.reshape(-1, size), others.reshape(-1, size))
    return np.sqrt(squares.min(1) / size)


def memorisation(generated: np.ndarray, held_out: np.ndarray, train: np.ndarray) -> float:
    """Return how far generated images are from training images, relative to held-out images.

    Args:
        generated: [n, Y, X, C].
        held_out: [m, Y, X, C], real images that were not trained on.
        train: [l, Y, X, C], training images.

    Returns:
        The mean distance of generated images to the nearest training image, divided by the mean
        distance of held-out images to it. 0: copies; 1: as far from the training images as
        held-out images.
    """
    distance = nearest_distances(generated, train).mean()
    return float(distance / nearest_distances(held_out, train).mean())


def _squared_distances(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Return the squared distances of the rows of x to the rows of y, float64 [n, m]."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    squares = (x**2).sum(1)[:, None] - 2 * x @ y.T + (y**2).sum(1)
    return np.maximum(squares, 0)
