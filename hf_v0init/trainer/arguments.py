"""The flags joined to transformers' own: `TrainingArguments` and `Seq2SeqTrainingArguments` with a v0."""

from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..settings import V0InitArguments


@dataclass
class V0InitTrainingArguments(V0InitArguments, TrainingArguments):
    """`transformers.TrainingArguments` with the v0 flags of `V0InitArguments`."""


@dataclass
class V0InitSeq2SeqTrainingArguments(V0InitArguments, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the v0 flags of `V0InitArguments`."""
