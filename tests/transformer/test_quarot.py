"""Tests of weight rotation: same function, smaller int8 error."""

import jax
import numpy as np
import pytest

from tests.transformer.conftest import GOLDEN, randomize
from transformer import checkpoint, decoder, lora, quarot
from transformer.config import Config
from transformer.layers import linear, quantize
from transformer.weights import Linear

pytestmark = pytest.mark.heavy

forward = jax.jit(decoder.forward, static_argnums=1)


def rotate(params: decoder.Params) -> decoder.Params:
    """Return the rotated model in float32, by the definition."""

    def rotate_input(p: Linear, norm_weight: np.ndarray | None = None) -> Linear:
        return p.replace(weight=quarot.rotate_input_weight(p.weight, norm_weight))

    def rotate_output(p: Linear) -> Linear:
        bias = None if p.bias is None else quarot.rotate_output_weight(p.bias[:, None])[:, 0]
        return p.replace(weight=quarot.rotate_output_weight(p.weight), bias=bias)

    layers = tuple(
        layer.replace(
            **{
                part: rotate_input(getattr(layer, part), layer.attn_norm.scale)
                for part in ("q", "k", "v")
            },
            **{
                part: rotate_input(getattr(layer, part), layer.mlp_norm.scale)
                for part in ("gate", "up")
            },
            out=rotate_output(layer.out),
            down=rotate_output(layer.down),
        )
        for layer in params.layers
    )
    head = params.embed if params.head is None else params.head
    return quarot.strip_norm_weights(
        params.replace(
            embed=rotate_input(params.embed),
            layers=layers,
            head=rotate_input(head, params.final_norm.scale),
        )
    )


@pytest.mark.parametrize("width", [1, 2, 7, 48, 64, 576, 896])
def test_rotation_is_orthogonal(width):
    rotation = quarot.rotate_input_weight(np.eye(width, dtype=np.float32))
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(width), atol=2e-6)
    if width > 2:  # every channel is mixed, and a constant vector is not mapped to one channel
        assert np.abs(rotation).max() < 1
        assert np.abs(rotation.sum(0)).max() < 0.9 * width**0.5


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"tie_embeddings": False, "qkv_bias": True, "linear_bias": True},
        {"qk_norm": True, "scale_embeddings": True, "num_kv_heads": 1},
    ],
    ids=str,
)
def test_rotated_model_has_same_logits(fields):
    cfg = Config.debug(**fields)
    params = randomize(decoder.init(jax.random.key(0), cfg))
    adapter = randomize(lora.init(jax.random.key(1), cfg, rank=3, alpha=6))
    ids = np.arange(24).reshape(2, 12)
    for change in (lambda params: params, lambda params: lora.apply(params, adapter)):
        expected, _ = forward(change(params), cfg, ids)
        actual, _ = forward(change(rotate(params)), cfg, ids)
        np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("fields", [{"norm": "layer"}, {"post_norms": True}, {"norm": "unit_rms"}])
def test_layer_norm_and_post_norms_cannot_be_rotated(fields):
    assert quarot.can_rotate(Config.debug())
    assert not quarot.can_rotate(Config.debug(**fields))


def test_rotation_reduces_int8_error_of_outliers():
    """A channel forty times as large as the others leaves few of the 127 int8 steps for those."""
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(16, 64)).astype(np.float32)
    rows[:, 3] *= 40
    weight = Linear(weight=rng.normal(size=(32, 64)).astype(np.float32))
    exact = linear(rows, weight)
    plain = linear(rows, quantize(weight))
    spread = Linear(weight=quarot.rotate_input_weight(weight.weight))
    actual = linear(quarot.rotate_input_weight(rows), quantize(spread))
    np.testing.assert_allclose(linear(quarot.rotate_input_weight(rows), spread), exact, atol=1e-3)
    assert np.abs(actual - exact).mean() < 0.5 * np.abs(plain - exact).mean()


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral"])
def test_int8_logits_are_close_to_float32(name):
    loaded, cfg, _ = checkpoint.load(GOLDEN / name, dtype="int8")
    params, _, _ = checkpoint.load(GOLDEN / name)

    def dequantize(p: Linear) -> Linear:
        return p.replace(weight=p.weight * p.scale[:, None], scale=None)

    ids = np.arange(16)[None]
    is_linear = lambda node: isinstance(node, Linear)  # noqa: E731
    widened = jax.tree.map(
        lambda p: dequantize(p) if is_linear(p) else p, loaded, is_leaf=is_linear
    )
    actual = forward(widened, cfg, ids)[0]
    expected = forward(params, cfg, ids)[0]
    assert np.abs(actual - expected).mean() < 0.03 * np.std(expected)
