"""Samplers: diffusers' numbers, what they have in common, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import sample, schedule
from diffusion.schedule import NoiseLevel
from tests.diffusion.conftest import GOLDEN, dummy
from tests.naming import naming

pytestmark = pytest.mark.heavy

RULES = ("euler", "ddim", "ddpm", "heun", "dpmpp")


def _vp(ratio: float) -> NoiseLevel:
    return schedule.from_alpha_bar(1 / (1 + ratio**2))


def _walk(start, levels, rule, **kw):
    steps = sample.steps(dummy, jnp.asarray(start), levels, rule, **kw)
    return np.stack([np.asarray(step.noisy) for step in steps])


@pytest.mark.parametrize("rule", ["ddim", "ddpm"])
def test_ddim_and_ddpm_are_those_of_diffusers(rule, monkeypatch):
    drawn = iter(GOLDEN["ddpm_noise"])
    monkeypatch.setattr(sample, "normal", lambda keys, shape: next(drawn))
    levels = schedule.ddpm_levels(schedule.linear_betas(), len(GOLDEN[rule]))
    found = _walk(GOLDEN["start"], levels, rule, keys=sample.image_keys(0, 2))
    np.testing.assert_allclose(found, GOLDEN[rule], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "rule", "level"),
    [
        ("dpmpp", "dpmpp", _vp),
        ("dpmpp_flow", "dpmpp", lambda sigma: schedule.from_flow(1 - sigma)),
        ("euler_flow", "euler", lambda sigma: schedule.from_flow(1 - sigma)),
        ("heun", "heun", lambda sigma: schedule.from_flow(1 - sigma)),
        ("euler_sigma", "euler", schedule.from_sigma),
    ],
)
def test_samplers_are_those_of_diffusers(name, rule, level):
    sigmas = GOLDEN[f"{name}_sigmas"]
    levels = [level(float(sigma)) for sigma in sigmas]
    start = GOLDEN["start"] * (sigmas[0] if name == "euler_sigma" else 1)
    found = _walk(start, levels, rule)
    np.testing.assert_allclose(found, GOLDEN[name], rtol=1e-5, atol=1e-5)


def test_spacings_are_those_of_diffusers():
    karras = GOLDEN["euler_sigma_sigmas"]
    ours = schedule.karras_levels(len(karras) - 1, karras[-2], karras[0])
    np.testing.assert_allclose([level.sigma for level in ours], karras, rtol=1e-4)
    shifted = [level.sigma for level in schedule.flow_levels(4, shift=3.0)]
    np.testing.assert_allclose(shifted, [1, 9 / 10, 3 / 4, 1 / 2, 0])


def _truth(z, level):
    """The best network there is where pictures are normal: mean 0.5, deviation 0.3."""
    gain = level.alpha * 0.09 / (level.alpha**2 * 0.09 + level.sigma**2)
    return 0.5 + gain * (z - 0.5 * level.alpha)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_draws_from_the_distribution(rule):
    """With a perfect network and many steps, what comes out is distributed as pictures are."""
    keys = sample.image_keys(0, 64)
    levels = schedule.ddpm_levels(schedule.cosine_betas(), 100)
    levels = [level for level in levels if level.alpha > 0.01]
    z = sample.normal(keys, (8, 8, 3))
    found = np.asarray(sample.sample(_truth, z, levels, rule, keys=keys))
    assert found.mean() == pytest.approx(0.5, abs=0.02)
    assert found.std() == pytest.approx(0.3, abs=0.02)


def test_more_steps_come_nearer_to_the_truth_and_second_order_sooner():
    """Where pictures are normal the flow is known: it moves noise e to 0.5 + 0.3 e."""
    z = sample.normal(sample.image_keys(1, 2), (4, 4, 3))

    def error(rule: str, count: int) -> float:
        found = sample.sample(_truth, z, schedule.flow_levels(count), rule)
        return float(jnp.abs(found - (0.5 + 0.3 * z)).max())

    for rule, gain in (("euler", 1.8), ("heun", 3.4)):
        assert error(rule, 16) > gain * error(rule, 32)
        assert error(rule, 32) > gain * error(rule, 64)
    for rule in ("heun", "dpmpp"):
        assert error(rule, 32) < error("euler", 32) / 2


def test_the_notation_does_not_matter():
    """The same ratios, written as a flow, with variance 1, or with sigma: the same picture."""
    flow = schedule.flow_levels(8)[1:]
    z = sample.normal(sample.image_keys(0, 2), (4, 4, 3))
    for rule in ("ddim", "heun", "dpmpp"):
        found = []
        for make in (
            lambda level: level,
            lambda level: schedule.from_alpha_bar(schedule.to_alpha_bar(level)),
            lambda level: schedule.from_sigma(level.ratio),
        ):
            levels = [make(level) for level in flow]
            start = schedule.rescale(z, flow[0], levels[0])
            found.append(np.asarray(sample.sample(dummy, start, levels, rule)))
        np.testing.assert_allclose(found[1], found[0], atol=2e-5)
        np.testing.assert_allclose(found[2], found[0], atol=2e-5)


def test_intermediates_are_the_noisy_and_the_predicted_picture():
    z = sample.normal(sample.image_keys(0, 1), (4, 4, 3))
    levels = schedule.flow_levels(5)
    steps = list(sample.steps(dummy, z, levels, "euler"))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(steps[0].clean, dummy(z, levels[0]))
    np.testing.assert_array_equal(steps[-1].noisy, steps[-1].clean)


@pytest.mark.parametrize("rule", RULES)
def test_a_picture_depends_on_its_seed_and_number_alone(rule):
    levels = schedule.flow_levels(4)

    def pictures(seed: int, count: int) -> np.ndarray:
        keys = sample.image_keys(seed, count)
        z = sample.normal(keys, (4, 4, 3))
        return np.asarray(sample.sample(dummy, z, levels, rule, keys=keys))

    np.testing.assert_allclose(pictures(0, 3)[:2], pictures(0, 2), atol=1e-6)
    assert np.abs(pictures(0, 1) - pictures(1, 1)).max() > 0.1
    assert np.abs(pictures(0, 2)[0] - pictures(0, 2)[1]).max() > 0.1


def test_guidance_goes_from_the_one_picture_through_the_other():
    with_prompt, without = jnp.array([3.0]), jnp.array([1.0])
    assert [
        float(sample.classifier_free_guidance(with_prompt, without, s)[0]) for s in (0, 1, 2)
    ] == [1, 3, 5]


def test_what_cannot_be_walked_is_refused():
    z, levels = jnp.zeros((1, 2, 2, 3)), schedule.flow_levels(2)
    for facts, args in (
        (["sampler", "ddim", "'euler2'"], (levels, "euler2")),
        (["levels", 1], (levels[:1], "ddim")),
        (["noise", levels[2], levels[1]], (levels[::-1], "ddim")),
        (["ddpm", "keys"], (levels, "ddpm")),
    ):
        with pytest.raises(ValueError, match=naming(*facts)):
            next(sample.steps(dummy, z, *args))


def test_keys_are_those_of_jax():
    """So that a seed means the same to whoever folds it in as the docstring says."""
    expected = jax.random.fold_in(jax.random.key(7), 2)
    assert jnp.array_equal(
        jax.random.key_data(sample.image_keys(7, 3)[2]), jax.random.key_data(expected)
    )
