"""Training and evaluation samples for causal language models: windows of a token stream, or prompt + completion.

Samples are dicts of `input_ids` and `labels`, unpadded lists of equal length; the model shifts the labels by one
itself. `PaddingCollator` makes batches of them. What reads, keeps and pads tokens serves masked models, too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from typing import Any

import datasets
import pyarrow
import pyarrow.compute
import torch
from transformers import PreTrainedTokenizerBase

from hf_v0init import InputError

from ..data import map_rows

NO_TARGET = -100
WORD_STARTS = "word_starts"
PLAINLY = {"return_attention_mask": False, "verbose": False}  # no warning of rows that are cut later


def tokenize_texts(
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    column: str,
    *,
    text_suffix: str = "",
    append_eos: bool = False,
    separator: list[int] | None = None,
    mark_words: bool = False,
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Tokenize one text column: as the tokenizer frames a text, or without its frame where a `separator` is given.

    Args:
        rows: a data set, or a stream, with the text column `column`.
        text_suffix: added to every text, such as the line end that reading lines took away.
        append_eos: end every row with the tokenizer's end-of-text token.
        separator: token ids put after every row that has tokens, [] for none.
        mark_words: say which tokens begin a word, by the tokenizer's own division of a text into words.
        num_proc: processes that tokenize; not for a stream.

    Returns:
        The rows with the column `input_ids` (int32) and, with `mark_words`, `word_starts` (bool).

    Raises:
        InputError: a row without text (None or not a string), or `append_eos` without such a token.
    """
    if append_eos and tokenizer.eos_token_id is None:
        raise InputError("--append_eos: the tokenizer has no end-of-text token; leave the flag out")
    last_token = [tokenizer.eos_token_id] if append_eos else []
    options = {"add_special_tokens": separator is None, **PLAINLY}

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        encoded = tokenizer([text + text_suffix for text in require_strings(batch[column], column)], **options)
        ends = [last_token + ((separator or []) if ids else []) for ids in encoded["input_ids"]]
        result = {"input_ids": [ids + end for ids, end in zip(encoded["input_ids"], ends, strict=True)]}
        if mark_words:
            result[WORD_STARTS] = [
                find_word_starts(encoded.word_ids(row)) + [True] * len(end) for row, end in enumerate(ends)
            ]
        return result

    features = {"input_ids": datasets.List(datasets.Value("int32"))}
    if mark_words:
        features[WORD_STARTS] = datasets.List(datasets.Value("bool"))
    return map_rows(rows, tokenize, datasets.Features(features), num_proc)


def find_word_starts(word_ids: list[int | None]) -> list[bool]:
    """Say of each token whether it is of another word than the one before; None, a token of no word, stands alone."""
    return [number is None or number != before for number, before in zip(word_ids, [None, *word_ids], strict=False)]


def tokenize_completions(
    rows: datasets.Dataset | datasets.IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    prompt_column: str,
    completion_column: str,
    *,
    max_length: int,
    prompt_prefix: str = "",
    num_proc: int | None = None,
) -> datasets.Dataset | datasets.IterableDataset:
    """Tokenize prompts and their completions, with the loss on the completion (and its end) only.

    A sample is [beginning-of-text] prefix + prompt + completion + end-of-text; prompt and completion are
    tokenized apart, so that the completion's tokens do not depend on the prompt. What is longer than
    `max_length` loses the beginning of its prompt; if the completion alone is too long, its end as well.

    Args:
        rows: a data set, or a stream, with both text columns.
        max_length: tokens of a sample at most, at least 3.
        prompt_prefix: text put before every prompt.
        num_proc: as for `tokenize_texts`.

    Returns:
        The rows with the columns `input_ids` and `labels` (int32 and int64); labels are -100 on the prompt.

    Raises:
        InputError: a row without a prompt or completion (None or not a string).
    """
    first_tokens, bos = find_first_token(tokenizer), tokenizer.bos_token_id
    before = [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []
    eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def tokenize(batch: dict[str, list]) -> dict[str, list]:
        prompts = [prompt_prefix + text for text in require_strings(batch[prompt_column], prompt_column)]
        prompts = tokenizer(prompts, add_special_tokens=False, **PLAINLY)["input_ids"]
        completions = require_strings(batch[completion_column], completion_column)
        completions = tokenizer(completions, add_special_tokens=False, **PLAINLY)["input_ids"]
        samples: dict[str, list] = {"input_ids": [], "labels": []}
        for prompt, completion in zip(prompts, completions, strict=True):
            # One token before the completion always stays: without it nothing forecasts the first target.
            completion = (completion + eos)[: max_length - 1]
            prompt = (before + prompt)[-(max_length - len(completion)) :] or first_tokens
            samples["input_ids"].append(prompt + completion)
            samples["labels"].append([NO_TARGET] * len(prompt) + completion)
        return samples

    features = datasets.Features(
        {"input_ids": datasets.List(datasets.Value("int32")), "labels": datasets.List(datasets.Value("int64"))}
    )
    return map_rows(rows, tokenize, features, num_proc)


def find_first_token(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The token before a stream's first one, from which that is forecast: [bos], else [eos], else []."""
    for token_id in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token_id is not None:
            return [token_id]
    return []


def require_strings(values: list, column: str) -> list[str]:
    """Return `values`; raise `InputError` if one is no text."""
    for value in values:
        if not isinstance(value, str):
            raise InputError(f"column {column!r} holds {value!r} in some row; every row must hold text there")
    return values


def flatten_rows(rows: datasets.Dataset, column: str = "input_ids") -> pyarrow.ChunkedArray:
    """Return the values of all rows of a column of lists as one; they stay where they are, usually in a memory-mapped file."""
    return pyarrow.compute.list_flatten(rows.with_format("arrow")[:][column])


class TokenWindows(torch.utils.data.Dataset):
    """All rows' tokens as one stream, cut into windows in which every token is a target exactly once.

    Windows have `window_length` tokens and begin with the last token of the one before (a model forecasts no
    token without one before it); the last window holds what is left.

    Args:
        rows: a data set with a column `input_ids`.
        window_length: tokens of a window, at least 2.
        first_token: what comes before the stream's first token, [] or [id]; left out if it is there already.
        max_windows: keep only so many windows from the beginning.

    Raises:
        InputError: the stream has no target token.
    """

    def __init__(
        self, rows: datasets.Dataset, window_length: int, first_token: list[int], max_windows: int | None = None
    ) -> None:
        self.tokens, self.window_length = flatten_rows(rows), window_length
        self.first_token = [] if self.tokens[:1].to_pylist() == first_token else list(first_token)
        num_targets = len(self.first_token) + len(self.tokens) - 1
        if num_targets < 1:
            raise InputError("the text has no tokens to train or evaluate on; give a file with more text")
        self._num_windows = min(-(-num_targets // (window_length - 1)), max_windows or num_targets)

    def __len__(self) -> int:
        return self._num_windows

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        start = index * (self.window_length - 1) - len(self.first_token)
        tokens = self.tokens[max(start, 0) : start + self.window_length].to_pylist()
        tokens = self.first_token + tokens if start < 0 else tokens
        return {"input_ids": tokens, "labels": list(tokens)}


class StreamedTokenWindows(torch.utils.data.IterableDataset):
    """`TokenWindows` over a stream of rows, which is read again in every epoch, their number unknown."""

    def __init__(
        self, rows: Iterable[dict], window_length: int, first_token: list[int], max_windows: int | None = None
    ) -> None:
        self.rows, self.window_length, self.first_token = rows, window_length, list(first_token)
        self.max_windows = max_windows

    def set_epoch(self, epoch: int) -> None:
        """Pass the epoch on to rows that are shuffled by it."""
        if hasattr(self.rows, "set_epoch"):
            self.rows.set_epoch(epoch)

    def __iter__(self) -> Iterator[dict]:
        for tokens in itertools.islice(self._cut(), self.max_windows):
            yield {"input_ids": tokens, "labels": list(tokens)}

    def _cut(self) -> Iterator[list[int]]:
        """Join the rows; every `window_length` - 1 tokens a window begins."""
        kept: list[int] = []
        for row in self.rows:
            ids = list(row["input_ids"])
            if not kept and ids and ids[:1] != self.first_token:
                kept = list(self.first_token)
            kept += ids
            start = 0
            while start + self.window_length <= len(kept):
                yield kept[start : start + self.window_length]
                start += self.window_length - 1
            kept = kept[start:]
        if len(kept) > 1:
            yield kept


class PaddingCollator:
    """Pad samples at the right to one length: `input_ids`, `labels` and `shift_labels` (-100), `attention_mask` (0).

    Of the segments of streams it also says by `begins_stream` whether all are their streams' first, and leaves their `context_ids`
    apart: a list of tensors (1, tokens).

    Args:
        pad_token_id: fills `input_ids`; masked, so any id does for a tokenizer without a padding token.
        length: pad to this length instead of that of the batch's longest sample.
    """

    def __init__(self, pad_token_id: int | None, length: int | None = None) -> None:
        self.pad_token_id, self.length = pad_token_id or 0, length

    def __call__(self, samples: list[dict[str, Any]]) -> dict[str, Any]:
        """Return int64 tensors of shape (samples, length), beside `begins_stream` and `context_ids`."""
        batch: dict[str, Any] = {}
        for name in ("input_ids", "labels", "shift_labels"):
            if name in samples[0]:
                filling = self.pad_token_id if name == "input_ids" else NO_TARGET
                rows = [sample[name] for sample in samples]
                batch[name], batch["attention_mask"] = pad_rows(rows, filling, self.length)
        if "begins_stream" in samples[0]:
            batch["begins_stream"] = all(sample["begins_stream"] for sample in samples)
        if "context_ids" in samples[0]:
            batch["context_ids"] = [torch.tensor(sample["context_ids"])[None].long() for sample in samples]
        return batch


def pad_rows(rows: list, filling: int, length: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Join rows of token ids to int64 (rows, longest or `length`), and return its mask, too (1: no padding)."""
    length = length or max(len(row) for row in rows)
    values = torch.full((len(rows), length), filling)
    mask = torch.zeros(len(rows), length, dtype=torch.long)
    for number, row in enumerate(rows):
        values[number, : len(row)] = torch.as_tensor(row, dtype=torch.long)
        mask[number, : len(row)] = 1
    return values, mask
