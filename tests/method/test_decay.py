"""The closed form of the linear decay: what is added before each step makes Adam's own update give the denominator asked for."""

import pytest

from hf_v0init.method.decay import compute_addend, compute_extra_weight, compute_linear_factor


@pytest.mark.parametrize("length", [1, 2, 5, 40])
@pytest.mark.parametrize("beta2", [0.5, 0.9, 0.98, 0.999])
@pytest.mark.parametrize("start", [1, 3, 7])
def test_adams_update_of_what_is_held_is_the_linear_decay(length, beta2, start):
    """For g^2 = 1 throughout, from the parameter's first update on, which is the run's step `start`."""
    v = held = 0.0
    for step in range(start, 60):
        num_updates = step - start + 1
        addend, held = compute_addend(step, length, beta2, num_updates=num_updates, held=held)
        v = beta2 * (v + addend) + (1 - beta2)
        v_hat = v / (1 - beta2**num_updates)
        assert v_hat**-0.5 == pytest.approx(min(1.0, step / length), rel=1e-9)
        assert compute_linear_factor(step, length) == min(1.0, step / length)
        assert held == pytest.approx((1 - beta2**num_updates) * compute_extra_weight(step, length), rel=1e-12)
        if step >= length:
            assert held == 0.0
