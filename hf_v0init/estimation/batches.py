"""Which training samples the statistics pass sees, and in which batches: the same whatever the number of processes.

The samples are drawn without replacement from the training data by the v0 seed and cut into batches once for all
processes; process r of W runs batches r, r + W, r + 2W, ... The training order is not touched, since neither the
run's data loader nor its sampler is used. A random collator (masking, augmentation) is seeded by batch.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
import torch.utils.data

from ..errors import InputError
from ..state_guard import seed_everything
from .statistics import StatisticsBatch, compute_batch_seed


def choose_samples(num_available: int, num_samples: int, seed: int) -> list[int]:
    """Choose min(num_samples, num_available) sample numbers at random, without replacement.

    Raises:
        InputError: there is nothing to choose from.
    """
    if num_available == 0:
        raise InputError(
            "the training data set is empty, so v0 has no gradients to be taken from: check the data files"
        )
    return random.Random(seed).sample(range(num_available), min(num_samples, num_available))


def choose_batch_size(requested: int | None, at_once: int) -> int:
    """Choose the samples per batch: as requested, else `at_once`: 1, which is exact, or as many as a batch norm or a sharded model
    needs.
    """
    return at_once if requested is None else requested


def cut_into_batches(samples: list[int], batch_size: int) -> list[list[int]]:
    """Cut sample numbers into batches; a single sample that is left joins the batch before it, since not every loss takes one."""
    batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
    if len(batches) > 1 and batch_size > 1 and len(batches[-1]) == 1:
        batches[-2:] = [batches[-2] + batches[-1]]
    return batches


def deal_out(numbers: list[int], rank: int, world_size: int) -> list[tuple[int, bool]]:
    """Deal batch numbers out to process `rank` in turn, as many to each: (number, whether it counts).

    A process that would have one fewer gets the last once more, which does not count: a loss that communicates must be computed as
    often on every process.
    """
    dealt = [(number, True) for number in numbers[rank::world_size]]
    if numbers and len(dealt) < -(-len(numbers) // world_size):
        dealt.append((numbers[-1], False))
    return dealt


IGNORED_LABEL = -100


def has_targets(inputs: Any) -> bool:
    """Whether collated inputs have any label that is not ignored (-100), beside the first of each row; True without labels."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() == 0 or labels.numel() == 0:
        return True
    valid = labels != IGNORED_LABEL
    return bool((valid[:, 1:] if labels.dim() > 1 and labels.shape[1] > 1 else valid).any())


class SampledBatches(torch.utils.data.Dataset):
    """The batches of one process, over a data set with a length. Item i is a `StatisticsBatch`.

    Args:
        dataset: indexable, with a length.
        collate: makes a list of samples into the loss's inputs.
        samples: the chosen sample numbers of all processes, see `choose_samples`.
        batch_size: samples per batch; the last batch may be smaller.
        seed, rank, world_size: the v0 seed, this process, the number of processes.
        batch_range: only the batches of these numbers, the second not included; by default all.
    """

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list], Any],
        samples: list[int],
        batch_size: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        batch_range: tuple[int, int] | None = None,
    ) -> None:
        self.dataset, self.collate, self.seed = dataset, collate, seed
        batches = cut_into_batches(samples, batch_size)
        first, end = batch_range or (0, len(batches))
        numbers = list(range(first, min(end, len(batches))))
        self.batches = [(k, batches[k], counts) for k, counts in deal_out(numbers, rank, world_size)]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> StatisticsBatch:
        index, samples, counts = self.batches[item]
        seed_everything(compute_batch_seed(self.seed, index))
        if hasattr(self.dataset, "__getitems__"):
            features = self.dataset.__getitems__(samples)
        else:
            features = [self.dataset[sample] for sample in samples]
        inputs = self.collate(features)
        return StatisticsBatch(inputs, len(samples), index, counts, has_targets(inputs))


def require_reiterable(dataset: Any) -> None:
    """Raise `InputError` for a one-shot iterable: samples read for v0 would be missing in training."""
    kept = (
        [name for name, value in vars(dataset).items() if isinstance(value, Iterator)]
        if hasattr(dataset, "__dict__")
        else []
    )
    if isinstance(dataset, Iterator) or kept:
        what = f"holds the iterator {kept[0]!r}" if kept else "is an iterator"
        raise InputError(
            f"train_dataset of type {type(dataset).__name__} {what}, so it can be read only once and the samples read for v0 would "
            "be lost to training; use a data set that can be iterated again, v0_init=random, or v0_init=zeros"
        )


def iterate_streamed_batches(
    dataset: Any,
    collate: Callable[[list], Any],
    num_samples: int,
    batch_size: int,
    seed: int,
    rank: int = 0,
    world_size: int = 1,
    batch_range: tuple[int, int] | None = None,
) -> Iterator[StatisticsBatch]:
    """Yield this process's batches of the first `num_samples` samples of an iterable data set, read from its start.

    With `batch_range` only the batches of these numbers, the second not included.

    Raises:
        InputError: the data set can be read only once, or is empty.
    """
    require_reiterable(dataset)
    first, end = batch_range or (0, math.ceil(num_samples / batch_size))
    stream = itertools.islice(iter(dataset), first * batch_size, min(end * batch_size, num_samples))
    features: list = []
    num_batches = num_mine = 0
    for features in _cut_stream(stream, batch_size):
        if num_batches % world_size == rank:
            num_mine += 1
            yield _collate_seeded(collate, features, seed, first + num_batches, True)
        num_batches += 1
    if num_batches == 0 and first == 0:
        raise InputError("the training data stream is empty, so v0 has no gradients to be taken from")
    if num_mine < math.ceil(num_batches / world_size):
        yield _collate_seeded(collate, features, seed, first + num_batches - 1, False)


def _cut_stream(stream: Iterator, batch_size: int) -> Iterator[list]:
    """Cut a stream into batches as `cut_into_batches` does."""
    batch = list(itertools.islice(stream, batch_size))
    while batch:
        following = list(itertools.islice(stream, batch_size))
        if batch_size > 1 and len(following) == 1:
            batch, following = batch + following, []
        yield batch
        batch = following


def _collate_seeded(
    collate: Callable[[list], Any], features: list, seed: int, index: int, counts: bool
) -> StatisticsBatch:
    seed_everything(compute_batch_seed(seed, index))
    inputs = collate(features)
    return StatisticsBatch(inputs, len(features), index, counts, has_targets(inputs))
