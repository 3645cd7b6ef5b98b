"""How a pass is cut into batches and dealt out: every sample once, as many batches on every process."""

import itertools

import pytest
import torch

from hf_v0init import InputError
from hf_v0init.trainer.per_sample import choose_samples, iterate_batches


def test_batches_hold_every_sample_once_whatever_the_number_of_processes():
    """As many batches on every process; none of a single sample unless all are."""
    for num, size, world_size in itertools.product(range(12), range(1, 6), range(1, 5)):
        dealt = [list(iterate_batches(iter(range(num)), list, size, 0, rank, world_size)) for rank in range(world_size)]
        assert len({len(mine) for mine in dealt}) == 1
        in_turn = [batch for batches in zip(*dealt, strict=True) for batch in batches]
        counted = [batch for batch, count in in_turn if count]
        assert list(itertools.chain(*counted)) == list(range(num))
        assert [count for _, count in in_turn if count] == [len(batch) for batch in counted]
        assert in_turn[len(counted) :] == [(batch, 0) for batch in counted[-1:]] * (-len(counted) % world_size)
        if size == 1 or num <= 1:
            assert all(len(batch) == 1 for batch in counted)
        else:
            assert all(len(batch) == size for batch in counted[:-1]) and 2 <= len(counted[-1]) <= size + 1


def test_a_process_reads_its_own_samples_under_the_seed_of_the_batch():
    read = []

    def collate(numbers):
        read.extend(numbers)
        return float(torch.rand(1))

    dealt = [list(iterate_batches([0, 1, 2], collate, 1, 0, rank, 2)) for rank in (0, 1)]
    assert read == [0, 2, 1, 2]
    assert dealt[1][1] == (dealt[0][1][0], 0)  # the repetition's random collator draws the same
    assert [inputs for inputs, _ in iterate_batches([0, 1, 2], collate, 1, 0, 0, 1)] == [
        dealt[0][0][0], dealt[1][0][0], dealt[0][1][0]
    ]  # fmt: skip


def test_samples_are_chosen_once_each_by_the_seed():
    chosen = choose_samples(50, 20, 3)
    assert len(set(chosen)) == 20 and set(chosen) <= set(range(50))
    assert chosen == choose_samples(50, 20, 3) != choose_samples(50, 20, 4)
    assert sorted(choose_samples(5, 20, 3)) == list(range(5))
    with pytest.raises(InputError, match="empty"):
        choose_samples(0, 20, 3)
