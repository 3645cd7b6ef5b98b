"""The linear loss with Gaussian gradients: closed forms against simulation, quadrature, and torch's own optimizers."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_v0init.analysis.linear_loss import (
    STARTS,
    LinearLoss,
    choose_measured_steps,
    compute_drift,
    compute_expected_second_moment,
    compute_rmsprop_step,
    draw_start,
    simulate_linear_loss,
)
from hf_v0init.errors import InputError
from hf_v0init.method.multiplier import compute_multiplier

NOISY = LinearLoss(gradient_mean=0.3, gradient_std=0.4, beta2=0.98, num_samples=200, fans=256)
STEADY = LinearLoss(gradient_mean=0.3, gradient_std=0.01, beta2=0.98, num_samples=200, fans=256, data_scale=3.0)
PURE_NOISE = LinearLoss(gradient_mean=0.0, gradient_std=0.01, beta2=0.99, num_samples=50)


@pytest.fixture(scope="module")
def runs():
    return {
        (loss, start): simulate_linear_loss(loss, start, num_coordinates=20_000, num_steps=500)
        for loss in (NOISY, STEADY, PURE_NOISE)
        for start in STARTS
    }


def test_stationary_value_is_eq_8():
    assert NOISY.stationary == pytest.approx(0.3**2 + 0.4**2)
    squares = np.square(0.3 + 0.4 * np.random.default_rng(0).standard_normal(1_000_000))
    assert squares.mean() == pytest.approx(NOISY.stationary, rel=5e-3)
    assert squares.std() == pytest.approx(NOISY.square_std, rel=5e-3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loss", [NOISY, STEADY, PURE_NOISE], ids=["noisy", "steady", "pure_noise"])
def test_closed_forms_are_what_the_simulation_measures(runs, loss, start):
    run = runs[loss, start]
    assert run.steps == [1, 10, 100, 500]
    # what is left of a random v0, 1e3 v_inf, after 500 steps at beta2 .99 still hides where v settles
    settled = 0.0 if loss is not PURE_NOISE else 0.01
    assert run.drift == pytest.approx(compute_drift(loss, start), rel=0.03 + settled)
    for i, step in enumerate(run.steps):
        assert run.second_moments[i] == pytest.approx(compute_expected_second_moment(loss, start, step), rel=0.03)
        # the squares of the few coordinates that drew next to no v0 have heavy tails
        tolerance = 0.08 if start == "random" and step == 1 else 0.04
        assert run.updates[i] == pytest.approx(compute_rmsprop_step(loss, start, step), rel=tolerance)


@pytest.mark.parametrize("random_scale", [1e-3, 0.25 * 256, 1e4])
def test_random_drift_is_the_mean_over_chi_squared(random_scale):
    loss = LinearLoss(0.3, 0.4, random_scale=random_scale, fans=256)
    v0 = draw_start(loss, "random", 1_000_000, np.random.default_rng(1))
    assert v0.mean() == pytest.approx(random_scale / 256, rel=5e-3)
    assert np.abs(loss.stationary - v0).mean() == pytest.approx(compute_drift(loss, "random"), rel=5e-3)


def test_drifts_of_zero_and_data_driven():
    assert compute_drift(NOISY, "zero") == pytest.approx(0.25)
    # the mean of n squares is off by sqrt(2 / pi) standard deviations of it
    expected = math.sqrt(2 / math.pi) * NOISY.square_std / math.sqrt(200)
    assert compute_drift(NOISY, "data-driven") == pytest.approx(expected)
    # away from scale 1, the scale is what counts
    assert compute_drift(STEADY, "data-driven") == pytest.approx(2 * STEADY.stationary, rel=1e-6)
    exact = LinearLoss(0.3, 0.0, data_scale=1.0)
    assert compute_drift(exact, "data-driven") == 0.0


def test_rmsprop_starts_at_the_inverse_root_and_data_driven_at_the_learning_rate():
    loss = LinearLoss(0.001, 0.01, beta2=0.999)
    assert compute_rmsprop_step(loss, "zero", 1) == pytest.approx(1 / math.sqrt(0.001))
    assert compute_rmsprop_step(loss, "data-driven", 1) == pytest.approx(1.0, rel=2e-3)
    assert compute_rmsprop_step(loss, "zero", 20_000) == pytest.approx(1.0, rel=1e-3)


@pytest.mark.parametrize("step", [1, 10, 300])
def test_with_the_bias_correction_out_a_v0_gives_m(step):
    # the ratio of the RMSprop steps with and without v0 is that of the Adam steps: the correction cancels
    loss = LinearLoss(0.5, 1e-6, beta2=0.98, data_scale=7.0)
    ratio = compute_rmsprop_step(loss, "data-driven", step) / compute_rmsprop_step(loss, "zero", step)
    assert ratio == pytest.approx(compute_multiplier(step, 7.0, 0.98), rel=1e-6)


def test_first_random_step_is_the_double_integral():
    # E[g^2 / (beta2 c X + (1 - beta2) g^2)], X of chi^2_1, on a fine grid of quantiles
    normal = torch.distributions.Normal(0.0, 1.0)
    z = normal.icdf((torch.arange(4000, dtype=torch.float64) + 0.5) / 4000)
    g_sq, v0 = (PURE_NOISE.gradient_std * z).square()[:, None], (PURE_NOISE.random_mean * z.square())[None, :]
    mean = (g_sq / (PURE_NOISE.beta2 * v0 + (1 - PURE_NOISE.beta2) * g_sq)).mean()
    assert compute_rmsprop_step(PURE_NOISE, "random", 1) == pytest.approx(math.sqrt(mean), rel=0.01)


@pytest.mark.parametrize("start", STARTS)
def test_simulation_is_torchs_rmsprop(start):
    coordinates, steps = 50, 20
    run = simulate_linear_loss(
        NOISY, start, num_steps=steps, num_coordinates=coordinates, measured_steps=list(range(1, 21))
    )
    generator = np.random.default_rng(0)
    theta = nn.Parameter(torch.zeros(coordinates, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([theta], lr=0.1, alpha=NOISY.beta2, eps=0.0)
    v0 = torch.from_numpy(draw_start(NOISY, start, coordinates, generator))
    optimizer.state[theta] = {"step": torch.tensor(0.0), "square_avg": v0}
    for step in range(steps):
        gradient = torch.from_numpy(0.3 + 0.4 * generator.standard_normal(coordinates))
        before = theta.detach().clone()
        theta.grad = gradient
        optimizer.step()
        update = (theta.detach() - before) / 0.1
        assert run.updates[step] == pytest.approx(float(update.square().mean().sqrt()), rel=1e-9)
        assert run.second_moments[step] == pytest.approx(float(optimizer.state[theta]["square_avg"].mean()), rel=1e-9)


def test_measured_steps():
    assert choose_measured_steps(1000) == [1, 10, 100, 1000]
    assert choose_measured_steps(500) == [1, 10, 100, 500]
    assert choose_measured_steps(1) == [1]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"gradient_std": -1.0}, "gradient_std=-1"),
        ({"gradient_mean": math.nan}, "gradient_mean=nan"),
        ({"gradient_mean": 0.0, "gradient_std": 0.0}, "no gradient"),
        ({"beta2": 1.0}, "beta2=1"),
        ({"fans": 0}, "fans=0"),
        ({"data_scale": 0.0}, "scale=0"),
    ],
)
def test_settings_out_of_range_are_refused(options, named):
    with pytest.raises(InputError, match=named):
        LinearLoss(**options)


@pytest.mark.parametrize(("options", "named"), [({"start": "ones"}, "ones"), ({"num_steps": 0}, "num_steps=0")])
def test_simulation_refuses_what_it_does_not_know(options, named):
    with pytest.raises(InputError, match=named):
        simulate_linear_loss(NOISY, **({"start": "zero"} | options))
