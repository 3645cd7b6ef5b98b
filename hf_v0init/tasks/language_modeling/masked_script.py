"""Trains and evaluates a masked language model (BERT), with a v0 for Adam if asked.

    hf-v0init mlm FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 -m hf_v0init.tasks.language_modeling.masked_script FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

The text is one stream of tokens cut into blocks; or, with --line_by_line, one sample per line. Masks are drawn from seed,
epoch and the sample's number, so they depend neither on the batch size nor on the number of processes, nor on where a run
was resumed; those of evaluations are always the same. Losses are exact: each masked token of the set counts once.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForMaskedLM
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..run import RunArguments, run, tokenize_first_on_main
from ..script_support import flag, run_script, say
from ..script_trainer import ScriptTrainerMixin
from ..token_budget import TokenBudgetMixin
from ..token_loss import TokenCrossEntropy
from .masked_samples import Frame, FramedTexts, StreamedTexts, require_words
from .masking import MaskedSamples, MaskedStream, Masking
from .perplexity import MaskedPerplexityMixin
from .samples import tokenize_texts
from .shared import LanguageDataArguments, LanguageModelArguments, LanguageTask

NUM_GUESSES = 5
ENCODER_DECODERS = {"bart", "mbart", "mvp"}  # which guess a whole text, not the masked tokens of it
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
    model_types: ClassVar[tuple[str, ...]] = tuple(
        name for name in MODEL_FOR_MASKED_LM_MAPPING_NAMES if name not in ENCODER_DECODERS
    )
    kind: ClassVar[str] = "masked language model"
    other_script: ClassVar[str] = "run_clm"

    model_type: str | None = flag(
        None, "From scratch: a transformers model type, such as bert, with its default configuration."
    )


@dataclass
class DataArguments(LanguageDataArguments):
    """data: what it is trained and measured on"""

    uneven_flag: ClassVar[str] = "line_by_line"

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
    mask_replace_prob: float = flag(0.8, "Share of those that become the mask token.")
    random_replace_prob: float = flag(0.1, "Share of those that become a random token; the rest stays as it is.")
    whole_word_mask: bool = flag(
        False, "Choose words instead of tokens, and mask all of a word's tokens. Words are the tokenizer's."
    )

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        if self.mask_replace_prob + self.random_replace_prob > 1 + 1e-9:
            raise InputError(
                f"--mask_replace_prob={self.mask_replace_prob} and --random_replace_prob={self.random_replace_prob}: together "
                "they must be at most 1"
            )


@dataclass
class SampleArguments:
    """generation: what is written at the end"""

    sample_text: str | None = flag(
        None,
        "At the end, list the likeliest tokens for each mask token in this text, such as 'the [MASK] rose' (of a tokenizer "
        "trained here the token is <mask>); printed and saved to filled_sample.txt.",
    )


class MaskedTrainer(ScriptTrainerMixin, MaskedPerplexityMixin, TokenBudgetMixin, V0InitTrainer):
    """With exact evaluation over the masked tokens and, where asked, token-budget batches."""


class MaskedTask(LanguageTask):
    """Masked language modelling: blocks or lines, with masks that depend on seed, epoch and number alone."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments, SampleArguments)
    trainer_class = MaskedTrainer
    examples = EXAMPLES
    metrics = ("loss", MaskedPerplexityMixin.perplexity_name, "accuracy", "num_tokens")
    card_task = "fill-mask"
    perplexity_name = MaskedPerplexityMixin.perplexity_name
    longest_default_block = 512
    for_masking = True

    def make_samples(self) -> dict[str, Any]:
        """Make blocks or lines with their masks, and refuse tokenizers and sizes with which that cannot be."""
        data, tokenizer, text = self.data, self.tokenizer, self.others[0].sample_text
        if data.whole_word_mask:
            require_words(tokenizer)
        self.masking = Masking.for_tokenizer(
            tokenizer,
            probability=data.mlm_probability,
            mask_share=data.mask_replace_prob,
            random_share=data.random_replace_prob,
            whole_words=data.whole_word_mask,
        )
        if text is not None and tokenizer.mask_token_id not in tokenizer(text)["input_ids"]:
            raise InputError(
                f"--sample_text={text!r}: has no mask token; write {tokenizer.mask_token} where one is wanted"
            )
        self.frame = Frame.of_tokenizer(tokenizer)
        if self.block_size <= len(self.frame):
            raise InputError(
                f"--block_size={self.block_size}: must be {len(self.frame) + 1} or more, for {len(self.frame)} tokens frame each "
                "sample"
            )
        return tokenize_first_on_main(self, self.rows, self.make_samples_of)

    def make_samples_of(self, rows, role: str):
        """Make the samples of one role: what the Trainer indexes or iterates."""
        data, training, tokenizer = self.data, self.training, self.tokenizer
        has_separator = not data.line_by_line and tokenizer.sep_token_id is not None
        tokenized = tokenize_texts(
            rows,
            tokenizer,
            *data.choose_text_columns(rows),
            separator=[tokenizer.sep_token_id] if has_separator else [],
            mark_words=data.whole_word_mask,
            **data.choose_map_options(self.model.cache_dir),
        )
        seed = None  # of evaluation
        if role == "train":
            seed = training.seed if training.data_seed is None else training.data_seed
        limit = data.get_limit(role)
        if data.streaming:
            texts = StreamedTexts(tokenized, self.block_size, self.frame, data.line_by_line)
            return MaskedStream(texts, self.masking, seed, limit)
        cut = FramedTexts.take_lines if data.line_by_line else FramedTexts.cut_blocks
        return MaskedSamples(cut(tokenized, self.block_size, self.frame, limit), self.masking, seed)

    def choose_trainer_options(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Choose tokenizer, token budget and loss."""
        loss = TokenCrossEntropy(self.training.label_smoothing_factor)
        return super().choose_trainer_options(samples) | {"compute_loss_func": loss}

    @torch.no_grad()
    def finish(self, trainer: MaskedTrainer) -> None:
        """Write the likeliest tokens for each mask token of `sample_text`, with their probabilities."""
        text, tokenizer = self.others[0].sample_text, self.tokenizer
        if text is None:
            return
        network = trainer.accelerator.unwrap_model(trainer.model).eval()
        input_ids = tokenizer(text, return_tensors="pt")["input_ids"].to(network.device)
        logits = network(input_ids=input_ids).logits[input_ids == tokenizer.mask_token_id].float()
        lines = []
        for number, probabilities in enumerate(logits.softmax(dim=-1), start=1):
            best = probabilities.topk(min(NUM_GUESSES, len(probabilities)))
            guesses = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            words = ", ".join(
                f"{tokenizer.decode([token]).strip()} {probability:.3f}" for token, probability in guesses
            )
            lines.append(f"mask {number} of {text!r}: {words}")
        if trainer.is_world_process_zero():
            say("\n".join(lines))
            path = Path(trainer.args.output_dir, "filled_sample.txt")
            path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


ARGUMENTS = MaskedTask.arguments


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    run(MaskedTask, argv)


if __name__ == "__main__":
    run_script(main)
