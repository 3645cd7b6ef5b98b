"""How a batch is shared out over processes, on one process: the parts' weighted losses must average to the whole's."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from hf_v0init.estimation.statistics import StatisticsBatch, make_sum_visitor, visit_gradients
from hf_v0init.estimation.together import (
    _choose_probe,
    _Part,
    _Splitter,
    count_row_items,
    cut_rows,
    visit_gradients_together,
)
from hf_v0init.sharding.fsdp import DataShare

VOCAB, WIDTH = 11, 5


def make_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB))


def make_inputs(num_rows: int, length: int = 7) -> dict:
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randint(0, VOCAB, (num_rows, length), generator=generator)
    labels = rows.clone()
    for index in range(num_rows):
        labels[index, length - index % 4 :] = -100
    return {"input_ids": rows, "labels": labels}


def token_loss(model, inputs, num_items=None, skipped=0) -> torch.Tensor:
    logits = model(inputs["input_ids"])[:, : logits_end(inputs, skipped)]
    labels = inputs["labels"][:, skipped:].flatten()
    total = nn.functional.cross_entropy(logits.flatten(0, 1), labels, reduction="sum")
    return total / (labels.ne(-100).sum() if num_items is None else num_items)


def logits_end(inputs, skipped) -> int:
    return inputs["labels"].shape[1] - skipped


def make_splitter(model, loss, part, num_parts, skipped=0) -> _Splitter:
    splitter = _Splitter(model, loss, lambda inputs: None, DataShare(part, num_parts), SimpleNamespace(), 1e-5)
    splitter.skipped_labels = skipped
    return splitter


@pytest.mark.parametrize("num_parts", [2, 3, 4, 8])
@pytest.mark.parametrize("num_rows", [2, 3, 5, 8])
@pytest.mark.parametrize(("with_items", "skipped"), [(True, 0), (False, 0), (False, 1)])
def test_weighted_parts_average_to_the_loss_and_gradient_of_the_whole(num_parts, num_rows, with_items, skipped):
    """Also where there are fewer rows than parts: the empty parts run another's row with weight 0."""
    model, inputs = make_model().double(), make_inputs(num_rows)
    num_items = int(inputs["labels"].ne(-100).sum()) if with_items else None

    def loss(model, inputs, num_items=None):
        return token_loss(model, inputs, num_items, skipped)

    whole = loss(model, inputs, num_items)
    expected = torch.autograd.grad(whole, list(model.parameters()))
    losses, gradients = [], []
    for number in range(num_parts):
        splitter = make_splitter(model, loss, number, num_parts, skipped)
        part, _ = splitter._cut(_Part(inputs, num_items, 1.0, 0), num_rows)
        assert part.number == number
        assert 1 <= len(part.inputs["labels"]) <= -(-num_rows // num_parts)
        losses.append(loss(model, part.inputs, part.num_items) * part.weight)
        gradients.append(torch.autograd.grad(losses[-1], list(model.parameters())))
    torch.testing.assert_close(torch.stack(losses).mean(), whole, rtol=1e-12, atol=0)
    for own, parts in zip(expected, zip(*gradients, strict=True), strict=True):
        torch.testing.assert_close(torch.stack(parts).mean(0), own, rtol=1e-10, atol=1e-15)


def test_a_part_whose_labels_are_all_ignored_has_no_mean_so_the_batch_stays_whole():
    inputs = make_inputs(4)
    inputs["labels"][2:] = -100
    for number in range(2):
        assert make_splitter(make_model(), token_loss, number, 2)._cut(_Part(inputs, None, 1.0, 0), 4)[0] is None
        part, _ = make_splitter(make_model(), token_loss, number, 2)._cut(_Part(inputs, 13, 1.0, 0), 4)
        assert part.num_items == 13


class AloneInStep:
    """The lockstep of a single process."""

    def compute(self, compute_loss):
        loss = compute_loss()
        return loss, float(loss)


def mean_of_rows(model, inputs, num_items=None):
    """Each row's own mean, then the mean over rows: adds up only while all rows have as many items."""
    single = [{key: value[row : row + 1] for key, value in inputs.items()} for row in range(len(inputs["labels"]))]
    return torch.stack([token_loss(model, row) for row in single]).mean()


def coupled(model, inputs, num_items=None):
    """Depends on which rows are in a batch together."""
    return token_loss(model, inputs, num_items) * (1 + model(inputs["input_ids"]).mean(0).square().mean())


@pytest.mark.parametrize(
    ("loss", "with_items", "is_split", "skipped"),
    [
        (token_loss, True, True, 0),
        (token_loss, False, True, 0),
        (lambda model, inputs, num_items=None: token_loss(model, inputs, num_items, 1), False, True, 1),
        (mean_of_rows, False, False, 1),
        (lambda model, inputs, num_items=None: token_loss(model, inputs), True, False, 0),
        (coupled, True, False, 0),
        (coupled, False, False, 1),
    ],
    ids=["sum", "mean", "mean_but_the_first", "mean_of_rows", "ignores_items", "coupled", "coupled_mean"],
)
def test_whether_a_loss_adds_up_is_seen_from_three_rows(loss, with_items, is_split, skipped):
    """Wherever they lie: a process must not need the memory of a whole batch that is shared out over thousands."""
    model, inputs, sizes = make_model().double(), make_inputs(16), []

    def watched(model, inputs, num_items=None):
        sizes.append(len(inputs["labels"]))
        return loss(model, inputs, num_items)

    count = (lambda inputs: int(inputs["labels"].ne(-100).sum())) if with_items else (lambda inputs: None)
    splitter = _Splitter(model, watched, count, DataShare(1, 8), AloneInStep(), 1e-9)
    part = splitter.split(StatisticsBatch(inputs, 16, 0))
    assert len(part.inputs["labels"]) == (2 if is_split else 16)
    assert (splitter.only_whole, splitter.skipped_labels) == (not is_split, skipped)
    assert max(sizes) == 3


@pytest.mark.parametrize("row_items", [[5, 5, 5, 6], [5, 7, 6], [1, 2, 3], [0, 4, 0, 3], [2, 3], [4, 2, 0, 0]])
def test_the_rows_looked_at_tell_means_over_rows_from_means_over_items(row_items):
    first, end, cut = _choose_probe(row_items)
    left, right = row_items[first:cut], row_items[cut:end]
    assert 2 <= end - first <= 3 and left and right
    assert sum(left) / sum(left + right) != len(left) / (end - first)


def test_rows_are_cut_out_of_nested_batches():
    rows = torch.arange(12).view(4, 3)
    batch = {
        "x": rows,
        "names": ["a", "b", "c", "d"],
        "deep": {"y": (rows + 1, rows + 2)},
        "scale": torch.tensor(2.0),
        "k": None,
    }
    cut = cut_rows(batch, 4, 1, 3)
    assert torch.equal(cut["x"], rows[1:3]) and cut["names"] == ["b", "c"]
    assert isinstance(cut["deep"]["y"], tuple) and torch.equal(cut["deep"]["y"][1], rows[1:3] + 2)
    assert cut["scale"] == 2.0 and cut["k"] is None


@pytest.mark.parametrize("odd", [torch.zeros(1, 12), torch.zeros(5), ["a", "b"], (torch.zeros(3),)])
def test_a_batch_with_something_of_another_length_cannot_be_cut(odd):
    assert cut_rows({"x": torch.zeros(4, 3), "odd": odd}, 4, 0, 2) is None


def test_row_items_are_the_labels_that_count():
    labels = torch.tensor([[1, 2, -100], [-100, -100, -100], [4, 5, 6]])
    assert count_row_items({"labels": labels}, 3) == [2, 0, 3]
    assert count_row_items({"labels": labels}, 3, num_skipped=1) == [1, 0, 2]
    assert count_row_items({"labels": torch.tensor([4, 5])}, 2) == [1, 1]
    for inputs in ({"labels": torch.tensor([[0.5], [1.0]])}, {"labels": [[1], [2]]}, {"x": labels}, (labels, labels)):
        assert count_row_items(inputs, 2) == [1, 1]


def test_on_one_process_the_pass_is_the_plain_one_bit_for_bit():
    model = make_model()
    named = list(model.named_parameters())
    batches = [StatisticsBatch(make_inputs(4), 4, index) for index in range(3)]
    sums = [{p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in named} for _ in range(2)]
    plain = visit_gradients(model, named, batches, token_loss, make_sum_visitor(sums[0]), seed=3)
    together = visit_gradients_together(
        model, named, batches, token_loss, make_sum_visitor(sums[1]), share=DataShare(0, 1), seed=3
    )
    assert (together.num_samples, together.num_batches, together.loss_sum) == (12, 3, plain.loss_sum)
    assert together.are_global and not plain.are_global
    for parameter in model.parameters():
        assert all(torch.equal(a, b) for a, b in zip(sums[0][parameter], sums[1][parameter], strict=True))
        assert parameter.grad is None
