"""What a masked language model reads, before masks are drawn: blocks of running text, or one line each.

A sample is framed as the tokenizer frames a text, with BERT's `[CLS]` before and `[SEP]` after. Samples are dicts of
`input_ids` and, where whole words are masked, `word_starts`: arrays of one length.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from hf_v0init import InputError

from .samples import WORD_STARTS, TokenRows, cut_stream


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
    """Ranges of the rows' tokens, each in its frame.

    Args:
        rows: from `tokenize_texts`, without a frame.
        starts, stops: positions in the stream of all rows' tokens where each sample begins and ends.
        frame: put around each.
    """

    def __init__(self, rows: TokenRows, starts: np.ndarray, stops: np.ndarray, frame: Frame) -> None:
        self.rows, self.starts, self.stops, self.frame = rows, starts, stops, frame
        self._columns = tuple(name for name in ("input_ids", WORD_STARTS) if name in rows.rows.column_names)
        if len(starts) == 0:
            raise InputError("the text has no tokens to train or evaluate on; give a file with more text")

    @classmethod
    def cut_blocks(
        cls, rows: datasets.Dataset, length: int, frame: Frame, max_samples: int | None = None
    ) -> FramedTexts:
        """Cut the joined rows into samples of `length` tokens, the frame included; the last holds what is left."""
        token_rows = TokenRows(rows)
        starts = np.arange(0, token_rows.num_tokens, length - len(frame))[:max_samples]
        return cls(token_rows, starts, np.minimum(starts + length - len(frame), token_rows.num_tokens), frame)

    @classmethod
    def take_lines(
        cls, rows: datasets.Dataset, length: int, frame: Frame, max_samples: int | None = None
    ) -> FramedTexts:
        """Make each row that has tokens a sample, cut at `length` tokens, the frame included."""
        token_rows = TokenRows(rows)
        starts = np.concatenate([np.zeros(1, dtype=np.int64), token_rows.ends[:-1]])[: len(token_rows.ends)]
        has_tokens = token_rows.ends > starts
        starts, stops = starts[has_tokens][:max_samples], token_rows.ends[has_tokens][:max_samples]
        return cls(token_rows, starts, np.minimum(stops, starts + length - len(frame)), frame)

    def __len__(self) -> int:
        return len(self.starts)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        values = self.rows.read(int(self.starts[index]), int(self.stops[index]), self._columns)
        return self.frame.put_around(values[0], values[1] if len(values) > 1 else None)

    def compute_lengths(self) -> list[int]:
        """Count the tokens of each sample, the frame included, without reading any."""
        return (self.stops - self.starts + len(self.frame)).tolist()


class StreamedTexts:
    """`FramedTexts` of a stream of rows, with the same samples in the same order: blocks, or lines.

    Args:
        rows: from `tokenize_texts`, without a frame; read again in every iteration.
        length: tokens of a sample, at most, the frame included.
        line_by_line: a row is a sample.
    """

    def __init__(self, rows: Iterable[dict[str, list]], length: int, frame: Frame, line_by_line: bool) -> None:
        self.rows, self.frame, self.line_by_line = rows, frame, line_by_line
        self._room = length - len(frame)

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to rows that are shuffled by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict[str, np.ndarray]]:
        one_by_one = ([row] for row in self.rows) if self.line_by_line else [self.rows]
        for rows in one_by_one:
            samples = cut_stream(rows, self._room, self._room)
            for sample in itertools.islice(samples, 1 if self.line_by_line else None):
                yield self.frame.put_around(sample["input_ids"], sample.get(WORD_STARTS))
