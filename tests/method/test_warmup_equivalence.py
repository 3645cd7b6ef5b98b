import math

import pytest
import torch
from optimizer_references import adam

from hf_v0init import InputError, compute_multiplier, compute_scale_for_warmup, compute_steps_to_multiplier
from hf_v0init.method.multiplier import (
    compute_multiplier_table,
    compute_similar_linear_warmup,
    compute_washout_warning,
)


@pytest.mark.parametrize("beta2", [0.9, 0.98, 0.999])
@pytest.mark.parametrize("scale", [0.0, 0.1, 1.0, 100.0])
def test_multiplier_is_the_closed_form(scale, beta2):
    for step in (1, 2, 10, 300, 5000):
        expected = 1 / math.sqrt(1 + scale * beta2**step / (1 - beta2**step))  # as the paper writes it
        assert compute_multiplier(step, scale, beta2) == pytest.approx(expected, rel=1e-9)


def test_multiplier_is_what_adam_does_on_constant_gradient_magnitude():
    """g = +-1, so g^2 = 1 always: |update with v0| / |update without v0| is m(t) exactly."""
    generator = torch.Generator().manual_seed(0)
    gradients = [torch.randint(0, 2, (50,), generator=generator).double() * 2 - 1 for _ in range(60)]
    w = torch.zeros(50)
    with_v0 = adam(w, torch.full((50,), 10.0), gradients, lr=1.0, b2=0.98, eps=0.0)
    without = adam(w, torch.zeros(50), gradients, lr=1.0, b2=0.98, eps=0.0)
    previous = w.double(), w.double()
    for t, ((a, _), (b, _)) in enumerate(zip(with_v0, without, strict=True), start=1):
        step_a, step_b = a - previous[0], b - previous[1]
        previous = a, b
        moved = step_b.abs() > 1e-6
        ratio = (step_a[moved] / step_b[moved]).mean().item()
        assert ratio == pytest.approx(compute_multiplier(t, 10.0, 0.98), rel=1e-6)


@pytest.mark.parametrize(("scale", "beta2", "steps"), [(1, 0.999, 1660), (1, 0.98, 82), (100, 0.98, 300)])
def test_washout_times_worked_out_by_hand(scale, beta2, steps):
    assert compute_steps_to_multiplier(0.9, scale, beta2) == pytest.approx(steps, abs=0.5)


@pytest.mark.parametrize("target", [0.5, 0.9, 0.99])
def test_scale_and_steps_are_inverse(target):
    for steps in (1, 10, 400):
        scale = compute_scale_for_warmup(steps, 0.98, target)
        assert compute_multiplier(steps, scale, 0.98) == pytest.approx(target, rel=1e-9)
        assert compute_steps_to_multiplier(target, scale, 0.98) == pytest.approx(steps, rel=1e-9)


def test_similar_linear_warmup_of_a_whole_washout():
    exact = (4 - 4 * math.log(2)) / -math.log(0.999)
    assert compute_similar_linear_warmup(1.0, 0.999, 10**6) == pytest.approx(exact, rel=1e-3)
    assert compute_similar_linear_warmup(0.0, 0.999, 100) == 0.0


def test_table_holds_the_steps_before_the_end_and_the_end():
    assert list(compute_multiplier_table(1.0, 0.98, 50)) == [1, 10, 50]
    assert list(compute_multiplier_table(1.0, 0.98, 5000)) == [1, 10, 100, 1000, 5000]


def test_warning_only_when_not_washed_out_and_its_remedies_hold():
    assert compute_washout_warning(1.0, 0.98, 83) is None
    text = compute_washout_warning(1.0, 0.98, 82)
    assert "83 steps" in text and "--v0_decay_steps 27 " in text
    scale = compute_scale_for_warmup(27, 0.98)
    assert compute_multiplier(27, scale, 0.98) == pytest.approx(0.9, abs=1e-6)
    assert compute_washout_warning(scale, 0.98, 82) is None
    assert "--v0_decay_steps 27: the 200 given" in compute_washout_warning(5.0, 0.98, 82, asked_for=200)
    assert "--v0_decay_steps 1 " in compute_washout_warning(1e6, 0.98, 2)


def test_impossible_values_are_refused():
    for beta2 in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match="beta2"):
            compute_multiplier(1, 1.0, beta2)
    with pytest.raises(InputError, match="v0_decay_steps=0"):
        compute_scale_for_warmup(0, 0.98)
    with pytest.raises(InputError, match="use at most"):
        compute_scale_for_warmup(10**6, 0.98)


@pytest.mark.parametrize(
    ("scale", "beta2", "max_steps"), [(1.0, 0.98, 40), (10.0, 0.999, 600), (1.0, 0.999, 5000), (0.1, 0.9, 50)]
)
def test_the_similar_linear_warmup_loses_as_much_within_the_run(scale, beta2, max_steps):
    """Summed step by step, the warmup found takes away what v0 does until the run ends, also where it is longer than the run."""
    length = compute_similar_linear_warmup(scale, beta2, max_steps)
    by_v0 = sum(1.0 - compute_multiplier(step, scale, beta2) for step in range(1, max_steps + 1))
    by_warmup = sum(1.0 - min(1.0, (step - 0.5) / length) for step in range(1, max_steps + 1))
    assert by_warmup == pytest.approx(by_v0, rel=0.02, abs=0.6)
