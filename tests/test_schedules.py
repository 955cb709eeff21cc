"""Noise schedules against 50-digit arithmetic, the textbook's formulas and the numbers that dxmi/README.md states."""

import json
import math
from dataclasses import fields, replace

import mpmath
import numpy as np
import pytest
import scipy.optimize

from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import (
    NUM_DIFFUSION_STEPS,
    SHAPES,
    SHORTENINGS,
    timestep_subset,
)
from dxmi.diffusion.schedules.ddpm import (
    ancestral_schedule,
    bisect,
    continuous_level,
    continuous_step,
    ddim_schedule,
    forward_levels,
    variances,
)
from dxmi.diffusion.schedules.edm import karras_levels, karras_schedule
from dxmi.diffusion.schedules.registry import SCHEDULES

K = NUM_DIFFUSION_STEPS
ALL = [(method, shape) for method in SHORTENINGS for shape in SHAPES]
BETAS = np.linspace(1e-4, 0.02, K)
LEVELS = np.cumprod(1.0 - BETAS)


@pytest.fixture(autouse=True)
def _fifty_digits():
    with mpmath.workdps(50):
        yield


def exact_levels() -> list[mpmath.mpf]:
    """abar_k as a product, in 50 digits."""
    first, last = mpmath.mpf("1e-4"), mpmath.mpf("0.02")
    levels, product = [], mpmath.mpf(1)
    for k in range(K):
        product *= 1 - (first + k * (last - first) / (K - 1))
        levels.append(product)
    return levels


def exact_continuous_level(step: float) -> mpmath.mpf:
    """delta^(k+1) Gamma(c+1) / Gamma(c-k) with c = (1 - beta_0) / delta, in 50 digits."""
    first, last, k = mpmath.mpf("1e-4"), mpmath.mpf("0.02"), mpmath.mpf(step)
    delta = (last - first) / (K - 1)
    c = (1 - first) / delta
    return delta ** (k + 1) * mpmath.gammaprod([c + 1], [c - k])


def relative_error(value: float, exact: mpmath.mpf) -> float:
    return float(abs(mpmath.mpf(value) / exact - 1))


# ----------------------------------------------------------------------------
# Forward process.


def test_forward_levels_equal_the_product_in_50_digits():
    errors = [relative_error(level, exact) for level, exact in zip(forward_levels(), exact_levels(), strict=True)]
    assert max(errors) < 1e-14


def test_continuous_level_equals_the_product_at_whole_steps():
    """Float64 lgamma of 5e4 loses 1e-10; float32 would lose 1e-2."""
    errors = [relative_error(continuous_level(k), exact) for k, exact in enumerate(exact_levels())]
    assert max(errors) < 4e-10


@pytest.mark.parametrize("step", [0.25, 1.5, 99.9, 500.5, 998.75])
def test_continuous_level_equals_the_gamma_function_between_steps(step):
    assert relative_error(continuous_level(step), exact_continuous_level(step)) < 4e-10


@pytest.mark.parametrize("step", [0.25, 1.5, 99.9, 500.5, 998.75])
def test_continuous_step_inverts_the_exact_level(step):
    """1e-6 of a step is what 1e-10 of a level amounts to where beta is 1e-4."""
    assert continuous_step(float(exact_continuous_level(step))) == pytest.approx(step, abs=2e-6)


def test_continuous_step_is_clipped_to_the_first_and_last_step():
    assert continuous_step(1.0) == 0.0
    assert continuous_step(1e-9) == K - 1


# ----------------------------------------------------------------------------
# Shortening: invariants that hold for every method, shape and T.


@pytest.mark.parametrize(("method", "shape"), ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 29])
@pytest.mark.parametrize("kappa", [0.0, 0.5, 1.0])
def test_a_perfect_denoiser_keeps_the_marginals(method, shape, num_steps, kappa):
    """If x_t = sqrt(g) x + sqrt(1-g) eps and the network gives eps, x_{t+1} has mean sqrt(g') x and variance 1-g'."""
    s = shorten(SCHEDULES.config(method, num_steps=num_steps, shape=shape, kappa=kappa, final_sigma=0.0))
    g, g_next = s.level[:-1], s.level[1:]
    np.testing.assert_allclose(s.signal_scale * np.sqrt(g), np.sqrt(g_next), rtol=1e-14)
    variance = (s.signal_scale * np.sqrt(1.0 - g) + s.output_scale) ** 2 + s.sigma**2
    # The two terms cancel against each other in the last step, where they are as large as signal_scale.
    np.testing.assert_allclose(variance, 1.0 - g_next, atol=1e-14 * s.signal_scale.max() ** 2)


@pytest.mark.parametrize(("method", "shape"), ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 29])
def test_levels_rise_to_one_and_diffusion_steps_match_them(method, shape, num_steps):
    s = shorten(SCHEDULES.config(method, num_steps=num_steps, shape=shape))
    assert s.num_steps == num_steps
    assert [len(table) for table in (s.timestep, s.signal_scale, s.output_scale, s.sigma, s.eta)] == [num_steps] * 5
    assert s.level[-1] == 1.0
    assert (np.diff(s.level) > 0.0).all()
    assert (np.diff(s.timestep) < 0.0).all()
    for step, level in zip(s.timestep, s.level[:-1], strict=True):
        assert relative_error(level, exact_continuous_level(step)) < 2e-8  # a root to 1e-12 where the level is 4e-5


@pytest.mark.parametrize(("method", "shape"), ALL)
@pytest.mark.parametrize("num_steps", [1, 2, 4, 5, 10, 29])
def test_eta_is_the_variance_that_the_matching_forward_step_adds(method, shape, num_steps):
    """In generation order the levels are gbar_T .. gbar_0, and 1 - eta_s = gbar_s / gbar_{s-1}."""
    s = shorten(SCHEDULES.config(method, num_steps=num_steps, shape=shape))
    np.testing.assert_allclose(np.cumprod((1.0 - s.eta)[::-1])[::-1], s.level[:-1], rtol=1e-10)
    if method == "var":
        np.testing.assert_allclose(s.eta[::-1], variances(num_steps, shape), rtol=1e-10)


@pytest.mark.parametrize(("method", "shape"), ALL)
def test_only_the_last_sigma_is_the_fixed_one(method, shape):
    near, far = (
        shorten(SCHEDULES.config(method, num_steps=5, shape=shape, final_sigma=sigma)) for sigma in (0.001, 0.25)
    )
    assert (near.sigma[-1], far.sigma[-1]) == (0.001, 0.25)
    np.testing.assert_array_equal(near.sigma[:-1], far.sigma[:-1])
    np.testing.assert_array_equal(near.output_scale, far.output_scale)


@pytest.mark.parametrize(("method", "shape"), ALL)
def test_one_step_goes_from_noise_to_the_sample(method, shape):
    """x_1 is the network's estimate of x from the one noisy level: (x_0 - sqrt(1-g) eps) / sqrt(g)."""
    s = shorten(SCHEDULES.config(method, num_steps=1, shape=shape))
    level = LEVELS[800] if (method, shape) == ("step", "quadratic") else LEVELS[-1]
    assert s.level == pytest.approx([level, 1.0], rel=1e-10)
    assert s.signal_scale == pytest.approx([1.0 / np.sqrt(level)], rel=1e-10)
    assert s.output_scale == pytest.approx([-np.sqrt(1.0 - level) / np.sqrt(level)], rel=1e-10)
    assert s.sigma.tolist() == [0.001]
    assert s.eta == pytest.approx([1.0 - level], rel=1e-10)


# ----------------------------------------------------------------------------
# Shortening: numbers.


@pytest.mark.parametrize(("num_steps", "noisiest"), [(4, "0.343"), (5, "0.220"), (10, "0.0208")])
def test_quadratic_var_ends_where_its_cap_puts_it(num_steps, noisiest):
    """eta_i = beta_0 (1 + i v)^2 with v = 0.95 / (sqrt(beta_0) T); dxmi/README.md states the three products."""
    s = shorten(SCHEDULES.config("var", num_steps=num_steps, shape="quadratic"))
    v = 0.95 / (0.01 * num_steps)
    by_hand = np.prod([1.0 - 1e-4 * (1.0 + i * v) ** 2 for i in range(num_steps)])
    assert s.level[0] == pytest.approx(by_hand, rel=1e-13)
    digits = len(noisiest) - 2
    assert f"{s.level[0]:.{digits}f}" == noisiest


@pytest.mark.parametrize("num_steps", [2, 4, 5, 10, 100])
def test_linear_var_is_linear_and_ends_at_the_last_forward_level(num_steps):
    eta = variances(num_steps, "linear")
    assert eta[0] == 1e-4
    np.testing.assert_allclose(np.diff(eta), (eta[-1] - 1e-4) / (num_steps - 1), rtol=1e-11)
    assert np.prod(1.0 - eta) == pytest.approx(LEVELS[-1], abs=1e-12)


def test_quadratic_var_is_quadratic_and_ends_at_the_last_forward_level_where_the_cap_is_slack():
    eta = variances(30, "quadratic")
    root = np.sqrt(eta / 1e-4)
    np.testing.assert_allclose(root, 1.0 + np.arange(30) * (root[1] - 1.0), rtol=1e-12)
    assert root[1] - 1.0 < 0.95 / (0.01 * 30)
    assert np.prod(1.0 - eta) == pytest.approx(LEVELS[-1], abs=1e-12)


def test_first_sigma_and_eta_of_ten_quadratic_steps():
    s = shorten(SCHEDULES.config("var", num_steps=10, shape="quadratic"))
    assert f"{s.sigma[0]:.4f}" == "0.8372"
    assert f"{s.eta[0]:.4f}" == "0.7482"


def test_linear_subset_is_even_and_quadratic_subset_is_squares():
    assert timestep_subset(4, "linear") == [0, 333, 666, 999]
    assert timestep_subset(5, "quadratic") == [0, 50, 200, 450, 800]
    s = shorten(SCHEDULES.config("step", num_steps=5, shape="quadratic"))
    np.testing.assert_allclose(s.level[:-1], LEVELS[[800, 450, 200, 50, 0]], rtol=1e-13)


# ----------------------------------------------------------------------------
# Reference samplers.


def test_ancestral_schedule_is_the_ddpm_posterior():
    """q(x_{k-1} | x_k, x_0) with x_0 from eps (arXiv 2006.11239, equations 6 and 7), written out from the paper."""
    alpha, abar = 1.0 - BETAS, LEVELS
    abar_before = np.append(1.0, abar[:-1])
    of_x0 = np.sqrt(abar_before) * BETAS / (1.0 - abar)
    of_xk = np.sqrt(alpha) * (1.0 - abar_before) / (1.0 - abar)
    posterior_variance = (1.0 - abar_before) / (1.0 - abar) * BETAS
    s = ancestral_schedule()
    assert s.timestep.tolist() == list(range(999, -1, -1))
    np.testing.assert_allclose(s.signal_scale[::-1], of_xk + of_x0 / np.sqrt(abar), rtol=1e-11)
    np.testing.assert_allclose(s.output_scale[::-1], -of_x0 * np.sqrt(1.0 - abar) / np.sqrt(abar), rtol=1e-10)
    np.testing.assert_allclose(s.sigma[::-1], np.sqrt(posterior_variance), rtol=1e-11)


def test_the_large_variance_is_that_of_the_forward_step_on_the_same_mean():
    """`fixedlarge` of the official code: beta_k instead of the posterior's, and no noise in the last step."""
    small, large = ancestral_schedule(), ancestral_schedule(variance="large")
    np.testing.assert_allclose(large.sigma[:-1], np.sqrt(BETAS[:0:-1]), rtol=1e-11)
    assert large.sigma[-1] == small.sigma[-1] == 0.0
    for table in ("level", "timestep", "signal_scale", "output_scale"):
        assert np.array_equal(getattr(large, table), getattr(small, table))


@pytest.mark.parametrize("num_steps", [2, 5, 10])
def test_respaced_variances_are_those_between_the_levels_that_are_kept(num_steps):
    """Improved DDPM (arXiv 2102.09672, equation 19): beta' = 1 - abar_s / abar_s', beta-tilde' of these levels."""
    small, large = (ancestral_schedule(num_steps, variance) for variance in ("small", "large"))
    g, g_next = LEVELS[small.timestep.astype(int)], np.append(LEVELS[small.timestep.astype(int)][1:], 1.0)
    beta = 1.0 - g / g_next
    np.testing.assert_allclose(large.sigma[:-1] ** 2, beta[:-1], rtol=1e-10)
    np.testing.assert_allclose(small.sigma**2, (1.0 - g_next) / (1.0 - g) * beta, rtol=1e-10, atol=1e-15)


@pytest.mark.parametrize(
    ("num_steps", "expected"),
    [
        (1, [999]),
        (2, [999, 499]),
        (3, [999, 666, 332]),
        (5, [999, 799, 599, 399, 199]),
        (10, [999, 899, 799, 699, 599, 499, 399, 299, 199, 99]),
        (1000, list(range(999, -1, -1))),
    ],
)
def test_reference_samplers_have_the_trailing_steps_of_diffusers(num_steps, expected):
    """`timestep_spacing="trailing"`: np.round(np.arange(1000, 0, -1000 / T)) - 1."""
    diffusers = np.round(np.arange(1000, 0, -1000 / num_steps))[:num_steps] - 1
    for schedule in (ddim_schedule(num_steps), ancestral_schedule(num_steps), ancestral_schedule(num_steps, "large")):
        assert schedule.timestep.tolist() == diffusers.tolist() == expected


@pytest.mark.parametrize("kappa", [0.0, 1.0])
@pytest.mark.parametrize("num_steps", [1, 2, 5])
def test_a_policy_can_take_the_trailing_steps_too(num_steps, kappa):
    schedule = shorten(SCHEDULES.config("step", shape="trailing", num_steps=num_steps, kappa=kappa))
    reference = ddim_schedule(num_steps) if kappa == 0.0 else ancestral_schedule(num_steps)
    assert np.array_equal(schedule.sigma[:-1], reference.sigma[:-1])
    assert np.array_equal(schedule.output_scale, reference.output_scale)
    assert schedule.sigma[-1] == 1e-3


@pytest.mark.parametrize("num_steps", [7, 64, 333, 400, 750, 999])
def test_trailing_steps_are_distinct_and_start_at_the_last(num_steps):
    steps = timestep_subset(num_steps, "trailing")
    assert len(np.unique(steps)) == num_steps
    assert steps[-1] == 999
    assert steps[0] >= 1000 // num_steps - 1


@pytest.mark.parametrize("num_steps", [1, 2, 3, 5, 10, 20])
def test_log_snr_steps_are_the_nearest_to_even_spacing_in_the_log_signal_to_noise_ratio(num_steps):
    """DPM-Solver's uniform lambda: half the log-SNR, from step 999 down, without the least noisy end."""
    log_snr = np.log(LEVELS / (1.0 - LEVELS))
    even = np.linspace(log_snr[-1], log_snr[0], num_steps + 1)[:-1]
    nearest = [int(np.abs(log_snr - value).argmin()) for value in even]
    assert timestep_subset(num_steps, "log_snr") == nearest[::-1]


@pytest.mark.parametrize("num_steps", [100, 500, 987, 999, 1000])
def test_log_snr_steps_are_distinct_however_many_there_are(num_steps):
    steps = timestep_subset(num_steps, "log_snr")
    assert len(steps) == num_steps
    assert steps == sorted(set(steps))
    assert steps[0] >= 0
    assert steps[-1] == 999


@pytest.mark.parametrize(("num_steps", "rho"), [(1, 7.0), (4, 4.0), (10, 7.0)])
def test_references_of_an_edm_model_spend_no_evaluation_on_the_lowest_level(num_steps, rho):
    config = SCHEDULES.config("karras", rho=rho)
    schedule = karras_schedule(config, num_steps, kappa=0.0)
    between = karras_levels(num_steps + 1, config)
    assert schedule.level.tolist() == [*between[:-1], 0.0]
    assert schedule.level[-2] > 2.0 * config.sigma_min


@pytest.mark.parametrize("num_steps", [1, 4, 10, 1000])
def test_ddim_schedule_is_deterministic_ddim(num_steps):
    """x' = sqrt(g') (x - sqrt(1-g) eps) / sqrt(g) + sqrt(1-g') eps (arXiv 2010.02502, equation 12, eta 0)."""
    s = ddim_schedule(num_steps)
    g, g_next = s.level[:-1], s.level[1:]
    np.testing.assert_allclose(g, LEVELS[s.timestep.astype(int)], rtol=1e-13)
    np.testing.assert_allclose(s.signal_scale, np.sqrt(g_next / g), rtol=1e-14)
    output_scale = np.sqrt(1.0 - g_next) - np.sqrt(g_next) * np.sqrt(1.0 - g) / np.sqrt(g)
    np.testing.assert_allclose(s.output_scale, output_scale, rtol=1e-10)
    assert not s.sigma.any()


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("num_steps", "level"), [(1, 0.1), (2, 0.8), (5, 0.3), (10, 0.05)])
def test_var_ends_at_the_level_that_is_asked_for(shape, num_steps, level):
    schedule = shorten(SCHEDULES.config("var", shape=shape, num_steps=num_steps, last_level=level))
    assert schedule.level[0] == pytest.approx(level, rel=1e-9)
    assert schedule.signal_scale.max() <= level**-0.5 * (1.0 + 1e-9)


def test_var_with_its_own_level_is_the_default():
    for shape in SHAPES:
        default = variances(5, shape)
        np.testing.assert_allclose(variances(5, shape, float(LEVELS[-1])), default, rtol=1e-9)


# ----------------------------------------------------------------------------
# Settings.

REFUSED = [
    {"last_level": 0.0},
    {"last_level": 1.0},
    {"last_level": float("nan")},
    {"num_steps": 0},
    {"num_steps": 1001},
    {"shape": "cubic"},
    {"shape": "trailing"},
    {"shape": "log_snr"},
    {"kappa": -0.1},
    {"kappa": 1.1},
    {"kappa": float("nan")},
    {"final_sigma": -0.001},
    {"final_sigma": 1.0},
    {"final_sigma": float("nan")},
]
REFUSED_KARRAS = [{"rho": 0.5}, {"sigma_min": 0.0}, {"sigma_max": float("inf")}]
REFUSED_STEP = [{"shape": "cubic"}, {"num_steps": 0}]
ALL_REFUSED = [
    *(("var", setting) for setting in REFUSED),
    *(("karras", setting) for setting in REFUSED_KARRAS),
    *(("step", setting) for setting in REFUSED_STEP),
]


@pytest.mark.parametrize(("kind", "setting"), ALL_REFUSED, ids=str)
def test_a_bad_setting_is_refused_by_name(kind, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} is "):
        SCHEDULES.config(kind, **setting)


def test_more_squares_than_there_are_distinct_steps_are_refused():
    """(28.28 i / (T-1))^2 at i = 1 is below 1 from T = 30 on, and step 0 would be chosen twice."""
    assert timestep_subset(29, "quadratic")[:2] == [0, 1]
    with pytest.raises(ValueError, match="num_steps is 30"):
        shorten(SCHEDULES.config("step", num_steps=30, shape="quadratic"))


PERTURBED = {"num_steps": 6, "shape": "linear", "kappa": 0.5, "final_sigma": 0.01}
PERTURBED |= {"last_level": 0.5}
PERTURBED |= {"rho": 5.0, "sigma_min": 0.01, "sigma_max": 70.0, "noisy_end": True}
FIELDS = [(kind, own.name) for kind in SCHEDULES.kinds() for own in fields(SCHEDULES.config_class(kind))]


@pytest.mark.parametrize(("kind", "name"), [(kind, name) for kind, name in FIELDS if name != "kind"])
def test_no_field_of_the_schedule_is_dead(kind, name):
    default = SCHEDULES.config(kind)
    changed = replace(default, **{name: PERTURBED[name]})
    assert shorten(default).tree() != shorten(changed).tree()


def test_no_two_kinds_of_schedule_are_one():
    tables = [json.dumps(shorten(SCHEDULES.config(kind)).tree()) for kind in SCHEDULES.kinds()]
    assert len(set(tables)) == len(tables)


@pytest.mark.parametrize("root", [0.0, 1e-9, 0.3, 1.0, 17.0, 499.5, 998.5])
def test_bisection_is_scipys_to_the_bit(root):
    def function(x):
        return math.atan(x - root) + 1e-3 * (x - root)

    assert bisect(function, 0.0, 999.0) == scipy.optimize.bisect(function, 0.0, 999.0, xtol=1e-12)
