"""The first steps with every supported optimizer: v0 at step 1, over K steps, and decaying linearly."""

import copy

import pytest
import torch
from linear_decay import factor
from optimizer_cases import CASES, make_gradients, make_parameter, name_of, quiet_and_eager, step, write

from hf_v0init import InputError, attach_v0, read_second_moment
from hf_v0init.method.strategies import compute_random_v0_mean
from hf_v0init.second_moment.state import SecondMoment
from hf_v0init.sharding.draws import draw_standard_normal_

K = 4


def read_counters(optimizer) -> list[dict]:
    """What the groups count: all but parameters, states kept there and the learning rate."""
    left_out = ("params", "param_names", "state", "lr")
    return [{k: copy.deepcopy(v) for k, v in group.items() if k not in left_out} for group in optimizer.param_groups]


def step_at(optimizer, parameter, gradient, rate) -> None:
    for group in optimizer.param_groups:
        group["lr"] = rate if not isinstance(group["lr"], torch.Tensor) else group["lr"].fill_(rate)
    step(optimizer, parameter, gradient)


def takes_linear_decay(optimizer) -> bool:
    try:
        SecondMoment(optimizer).require_linear_decay()
    except InputError:
        return False
    return True


OF_OTHER_SQUARES = ("AdaBelief", "GrokAdamW", "RAdamScheduleFree")  # of g - m, of filtered gradients, of others


def skip_where_weights_enter(case) -> None:
    if "weight_decay" in name_of(case):
        pytest.skip("its weights may enter its gradients, and those of the two runs differ")


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_linear_decay_holds_or_is_refused(case):
    """Beside the same optimizer on the same gradients the second moment holds (1 - beta2^t) ((L / t)^2 - 1) s more; after L nothing."""
    skip_where_weights_enter(case)
    parameter, other, length = make_parameter(), make_parameter(), 9
    gradients = make_gradients(length + 3)
    with quiet_and_eager():
        optimizer, plain = case.make([parameter]), case.make([other])
        if not takes_linear_decay(optimizer):
            with pytest.raises(InputError, match=r"v0_decay=linear with .*use v0_decay=beta2"):
                attach_v0(optimizer, None, v0_decay_steps=length)
            assert not optimizer._optimizer_step_pre_hooks
            return
        hook = attach_v0(optimizer, None, v0_decay_steps=length, v0_estimation_steps=K)
        beta2, spread = SecondMoment(optimizer).read_beta2(), 0.0
        for t, gradient in enumerate(gradients, 1):
            rate = 1e-3 * t
            step_at(optimizer, parameter, gradient, rate)
            step_at(plain, other, gradient, rate)
            assert float(optimizer.param_groups[0]["lr"]) == rate
            u = read_second_moment(plain, other).double()
            if t == K:
                spread = factor(u / (1 - beta2**t))
            extra = (1 - beta2**t) * ((length / t) ** 2 - 1) * spread if K < t < length else 0.0
            expected = u + extra
            difference = (read_second_moment(optimizer, parameter).double() - expected).abs().max()
            assert difference <= 1e-5 * float(expected.max()) + 1e-4 * (t >= length) * float(u.max()), t
        assert not hook.is_attached and hook.report.decay_steps == length


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_several_first_steps_by_beta2_hold_or_are_refused(case):
    """After K steps the second moment is that of the same optimizer without a v0, times 1 + scale * beta2^K / (1 - beta2^K)."""
    skip_where_weights_enter(case)
    parameter, other = make_parameter(), make_parameter()
    gradients = make_gradients(K + 2)
    with quiet_and_eager():
        optimizer, plain = case.make([parameter]), case.make([other])
        beta2 = SecondMoment(optimizer).read_beta2()
        if beta2 is None:
            with pytest.raises(InputError, match="no decaying mean of g\\^2"):
                attach_v0(optimizer, None, v0_estimation_steps=K, v0_scale=0.5)
            return
        hook = attach_v0(optimizer, None, v0_estimation_steps=K, v0_scale=0.5)
        counters = []
        for t, gradient in enumerate(gradients, 1):
            before = parameter.detach().clone()
            step_at(optimizer, parameter, gradient, 1e-3)
            step_at(plain, other, gradient, 1e-3)
            if t >= 3 and "RAdamScheduleFree" not in name_of(case):  # whose first steps are none
                assert not torch.equal(parameter, before)  # no step is lost
            counters.append(read_counters(optimizer) == read_counters(plain))
            if t == K and takes_linear_decay(optimizer) and not any(name in name_of(case) for name in OF_OTHER_SQUARES):
                expected = read_second_moment(plain, other) * (1 + 0.5 * beta2**K / (1 - beta2**K))
                torch.testing.assert_close(read_second_moment(optimizer, parameter), expected, rtol=1e-4, atol=1e-20)
        assert all(counters) and not hook.is_attached and hook.report.estimation_steps == K


@pytest.mark.parametrize("strategy", ["random", "first_gradient", "data_driven"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_one_step_strategies_lose_no_step(case, strategy):
    parameter, other = make_parameter(), make_parameter()
    (gradient,) = make_gradients(1)
    with quiet_and_eager():
        optimizer, fresh = case.make([parameter]), case.make([other])
        steps = attach_v0(optimizer, None, strategy, v0_scale=2.0, v0_seed=3)
        seen = []
        steps.on_written = lambda _: seen.append(read_second_moment(optimizer, parameter).clone())
        step_at(optimizer, parameter, gradient, 1e-2)
        v0 = 2.0 * gradient.square()
        if strategy == "random":
            v0 = torch.empty_like(gradient)
            draw_standard_normal_(
                v0, name="group 0, parameter 0", seed=3, full_shape=v0.shape, offset=(0, 0),
                transform=lambda z: z.square_().mul_(compute_random_v0_mean(v0.shape, 2.0)),
            )  # fmt: skip
            stored = seen[0].float()  # of codes, where these are kept
            ratio = (stored / gradient.square()).flatten()[::2].median().item()
            assert steps.report.measured_ratio == pytest.approx(ratio, rel=1e-6)
        write(fresh, other, v0)
        assert torch.equal(seen[0], read_second_moment(fresh, other))
        step_at(fresh, other, gradient, 1e-2)
    assert torch.equal(parameter, other) and not steps.is_attached
