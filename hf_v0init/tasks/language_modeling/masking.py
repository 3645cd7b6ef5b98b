"""Which tokens a masked language model must guess: drawn from seed, epoch and the sample's number, and from nothing else.

So a sample has the same masks whatever the batch size, the number of processes or of loader workers, and however often a run
was stopped and resumed; in every epoch of training they are others, at every evaluation the same. Masks that a collator
draws, as transformers' does, come from a generator whose state is that of the batches before.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ...errors import InputError
from .samples import NO_TARGET, StreamedSamples

TRAINING, EVALUATION = 0, 1  # first number of a seed, so that the two never draw the same


@dataclass(frozen=True)
class Masking:
    """How tokens are masked (Devlin et al., 2019, section 3.1).

    Of the tokens that may be masked, or of their words, the share `probability` is chosen, at least one. Of the tokens chosen
    the share `mask_share` becomes the mask token, `random_share` a token drawn at random, and the rest stays; all are to be
    guessed.

    Attributes:
        mask_token_id: the mask token.
        kept_ids: token ids that are never masked: those that frame texts or fill batches up. The unknown token is no such one.
        ordinary_ids: from which random tokens are drawn: all that are not special.
        whole_words: choose words instead of tokens. Each word is as likely, so the share of tokens is the same on average.
    """

    mask_token_id: int
    kept_ids: np.ndarray
    ordinary_ids: np.ndarray
    probability: float = 0.15
    mask_share: float = 0.8
    random_share: float = 0.1
    whole_words: bool = False

    @classmethod
    def for_tokenizer(cls, tokenizer: PreTrainedTokenizerBase, **settings) -> Masking:
        """Take the ids from a tokenizer.

        Raises:
            InputError: it has no mask token, or only special tokens.
        """
        if tokenizer.mask_token_id is None:
            raise InputError(
                "the tokenizer has no mask token, so it is not one of a masked language model; give --tokenizer_name of one, "
                "such as google-bert/bert-base-uncased, or from scratch leave it out"
            )
        roles = ("mask", "cls", "sep", "bos", "eos", "pad")
        kept = {getattr(tokenizer, f"{role}_token_id") for role in roles} - {None}
        ordinary = set(tokenizer.get_vocab().values()) - set(tokenizer.all_special_ids)
        if not ordinary:
            raise InputError("the tokenizer has only special tokens; give --tokenizer_name of another")
        return cls(tokenizer.mask_token_id, np.array(sorted(kept)), np.array(sorted(ordinary)), **settings)

    def mask(
        self, ids: np.ndarray, word_starts: np.ndarray | None, seed: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Mask one sample.

        Args:
            ids: integers, shape (tokens,), the frame included.
            word_starts: booleans, shape (tokens,), true where a token begins a word; needed for whole words.
            seed: the same gives the same masks.

        Returns:
            `input_ids` and `labels`, int64, shape (tokens,); labels are -100 where nothing is to be guessed, which is
            everywhere only if no token may be masked.
        """
        generator = np.random.default_rng(seed)
        ids = np.asarray(ids, dtype=np.int64)
        may_be_masked = ~np.isin(ids, self.kept_ids)
        unit = np.cumsum(word_starts) if self.whole_words else np.arange(len(ids))
        units = np.unique(unit[may_be_masked])
        # rounded up or down at random, so that the share is met on average for short samples, too
        num_chosen = min(len(units), max(1, int(self.probability * len(units) + generator.random())))
        chosen = may_be_masked & np.isin(unit, generator.choice(units, num_chosen, replace=False) if num_chosen else [])
        fate = generator.random(len(ids))
        random_ids = generator.choice(self.ordinary_ids, len(ids))
        input_ids = np.where(chosen & (fate < self.mask_share), self.mask_token_id, ids)
        is_random = chosen & (fate >= self.mask_share) & (fate < self.mask_share + self.random_share)
        return np.where(is_random, random_ids, input_ids), np.where(chosen, ids, NO_TARGET)

    def mask_sample(self, sample: dict[str, np.ndarray], seed: tuple[int, ...]) -> dict[str, np.ndarray]:
        """Mask a sample of `input_ids` and perhaps `word_starts`; return it with `input_ids` and `labels`."""
        input_ids, labels = self.mask(sample["input_ids"], sample.get("word_starts"), seed)
        return {"input_ids": input_ids, "labels": labels}


class MaskedSamples(torch.utils.data.Dataset):
    """Samples with masks: those of item i depend on the seed, the epoch and i alone.

    Args:
        samples: indexed; items are dicts of `input_ids` and perhaps `word_starts`. It has `compute_lengths()`.
        masking: how.
        seed: of the run; None for evaluation, whose masks are the same in every run and every epoch.
    """

    def __init__(self, samples, masking: Masking, seed: int | None) -> None:
        self.samples, self.masking, self.seed = samples, masking, seed
        # in shared memory, so that loader workers that live for several epochs see it change
        self._epoch = torch.zeros((), dtype=torch.int64).share_memory_()

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch of training; evaluation stays as it is."""
        self._epoch.fill_(epoch)

    begin_epoch = set_epoch

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        return self.masking.mask_sample(self.samples[index], compose_seed(self.seed, int(self._epoch), index))

    def compute_lengths(self) -> list[int]:
        """Count the tokens of each sample."""
        return self.samples.compute_lengths()


class MaskedStream(StreamedSamples):
    """`MaskedSamples` over samples that are read as a stream, their number unknown.

    Args:
        rows, cut, max_samples: as for `StreamedSamples`.
    """

    def __init__(self, rows, cut, masking: Masking, seed: int | None, max_samples: int | None = None) -> None:
        super().__init__(rows, cut, max_samples)
        self.masking, self.seed, self.epoch = masking, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the masks of an epoch of training, and pass it on to rows that are shuffled by it."""
        self.epoch = epoch
        super().set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        for index, sample in enumerate(super().__iter__()):
            yield self.masking.mask_sample(sample, compose_seed(self.seed, self.epoch, index))


def compose_seed(seed: int | None, epoch: int, index: int) -> tuple[int, int, int, int]:
    """Compose the seed of one sample's masks; `seed` None is evaluation, in which the epoch counts for nothing."""
    return (EVALUATION, 0, 0, index) if seed is None else (TRAINING, seed, epoch, index)
