"""The toy saddle: its shape, Adam against torch's, and the paper's four final values."""

import math
import random

import pytest
import torch
from torch import nn

from hf_v0init.analysis.saddle import (
    BASE,
    JOIN,
    SADDLE,
    START,
    compute_saddle_gradient,
    compute_saddle_loss,
    run_adam,
    run_saddle,
    run_sgd,
)

STEP = 1e-6


def test_pieces_meet_where_the_paper_says():
    assert pytest.approx(0.3559, abs=5e-5) == JOIN and pytest.approx(-0.1726, abs=5e-5) == BASE
    for join in (JOIN, -JOIN):
        assert compute_saddle_loss(join - 1e-12) == pytest.approx(compute_saddle_loss(join + 1e-12), abs=1e-10)
    # the slopes do not meet: 2 x_s from inside, s from outside
    assert compute_saddle_gradient(JOIN) == pytest.approx(0.5)
    assert compute_saddle_gradient(JOIN - 1e-9) == pytest.approx(0.712, abs=5e-4)


@pytest.mark.parametrize("x", [-1.7, -1.0, -0.6, -0.2, 0.0, 1e-3, 0.3, 0.5, 1.0, 1.5])
def test_gradient_is_the_slope_and_the_loss_is_even(x):
    slope = (compute_saddle_loss(x + STEP) - compute_saddle_loss(x - STEP)) / (2 * STEP)
    assert compute_saddle_gradient(x) == pytest.approx(slope, abs=1e-8)
    assert compute_saddle_loss(x) == pytest.approx(compute_saddle_loss(-x))
    assert compute_saddle_gradient(SADDLE) == 0.0 == compute_saddle_gradient(-SADDLE)


@pytest.mark.parametrize(("v0", "warmup_steps"), [(0.0, 0), (0.0, 100), (0.0, 20), (100.0, 0), (4e-12, 0)])
def test_adam_is_torchs(v0, warmup_steps):
    x = nn.Parameter(torch.tensor(START, dtype=torch.float64))
    optimizer = torch.optim.Adam([x], lr=1.0, betas=(0.9, 0.999), eps=1e-8)
    optimizer.state[x] = {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(x),
        "exp_avg_sq": torch.full_like(x, v0),
    }
    path = [x.item()]
    for step in range(1, 51):
        optimizer.param_groups[0]["lr"] = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        x.grad = torch.tensor(compute_saddle_gradient(x.item()), dtype=torch.float64)
        optimizer.step()
        path.append(x.item())
    assert run_adam(v0, warmup_steps) == pytest.approx(path, rel=1e-6, abs=1e-12)


def test_the_papers_four_final_values():
    vanilla, warmup, random_v0, sgd, _ = run_saddle()
    assert vanilla.final == pytest.approx(-0.96125, abs=1e-5)
    assert warmup.final == pytest.approx(0.01104, abs=1e-5)
    assert random_v0.final == pytest.approx(-9.552e-8, rel=1e-3)
    assert sgd.final == pytest.approx(-1e-6 * 0.998**50, rel=1e-9)  # -9.05e-7
    published = [run.published for run in run_saddle()]
    assert published == ["-0.96", "0.01", "1e-7", "9e-7", None]


def test_first_step_of_vanilla_adam_is_the_learning_rate():
    # 2e-6 / (2e-6 + eps): eps takes half a per cent
    assert run_adam()[1] == pytest.approx(START + 2e-6 / (2e-6 + 1e-8), rel=1e-9)
    # eq. 12: -lr g / sqrt(g^2 + beta2 / (1 - beta2) v0)
    expected = START + 2e-6 / math.sqrt(4e-12 + 999 * 100.0)
    assert run_adam(100.0)[1] == pytest.approx(expected, rel=1e-6)


def test_random_draws_stay_at_the_optimum():
    generator = random.Random(0)
    finals = sorted(abs(run_adam(100.0 * generator.gauss(0.0, 1.0) ** 2)[-1]) for _ in range(200))
    assert finals[100] == pytest.approx(7e-8, rel=0.5) and finals[-1] < 1e-5


def test_data_driven_v0_of_scale_1_is_too_small_here():
    # v0 = (2e-6)^2 shrinks the first step to sqrt(1 - beta2) = 0.03, still 30,000 times the distance to the optimum
    path = run_saddle()[-1].path
    assert path[1] == pytest.approx(math.sqrt(0.001), rel=1e-3)
    assert path[-1] == pytest.approx(0.9036, abs=1e-4)


def test_sgd_at_lr_1_only_changes_sides():
    path = run_sgd(1.0)
    assert path[-1] == START and path[1] == -START


@pytest.mark.parametrize("warmup_steps", [74, 87, 100])
def test_warmups_of_74_to_100_steps_all_give_the_papers_value(warmup_steps):
    assert round(run_adam(warmup_steps=warmup_steps)[-1], 2) == 0.01


def test_other_lengths_have_no_published_value():
    assert all(run.published is None for run in run_saddle(num_steps=20))
    assert [len(run.path) for run in run_saddle(num_steps=20)] == [21] * 5
