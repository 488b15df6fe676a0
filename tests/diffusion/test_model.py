"""Both networks: initialization, dependence on inputs and config, training, checkpoints."""

from dataclasses import fields, replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from diffusion import checkpoint, dit, layers, model
from diffusion.config import DiTConfig, UNetConfig
from diffusion.text import PromptEmbeds
from tests.diffusion.conftest import random_params, shapes
from tests.naming import naming
from transformer import rope

pytestmark = pytest.mark.heavy

CONFIGS = [UNetConfig.debug(), DiTConfig.debug()]
both = pytest.mark.parametrize("cfg", CONFIGS, ids=["unet", "dit"])


@pytest.fixture(scope="module")
def initial():
    """Return initial weights of both networks, by config."""
    return {cfg: model.init(jax.random.key(0), cfg) for cfg in CONFIGS}


def inputs(cfg, rows=3, words=4, seed=1):
    keys = jax.random.split(jax.random.key(seed), 4)
    text = PromptEmbeds(
        states=jax.random.normal(keys[0], (rows, words, cfg.text_dim)),
        mask=jnp.arange(words) < jnp.arange(1, rows + 1)[:, None],
        pooled=jax.random.normal(keys[1], (rows, cfg.text_dim)),
    )
    z = jax.random.normal(keys[2], (rows, cfg.image_size, cfg.image_size, 3))
    return z, jnp.linspace(0.1, 0.9, rows), text, jnp.ones(rows, bool)


@both
def test_debug_configs_have_under_50_000_weights(cfg):
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes(cfg))) < 50_000


@both
def test_initial_network_predicts_the_best_linear_estimate(cfg, initial):
    """The initial output is 0, so the prediction is c_skip z, which at t = 1 is the image."""
    z, t, text, keep = inputs(cfg)
    params = initial[cfg]
    predicted = model.denoise(params, cfg, z, t, text, keep)
    gain = t * cfg.spread**2 / ((t * cfg.spread) ** 2 + (1 - t) ** 2)
    np.testing.assert_allclose(predicted, gain[:, None, None, None] * z, atol=1e-6)
    np.testing.assert_allclose(model.denoise(params, cfg, z, t * 0 + 1, text, keep), z, atol=1e-6)


@both
def test_prediction_depends_on_every_input(cfg):
    z, t, text, keep = inputs(cfg)
    params = random_params(cfg)
    predicted = model.denoise(params, cfg, z, t, text, keep)
    assert predicted.shape == z.shape and predicted.dtype == jnp.float32
    for other in (
        (z + 0.1, t, text, keep),
        (z, t + 0.05, text, keep),
        (z, t, replace(text, states=text.states + 0.3), keep),
        (z, t, replace(text, pooled=text.pooled + 0.3), keep),
        (z, t, replace(text, mask=~text.mask), keep),
        (z, t, text, ~keep),
    ):
        assert float(jnp.abs(model.denoise(params, cfg, *other) - predicted).max()) > 1e-4


@both
def test_padding_and_dropped_prompts_have_no_effect(cfg):
    z, t, text, keep = inputs(cfg)
    params = random_params(cfg)
    predicted = model.denoise(params, cfg, z, t, text, keep)
    states = jnp.where(text.mask[..., None], text.states, 1e3)
    masked = model.denoise(params, cfg, z, t, replace(text, states=states), keep)
    np.testing.assert_allclose(masked, predicted, atol=1e-5)
    other = PromptEmbeds(text.states + 1, ~text.mask, text.pooled - 1)
    np.testing.assert_allclose(
        model.denoise(params, cfg, z, t, text, ~keep),
        model.denoise(params, cfg, z, t, other, ~keep),
        atol=1e-5,
    )


@both
def test_prediction_does_not_depend_on_rest_of_batch(cfg):
    z, t, text, keep = inputs(cfg)
    params = random_params(cfg)
    predicted = model.denoise(params, cfg, z, t, text, keep)
    first = jax.tree.map(lambda a: a[:1], (z, t, text, keep))
    np.testing.assert_allclose(model.denoise(params, cfg, *first), predicted[:1], atol=1e-5)


@both
def test_every_config_field_has_an_effect(cfg):
    others = {
        "image_size": 16, "channels": (8, 24), "blocks": (1, 2), "attention": (True, True),
        "head_dim": 4, "spread": 0.5, "d_cond": 24, "text_dim": 8, "patch": 4, "num_layers": 1,
        "num_heads": 4, "d_model": 24, "d_ff": 40, "rope_theta": 10.0,
    }  # fmt: skip
    z, t, text, keep = inputs(cfg)
    before = model.denoise(random_params(cfg), cfg, z, t, text, keep)
    for name in (field.name for field in fields(cfg)):
        changed = replace(cfg, **{name: others[name]})
        sizes = [[leaf.shape for leaf in jax.tree.leaves(shapes(c))] for c in (cfg, changed)]
        if sizes[0] == sizes[1] and name != "image_size":
            after = model.denoise(random_params(changed), changed, z, t, text, keep)
            assert float(jnp.abs(after - before).max()) > 1e-5, name


@pytest.mark.parametrize(
    ("make", "changes", "facts"),
    [
        (UNetConfig.debug, {"image_size": 10}, ["image_size", 4, 10]),
        (UNetConfig.debug, {"head_dim": 5}, ["channels", "head_dim", 5]),
        (UNetConfig.debug, {"blocks": (1,)}, ["channels", "blocks", "attention", (1,)]),
        (UNetConfig.debug, {"channels": (8, 0)}, ["channels", 0]),
        (UNetConfig.debug, {"spread": 0.0}, ["spread", 0.0]),
        (DiTConfig.debug, {"patch": 3}, ["image_size", "patch", 3]),
        (DiTConfig.debug, {"num_heads": 3}, ["d_model", "num_heads", 3]),
        (DiTConfig.debug, {"num_layers": True}, ["num_layers", True]),
    ],
)
def test_error_names_invalid_config_fields(make, changes, facts):
    with pytest.raises(ValueError, match=naming(*facts)):
        make(**changes)


def test_rotary_angles_depend_on_row_and_column():
    """Half of the channel pairs is rotated by the row, half by the column; prompts are not."""
    cfg = DiTConfig.debug(num_heads=1, d_model=16)
    cos, sin = dit.rotary_angles(4, 4, 2, cfg)
    assert cos.shape == (1, 18, 1, 8)
    np.testing.assert_array_equal(np.asarray(cos[0, 16:]), 1)  # prompt tokens are not rotated
    np.testing.assert_array_equal(np.asarray(sin[0, 16:]), 0)
    frequency = rope.frequencies(8, cfg.rope_theta)
    np.testing.assert_allclose(cos[0, 4 * 2 + 3, 0, :4], np.cos(2 * frequency), rtol=1e-6)
    np.testing.assert_allclose(sin[0, 4 * 2 + 3, 0, 4:], np.sin(3 * frequency), rtol=1e-6)


def test_space_to_depth_keeps_blocks_together():
    x = jnp.arange(4 * 4).reshape(1, 4, 4, 1)
    assert layers.space_to_depth(x)[0, 0, 1].tolist() == [2, 3, 6, 7]
    x = jnp.arange(2 * 8 * 8 * 3).reshape(2, 8, 8, 3)
    for block in (2, 4):
        np.testing.assert_array_equal(
            layers.depth_to_space(layers.space_to_depth(x, block), block), x
        )


@both
def test_flow_loss_equals_velocity_error(cfg):
    x, t, text, keep = inputs(cfg)
    e = jax.random.normal(jax.random.key(5), x.shape)
    params = random_params(cfg)
    time = t[:, None, None, None]
    z = time * x + (1 - time) * e
    clean = model.denoise(params, cfg, z, t, text, keep)
    velocity = (clean - z) / (1 - time)
    expected = jnp.mean((velocity - (x - e)) ** 2, (1, 2, 3))
    loss = model.flow_loss(params, cfg, x, e, t, text, keep)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


@pytest.mark.parametrize(
    "cfg",
    [CONFIGS[0], pytest.param(CONFIGS[1], marks=pytest.mark.slow)],
    ids=["unet", "dit"],
)
def test_training_on_two_prompts_separates_them(cfg, initial):
    """Two prompts, two colours: after training, each prompt gives its own colour."""
    _, _, text, keep = inputs(cfg, rows=2)
    x = jnp.stack([jnp.full((8, 8, 3), 0.8), jnp.full((8, 8, 3), -0.8)])
    params = initial[cfg]
    optimizer = optax.adam(3e-3)

    @jax.jit
    def step(params, state, key):
        def loss(params):
            t_key, e_key = jax.random.split(key)
            t = jax.random.uniform(t_key, (2,), maxval=0.95)
            e = jax.random.normal(e_key, x.shape)
            return model.flow_loss(params, cfg, x, e, t, text, keep).mean()

        updates, state = optimizer.update(jax.grad(loss)(params), state)
        return optax.apply_updates(params, updates), state

    state = optimizer.init(params)
    for number in range(120):
        params, state = step(params, state, jax.random.key(number))
    noise = jax.random.normal(jax.random.key(9), x.shape)
    predicted = model.denoise(params, cfg, noise, jnp.zeros(2), text, keep)
    assert float(predicted[0].mean()) > 0.5 and float(predicted[1].mean()) < -0.5


@both
def test_saved_denoiser_loads_equal(cfg, tmp_path):
    params = random_params(cfg)
    checkpoint.save(tmp_path, params, cfg)
    loaded, loaded_cfg = checkpoint.load(tmp_path)
    assert loaded_cfg == cfg
    jax.tree.map(np.testing.assert_array_equal, loaded, params)
    checkpoint.save(tmp_path, params, cfg, dtype="float16")
    half, _ = checkpoint.load(tmp_path)
    for a, b in zip(jax.tree.leaves(half), jax.tree.leaves(params), strict=True):
        assert a.dtype == jnp.float32
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_mismatched_checkpoint_is_refused(tmp_path):
    cfg = UNetConfig.debug()
    checkpoint.save(tmp_path, random_params(cfg), cfg)
    config = tmp_path / "config.json"
    text = config.read_text()
    for change, facts in (
        (('"unet"', '"gan"'), ["kind", "unet", "dit", "upscaler", "'gan'"]),
        (('"head_dim"', '"head_dims"'), ["head_dims"]),
        (('"d_cond": 16', '"d_cond": 24'), ["condition.time.weight", "(24, 64)", "(16, 64)"]),
        (("16\n  ],", "16,\n  32\n  ],"), ["channels", "blocks", "attention"]),
        (
            ('"attention": [\n    false', '"attention": [\n    true'),
            ["'stages.0.attention_down.k.weight'"],
        ),
    ):
        assert change[0] in text
        config.write_text(text.replace(*change))
        with pytest.raises(ValueError, match=naming(*facts)):
            checkpoint.load(tmp_path)
