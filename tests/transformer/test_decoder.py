"""Tests of the forward pass: against transformers, and of the effect of each config field."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.naming import naming
from tests.transformer.conftest import GOLDEN, GPT2_VARIANT, MORE, TINY, VARIANTS, randomize
from tests.transformer.parts import check_parts
from transformer import attention, checkpoint, decoder, rope
from transformer.config import Config, RopeScaling

pytestmark = pytest.mark.heavy

IDS = np.random.default_rng(1).integers(0, 320, (2, 12)).astype(np.int32)
forward = jax.jit(decoder.forward, static_argnums=1, static_argnames="taps")
# Compiles faster, for tests that only check whether something changes.
forward_unoptimized = jax.jit(
    decoder.forward, static_argnums=1, compiler_options={"xla_backend_optimization_level": 0}
)


def random_params(cfg: Config) -> decoder.Params:
    return randomize(decoder.init(jax.random.key(0), cfg))


@pytest.mark.parametrize("name", TINY)
def test_forward_matches_transformers(tiny, name):
    params, cfg, golden = tiny(name)
    logits, taps = forward(params, cfg, golden["ids"], taps=("residual", "attention"))
    np.testing.assert_allclose(logits, golden["logits"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(taps["residual"], golden["stream"], rtol=0, atol=1e-4)
    np.testing.assert_allclose(taps["attention"], golden["attention"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", TINY)
def test_each_norm_projection_and_sublayer_matches_transformers(tiny, name):
    check_parts(*tiny(name))


@pytest.mark.parametrize("variant", [*VARIANTS.values(), {"tie_embeddings": False}])
def test_init_matches_abstract_tree(variant):
    cfg = Config.debug(**variant)
    params, infos = decoder.init(jax.random.key(0), cfg), decoder.abstract(cfg)
    assert jax.tree.structure(params) == jax.tree.structure(infos)
    for leaf, info in zip(jax.tree.leaves(params), jax.tree.leaves(infos), strict=True):
        assert leaf.shape == info.shape
        assert leaf.dtype == jnp.float32
        assert len(info.axes) == len(info.shape)
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cfg.num_params
    assert decoder.num_bytes(params) == 4 * cfg.num_params


def test_init_is_deterministic_by_key():
    cfg = Config.debug()
    first, again, other = (decoder.init(jax.random.key(seed), cfg) for seed in (0, 0, 1))
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), first, again))
    assert not (first.embed.weight == other.embed.weight).any()


def test_initial_loss_is_that_of_uniform_prediction():
    cfg = Config.debug()
    logits, _ = forward(decoder.init(jax.random.key(0), cfg), cfg, IDS)
    loss = -jax.nn.log_softmax(logits[:, :-1])
    loss = np.take_along_axis(np.asarray(loss), IDS[:, 1:, None], -1).mean()
    assert abs(loss - np.log(cfg.vocab_size)) < 0.1


def test_attention_is_causal():
    cfg = Config.debug()
    params = random_params(cfg)
    logits, _ = forward(params, cfg, IDS)
    changed, _ = forward(params, cfg, np.concatenate([IDS[:, :7], (IDS[:, 7:] + 1) % 320], 1))
    np.testing.assert_array_equal(logits[:, :7], changed[:, :7])
    assert (np.abs(logits[:, 7:] - changed[:, 7:]).max(-1) > 1e-3).all()


LLAMA3 = dict(
    rope_type="llama3", factor=8, original_max_seq_len=64, low_freq_factor=2, high_freq_factor=8
)
YARN = dict(
    rope_type="yarn",
    factor=8,
    original_max_seq_len=64,
    beta_fast=4,
    beta_slow=2,
    attention_factor=2,
)
NUMBERS = [
    {"norm_eps": 0.5},
    {"rope_theta": 100.0},
    {"rope_scaling": RopeScaling(rope_type="linear", factor=8)},
    {"rope_scaling": RopeScaling(**LLAMA3)},
    {"rope_scaling": RopeScaling(**YARN)},
    {"local_rope_theta": 50.0},
    {"windows": (4,)},
    {"windows": (None, 4)},
    {"query_scalar": 3},
    {"scale_embeddings": True},
    {"norm": "unit_rms"},
    {"mlp": "geglu"},
]
ROTARY = {"rope_theta", "rope_scaling", "local_rope_theta"}


def is_change(variant, change):
    """Return whether `change` alters the variant's config, and no shape of its weights."""
    variant = VARIANTS[variant]
    (name,) = change
    return variant.get(name) != change[name] and not (
        variant.get("norm") == "layer" and name in ("norm", "mlp")
    )


# Fields that change no shape: the same weights must have other logits.
@pytest.mark.parametrize(
    ("variant", "change"),
    [(variant, change) for variant in VARIANTS for change in NUMBERS if is_change(variant, change)],
    ids=str,
)
def test_changed_config_field_changes_logits(variant, change):
    cfg = Config.debug(**VARIANTS[variant])
    (name,) = change
    has_effect = not (
        (name in ROTARY and cfg.position == "learned")
        or (name == "local_rope_theta" and cfg.windows == (None,))
    )
    params = random_params(cfg)
    before, _ = forward_unoptimized(params, cfg, IDS)
    after, _ = forward_unoptimized(params, dataclasses.replace(cfg, **change), IDS)
    if has_effect:
        assert np.abs(before - after).max() > 1e-3
    else:
        np.testing.assert_array_equal(before, after)


@pytest.mark.parametrize("scaling", [LLAMA3, YARN], ids=["llama3", "yarn"])
def test_changed_rope_scaling_field_changes_angles(scaling):
    def angles(**change):  # many channels, because bounds are rounded to pairs
        return np.stack(rope.angles(IDS, 32, 100.0, RopeScaling(**scaling | change)))

    for name in scaling.keys() - {"rope_type"}:
        change = {name: scaling[name] * 3 // 2}
        assert np.abs(angles() - angles(**change)).max() > 1e-2, name


def test_every_config_field_is_tested():
    """Every new field needs an entry in NUMBERS or SHAPES, or a golden family that sets it."""
    wired = {name for change in [*NUMBERS, *SHAPES] for name in change} | {"max_seq_len"}
    golden = [checkpoint.read_config(GOLDEN / name) for name in MORE]
    wired |= {
        field.name
        for field in dataclasses.fields(Config)
        if any(getattr(cfg, field.name) != field.default for cfg in golden)
    }
    assert wired == {field.name for field in dataclasses.fields(Config)}


def test_window_masks_older_positions():
    cfg = Config.debug(num_layers=1, windows=(4,))
    params = random_params(cfg)
    other = IDS.copy()
    other[:, 5] = (other[:, 5] + 1) % 320
    before, after = forward(params, cfg, IDS)[0], forward(params, cfg, other)[0]
    is_changed = np.abs(before - after).max((0, 2)) > 0
    np.testing.assert_array_equal(np.flatnonzero(is_changed), [5, 6, 7, 8])


# Fields that change the tree of weights.
SHAPES = [
    {"num_layers": 3},
    {"num_heads": 8},
    {"num_kv_heads": 4},
    {"head_dim": 16},
    {"d_model": 40},
    {"d_ff": 56},
    {"vocab_size": 330},
    {"norm": "layer"},
    {"position": "learned"},
    {"mlp": "gelu"},
    {"qkv_bias": True},
    {"linear_bias": True},
    {"qk_norm": True},
    {"post_norms": True},
    {"tie_embeddings": False},
]


@pytest.mark.parametrize("change", SHAPES, ids=str)
def test_changed_config_field_changes_shapes(change):
    cfg = Config.debug()
    changed = dataclasses.replace(cfg, **change)
    shapes = [leaf.shape for leaf in jax.tree.leaves(decoder.abstract(cfg))]
    assert shapes != [leaf.shape for leaf in jax.tree.leaves(decoder.abstract(changed))]
    logits, _ = forward_unoptimized(random_params(changed), changed, IDS)
    assert logits.shape == (*IDS.shape, changed.vocab_size)
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("variant", [*VARIANTS.values(), {"tie_embeddings": False}], ids=str)
def test_every_weight_has_a_gradient(variant):
    cfg = Config.debug(**variant)

    def loss(params):
        logits, _ = decoder.forward(params, cfg, IDS)
        return (logits[:, :-1] * jax.nn.one_hot(IDS[:, 1:], cfg.vocab_size)).sum()

    gradients = jax.tree_util.tree_leaves_with_path(jax.jit(jax.grad(loss))(random_params(cfg)))
    for path, gradient in gradients:
        assert np.isfinite(gradient).all(), path
        # A bias of the keys shifts all scores of a query equally and cancels in the softmax, except
        # with rotary embeddings.
        is_key_bias = ".k.bias" in jax.tree_util.keystr(path) and cfg.position == "learned"
        assert is_key_bias or np.abs(gradient).max() > 1e-4, path


def test_taps_are_consistent_with_logits():
    cfg = Config.debug()
    params = random_params(cfg)
    names = ("residual", "attention", "logits")
    logits, actual = forward(params, cfg, IDS, taps=names)
    batch, length = IDS.shape
    assert set(actual) == set(names)
    assert actual["residual"].shape == (cfg.num_layers + 1, batch, length, cfg.d_model)
    assert actual["attention"].shape == (cfg.num_layers, batch, cfg.num_heads, length, length)
    np.testing.assert_allclose(actual["attention"].sum(-1), 1, rtol=0, atol=1e-5)
    assert (np.triu(actual["attention"], 1) == 0).all()
    np.testing.assert_array_equal(actual["residual"][0], params.embed.weight[IDS])
    np.testing.assert_allclose(actual["logits"][-1], logits, rtol=0, atol=1e-5)
    plain, nothing = forward(params, cfg, IDS)
    assert nothing == {}
    np.testing.assert_allclose(plain, logits, rtol=0, atol=1e-5)


def test_unused_tap_adds_no_flops():
    cfg = Config.debug()
    params = random_params(cfg)

    def flops(*taps: str) -> float:
        return forward.lower(params, cfg, IDS, taps=taps).compile().cost_analysis()["flops"]

    def logits_only(params, cfg, ids):
        return decoder.forward(params, cfg, ids)[0]

    alone = jax.jit(logits_only, static_argnums=1).lower(params, cfg, IDS).compile()
    assert flops() == alone.cost_analysis()["flops"]
    assert flops("logits") > flops()


def test_unknown_tap_is_rejected():
    cfg = Config.debug()
    with pytest.raises(ValueError, match=naming("residual", "attention", "logits", "'atention'")):
        decoder.forward(random_params(cfg), cfg, IDS, taps=("atention",))


def test_more_tokens_than_learned_positions_raises():
    """Bug: tokens beyond the table all had the embedding of the last position."""
    cfg = Config.debug(**GPT2_VARIANT | dict(max_seq_len=11))
    for read in (decoder.forward, decoder.hidden_states):
        with pytest.raises(ValueError, match=naming(11, 12)):
            read(random_params(cfg), cfg, IDS)


@pytest.mark.parametrize("variant", VARIANTS)
def test_unstack_layers_inverts_stack_layers(variant):
    cfg = Config.debug(num_layers=3, **VARIANTS[variant])
    layers = random_params(cfg).layers
    stacked = decoder.stack_layers(layers)
    assert all(len(leaf) == 3 for leaf in jax.tree.leaves(stacked))
    unstacked = decoder.unstack_layers(stacked)
    assert jax.tree.structure(unstacked) == jax.tree.structure(layers)
    jax.tree.map(np.testing.assert_array_equal, unstacked, layers)


@pytest.mark.parametrize("variant", [{}, GPT2_VARIANT, {"windows": (5,), "qk_norm": True}], ids=str)
def test_scan_over_stacked_layers_matches_forward(variant):
    cfg = Config.debug(num_layers=3, **variant)
    params = random_params(cfg)
    positions = jnp.broadcast_to(jnp.arange(IDS.shape[1]), IDS.shape)

    def attend(q, k, v):
        return attention.attend(q, k, v, window=cfg.window(0))[0]

    @jax.jit
    def scanned(params, stacked, ids):
        x, angles = decoder.embed_tokens(params, cfg, ids, positions)
        step = lambda x, layer: (decoder.block(x, layer, cfg, angles[0], attend), None)  # noqa: E731
        return decoder.unembed(params, cfg, jax.lax.scan(step, x, stacked)[0])

    actual = scanned(params, decoder.stack_layers(params.layers), IDS)
    np.testing.assert_allclose(actual, forward(params, cfg, IDS)[0], rtol=0, atol=1e-5)
