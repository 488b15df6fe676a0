"""Noise notations and prediction types: identities, and results of diffusers."""

import numpy as np
import pytest

from diffusion import schedule
from diffusion.schedule import NoiseLevel
from tests.diffusion.conftest import GOLDEN
from tests.naming import naming

RANDOM = np.random.default_rng(0)
X, E = RANDOM.standard_normal((2, 3, 4))
LEVELS = [
    *(schedule.from_flow(t) for t in (0.1, 0.5, 0.9)),
    *(schedule.from_alpha_bar(a) for a in (0.01, 0.5, 0.99)),
    *(schedule.from_sigma(s) for s in (0.002, 1.0, 80.0)),
]


@pytest.mark.parametrize("level", LEVELS, ids=str)
@pytest.mark.parametrize("kind", schedule.PREDICTION_TYPES)
def test_every_prediction_type_recovers_image_and_noise(kind, level):
    z = level.alpha * X + level.sigma * E
    output = schedule.target(kind, X, E, level)
    x = schedule.clean(kind, output, z, level)
    np.testing.assert_allclose(x, X, rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(schedule.noise(x, z, level), E, rtol=1e-6, atol=1e-6)


def test_error_names_unknown_prediction_type():
    for call in (schedule.target, schedule.clean):
        with pytest.raises(ValueError, match="'score'"):
            call("score", X, E, NoiseLevel(0.5, 0.5))


@pytest.mark.parametrize("level", LEVELS, ids=str)
def test_conversions_of_a_noise_level_preserve_its_ratio(level):
    for other in (
        schedule.from_flow(schedule.to_flow(level)),
        schedule.from_alpha_bar(schedule.to_alpha_bar(level)),
        schedule.from_sigma(level.ratio),
    ):
        assert other.ratio == pytest.approx(level.ratio)
        z = schedule.rescale(level.alpha * X + level.sigma * E, level, other)
        np.testing.assert_allclose(z, other.alpha * X + other.sigma * E, rtol=1e-9)


def test_velocity_of_a_flow_is_constant():
    """The velocity at t = 0.25 leads from there to t = 0.5 exactly."""
    quarter, half = (schedule.from_flow(t) for t in (0.25, 0.5))
    z = quarter.alpha * X + quarter.sigma * E
    velocity = schedule.target("flow", X, E, quarter)
    np.testing.assert_allclose(z + 0.25 * velocity, half.alpha * X + half.sigma * E)


def test_betas_match_diffusers():
    for name, betas in (
        ("linear", schedule.linear_betas()),
        ("cosine", schedule.cosine_betas()),
    ):
        np.testing.assert_allclose(schedule.alpha_bars(betas), GOLDEN[name], rtol=1e-4, atol=1e-7)


def test_noisy_images_and_velocities_match_diffusers():
    x, e = GOLDEN["picture"], GOLDEN["start"]
    bars = schedule.alpha_bars(schedule.linear_betas())
    for number, step in enumerate(GOLDEN["mixed"]):
        level = schedule.from_alpha_bar(bars[step])
        noisy = level.alpha * x + level.sigma * e
        np.testing.assert_allclose(noisy, GOLDEN["noisy"][number], atol=1e-5)
        velocity = schedule.target("v", x, e, level)
        np.testing.assert_allclose(velocity, GOLDEN["velocity"][number], atol=1e-5)
    for sigma, expected in zip(GOLDEN["mixed_flow"], GOLDEN["flow_noisy"], strict=True):
        level = schedule.from_flow(1 - sigma)
        np.testing.assert_allclose(level.alpha * x + level.sigma * e, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("ours", "theirs"), [("epsilon", "epsilon"), ("x0", "sample"), ("v", "v_prediction")]
)
def test_clean_images_match_diffusers(ours, theirs):
    bars = schedule.alpha_bars(schedule.linear_betas())
    z = GOLDEN["start"]
    x = schedule.clean(ours, 0.3 * z + 0.1, z, schedule.from_alpha_bar(bars[500]))
    np.testing.assert_allclose(x, GOLDEN[theirs], rtol=1e-5, atol=1e-5)


def test_karras_levels_decrease_from_largest_to_zero():
    sigmas = [level.sigma for level in schedule.karras_levels(8)]
    assert sigmas[0] == pytest.approx(80) and sigmas[-2] == pytest.approx(0.002)
    assert sigmas[-1] == 0 and sigmas == sorted(sigmas, reverse=True)


def test_ddpm_levels_with_steps_that_do_not_divide_betas_raise():
    with pytest.raises(ValueError, match=naming("steps", 1000, 7)):
        schedule.ddpm_levels(schedule.linear_betas(), 7)


@pytest.mark.parametrize("t", [0.0, 0.3, 0.8, 0.99])
def test_preconditioned_input_and_target_have_unit_variance(t):
    """At every flow time, the input of the network and the target of its output have variance 1."""
    spread = 0.6
    x, e = RANDOM.standard_normal((2, 200_000))
    x = spread * x
    z = t * x + (1 - t) * e
    c_in, c_skip, c_out = (np.float64(c) for c in schedule.precondition(t, spread))
    assert (c_in * z).var() == pytest.approx(1, rel=0.02)
    assert ((x - c_skip * z) / c_out).var() == pytest.approx(1, rel=0.02)
