"""Trains and evaluates a masked language model (BERT), with a v0 for Adam if asked.

The text is one stream of tokens cut into blocks; or, with --line_by_line, one sample per line. Masks are drawn from seed,
epoch and the sample's number, so they depend neither on the batch size nor on the number of processes, nor on where a run
was resumed; those of evaluations are always the same. Losses are exact: each masked token of the set counts once.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoModelForMaskedLM

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..run import RunArguments, run
from ..script_support import flag, run_script
from ..script_trainer import ScriptTrainerMixin
from ..token_budget import TokenBudgetMixin
from ..token_loss import MaskedPerplexityMixin
from .masking import Frame, FramedTexts, MaskedSamples, Masking, require_words
from .samples import PaddingCollator, tokenize_texts
from .shared import LanguageDataArguments, LanguageModelArguments, LanguageTask

ENCODER_DECODERS = frozenset({"bart", "mbart", "mvp"})  # which guess a whole text, not the masked tokens of it
EXAMPLES = """
# BERT's architecture from scratch on a text file, with its data-driven v0
{} --model_type bert --train_file train.txt --do_train --do_eval --v0_init data_driven --output_dir out
# flags from a file, whole words masked, the best checkpoint by its loss
{} FILE.yaml --whole_word_mask --eval_strategy epoch --save_strategy best --metric_for_best_model loss
# go on with a pretrained model, one sample per line
{} --model_name_or_path bert-base-uncased --train_file train.txt --line_by_line --do_train --output_dir out
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.language_modeling.masked_script FILE.yaml --output_dir out
"""


@dataclass
class ModelArguments(LanguageModelArguments):
    """model: which model, which tokenizer"""

    auto_class: ClassVar[type] = AutoModelForMaskedLM
    left_out: ClassVar[frozenset[str]] = ENCODER_DECODERS
    kind: ClassVar[str] = "masked language model; for causal ones use `hf-v0init clm`"

    model_type: str | None = flag(
        None, "From scratch: a transformers model type, such as bert, with its default configuration."
    )


@dataclass
class DataArguments(LanguageDataArguments):
    """data: what it is trained and measured on"""

    block_size: int | None = flag(
        None,
        "Tokens of a sample, its first and last special token included. Default: what model and tokenizer take, at most 512.",
    )
    line_by_line: bool = flag(
        False,
        "Make each line or row a sample, cut at --block_size; empty ones are left out. Default: join them, each ended by the "
        "tokenizer's separator, and cut them into blocks.",
    )
    mlm_probability: float = flag(0.15, "Share of the tokens that are to be guessed.")
    whole_word_mask: bool = flag(
        False, "Choose words instead of tokens, and mask all of a word's tokens. Words are the tokenizer's."
    )


class MaskedTrainer(ScriptTrainerMixin, MaskedPerplexityMixin, TokenBudgetMixin, V0InitTrainer):
    """With exact evaluation over the masked tokens and, where asked, token-budget batches."""


class MaskedTask(LanguageTask):
    """Masked language modelling: blocks or lines, with masks that depend on seed, epoch and number alone."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments)
    trainer_class = MaskedTrainer
    examples = EXAMPLES
    metrics = ("loss", MaskedPerplexityMixin.perplexity_name, "accuracy", "num_tokens")
    card_task = "fill-mask"
    longest_default_block = 512
    for_masking = True

    def make_samples(self, rows, role: str):
        """Make the samples of one role: what the Trainer indexes or iterates."""
        data, tokenizer = self.data, self.tokenizer
        if data.whole_word_mask:
            require_words(tokenizer)
        options = {"probability": data.mlm_probability, "whole_words": data.whole_word_mask}
        masking, frame = Masking.for_tokenizer(tokenizer, **options), Frame.of_tokenizer(tokenizer)
        if self.block_size <= len(frame):
            least = len(frame) + 1
            raise InputError(f"--block_size={self.block_size}: must be {least} or more, for its special tokens and one")
        has_separator = not data.line_by_line and tokenizer.sep_token_id is not None
        tokenized = tokenize_texts(
            rows,
            tokenizer,
            *data.choose_text_columns(rows),
            separator=[tokenizer.sep_token_id] if has_separator else [],
            mark_words=data.whole_word_mask,
            num_proc=data.preprocessing_num_workers,
        )
        texts = FramedTexts(tokenized, self.block_size, frame, data.line_by_line, data.get_limit(role))
        return MaskedSamples(texts, masking, self.data_seed if role == "train" else None)

    def make_collator(self) -> PaddingCollator:
        """Make what pads samples to a batch."""
        return PaddingCollator(self.tokenizer.pad_token_id)


ARGUMENTS = MaskedTask.arguments
main = functools.partial(run, MaskedTask)


if __name__ == "__main__":
    run_script(main)
