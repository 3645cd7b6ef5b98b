"""Measuring over K steps with every supported optimizer: three steps that change nothing, then the first step from v0."""

import copy

import pytest
import torch
from optimizer_cases import CASES, make_gradients, make_parameter, name_of, quiet_and_eager, write

from hf_v0init import attach_v0
from hf_v0init.initialization.strategies import compute_random_v0_
from hf_v0init.second_moment.state import read_second_moment
from hf_v0init.sharding.draws import draw_standard_normal_

K = 4
RATES = (1e-3, 4e-3, 2e-2, 5e-3, 1e-3)  # as a scheduler would set them


def read_counters(optimizer) -> list[dict]:
    """What the groups count: all but parameters, states kept there and the learning rate."""
    left_out = ("params", "param_names", "state", "lr")
    return [{k: copy.deepcopy(v) for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]


def step_at(optimizer, parameter, gradient, rate) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate if not isinstance(group["lr"], torch.Tensor) else group["lr"].fill_(rate)
    parameter.grad = gradient.clone()
    optimizer.step()


def set_training(optimizer) -> None:
    if hasattr(optimizer, "train"):
        optimizer.train()


def sum_squares(gradients) -> torch.Tensor:
    total = torch.zeros_like(gradients[0])
    for g in gradients:
        total.addcmul_(g, g)
    return total


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_the_first_real_step_is_that_of_a_fresh_optimizer_from_this_v0(case):
    parameter, other = make_parameter(), make_parameter()
    gradients = make_gradients(K + 1)
    with quiet_and_eager():
        optimizer, fresh = case.make([parameter]), case.make([other])
        steps = attach_v0(optimizer, None, "data_driven", v0_estimation_steps=K, v0_scale=0.5)
        set_training(optimizer)
        set_training(fresh)
        start, counters = parameter.detach().clone(), read_counters(optimizer)
        for number in range(K - 1):
            step_at(optimizer, parameter, gradients[number], RATES[number])
            assert torch.equal(parameter, start) and parameter.grad is None
            assert read_counters(optimizer) == counters
            assert optimizer.param_groups[0]["lr"] == RATES[number]
            assert steps.is_waiting and steps.num_measured == number + 1
        write(fresh, other, 0.5 / K * sum_squares(gradients[:K]))
        v0, seen = read_second_moment(fresh, other).clone(), []
        steps.observers.append(lambda: seen.append(read_second_moment(optimizer, parameter).clone()))
        for number in (K - 1, K):
            step_at(optimizer, parameter, gradients[number], RATES[number])
            step_at(fresh, other, gradients[number], RATES[number])
            assert torch.equal(parameter, other)
        assert not steps.is_attached
        assert torch.equal(seen[0], v0)  # quantised ones too: the same codes
        assert torch.equal(read_second_moment(optimizer, parameter), read_second_moment(fresh, other))
        assert read_counters(optimizer) == read_counters(fresh)


@pytest.mark.parametrize("strategy", ["random", "first_gradient"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_step_strategies_lose_no_step(case, strategy):
    parameter, other = make_parameter(), make_parameter()
    (gradient,) = make_gradients(1)
    with quiet_and_eager():
        optimizer, fresh = case.make([parameter]), case.make([other])
        steps = attach_v0(optimizer, None, strategy, v0_scale=2.0, v0_seed=3)
        set_training(optimizer)
        set_training(fresh)
        seen = []
        steps.observers.append(lambda: seen.append(read_second_moment(optimizer, parameter).clone()))
        step_at(optimizer, parameter, gradient, 1e-2)
        v0 = 2.0 * gradient.square()
        if strategy == "random":
            v0 = torch.empty_like(gradient)
            draw_standard_normal_(
                v0, name="group 0, parameter 0", seed=3, full_shape=v0.shape, offset=(0, 0),
                transform=lambda z: compute_random_v0_(z, v0.shape, 2.0),
            )  # fmt: skip
            ratio = (v0 / gradient.square()).flatten()[::2].median().item()
            assert steps.report.measured_ratio == pytest.approx(ratio, rel=1e-6)
        write(fresh, other, v0)
        assert torch.equal(seen[0], read_second_moment(fresh, other))
        step_at(fresh, other, gradient, 1e-2)
    assert torch.equal(parameter, other) and not steps.is_attached
