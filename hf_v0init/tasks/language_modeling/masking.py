"""What a masked language model reads: blocks of running text or one line each, and which tokens of them it must guess.

A sample is framed as the tokenizer frames a text, with BERT's `[CLS]` before and `[SEP]` after. Its masks are drawn from seed,
epoch and the sample's number, and from nothing else: a sample has the same masks whatever the batch size, the number of
processes or of loader workers, and however often a run was stopped and resumed; in every epoch of training they are others, at
every evaluation the same. Masks that a collator draws, as transformers' does, come from a generator whose state is that of the
batches before.
"""

from __future__ import annotations

from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute
import torch
from transformers import PreTrainedTokenizerBase

from hf_v0init import InputError

from .samples import NO_TARGET, WORD_STARTS, flatten_rows

TRAINING, EVALUATION = 0, 1  # first number of a seed, so that the two never draw the same


# ---- blocks and lines -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Frame:
    """The special tokens that a tokenizer puts around a text."""

    before: list[int]
    after: list[int]

    @classmethod
    def of_tokenizer(cls, tokenizer: PreTrainedTokenizerBase) -> Frame:
        """Find them by encoding a text with and without them."""
        bare, framed = tokenizer("a", add_special_tokens=False)["input_ids"], tokenizer("a")["input_ids"]
        for start in range(len(framed) - len(bare) + 1):
            if framed[start : start + len(bare)] == bare:
                return cls(framed[:start], framed[start + len(bare) :])
        raise InputError(
            f"the tokenizer encodes 'a' as {framed}, in which {bare} is not found; give --tokenizer_name of another"
        )

    def __len__(self) -> int:
        return len(self.before) + len(self.after)

    def put_around(self, ids: np.ndarray, word_starts: np.ndarray | None) -> dict[str, np.ndarray]:
        """Return a sample: the tokens in their frame, each token of which, and the first after it, counts as a word's start."""
        sample = {"input_ids": np.concatenate([self.before, ids, self.after]).astype(np.int64)}
        if word_starts is not None:
            starts = np.ones(len(sample["input_ids"]), dtype=bool)
            first = len(self.before)
            starts[first + 1 : first + len(ids)] = word_starts[1:]
            sample[WORD_STARTS] = starts
        return sample


def require_words(tokenizer: PreTrainedTokenizerBase) -> None:
    """Refuse a tokenizer that does not tell words apart."""
    remedy = "drop --whole_word_mask, or give another --tokenizer_name"
    if not tokenizer.is_fast:
        raise InputError(f"--whole_word_mask: {type(tokenizer).__name__} does not say where words begin; {remedy}")
    if len(set(tokenizer("a b c", add_special_tokens=False).word_ids())) < 3:
        raise InputError(f"--whole_word_mask: this tokenizer takes a whole line for one word; {remedy}")


class FramedTexts(torch.utils.data.Dataset):
    """Tokens of the rows, each sample in its frame: blocks of the joined rows, or a row each.

    Args:
        rows: from `tokenize_texts`, without a frame.
        length: tokens of a sample at most, the frame included; the last block holds what is left.
        frame: put around each.
        line_by_line: each row that has tokens is a sample, cut at `length`.
        max_samples: keep only so many from the beginning.

    Raises:
        InputError: there are no tokens.
    """

    def __init__(
        self, rows: datasets.Dataset, length: int, frame: Frame, line_by_line: bool, max_samples: int | None = None
    ) -> None:
        self.frame = frame
        self.columns = {name: flatten_rows(rows, name) for name in ("input_ids", WORD_STARTS) if name in rows.features}
        num_tokens, room = len(self.columns["input_ids"]), length - len(frame)
        if num_tokens == 0:
            raise InputError("the text has no tokens to train or evaluate on; give a file with more text")
        starts, stops = np.arange(0, num_tokens, room), np.arange(room, num_tokens + room, room)
        if line_by_line:
            lengths = pyarrow.compute.list_value_length(rows.with_format("arrow")[:]["input_ids"]).to_numpy()
            stops = np.cumsum(lengths[lengths > 0])
            starts = np.concatenate([[0], stops[:-1]])
        self.starts = starts[:max_samples]
        self.stops = np.minimum(np.minimum(stops, num_tokens), starts + room)[:max_samples]

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        where = slice(int(self.starts[index]), int(self.stops[index]))
        sample = {name: values[where].to_numpy() for name, values in self.columns.items()}
        return self.frame.put_around(sample["input_ids"], sample.get(WORD_STARTS))

    def compute_lengths(self) -> list[int]:
        """Count the tokens of each sample, the frame included, without reading any."""
        return (self.stops - self.starts + len(self.frame)).tolist()


# ---- masks ------------------------------------------------------------------------------------------------------------


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
        sample, seed = self.samples[index], compose_seed(self.seed, int(self._epoch), index)
        input_ids, labels = self.masking.mask(sample["input_ids"], sample.get(WORD_STARTS), seed)
        return {"input_ids": input_ids, "labels": labels}

    def compute_lengths(self) -> list[int]:
        """Count the tokens of each sample."""
        return self.samples.compute_lengths()


def compose_seed(seed: int | None, epoch: int, index: int) -> tuple[int, int, int, int]:
    """Compose the seed of one sample's masks; `seed` None is evaluation, in which the epoch counts for nothing."""
    return (EVALUATION, 0, 0, index) if seed is None else (TRAINING, seed, epoch, index)
