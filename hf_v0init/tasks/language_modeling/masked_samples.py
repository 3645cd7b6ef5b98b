"""What a masked language model reads, before masks are drawn: blocks of running text, or one line each.

A sample is framed as the tokenizer frames a text, with BERT's `[CLS]` before and `[SEP]` after. Samples are dicts of
`input_ids` and, where whole words are masked, `word_starts`: arrays of one length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import datasets
import numpy as np
import pyarrow.compute
import torch
from transformers import PreTrainedTokenizerBase

from hf_v0init import InputError

from .samples import WORD_STARTS, cut_stream, flatten_rows


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


def cut_framed_texts(
    rows: Iterable[dict[str, list]], length: int, frame: Frame, line_by_line: bool
) -> Iterator[dict[str, np.ndarray]]:
    """Cut the samples of `FramedTexts`, in the same order, from a stream of rows."""
    room = length - len(frame)
    if line_by_line:
        samples = (next(cut_stream([row], room, room), None) for row in rows)
    else:
        samples = cut_stream(rows, room, room)
    for sample in samples:
        if sample is not None:
            yield frame.put_around(sample["input_ids"], sample.get(WORD_STARTS))
