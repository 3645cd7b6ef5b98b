"""How a pass is cut into batches and dealt out: every sample once, as many batches on every process."""

import itertools

import pytest
import torch
from torch import nn

from hf_v0init.estimation.batches import SampledBatches, cut_into_batches, deal_out, has_targets
from hf_v0init.estimation.statistics import StatisticsBatch, make_sum_visitor, visit_gradients


@pytest.mark.parametrize(("num", "size"), itertools.product(range(1, 12), range(1, 6)))
def test_batches_hold_every_sample_once_and_none_is_a_single_one_unless_all_are(num, size):
    batches = cut_into_batches(list(range(num)), size)
    assert list(itertools.chain(*batches)) == list(range(num))
    if size == 1 or num == 1:
        assert [len(b) for b in batches] == [1] * num
    else:
        assert all(2 <= len(b) <= size + 1 for b in batches)
        assert all(len(b) == size for b in batches[:-1])


@pytest.mark.parametrize(("num", "world_size"), itertools.product(range(10), range(1, 5)))
def test_every_batch_counts_once_and_every_process_has_as_many(num, world_size):
    numbers = list(range(3, 3 + num))
    dealt = [deal_out(numbers, rank, world_size) for rank in range(world_size)]
    assert len({len(mine) for mine in dealt}) == 1
    assert sorted(number for mine in dealt for number, counts in mine if counts) == numbers
    assert all(number in numbers for mine in dealt for number, _ in mine)
    assert sum(not counts for mine in dealt for _, counts in mine) == -num % world_size


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ({"labels": torch.tensor([[1, -100], [2, -100]])}, False),  # the first of a row is no target of a causal loss
        ({"labels": torch.tensor([[1, -100], [2, 3]])}, True),
        ({"labels": torch.tensor([-100, -100])}, False),
        ({"labels": torch.tensor([-100, 4])}, True),
        ({"labels": torch.tensor([[-100], [5]])}, True),
        ({"labels": torch.tensor([0.0, 1.0])}, True),
        ({"x": torch.zeros(2)}, True),
        ((torch.zeros(2),), True),
    ],
)
def test_a_batch_without_any_target_is_told(inputs, expected):
    assert has_targets(inputs) is expected


def test_repetitions_and_batches_without_a_loss_are_run_but_neither_counted_nor_summed():
    torch.manual_seed(0)
    model, x = nn.Linear(3, 2), torch.randn(5, 4, 3)
    flags = [(True, True), (False, True), (True, False), (True, True), (False, False)]
    batches = [StatisticsBatch(x[k], 4, k, *both) for k, both in enumerate(flags)]
    sums, run = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in model.parameters()}, []

    def loss(model, inputs):
        run.append(1)
        value = model(inputs).square().mean()
        return value * float("nan") if torch.equal(inputs, x[2]) else value  # as a mean over no label is

    counts = visit_gradients(model, list(model.named_parameters()), batches, loss, make_sum_visitor(sums))
    assert (len(run), counts.num_samples, counts.num_batches, counts.num_skipped) == (5, 8, 2, 4)
    expected, losses = torch.zeros(2, 3), []
    for k in (0, 3):
        value = model(x[k]).square().mean()
        expected += 4 * torch.autograd.grad(value, model.weight)[0].square()
        losses.append(value.item())
    torch.testing.assert_close(sums[model.weight][1], expected, rtol=1e-6, atol=0)
    assert counts.mean_loss == pytest.approx(sum(losses) / 2)
    later = counts + counts
    assert (later.num_samples, later.num_skipped, later.loss_sum) == (16, 8, 2 * counts.loss_sum)


def test_items_of_sampled_batches_say_whether_they_count():
    rows = [{"labels": torch.tensor([1, -100 if k == 2 else k])} for k in range(3)]

    def stack(features):
        return {"labels": torch.stack([f["labels"] for f in features])}

    last = [SampledBatches(rows, stack, [0, 1, 2], 1, seed=0, rank=rank, world_size=2)[1] for rank in (0, 1)]
    assert [(b.index, b.counts, b.has_loss) for b in last] == [(2, True, False), (2, False, False)]
