"""The paper's v0 in an optimizer: the mean of squares of single samples, all of it or nothing."""

import pytest
import torch
from reference import per_sample_gradients
from torch import nn

from hf_v0init import InputError, V0InitArguments, read_second_moment
from hf_v0init.estimation.batches import SampleBatch
from hf_v0init.initialization.per_sample import write_per_sample_v0
from hf_v0init.second_moment.state import SecondMoment

ROWS = torch.randn(9, 1, 3, generator=torch.Generator().manual_seed(1))


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2))


def write(optimizer, model, rows=ROWS, **settings):
    plan = V0InitArguments(v0_init="data_driven", v0_estimator="per_sample", **settings).resolve()
    batches = [SampleBatch(row, 1, k) for k, row in enumerate(rows)]
    return write_per_sample_v0(
        optimizer,
        model,
        plan,
        batches,
        lambda x: model(x).square().mean(),
        seed=4,
        batch_size=1,
        effective_batch_size=3,
    )


def compute_expected(model) -> dict[str, torch.Tensor]:
    gradients = per_sample_gradients(model, ROWS, lambda model, row: model(row).square().mean())
    return {name: g.square().mean(0).float() for name, g in gradients.items() if g.dim() > 2}


def test_v0_is_the_scaled_mean_square_and_all_else_starts_at_zero():
    model = make_model()
    expected, optimizer = compute_expected(model), torch.optim.AdamW(model.parameters())
    report = write(optimizer, model, v0_scale=8.0)
    for name, p in model.named_parameters():
        v0 = read_second_moment(optimizer, p)
        assert (v0 is None) == (name not in expected)
        if v0 is not None:
            assert set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"}
            assert not optimizer.state[p]["exp_avg"].any()
            torch.testing.assert_close(v0, 8.0 * expected[name], rtol=1e-5, atol=1e-12)
    assert report.measured_ratio > 8.0
    assert (report.scale, report.seed, report.num_samples, report.estimator) == (8.0, 4, 9, "per_sample")
    with pytest.raises(InputError, match="parameters already have optimizer state"):
        write(optimizer, model)


def test_each_group_by_its_own_beta2():
    model = make_model()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "betas": (0.9, 0.9)}]
    optimizer, expected = torch.optim.AdamW(groups), compute_expected(model)
    plan = V0InitArguments(v0_init="data_driven", v0_estimator="per_sample", v0_decay_steps=20).resolve()
    write(optimizer, model, v0_decay_steps=20)
    for name, beta2 in (("0.weight", 0.999), ("2.weight", 0.9)):
        v0 = read_second_moment(optimizer, model.get_parameter(name))
        torch.testing.assert_close(v0, plan.get_scale(beta2) * expected[name], rtol=1e-5, atol=1e-12)


@pytest.mark.parametrize("optimizer_class", [torch.optim.AdamW, torch.optim.Adagrad])
def test_a_gradient_that_is_not_finite_is_refused_and_nothing_is_written(optimizer_class):
    model = make_model()
    model[2].weight.register_hook(lambda gradient: gradient * float("nan"))
    optimizer = optimizer_class(model.parameters())
    with pytest.raises(InputError, match=r"'2\.weight' is not finite"):
        write(optimizer, model)
    assert SecondMoment(optimizer).is_untouched()
