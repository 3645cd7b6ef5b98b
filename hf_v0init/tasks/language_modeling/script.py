"""Trains and evaluates a causal language model, with a v0 for Adam if asked.

The text is one stream of tokens cut into blocks; or, with --model_type awd_lstm, as many contiguous streams as a batch has
rows, read from beginning to end with the state carried on; or, with --prompt_column and --completion_column, one sample a
row with the loss on the completion. Losses and perplexities are exact: each token of the set counts once.
"""

import functools
from dataclasses import dataclass
from typing import ClassVar

from transformers import AutoModelForCausalLM, PreTrainedConfig

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..data import limit_rows
from ..run import RunArguments, run
from ..script_support import flag, run_script
from ..script_trainer import ScriptTrainerMixin
from ..text_files import TABLES, get_format
from ..token_budget import TokenBudgetMixin
from ..token_loss import ExactPerplexityMixin
from .awd_lstm import AwdLstmConfig
from .samples import (
    PaddingCollator,
    StreamedTokenWindows,
    TokenWindows,
    find_first_token,
    tokenize_completions,
    tokenize_texts,
)
from .shared import LanguageDataArguments, LanguageModelArguments, LanguageTask
from .streams import ContiguousStreamsMixin, TokenStreams

DEFAULT_SEGMENT = 70  # tokens through which AWD-LSTM's paper back-propagates
EXAMPLES = """
# GPT-2's architecture from scratch on a text file, with its data-driven v0
{} --model_type gpt2 --train_file train.txt --do_train --do_eval --v0_init data_driven --output_dir out
# flags from a file, a smaller model, the best checkpoint by perplexity
{} FILE.yaml --config_overrides n_embd=256,n_layer=4,n_head=4 --eval_strategy epoch --save_strategy best \\
  --metric_for_best_model perplexity
# fine-tune a pretrained model on prompts with their completions
{} --model_name_or_path gpt2 --train_file qa.jsonl --prompt_column q --completion_column a --do_train \\
  --output_dir out
# data that does not fit on the disk
{} FILE.yaml --dataset_name allenai/c4 --dataset_config_name en --streaming --max_steps 10000
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.language_modeling.script FILE.yaml --output_dir out
"""


@dataclass
class ModelArguments(LanguageModelArguments):
    """model: which model, which tokenizer"""

    auto_class: ClassVar[type] = AutoModelForCausalLM
    kind: ClassVar[str] = "causal language model; for masked ones use `hf-v0init mlm`"

    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type, such as gpt2, with its default configuration; or awd_lstm, an LSTM that reads "
        "contiguous streams and keeps its state from batch to batch.",
    )


@dataclass
class DataArguments(LanguageDataArguments):
    """data: what it is trained and measured on"""

    column_flags: ClassVar[tuple[str, ...]] = ("text_column", "prompt_column", "completion_column")

    prompt_column: str | None = flag(
        None, "Column with prompts; needs --completion_column. One sample per row, the loss on the completion only."
    )
    completion_column: str | None = flag(None, "Column with the completions.")
    prompt_prefix: str = flag("", "Text put before every prompt.")
    block_size: int | None = flag(
        None,
        "Tokens of a block, and the longest prompt with completion (longer ones lose the beginning of the prompt). Default: what "
        "model and tokenizer take, at most 1024. awd_lstm: tokens of a segment, through which it back-propagates; 70.",
    )
    vary_block_size: bool = flag(
        False,
        "awd_lstm: draw new segment lengths in every epoch, around --block_size or, 5 in 100, half of it, and scale the "
        "learning rate of each step by its length (Merity et al., section 5). Depends on --seed alone.",
    )
    append_eos: bool = flag(False, "End every line or row with the tokenizer's end-of-text token.")
    streaming: bool = flag(
        False, "Read the data while training instead of before; needs --max_steps. Nothing is cached."
    )
    shuffle_buffer_size: int | None = flag(
        None, "With --streaming: draw training rows at random from a buffer of this many. Default: in order."
    )

    def choose_text_columns(self, rows) -> list[str]:
        """Choose the columns that hold text: prompt and completion, or the one of running text."""
        return [self.prompt_column, self.completion_column] if self.prompt_column else super().choose_text_columns(rows)

    def choose_text_suffix(self, role: str) -> str:
        """Return the line break that reading a text file by lines took away, or nothing."""
        path = getattr(self, f"{role}_file") or self.train_file
        is_text = path is not None and get_format(path) not in TABLES
        return "\n" if is_text and self.prompt_column is None else ""


class CausalTrainer(ScriptTrainerMixin, ExactPerplexityMixin, ContiguousStreamsMixin, TokenBudgetMixin, V0InitTrainer):
    """With exact evaluation and, where asked, contiguous streams and token-budget batches."""


class CausalTask(LanguageTask):
    """Causal language modelling: blocks, contiguous streams, or prompts with completions."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments)
    trainer_class = CausalTrainer
    examples = EXAMPLES
    metrics = ("loss", "perplexity", "accuracy", "num_tokens")
    has_own_loss = True
    card_task = "text-generation"
    longest_default_block = 1024

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration, and refuse what kind of model and arguments rule out together."""
        config, data = super().load_config(), self.data
        self.reads_streams = isinstance(config, AwdLstmConfig)
        if not self.reads_streams:
            if data.vary_block_size:
                raise InputError("--vary_block_size: is for --model_type awd_lstm; leave it out")
            return config
        flags = vars(data) | vars(self.training)
        for name, why in (
            ("streaming", "it reads several places of the text at once"),
            ("prompt_column", "it reads running text"),
            ("max_tokens_per_batch", "its batches are as many streams"),
            ("label_smoothing_factor", "it would replace the model's own loss with its regularisers"),
        ):
            if flags[name]:
                raise InputError(f"--{name}={flags[name]}: not with an awd_lstm, for {why}; leave it out")
        self.longest_default_block = DEFAULT_SEGMENT
        return config

    def make_samples(self, rows, role: str):
        """Make the samples of one role."""
        data, tokenizer, length, limit = self.data, self.tokenizer, self.block_size, self.data.get_limit(role)
        columns, options = data.choose_text_columns(rows), {"num_proc": data.preprocessing_num_workers}
        if role == "train" and data.shuffle_buffer_size:
            rows = rows.shuffle(seed=self.training.seed, buffer_size=data.shuffle_buffer_size)
        if data.prompt_column is not None:
            options |= {"max_length": length, "prompt_prefix": data.prompt_prefix}
            return tokenize_completions(limit_rows(rows, limit), tokenizer, *columns, **options)
        options |= {"text_suffix": data.choose_text_suffix(role), "append_eos": data.append_eos}
        tokenized = tokenize_texts(rows, tokenizer, *columns, **options)
        first_token = find_first_token(tokenizer)
        if not self.reads_streams:
            windows = StreamedTokenWindows if data.streaming else TokenWindows
            return windows(tokenized, length, first_token, limit)
        training, varies = self.training, data.vary_block_size and role == "train"
        num_streams = training.world_size * (training.train_batch_size if role == "train" else training.eval_batch_size)
        return TokenStreams(tokenized, num_streams, length, first_token, limit, varies=varies, seed=training.seed)

    def make_collator(self) -> PaddingCollator:
        """Make what joins samples to a batch."""
        # A stream's batches are cut and joined across processes, so they must all be of one length.
        return PaddingCollator(self.tokenizer.pad_token_id, length=self.block_size if self.data.streaming else None)


ARGUMENTS = CausalTask.arguments
main = functools.partial(run, CausalTask)


if __name__ == "__main__":
    run_script(main)
