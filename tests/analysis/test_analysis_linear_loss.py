"""The linear loss with Gaussian gradients: closed form against simulation, and the simulation against torch's own RMSprop."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from hf_v0init.analysis.linear_loss import (
    STARTS,
    LinearLoss,
    choose_measured_steps,
    compute_expected_second_moment,
    draw_start,
    simulate_linear_loss,
)
from hf_v0init.errors import InputError

NOISY = LinearLoss(gradient_mean=0.3, gradient_std=0.4, beta2=0.98)
STEADY = LinearLoss(gradient_mean=0.3, gradient_std=0.01, beta2=0.98, data_scale=3.0)


def test_stationary_value_is_eq_8():
    squares = np.square(0.3 + 0.4 * np.random.default_rng(0).standard_normal(1_000_000))
    assert squares.mean() == pytest.approx(NOISY.stationary, rel=5e-3)


@pytest.mark.parametrize("start", STARTS)
@pytest.mark.parametrize("loss", [NOISY, STEADY], ids=["noisy", "steady"])
def test_the_closed_form_is_what_the_simulation_measures(loss, start):
    run = simulate_linear_loss(loss, start, num_coordinates=2000, num_steps=500)
    assert run.steps == [1, 10, 100, 500]
    expected = [compute_expected_second_moment(loss, start, step) for step in run.steps]
    assert run.second_moments == pytest.approx(expected, rel=0.06)


def test_drifts_and_first_steps():
    """Zero is off by v_inf, and its first step is 1 / sqrt(1 - beta2) in every coordinate; data-driven is off by its scale."""
    runs = {start: simulate_linear_loss(STEADY, start, num_steps=3, num_coordinates=500) for start in STARTS}
    assert runs["zero"].drift == pytest.approx(STEADY.stationary)
    assert runs["zero"].updates[0] == pytest.approx(1 / math.sqrt(0.02))
    assert runs["data-driven"].drift == pytest.approx(2 * STEADY.stationary, rel=1e-3)
    level = LinearLoss(0.3, 0.0)
    assert simulate_linear_loss(level, "data-driven", num_steps=3).updates == pytest.approx([1.0] * 2)


@pytest.mark.parametrize("start", STARTS)
def test_simulation_is_torchs_rmsprop(start):
    coordinates, steps = 50, 20
    run = simulate_linear_loss(NOISY, start, num_steps=steps, num_coordinates=coordinates)
    generator = np.random.default_rng(0)
    theta = nn.Parameter(torch.zeros(coordinates, dtype=torch.float64))
    optimizer = torch.optim.RMSprop([theta], lr=0.1, alpha=NOISY.beta2, eps=0.0)
    v0 = torch.from_numpy(draw_start(NOISY, start, coordinates, generator))
    optimizer.state[theta] = {"step": torch.tensor(0.0), "square_avg": v0}
    sizes = {}
    for step in range(1, steps + 1):
        before = theta.detach().clone()
        theta.grad = torch.from_numpy(0.3 + 0.4 * generator.standard_normal(coordinates))
        optimizer.step()
        sizes[step] = float((theta.detach() - before).square().mean().sqrt()) / 0.1
    assert run.updates == pytest.approx([sizes[step] for step in run.steps])


def test_measured_steps_are_spaced_evenly_in_the_logarithm():
    assert choose_measured_steps(5000) == [1, 10, 100, 1000, 5000]
    assert choose_measured_steps(1) == [1]


@pytest.mark.parametrize("options", [{"beta2": 1.0}, {"gradient_mean": 0.0, "gradient_std": 0.0}])
def test_bad_input_is_refused(options):
    with pytest.raises(InputError):
        LinearLoss(**options)
