"""Which training samples the statistics pass sees, and in which batches: the same whatever the number of processes.

The samples are drawn without replacement from the training data by the v0 seed and cut into batches once for all
processes; process r of W runs batches r, r + W, r + 2W, ... The training order is not touched, since neither the
run's data loader nor its sampler is used. A random collator (masking, augmentation) is seeded by batch.
"""

import itertools
import math
import random
from collections.abc import Callable, Iterator
from typing import Any

import torch.utils.data

from ..errors import InputError
from ..preservation import seed_everything
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


def choose_batch_size(requested: int | None, train_batch_size: int, num_samples: int) -> int:
    """Choose the samples a batch: as requested, else the training batch size but at least 64 batches in the pass."""
    if requested is not None:
        return requested
    return max(1, min(train_batch_size, num_samples // 64))


class SampledBatches(torch.utils.data.Dataset):
    """The batches of one process, over a data set with a length. Item i is a `StatisticsBatch`.

    Args:
        dataset: indexable, with a length.
        collate: makes a list of samples into the loss's inputs.
        samples: the chosen sample numbers of all processes, see `choose_samples`.
        batch_size: samples a batch; the last batch may be smaller.
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
        batches = [samples[start : start + batch_size] for start in range(0, len(samples), batch_size)]
        first, end = batch_range or (0, len(batches))
        self.batches = [(k, batch) for k, batch in enumerate(batches[:end]) if k >= first and k % world_size == rank]

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> StatisticsBatch:
        index, samples = self.batches[item]
        seed_everything(compute_batch_seed(self.seed, index))
        if hasattr(self.dataset, "__getitems__"):
            features = self.dataset.__getitems__(samples)
        else:
            features = [self.dataset[sample] for sample in samples]
        return StatisticsBatch(self.collate(features), len(samples), index)


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
    for index in itertools.count(first):
        features = list(itertools.islice(stream, batch_size))
        if not features:
            if index == 0:
                raise InputError("the training data stream is empty, so v0 has no gradients to be taken from")
            return
        if index % world_size == rank:
            seed_everything(compute_batch_seed(seed, index))
            yield StatisticsBatch(collate(features), len(features), index)
