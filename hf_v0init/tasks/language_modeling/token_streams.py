"""Contiguous streams: a text cut into parallel streams that a model with a state reads from beginning to end.

The text of N target tokens becomes S streams of N // S or one more, S = samples per batch x processes. Streams are cut into
segments of about `segment_length` tokens, and item k * S + b is segment k of stream b. Read in order, in batches of S, each
batch therefore holds the continuation of the one before, row by row, and every token is a target exactly once an epoch; the
batches that accelerate deals to process r of W (r, r + W, ...) are those of the same S / W streams.

Segments may vary in length, as in AWD-LSTM, so that the points where back-propagation is cut differ from epoch to epoch.
"""

from __future__ import annotations

from typing import Any

import datasets
import numpy as np
import torch

from ...errors import InputError
from .samples import NO_TARGET, flatten_rows, pad_rows

# How AWD-LSTM draws lengths: around the base length, or around half of it; see `draw_boundaries`.
SHARE_OF_FULL_LENGTH, STANDARD_DEVIATION, SHORTEST = 0.95, 5.0, 5
MEAN_LENGTH = (1 + SHARE_OF_FULL_LENGTH) / 2  # in base lengths
SHORTEST_BASE = 20  # where drawing with that standard deviation still makes sense


def draw_boundaries(num_tokens: int, segment_length: int, seed: tuple[int, int]) -> np.ndarray:
    """Draw where the segments of a stream begin and end, with AWD-LSTM's distribution of lengths (its section 5).

    A length is max(5, N(l, 5)) with l the segment length in 95% of the cases, else half of it. Their number is fixed, that of the
    mean length, so that every epoch has as many steps, and the lengths are stretched to add up to the stream.

    Returns:
        int64, increasing from 0 to `num_tokens`.
    """
    generator = np.random.default_rng(seed)
    num_segments = max(1, round(num_tokens / (segment_length * MEAN_LENGTH)))
    is_full = generator.random(num_segments) < SHARE_OF_FULL_LENGTH
    lengths = generator.normal(np.where(is_full, segment_length, segment_length / 2), STANDARD_DEVIATION)
    ends = np.cumsum(np.maximum(SHORTEST, lengths.astype(np.int64)))
    return np.concatenate([[0], np.rint(ends * (num_tokens / ends[-1]))]).astype(np.int64)


class TokenStreams(torch.utils.data.Dataset):
    """A text as contiguous streams; item i is a segment, see the top of the file. The tokens are kept in memory, 4 bytes each.

    Items are dicts of `input_ids` and `shift_labels` (the token after each), int32 arrays of one length, and `begins_stream`.

    Args:
        rows: a data set with a column `input_ids`; its rows are joined.
        num_streams: rows of a batch, over all processes.
        segment_length: tokens of a segment. The last one of a stream is shorter, or one token longer.
        first_token: what comes before the text's first token, [] or [id]; left out if it is there already.
        max_segments: read only so many segments' worth of tokens, from the beginning.
        varies: draw the lengths anew in every epoch, from `seed` and the epoch (`set_epoch`) alone.

    Raises:
        InputError: fewer target tokens than streams; varying segments of less than 20 tokens.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        num_streams: int,
        segment_length: int,
        first_token: list[int],
        max_segments: int | None = None,
        *,
        varies: bool = False,
        seed: int = 0,
    ) -> None:
        if varies and segment_length < SHORTEST_BASE:
            raise InputError(
                f"segments of {segment_length} tokens are too short to vary in length; make them at least {SHORTEST_BASE}"
            )
        tokens = flatten_rows(rows).to_numpy().astype(np.int32, copy=False)
        if first_token and tokens[:1].tolist() != list(first_token):
            tokens = np.concatenate([np.asarray(first_token, dtype=np.int32), tokens])
        if max_segments is not None:
            tokens = tokens[: max_segments * segment_length + 1]
        self.tokens, self.num_streams, self.segment_length = tokens, num_streams, segment_length
        self.varies, self.seed = varies, seed
        self.num_targets = max(len(tokens) - 1, 0)
        if self.num_targets < num_streams:
            raise InputError(
                f"the text has {self.num_targets} tokens to forecast, fewer than the {num_streams} streams of a batch over all "
                "processes; lower the batch size, or give a longer text"
            )
        shorter, num_longer = divmod(self.num_targets, num_streams)
        is_longer = np.arange(num_streams) < num_longer
        self._lengths = shorter + is_longer
        self._starts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]])
        self.set_epoch(0)

    def set_epoch(self, epoch: int) -> None:
        """Draw the epoch's segments, if they vary. Their number is the same in every epoch."""
        shorter = int(self._lengths.min())
        if self.varies:
            boundaries = draw_boundaries(shorter, self.segment_length, (self.seed, epoch))
        else:
            boundaries = np.append(np.arange(0, shorter, self.segment_length), shorter)
        boundaries[-1] = self._lengths.max()  # the odd token goes to the last segment
        self._boundaries = boundaries

    def __len__(self) -> int:
        return (len(self._boundaries) - 1) * self.num_streams

    def __getitem__(self, index: int) -> dict[str, Any]:
        segment, stream = divmod(index, self.num_streams)
        offset = int(self._starts[stream])
        start = offset + int(self._boundaries[segment])
        stop = offset + int(min(self._boundaries[segment + 1], self._lengths[stream]))
        return {
            "input_ids": self.tokens[start:stop],
            "shift_labels": self.tokens[start + 1 : stop + 1],
            "begins_stream": segment == 0,
        }

    def read_context(self, index: int) -> np.ndarray:
        """The tokens of the same stream before segment `index`, up to a segment's length; empty at the stream's beginning."""
        segment, stream = divmod(index, self.num_streams)
        stop = int(self._boundaries[segment])
        return self.tokens[self._starts[stream] :][max(stop - self.segment_length, 0) : stop]


class SegmentsWithContext(torch.utils.data.Dataset):
    """The segments of `TokenStreams`, to be taken in any order: each with `context_ids`, what the stream says before it."""

    def __init__(self, streams: TokenStreams) -> None:
        self.streams = streams

    def __len__(self) -> int:
        return len(self.streams)

    def __getitem__(self, index: int) -> dict[str, Any]:
        return self.streams[index] | {"context_ids": self.streams.read_context(index)}


class SegmentCollator:
    """Make a batch of segments: `input_ids`, `labels` (the same) and `shift_labels`, int64 of shape (segments, tokens).

    Shorter segments are padded at the right (-100 in the labels), and only then there is an `attention_mask`. `begins_stream`
    says whether all are their streams' first. Segments with context get `context_ids`, a list of int64 tensors (1, tokens).

    Args:
        pad_token_id: fills `input_ids`; masked, so any id does.
    """

    def __init__(self, pad_token_id: int | None) -> None:
        self.pad_token_id = 0 if pad_token_id is None else pad_token_id

    def __call__(self, segments: list[dict[str, Any]]) -> dict[str, Any]:
        """Return the batch; tensors but for `begins_stream`, a bool, and `context_ids`."""
        inputs, mask = pad_rows([segment["input_ids"] for segment in segments], self.pad_token_id)
        targets, _ = pad_rows([segment["shift_labels"] for segment in segments], NO_TARGET)
        batch = {
            "input_ids": inputs,
            "labels": inputs.masked_fill(mask == 0, NO_TARGET),
            "shift_labels": targets,
            "begins_stream": all(segment["begins_stream"] for segment in segments),
        }
        if not bool(mask.all()):
            batch["attention_mask"] = mask
        if "context_ids" in segments[0]:
            batch["context_ids"] = [torch.tensor(segment["context_ids"])[None].long() for segment in segments]
        return batch
