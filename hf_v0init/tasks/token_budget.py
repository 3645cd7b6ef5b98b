"""Batches by token budget: as many samples as fit, instead of a fixed number (fairseq's `--max-tokens`).

A batch costs max(padded source length, padded target length) * samples. Batches hold samples of like length.
Which of the equally long samples share a batch, and the order of the batches, depend on seed and epoch alone.
"""

import functools
import logging
import re
from collections.abc import Sequence
from pathlib import Path

import datasets
import numpy as np
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from .script_trainer import AnnounceEpoch

logger = logging.getLogger("hf_v0init")


class TokenBudgetBatchSampler(Sampler[list[int]]):
    """Yields lists of sample indices whose padded size stays within `max_tokens`.

    The batches of an epoch hold every sample exactly once. Their number is the same in every epoch and a
    multiple of `num_processes`, so that accelerate's shards (process r takes batches r, r + num_processes,
    and so on) have equal length without repeating a sample: where the number does not divide, the batches
    with the most samples are halved until it does.

    Args:
        source_lengths, target_lengths: tokens of each sample.
        max_tokens: the budget of one batch on one process.
        num_processes: among which the batches will be dealt out.
        seed: with the epoch number it decides the order; no global generator is read.
        pad_to_multiple_of: the collator's, so that what it adds is counted.

    Raises:
        InputError: a sample is longer than the budget; or there are fewer samples than processes.
    """

    batch_size = None  # read by accelerate: batches differ in size
    drop_last = False

    def __init__(
        self,
        source_lengths: Sequence[int],
        target_lengths: Sequence[int],
        max_tokens: int,
        *,
        num_processes: int = 1,
        seed: int = 0,
        pad_to_multiple_of: int | None = None,
    ):
        multiple = pad_to_multiple_of or 1
        self.source_lengths = -(-np.asarray(source_lengths, dtype=np.int64) // multiple) * multiple
        self.target_lengths = -(-np.asarray(target_lengths, dtype=np.int64) // multiple) * multiple
        self.max_tokens = max_tokens
        self.seed = seed
        self.epoch = 0
        longest_side = np.maximum(self.source_lengths, self.target_lengths)
        if len(longest_side) == 0:
            raise InputError("max_tokens_per_batch: the training set has no samples; give at least one")
        if longest_side.max() > max_tokens:
            index = int(longest_side.argmax())
            raise InputError(
                f"max_tokens_per_batch={max_tokens}: training sample {index} alone has {longest_side[index]} "
                "tokens; raise the budget, or lower the maximum source and target length"
            )
        self._boundaries = self._compute_boundaries(longest_side, num_processes)

    def __len__(self) -> int:
        return len(self._boundaries) - 1

    def set_epoch(self, epoch: int) -> None:
        """Chooses the order of the next iteration: the same epoch gives the same order."""
        self.epoch = epoch

    def __iter__(self):
        generator = np.random.default_rng((self.seed, self.epoch))
        order = self._sort_by_length(generator.permutation(len(self.source_lengths)))
        for batch in generator.permutation(len(self)):
            yield order[self._boundaries[batch] : self._boundaries[batch + 1]].tolist()

    def _sort_by_length(self, order: np.ndarray) -> np.ndarray:
        """Sorts by source, then target length; equals stay in the order given (lexsort is stable)."""
        return order[np.lexsort((self.target_lengths[order], self.source_lengths[order]))]

    def _compute_boundaries(self, longest_side: np.ndarray, num_processes: int) -> list[int]:
        """Where batches begin in the sorted sample order; the last entry is the number of samples.

        Shuffling equals does not change the sequence of lengths, so the boundaries hold for every epoch.
        """
        num_samples = len(longest_side)
        lengths = longest_side[self._sort_by_length(np.arange(num_samples))].tolist()
        boundaries, longest = [0], 0
        for position, length in enumerate(lengths):
            longest = max(longest, length)
            if longest * (position - boundaries[-1] + 1) > self.max_tokens:
                boundaries.append(position)
                longest = length
        boundaries.append(num_samples)
        while (len(boundaries) - 1) % num_processes:
            sizes = np.diff(boundaries)
            largest = int(sizes.argmax())
            if sizes[largest] < 2:
                raise InputError(
                    f"max_tokens_per_batch: {num_samples} training samples cannot be dealt out evenly to "
                    f"{num_processes} processes; use fewer processes or more samples"
                )
            boundaries.insert(largest + 1, boundaries[largest] + int(sizes[largest]) // 2)
        return boundaries


class TokenBudgetMixin:
    """Put before a Trainer: with `max_tokens_per_batch`, training batches are made by token budget.

    The budget is per process and forward pass; accumulation and processes multiply it. Samples need the fields
    "input_ids" and "labels". Evaluation batches keep their fixed size.
    """

    def __init__(self, *args, max_tokens_per_batch: int | None = None, **kwargs):
        self.max_tokens_per_batch = max_tokens_per_batch
        super().__init__(*args, **kwargs)
        if max_tokens_per_batch is not None:
            self.add_callback(AnnounceEpoch(lambda epoch: self._token_budget_sampler.set_epoch(epoch)))

    def get_train_dataloader(self) -> DataLoader:
        """The training batches of this process. Raises InputError as the sampler does."""
        if self.max_tokens_per_batch is None:
            return super().get_train_dataloader()
        sampler, args, dataset = self._token_budget_sampler, self.args, self.train_dataset
        if isinstance(dataset, datasets.Dataset):
            dataset = self._remove_unused_columns(dataset, description="training")
        loader = DataLoader(
            dataset,
            batch_sampler=sampler,
            collate_fn=self.data_collator,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory,
            persistent_workers=args.dataloader_persistent_workers,
            prefetch_factor=args.dataloader_prefetch_factor,
        )
        return self.accelerator.prepare(loader)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the card as the Trainer does, with the token budget in place of a batch size that had no effect."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.max_tokens_per_batch is None or not self.is_world_process_zero() or not path.is_file():
            return
        text = path.read_text(encoding="utf-8")
        text = re.sub(r"^- total_train_batch_size: .*\n", "", text, flags=re.MULTILINE)
        budget = (
            f"{self.max_tokens_per_batch} tokens per batch; {self.get_v0_effective_batch_size():.1f} samples per step"
        )
        text = re.sub(r"^(- train_batch_size: ).*$", rf"\g<1>{budget}", text, flags=re.MULTILINE)
        path.write_text(text, encoding="utf-8")

    def get_v0_effective_batch_size(self) -> float:
        """Mean number of samples an optimizer step sees, over accumulation and processes."""
        if self.max_tokens_per_batch is None:
            return super().get_v0_effective_batch_size()
        sampler = self._token_budget_sampler
        samples_per_batch = len(sampler.source_lengths) / len(sampler)
        return samples_per_batch * self.args.gradient_accumulation_steps * self.args.world_size

    def get_total_train_batch_size(self, args) -> int:
        """Samples of an optimizer step, for the Trainer's log and speeds; under a budget the mean."""
        if self.max_tokens_per_batch is None:
            return super().get_total_train_batch_size(args)
        return round(self.get_v0_effective_batch_size())

    @functools.cached_property
    def _token_budget_sampler(self) -> TokenBudgetBatchSampler:
        sampler = TokenBudgetBatchSampler(
            *_compute_lengths(self.train_dataset),
            self.max_tokens_per_batch,
            num_processes=self.args.world_size,
            seed=self.args.seed if self.args.data_seed is None else self.args.data_seed,
            pad_to_multiple_of=getattr(self.data_collator, "pad_to_multiple_of", None),
        )
        logger.info(
            f"batches by token budget: {len(sampler):,} of at most {self.max_tokens_per_batch:,} tokens, "
            f"{len(sampler.source_lengths) / len(sampler):.1f} samples on average"
        )
        return sampler


def _compute_lengths(dataset) -> tuple[list[int], list[int]]:
    """Tokens of "input_ids" and of "labels" of every sample."""
    if hasattr(dataset, "compute_lengths"):  # of samples whose labels are as long as they and costly to make
        lengths = dataset.compute_lengths()
        return lengths, lengths
    if isinstance(dataset, datasets.Dataset):
        source_lengths, target_lengths = [], []
        for rows in dataset.select_columns(["input_ids", "labels"]).iter(batch_size=1000):
            source_lengths += map(len, rows["input_ids"])
            target_lengths += map(len, rows["labels"])
        return source_lengths, target_lengths
    rows = [dataset[index] for index in range(len(dataset))]
    return [len(row["input_ids"]) for row in rows], [len(row["labels"]) for row in rows]
