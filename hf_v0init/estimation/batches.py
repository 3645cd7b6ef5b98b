"""Which training samples the per-sample estimation sees, and in which batches: the same whatever the number of processes.

The samples are drawn without replacement from the training data by the v0 seed (of a stream, the first ones) and cut into batches
once for all processes; process r of W runs batches r, r + W, r + 2W, ... The training order is not touched, since neither the
run's data loader nor its sampler is used. A random collator (masking, augmentation) is seeded by batch.
"""

import itertools
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import InputError
from ..state_guard import seed_everything

IGNORED_LABEL = -100


@dataclass
class SampleBatch:
    """One batch of the pass.

    Attributes:
        inputs: as the loss takes them.
        num_samples: how many samples they are.
        index: the batch's number in the whole pass (over all processes), which seeds its dropout.
        counts: False for a repetition, by which a process has as many batches as the others, whose losses may be collective.
        has_loss: whether any target is left to compute a loss of. A batch without is run and skipped.
    """

    inputs: Any
    num_samples: int
    index: int
    counts: bool = True
    has_loss: bool = True


def compute_batch_seed(seed: int, index: int) -> int:
    """Compute the random seed of batch `index` of the pass, the same on whichever process runs it."""
    return (seed * 1_000_003 + index * 7_919 + 1) % (1 << 63)


def choose_samples(num_available: int, num_samples: int, seed: int) -> list[int]:
    """Choose min(num_samples, num_available) sample numbers at random, without replacement.

    Raises:
        InputError: there is nothing to choose from.
    """
    if num_available == 0:
        raise InputError("the training data are empty, so v0 has no gradients to be taken from: check the data files")
    return random.Random(seed).sample(range(num_available), min(num_samples, num_available))


def cut_into_batches(samples: Iterable, batch_size: int) -> Iterator[list]:
    """Cut samples into batches; a single one that is left joins the batch before it, since not every loss takes one."""
    samples = iter(samples)
    batch = list(itertools.islice(samples, batch_size))
    while batch:
        following = list(itertools.islice(samples, batch_size))
        if batch_size > 1 and len(following) == 1:
            batch, following = batch + following, []
        yield batch
        batch = following


def deal_out(batches: Iterable, rank: int, world_size: int) -> Iterator[tuple[int, Any, bool]]:
    """Deal batches out to process `rank` in turn, as many to each: (number, batch, whether it counts).

    A process that would have one fewer gets the last once more, which does not count: a loss that communicates must be computed as
    often on every process.
    """
    number, batch = -1, None
    for number, batch in enumerate(batches):
        if number % world_size == rank:
            yield number, batch, True
    if number >= 0 and number % world_size < rank:
        yield number, batch, False


def has_targets(inputs: Any) -> bool:
    """Whether collated inputs have any label that is not ignored (-100), beside the first of each row; True without labels."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() == 0 or labels.numel() == 0:
        return True
    return bool((labels[:, 1:] if labels.dim() > 1 and labels.shape[1] > 1 else labels).ne(IGNORED_LABEL).any())


def iterate_batches(
    samples: Iterable, collate: Callable[[list], Any], batch_size: int, seed: int, rank: int, world_size: int
) -> Iterator[SampleBatch]:
    """Yield one process's batches of the pass.

    Args:
        samples: of all processes: their numbers, or the items of a stream.
        collate: makes the loss's inputs of a list of them. Only this process's are read.
        batch_size: samples per batch.
        seed: what collates batch k is seeded from (seed, k).
        rank, world_size: this process, and the number of processes.
    """
    for index, own, counts in deal_out(cut_into_batches(samples, batch_size), rank, world_size):
        seed_everything(compute_batch_seed(seed, index))
        inputs = collate(own)
        yield SampleBatch(inputs, len(own), index, counts, has_targets(inputs))
