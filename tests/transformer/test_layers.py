"""Tests of norms: batch invariance, and accuracy against float64."""

import jax
import numpy as np
import pytest

from transformer.layers import norm
from transformer.weights import Norm


@pytest.mark.parametrize("width", [32, 576, 768, 896])
@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
def test_norm_is_bitwise_equal_in_every_batch_size(width, has_bias):
    """Bug: a product with one column of ones summed in another order from eight rows on."""
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (256, 1, width)).astype(np.float32)
    scale, bias = rng.normal(1, 0.1, (2, width)).astype(np.float32)
    compiled = jax.jit(lambda x: norm(x, Norm(scale, bias if has_bias else None), 1e-5))
    whole = [
        np.concatenate([compiled(x[start : start + size]) for start in range(0, 256, size)])
        for size in (2, 4, 8, 16)
    ]
    for other in whole[1:]:
        np.testing.assert_array_equal(other, whole[0])


@pytest.mark.parametrize("has_bias", [False, True], ids=["rms", "layer"])
def test_norm_matches_float64(has_bias):
    rng = np.random.default_rng(0)
    x, scale, bias = rng.normal(1, 2, (5, 96)), *rng.normal(1, 1, (2, 96))
    centred = x - x.mean(-1, keepdims=True) if has_bias else x
    expected = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + 1e-5) * scale
    expected = expected + bias if has_bias else expected
    p = Norm(scale.astype(np.float32), bias.astype(np.float32) if has_bias else None)
    np.testing.assert_allclose(norm(x.astype(np.float32), p, 1e-5), expected, atol=1e-5)
