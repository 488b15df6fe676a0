"""Samplers: results of diffusers, common properties, and invalid arguments."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from diffusion import sample, schedule
from diffusion.schedule import NoiseLevel
from tests.diffusion.conftest import GOLDEN, dummy
from tests.naming import naming

pytestmark = pytest.mark.heavy

SAMPLERS = ("euler", "ddim", "ddpm", "heun", "dpmpp")


def _vp(ratio: float) -> NoiseLevel:
    return schedule.from_alpha_bar(1 / (1 + ratio**2))


def _noisy_images(start, levels, sampler, **kw):
    steps = sample.steps(dummy, jnp.asarray(start), levels, sampler, **kw)
    return np.stack([np.asarray(step.noisy) for step in steps])


@pytest.mark.parametrize("sampler", ["ddim", "ddpm"])
def test_ddim_and_ddpm_match_diffusers(sampler, monkeypatch):
    noises = iter(GOLDEN["ddpm_noise"])
    monkeypatch.setattr(sample, "normal", lambda keys, shape: next(noises))
    levels = schedule.ddpm_levels(schedule.linear_betas(), len(GOLDEN[sampler]))
    images = _noisy_images(GOLDEN["start"], levels, sampler, keys=sample.image_keys(0, 2))
    np.testing.assert_allclose(images, GOLDEN[sampler], atol=1e-5)


@pytest.mark.parametrize(
    ("name", "sampler", "level"),
    [
        ("dpmpp", "dpmpp", _vp),
        ("dpmpp_flow", "dpmpp", lambda sigma: schedule.from_flow(1 - sigma)),
        ("euler_flow", "euler", lambda sigma: schedule.from_flow(1 - sigma)),
        ("heun", "heun", lambda sigma: schedule.from_flow(1 - sigma)),
        ("euler_sigma", "euler", schedule.from_sigma),
    ],
)
def test_samplers_match_diffusers(name, sampler, level):
    sigmas = GOLDEN[f"{name}_sigmas"]
    levels = [level(float(sigma)) for sigma in sigmas]
    start = GOLDEN["start"] * (sigmas[0] if name == "euler_sigma" else 1)
    images = _noisy_images(start, levels, sampler)
    np.testing.assert_allclose(images, GOLDEN[name], rtol=1e-5, atol=1e-5)


def test_noise_levels_match_diffusers():
    karras = GOLDEN["euler_sigma_sigmas"]
    ours = schedule.karras_levels(len(karras) - 1, karras[-2], karras[0])
    np.testing.assert_allclose([level.sigma for level in ours], karras, rtol=1e-4)
    shifted = [level.sigma for level in schedule.flow_levels(4, shift=3.0)]
    np.testing.assert_allclose(shifted, [1, 9 / 10, 3 / 4, 1 / 2, 0])


def _exact_denoiser(z, level):
    """Predict optimally for normally distributed pixels of mean 0.5 and deviation 0.3."""
    gain = level.alpha * 0.09 / (level.alpha**2 * 0.09 + level.sigma**2)
    return 0.5 + gain * (z - 0.5 * level.alpha)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_every_sampler_samples_the_distribution(sampler):
    """With the optimal network and many steps, the result has the distribution of the images."""
    keys = sample.image_keys(0, 64)
    levels = schedule.ddpm_levels(schedule.cosine_betas(), 100)
    levels = [level for level in levels if level.alpha > 0.01]
    z = sample.normal(keys, (8, 8, 3))
    images = np.asarray(sample.sample(_exact_denoiser, z, levels, sampler, keys=keys))
    assert images.mean() == pytest.approx(0.5, abs=0.02)
    assert images.std() == pytest.approx(0.3, abs=0.02)


def test_errors_decrease_with_the_order_of_the_sampler():
    """For normally distributed pixels, the exact flow maps noise e to 0.5 + 0.3 e."""
    z = sample.normal(sample.image_keys(1, 2), (4, 4, 3))

    def error(sampler: str, count: int) -> float:
        result = sample.sample(_exact_denoiser, z, schedule.flow_levels(count), sampler)
        return float(jnp.abs(result - (0.5 + 0.3 * z)).max())

    for sampler, gain in (("euler", 1.8), ("heun", 3.4)):
        assert error(sampler, 16) > gain * error(sampler, 32)
        assert error(sampler, 32) > gain * error(sampler, 64)
    for sampler in ("heun", "dpmpp"):
        assert error(sampler, 32) < error("euler", 32) / 2


def test_equal_noise_ratios_in_all_notations_give_equal_images():
    """The same ratios as a flow, with variance 1, or with sigma give the same image."""
    flow = schedule.flow_levels(8)[1:]
    z = sample.normal(sample.image_keys(0, 2), (4, 4, 3))
    for sampler in ("ddim", "heun", "dpmpp"):
        images = []
        for convert in (
            lambda level: level,
            lambda level: schedule.from_alpha_bar(schedule.to_alpha_bar(level)),
            lambda level: schedule.from_sigma(level.ratio),
        ):
            levels = [convert(level) for level in flow]
            start = schedule.rescale(z, flow[0], levels[0])
            images.append(np.asarray(sample.sample(dummy, start, levels, sampler)))
        np.testing.assert_allclose(images[1], images[0], atol=2e-5)
        np.testing.assert_allclose(images[2], images[0], atol=2e-5)


def test_sampler_steps_yield_the_noisy_and_the_predicted_image():
    z = sample.normal(sample.image_keys(0, 1), (4, 4, 3))
    levels = schedule.flow_levels(5)
    steps = list(sample.steps(dummy, z, levels, "euler"))
    assert [step.number for step in steps] == [1, 2, 3, 4, 5]
    np.testing.assert_array_equal(steps[0].clean, dummy(z, levels[0]))
    np.testing.assert_array_equal(steps[-1].noisy, steps[-1].clean)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_image_depends_on_its_seed_and_index_only(sampler):
    levels = schedule.flow_levels(4)

    def images(seed: int, count: int) -> np.ndarray:
        keys = sample.image_keys(seed, count)
        z = sample.normal(keys, (4, 4, 3))
        return np.asarray(sample.sample(dummy, z, levels, sampler, keys=keys))

    np.testing.assert_allclose(images(0, 3)[:2], images(0, 2), atol=1e-6)
    assert np.abs(images(0, 1) - images(1, 1)).max() > 0.1
    assert np.abs(images(0, 2)[0] - images(0, 2)[1]).max() > 0.1


def test_guidance_extrapolates_through_the_conditional_prediction():
    with_prompt, without = jnp.array([3.0]), jnp.array([1.0])
    assert [
        float(sample.classifier_free_guidance(with_prompt, without, s)[0]) for s in (0, 1, 2)
    ] == [1, 3, 5]


def test_sampler_with_invalid_arguments_raises():
    z, levels = jnp.zeros((1, 2, 2, 3)), schedule.flow_levels(2)
    for facts, args in (
        (["sampler", "ddim", "'euler2'"], (levels, "euler2")),
        (["levels", 1], (levels[:1], "ddim")),
        (["noise", levels[2], levels[1]], (levels[::-1], "ddim")),
        (["ddpm", "keys"], (levels, "ddpm")),
    ):
        with pytest.raises(ValueError, match=naming(*facts)):
            next(sample.steps(dummy, z, *args))


def test_image_keys_equal_fold_in():
    """The derivation of keys from a seed is documented, so it must not change."""
    expected = jax.random.fold_in(jax.random.key(7), 2)
    assert jnp.array_equal(
        jax.random.key_data(sample.image_keys(7, 3)[2]), jax.random.key_data(expected)
    )
