import pytest
import torch

from hf_v0init import V0InitArguments
from hf_v0init.method.strategies import (
    compute_fans,
    compute_random_v0_mean,
    is_eligible,
)

# Quantiles of chi^2 with one degree of freedom: the squared normal quantiles of (1 + p) / 2.
CHI2_1_QUANTILES = {0.25: 0.10153, 0.5: 0.45494, 0.75: 1.32330, 0.9: 2.70554, 0.99: 6.63490}


@pytest.mark.parametrize(
    ("shape", "fans"),
    [((), (1, 1)), ((7,), (1, 7)), ((3, 5), (5, 3)), ((8, 4, 3), (12, 24)), ((16, 3, 5, 7), (105, 560))],
)
def test_fans_are_those_of_algorithm_1(shape, fans):
    assert compute_fans(shape) == fans


def test_random_v0_is_scale_over_fans_times_chi_squared():
    z = torch.randn(400, 600, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    v0 = z.square() * compute_random_v0_mean((400, 600), 100.0)
    # moments of c * chi^2_1: mean c, variance 2 c^2; 240,000 draws
    assert v0.mean().item() == pytest.approx(0.1, rel=0.02)
    assert v0.var().item() == pytest.approx(2 * 0.1**2, rel=0.05)
    for probability, quantile in CHI2_1_QUANTILES.items():
        assert (v0 / 0.1).quantile(probability).item() == pytest.approx(quantile, rel=0.05)


def test_twice_the_scale_is_the_squared_xavier_normal_of_the_authors_code():
    shape = (300, 500)
    xavier = torch.nn.init.xavier_normal_(torch.empty(shape), generator=torch.Generator().manual_seed(1))
    z = torch.empty(shape).normal_(generator=torch.Generator().manual_seed(1))
    ours = z.square() * compute_random_v0_mean(shape, 2.0)
    torch.testing.assert_close(ours, xavier.square())
    assert compute_random_v0_mean(shape, 2.0) == 2 / 800
    authors, paper = (V0InitArguments(v0_init="random", v0_preset=name) for name in ("authors_code", "paper"))
    assert authors.resolve().scale == 2 * paper.resolve().scale == 200.0


def test_only_two_or_more_dimensions_get_a_v0():
    for shape, default in (((), False), ((4,), False), ((4, 4), True), ((2, 2, 2), True)):
        assert is_eligible(shape) == default and is_eligible(shape, include_bias_and_norm=True)
