"""What clm and mlm share: the flags of text and model, the rows of each role, the size of a block."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hf_v0init import InputError

from ..data import TextDataArguments, is_stream, list_columns
from ..models import TextModelArguments
from ..run import TextTask
from ..script_support import flag
from ..tokenizer_training import train_bpe_tokenizer, train_word_tokenizer
from .samples import require_strings

MAX_TOKENIZER_TEXTS = 2_000_000  # a vocabulary does not get better from more, but memory runs out


@dataclass
class LanguageModelArguments(TextModelArguments):
    """model: which model, which tokenizer"""

    tokenizer_kind: str = flag(
        "bpe",
        "From scratch without a tokenizer, one is trained on the training text and saved: 'bpe' (byte-level BPE), or "
        "'word' (words between white space; of a causal model with a </s> after every line, as PTB perplexities count).",
        choices=["bpe", "word"],
    )


@dataclass
class LanguageDataArguments(TextDataArguments):
    """data: what it is trained and measured on"""

    column_flags: ClassVar[tuple[str, ...]] = ("text_column",)

    validation_split_percentage: float = flag(
        5.0, "Without validation data, --do_eval takes this percentage from the beginning of the training data."
    )
    validation_split_rows: int | None = flag(
        None,
        "The same by number: validation data are the first so many rows of the training data.",
    )
    text_column: str | None = flag(None, "Column with the text. Default: 'text', else the first column.")
    block_size: int | None = flag(None, "Tokens of a sample. Default: what model and tokenizer take, within limits.")

    def choose_text_columns(self, rows) -> list[str]:
        """Choose the columns that hold text: the one named, else 'text', else the first."""
        names = list_columns(rows)
        return [self.text_column or ("text" if "text" in names else names[0])]

    def select(self, rows, role: str):
        """Refuse rows that have not the columns named."""
        names = list_columns(rows)
        for name in self.column_flags:
            column = getattr(self, name)
            if column is not None and column not in names:
                raise InputError(f"--{name}={column}: the {role} data has no such column, only {', '.join(names)}")
        return rows

    def split_off_validation(self, train) -> dict[str, Any]:
        """Split rows into "train" and "validation", its first rows; raise `InputError` if one of them would be empty."""
        number = self.validation_split_rows
        if train is None or (is_stream(train) and number is None):
            of_stream = (
                ", or --validation_split_rows 1000 for the first rows of the training data" if is_stream(train) else ""
            )
            raise InputError(f"{self.describe_missing('validation')}{of_stream}")
        if is_stream(train):
            if next(iter(train.skip(number)), None) is None:
                raise InputError(f"--validation_split_rows={number}: the training stream has no more rows; lower it")
            return {"train": train.skip(number), "validation": train.take(number)}
        number = round(len(train) * self.validation_split_percentage / 100) if number is None else number
        if not 0 < number < len(train):
            raise InputError(f"of {len(train)} training rows, {number} cannot be split off; give --validation_file")
        return {"train": train.select(range(number, len(train))), "validation": train.select(range(number))}

    def choose_text_suffix(self, role: str) -> str:
        """Return what is put after each text of "train", "validation" or "test"."""
        return ""


class LanguageTask(TextTask):
    """A language model: rows of text, a tokenizer, blocks."""

    test_name = "test"
    longest_default_block: ClassVar[int]
    for_masking: ClassVar[bool] = False

    def iterate_texts(self, rows) -> Iterator[str]:
        """Yield the training texts, for a tokenizer to be trained on; raise `InputError` for a row without text."""
        columns, suffix = self.data.choose_text_columns(rows), self.data.choose_text_suffix("train")
        for row in itertools.islice(rows, MAX_TOKENIZER_TEXTS):
            for column in columns:
                yield require_strings([row[column]], column)[0] + suffix

    def train_tokenizer(self, texts) -> PreTrainedTokenizerBase:
        """Train a tokenizer on texts."""
        if self.model.tokenizer_kind == "word":
            return train_word_tokenizer(texts, self.model.vocab_size, for_masking=self.for_masking)
        return train_bpe_tokenizer(texts, self.model.vocab_size, for_translation=False, for_masking=self.for_masking)

    @functools.cached_property
    def block_size(self) -> int:
        """The tokens of a block: as asked, else as many as model and tokenizer take, within `longest_default_block`.

        Raises:
            InputError: more than they take.
        """
        requested = self.data.block_size
        limits = [n for n in (count_positions(self.network), self.tokenizer.model_max_length) if n and n > 0]
        if requested is None:
            return min([self.longest_default_block, *limits])
        if limits and requested > min(limits):
            raise InputError(
                f"--block_size={requested}: model and tokenizer take {min(limits)} tokens; lower it, or raise the number of "
                "positions with --config_overrides"
            )
        return requested


def count_positions(network: PreTrainedModel) -> int | None:
    """Count the tokens that a model has positions for; None: any number.

    RoBERTa and its like number positions from behind their padding's, so some of their table is never used.
    """
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if not isinstance(positions, int):
        return None
    for name, module in network.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, nn.Embedding) and module.padding_idx is not None:
            return min(positions, module.num_embeddings - module.padding_idx - 1)
    return positions
