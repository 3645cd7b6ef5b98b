"""The pass against one-sample-at-a-time fp64 gradients, and what it must leave alone."""

import random

import numpy as np
import pytest
import torch
from reference import per_sample_gradients
from torch import nn

from hf_v0init.errors import InputError
from hf_v0init.estimation.statistics import (
    PassCounts,
    StatisticsBatch,
    compute_grad_sq_mean_,
    make_sum_visitor,
    visit_gradients,
)


class Regression(nn.Module):
    """Two layers with everything that could be disturbed: dropout, BatchNorm, a shared weight, a frozen one."""

    def __init__(self, dropout: float = 0.0, batch_norm: bool = False):
        super().__init__()
        self.first = nn.Linear(5, 5)
        self.norm = nn.BatchNorm1d(5) if batch_norm else nn.Identity()
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(5, 1)
        self.frozen = nn.Linear(5, 5)
        self.frozen.requires_grad_(False)

    def forward(self, x):
        x = torch.tanh(self.first(self.first(x)))  # used twice, as tied weights are
        return self.last(self.frozen(self.dropout(self.norm(x))))


def mean_loss(model, inputs):
    x, y = inputs
    return (model(x) - y).square().mean()


def make_data(num: int, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(num, 5, generator=generator), torch.randn(num, 1, generator=generator)


def run(model, x, y, sizes):
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    sums = {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in named}
    cut = torch.arange(len(x)).split(sizes)
    batches = [StatisticsBatch((x[i], y[i]), len(i), k) for k, i in enumerate(cut)]
    counts = visit_gradients(model, named, batches, mean_loss, make_sum_visitor(sums))
    return named, sums, counts


def test_single_samples_give_the_exact_mean_square():
    torch.manual_seed(0)
    model = Regression()
    x, y = make_data(30)
    exact = per_sample_gradients(model, list(zip(x.split(1), y.split(1), strict=True)), mean_loss)
    named, sums, counts = run(model, x, y, [1] * 30)
    assert (counts.num_samples, counts.num_batches) == (30, 30)
    for name, p in named:
        estimate = compute_grad_sq_mean_(*sums[p], counts, batch_size=1)
        torch.testing.assert_close(estimate.double(), exact[name].square().mean(0), rtol=1e-5, atol=1e-12)
        torch.testing.assert_close(sums[p][0].double(), exact[name].mean(0), rtol=1e-4, atol=1e-7)


def test_batches_estimate_the_per_sample_mean_square_without_bias():
    """1,200 random cuts of the same samples into uneven batches average to the per-sample value."""
    torch.manual_seed(0)
    model = Regression()
    x, y = make_data(23)
    exact = per_sample_gradients(model, list(zip(x.split(1), y.split(1), strict=True)), mean_loss)["last.weight"]
    per_sample = exact
    sizes = [4, 4, 4, 4, 4, 3]
    generator = torch.Generator().manual_seed(1)
    total, repeats = torch.zeros(5, dtype=torch.float64), 1200
    for _ in range(repeats):
        order = torch.randperm(23, generator=generator)
        means = [per_sample[i].mean(0) for i in order.split(sizes)]
        grad_sum = sum(n * g for n, g in zip(sizes, means, strict=True)).flatten()
        grad_sq_sum = sum(n * g * g for n, g in zip(sizes, means, strict=True)).flatten()
        total += compute_grad_sq_mean_(grad_sum.clone(), grad_sq_sum.clone(), PassCounts(23, 6), 1.0)
    # a finite population of 23: its variance with n - 1 enters, E[g^2] with n
    expected = per_sample.square().mean(0).flatten()
    torch.testing.assert_close(total / repeats, expected, rtol=0.05, atol=0)


@pytest.mark.parametrize("batch_size", [2, 8, 64])
def test_per_step_is_the_mean_square_of_the_gradient_of_that_batch(batch_size):
    """i.i.d. g ~ N(mu, s^2): E[g_B^2] = mu^2 + s^2 / B."""
    generator = torch.Generator().manual_seed(0)
    g = 0.5 + 2.0 * torch.randn(50_000, generator=generator, dtype=torch.float64)
    batches = g.view(-1, 4).mean(1)
    grad_sum, grad_sq_sum = 4 * batches.sum(), 4 * batches.square().sum()
    estimate = compute_grad_sq_mean_(grad_sum.view(1), grad_sq_sum.view(1), PassCounts(50_000, 12_500), batch_size)
    assert estimate.item() == pytest.approx(0.25 + 4.0 / batch_size, rel=0.05)


def test_a_step_larger_than_the_sample_gives_the_squared_mean_and_never_less_than_zero():
    grad_sum, grad_sq_sum = torch.tensor([10.0, 0.0]), torch.tensor([30.0, 5.0])
    estimate = compute_grad_sq_mean_(grad_sum, grad_sq_sum, PassCounts(10, 10), batch_size=1000)
    assert estimate.tolist() == [1.0, 0.0]


def test_one_batch_of_several_samples_is_refused():
    with pytest.raises(InputError, match=r"the 8 samples .* fit into one batch.*batches of at most 4"):
        compute_grad_sq_mean_(torch.ones(1), torch.ones(1), PassCounts(8, 1), 1)


def snapshot(model):
    return {
        "state": {k: v.clone() for k, v in model.state_dict().items()},
        "modes": [m.training for m in model.modules()],
        "grads": [None if p.grad is None else p.grad.clone() for p in model.parameters()],
        "requires_grad": [p.requires_grad for p in model.parameters()],
        "hooks": [len(p._post_accumulate_grad_hooks or {}) for p in model.parameters()],
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state()[1].copy(),
    }


def assert_same(before, after):
    assert all(torch.equal(v, after["state"][k]) for k, v in before["state"].items())
    for key in ("modes", "requires_grad", "hooks", "python"):
        assert before[key] == after[key], key
    for a, b in zip(before["grads"], after["grads"], strict=True):
        assert (a is None and b is None) or torch.equal(a, b)
    assert torch.equal(before["torch"], after["torch"])
    assert np.array_equal(before["numpy"], after["numpy"])


@pytest.mark.parametrize("fails", [None, ValueError, KeyboardInterrupt])
def test_the_pass_leaves_everything_as_it_was(fails):
    torch.manual_seed(0)
    model = Regression(dropout=0.5, batch_norm=True)
    model.first.eval()  # a user's own mixture of modes
    mean_loss(model, make_data(8)).backward()  # a user's own gradients
    before = snapshot(model)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    seen = []

    def visit(parameter, gradient, num_samples):
        seen.append(num_samples)
        random.random(), np.random.rand(), torch.rand(1)
        if fails is not None and len(seen) == 7:
            raise fails("stop here")

    x, y = make_data(24)
    batches = [StatisticsBatch((x[i], y[i]), len(i), k) for k, i in enumerate(torch.arange(24).split(6))]
    if fails is None:
        visit_gradients(model, named, batches, mean_loss, visit)
        # first.*, norm.*, last.* a batch (the weight used twice is visited once)
        assert seen == [6] * (len(named) * 4)
    else:
        with pytest.raises(fails, match="stop here"):
            visit_gradients(model, named, batches, mean_loss, visit)
    assert_same(before, snapshot(model))


def test_dropout_of_a_batch_does_not_depend_on_who_runs_it():
    torch.manual_seed(0)
    model = Regression(dropout=0.5)
    x, y = make_data(24)
    batches = [StatisticsBatch((x[i], y[i]), len(i), k) for k, i in enumerate(torch.arange(24).split(4))]
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]

    def sums_of(some):
        sums = {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in named}
        visit_gradients(model, named, some, mean_loss, make_sum_visitor(sums), seed=5)
        return sums

    whole, even, odd = sums_of(batches), sums_of(batches[::2]), sums_of(batches[1::2])
    for _, p in named:
        for i in (0, 1):
            torch.testing.assert_close(even[p][i] + odd[p][i], whole[p][i], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_names_its_batch(bad):
    model = Regression()
    x, y = make_data(12)
    y[9] = bad
    with pytest.raises(InputError, match=r"loss is (nan|inf) in batch 2 .*4 samples"):
        run(model, x, y, [4, 4, 4])


def test_bf16_gradients_are_summed_in_fp32():
    """1,250 equal gradients of 1/3: a bf16 running sum stops growing at 128, the fp32 one is right."""
    p = nn.Parameter(torch.zeros(4, 4, dtype=torch.bfloat16))
    sums = {p: (torch.zeros(4, 4), torch.zeros(4, 4))}
    visit = make_sum_visitor(sums)
    g = torch.full((4, 4), 1 / 3, dtype=torch.bfloat16)
    for _ in range(1250):
        visit(p, g, 1)
    torch.testing.assert_close(sums[p][0], torch.full((4, 4), 1250 * g[0, 0].item()), rtol=1e-5, atol=0)
    torch.testing.assert_close(sums[p][1], torch.full((4, 4), 1250 * g[0, 0].item() ** 2), rtol=1e-4, atol=0)


def test_a_gradient_in_two_parts_is_refused():
    """Reentrant checkpointing with a shared module runs two backward passes into the same weight."""
    from torch.utils.checkpoint import checkpoint

    model = Regression()

    def loss(module, inputs):
        x, y = inputs
        x = x.requires_grad_(True)
        h = checkpoint(module.first, x, use_reentrant=True)
        h = checkpoint(module.first, h, use_reentrant=True)
        return (module.last(h) - y).square().mean()

    x, y = make_data(8)
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    with pytest.raises(InputError, match="use_reentrant"):
        visit_gradients(model, named, [StatisticsBatch((x, y), 8, 0)], loss, lambda *_: None)
    assert all(p.grad is None for p in model.parameters())


def test_no_parameter_sized_buffer_beyond_the_two_sums():
    """Bytes of live tensors of the parameter's size while a batch is visited: weight, two sums, the one gradient."""
    import gc

    size = 301
    model = nn.Linear(size, size, bias=False)
    named = list(model.named_parameters())
    sums = {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in named}
    visitor = make_sum_visitor(sums)
    alive = []

    def visit(parameter, gradient, num_samples):
        visitor(parameter, gradient, num_samples)
        gc.collect()
        storages = {
            o.untyped_storage().data_ptr()
            for o in gc.get_objects()
            if isinstance(o, torch.Tensor) and o.numel() == size * size
        }
        alive.append(len(storages))

    x = torch.randn(4, size)
    batches = [StatisticsBatch((x, x), 4, k) for k in range(3)]
    visit_gradients(model, named, batches, lambda m, i: (m(i[0]) - i[1]).square().mean(), visit)
    assert alive == [4, 4, 4]
    assert model.weight.grad is None
