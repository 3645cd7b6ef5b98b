"""How a pass is cut into batches and dealt out: every sample once, as many batches on every process."""

import itertools

import pytest
import torch

from hf_v0init import InputError
from hf_v0init.trainer.per_sample import (
    choose_samples,
    cut_into_batches,
    deal_out,
    has_targets,
    iterate_batches,
)


def test_batches_hold_every_sample_once_and_none_is_a_single_one_unless_all_are():
    for num, size in itertools.product(range(1, 12), range(1, 6)):
        batches = list(cut_into_batches(iter(range(num)), size))
        assert list(itertools.chain(*batches)) == list(range(num))
        if size == 1 or num == 1:
            assert [len(b) for b in batches] == [1] * num
        else:
            assert all(2 <= len(b) <= size + 1 for b in batches)
            assert all(len(b) == size for b in batches[:-1])


def test_every_batch_counts_once_and_every_process_has_as_many():
    for num, world_size in itertools.product(range(10), range(1, 5)):
        batches = [f"batch {number}" for number in range(num)]
        dealt = [list(deal_out(iter(batches), rank, world_size)) for rank in range(world_size)]
        assert len({len(mine) for mine in dealt}) == 1
        assert sorted(number for mine in dealt for number, _, counts in mine if counts) == list(range(num))
        assert all(batch == batches[number] for mine in dealt for number, batch, _ in mine)
        assert sum(not counts for mine in dealt for *_, counts in mine) == -num % world_size


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


def test_a_process_reads_its_own_samples_and_says_what_counts():
    rows = [{"labels": torch.tensor([1, -100 if k == 2 else k])} for k in range(3)]
    read = []

    def collate(numbers):
        read.extend(numbers)
        return {"labels": torch.stack([rows[number]["labels"] for number in numbers]), "noise": torch.rand(1)}

    batches = [list(iterate_batches([0, 1, 2], collate, 1, 0, rank, 2)) for rank in (0, 1)]
    assert read == [0, 2, 1, 2]
    last = [mine[1] for mine in batches]
    assert [(b.index, b.num_samples, b.counts, b.has_loss) for b in last] == [(2, 1, True, False), (2, 1, False, False)]
    assert last[0].inputs["noise"] == last[1].inputs["noise"]  # a random collator is seeded by batch


def test_samples_are_chosen_once_each_by_the_seed():
    chosen = choose_samples(50, 20, 3)
    assert len(set(chosen)) == 20 and set(chosen) <= set(range(50))
    assert chosen == choose_samples(50, 20, 3) != choose_samples(50, 20, 4)
    assert sorted(choose_samples(5, 20, 3)) == list(range(5))
    with pytest.raises(InputError, match="empty"):
        choose_samples(0, 20, 3)
