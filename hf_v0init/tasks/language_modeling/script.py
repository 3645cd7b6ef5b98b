"""Trains, evaluates and samples from a causal language model, with a v0 for Adam if asked.

    hf-v0init clm FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 -m hf_v0init.tasks.language_modeling.script FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

The text is one stream of tokens cut into blocks; or, with --model_type awd_lstm, as many contiguous streams as a batch has
rows, read from beginning to end with the state carried on; or, with --prompt_column and --completion_column, one sample a
row with the loss on the completion. Losses and perplexities are exact: each token of the set counts once.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoModelForCausalLM, PreTrainedConfig, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..data import limit_rows
from ..run import RunArguments, run, tokenize_first_on_main
from ..script_support import flag, run_script, say
from ..script_trainer import ScriptTrainerMixin
from ..text_files import TABLES, get_format
from ..token_budget import TokenBudgetMixin
from .awd_lstm import AwdLstmConfig
from .completions import generate_completions
from .perplexity import ExactPerplexityMixin
from .samples import (
    PaddingCollator,
    StreamedTokenWindows,
    TokenWindows,
    encode_prompts,
    find_first_token,
    tokenize_completions,
    tokenize_texts,
)
from .shared import LanguageDataArguments, LanguageModelArguments, LanguageTask
from .stream_training import ContiguousStreamsMixin, require_possible_streams
from .token_streams import SegmentCollator, TokenStreams

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
    model_types: ClassVar[tuple[str, ...]] = (*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, AwdLstmConfig.model_type)
    kind: ClassVar[str] = "causal language model"
    other_script: ClassVar[str] = "run_mlm"

    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type, such as gpt2, with its default configuration; or awd_lstm, an LSTM that reads "
        "contiguous streams and keeps its state from batch to batch.",
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example n_embd=256,n_layer=4."
    )


@dataclass
class DataArguments(LanguageDataArguments):
    """data: what it is trained and measured on"""

    column_flags: ClassVar[tuple[str, ...]] = ("text_column", "prompt_column", "completion_column")
    uneven_flag: ClassVar[str] = "prompt_column"

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
        "awd_lstm: draw the segments' lengths anew in every epoch, around --block_size or, 5 in 100, half of it, and scale the "
        "learning rate of each step by its length (Merity et al., section 5). Depends on --seed alone.",
    )
    keep_linebreaks: bool = flag(True, "Text files: keep the line break at the end of every line.")
    append_eos: bool = flag(False, "End every line or row with the tokenizer's end-of-text token.")

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        if (self.prompt_column is None) != (self.completion_column is None):
            raise InputError("--prompt_column and --completion_column: give both or neither")
        if self.prompt_column is None and self.prompt_prefix:
            raise InputError(f"--prompt_prefix={self.prompt_prefix!r}: needs --prompt_column and --completion_column")
        if self.prompt_column is not None and (self.text_column or self.append_eos):
            raise InputError(
                "--text_column and --append_eos: are for running text; drop them, or --prompt_column and --completion_column"
            )
        smallest = 2 if self.prompt_column is None else 3
        if self.block_size is not None and self.block_size < smallest:
            raise InputError(f"--block_size={self.block_size}: must be {smallest} or more")

    def choose_text_columns(self, rows) -> list[str]:
        """Choose the columns that hold text: prompt and completion, or the one of running text."""
        return [self.prompt_column, self.completion_column] if self.prompt_column else super().choose_text_columns(rows)

    def choose_text_suffix(self, role: str) -> str:
        """Return the line break that reading a text file by lines took away, or nothing."""
        path = getattr(self, f"{role}_file") or self.train_file
        is_text = path is not None and get_format(path) not in TABLES
        return "\n" if is_text and self.keep_linebreaks and self.prompt_column is None else ""


@dataclass
class SamplingArguments:
    """generation: what is written at the end"""

    sample_prompt: str | None = flag(
        None, "At the end, continue this text by sampling; printed and saved to generated_sample.txt."
    )
    max_new_tokens: int = flag(64, "Tokens generated at most, for --sample_prompt and for completions of the test set.")


class CausalTrainer(ScriptTrainerMixin, ExactPerplexityMixin, ContiguousStreamsMixin, TokenBudgetMixin, V0InitTrainer):
    """With exact evaluation and, where asked, contiguous streams and token-budget batches."""


class CausalTask(LanguageTask):
    """Causal language modelling: blocks, contiguous streams, or prompts with completions."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments, SamplingArguments)
    trainer_class = CausalTrainer
    examples = EXAMPLES
    metrics = ("loss", "perplexity", "accuracy", "num_tokens")
    card_task = "text-generation"
    perplexity_name = "perplexity"
    longest_default_block = 1024

    def load_config(self) -> PreTrainedConfig:
        """Load the configuration, and refuse what kind of model and arguments rule out together."""
        config, data, smoothing = super().load_config(), self.data, self.training.label_smoothing_factor
        is_lstm = isinstance(config, AwdLstmConfig)
        self.reads_streams = is_lstm and data.prompt_column is None
        if self.reads_streams and data.streaming:
            raise InputError("--streaming: an awd_lstm reads several places of the text at once; leave it out")
        if data.vary_block_size and not self.reads_streams:
            raise InputError("--vary_block_size: is for running text and --model_type awd_lstm; leave it out")
        if is_lstm and smoothing:
            raise InputError(
                f"--label_smoothing_factor={smoothing}: would replace the loss of awd_lstm with its regularisers; leave it out"
            )
        if is_lstm:
            self.longest_default_block = DEFAULT_SEGMENT
        return config

    def make_samples(self) -> dict[str, Any]:
        """Make blocks, streams, or prompts with completions: what the Trainer indexes or iterates."""
        samples = tokenize_first_on_main(self, self.rows, self.make_samples_of)
        require_possible_streams(self.training, samples.get("train"), [samples.get("validation"), samples.get("test")])
        return samples

    def make_samples_of(self, rows, role: str):
        """Make the samples of one role."""
        data, training, tokenizer, limit = self.data, self.training, self.tokenizer, self.data.get_limit(role)
        options = data.choose_map_options(self.model.cache_dir)
        columns = data.choose_text_columns(rows)
        if data.prompt_column is not None:
            options |= {"max_length": self.block_size, "prompt_prefix": data.prompt_prefix}
            return tokenize_completions(limit_rows(rows, limit), tokenizer, *columns, **options)
        suffix = data.choose_text_suffix(role)
        tokenized = tokenize_texts(rows, tokenizer, *columns, text_suffix=suffix, append_eos=data.append_eos, **options)
        first_token = find_first_token(tokenizer)
        if not self.reads_streams:
            windows = StreamedTokenWindows if data.streaming else TokenWindows
            return windows(tokenized, self.block_size, first_token, limit)
        batch_size = training.train_batch_size if role == "train" else training.eval_batch_size
        varies = data.vary_block_size and role == "train"
        num_streams = batch_size * training.world_size
        return TokenStreams(
            tokenized, num_streams, self.block_size, first_token, limit, varies=varies, seed=training.seed
        )

    def make_collator(self) -> PaddingCollator | SegmentCollator:
        """Make what joins samples to a batch."""
        return SegmentCollator(self.tokenizer.pad_token_id) if self.reads_streams else super().make_collator()

    # ---- after training ----------------------------------------------------------------------------------------------

    def predict(self, trainer: CausalTrainer, samples) -> None:
        """Measure the test samples; of prompts, write greedy completions beside the true ones."""
        super().predict(trainer, samples)
        data = self.data
        if data.prompt_column is None:
            return
        rows = list(limit_rows(self.rows["test"], data.max_predict_samples))
        prompts = encode_prompts([row[data.prompt_column] for row in rows], self.tokenizer, data.prompt_prefix)
        generated = self.complete(trainer, prompts, do_sample=False)
        lines = [
            json.dumps(
                {"prompt": row[data.prompt_column], "completion": row[data.completion_column], "generated": text},
                ensure_ascii=False,
            )
            for row, text in zip(rows, generated, strict=True)
        ]
        write_lines(trainer, "generated_completions.jsonl", lines)

    def finish(self, trainer: CausalTrainer) -> None:
        """Write a sampled continuation of `sample_prompt`."""
        prompt = self.others[0].sample_prompt
        if prompt is None:
            return
        set_seed(trainer.args.seed)
        text = prompt + self.complete(trainer, encode_prompts([prompt], self.tokenizer), do_sample=True)[0]
        write_lines(trainer, "generated_sample.txt", [text])
        if trainer.is_world_process_zero():
            say(f"sample: {text}")

    def complete(self, trainer: CausalTrainer, prompts: list[list[int]], **options) -> list[str]:
        """Continue prompts, given as token ids, and return the texts."""
        network, first_token = trainer.accelerator.unwrap_model(trainer.model), find_first_token(self.tokenizer)
        prompts, longest = [ids or first_token for ids in prompts], self.others[0].max_new_tokens
        return generate_completions(network, self.tokenizer, prompts, longest, trainer.accelerator, **options)


def write_lines(trainer, name: str, lines: list[str]) -> None:
    """Write one text per line into a file of the output folder, on the main process."""
    if trainer.is_world_process_zero():
        Path(trainer.args.output_dir, name).write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


ARGUMENTS = CausalTask.arguments


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    run(CausalTask, argv)


if __name__ == "__main__":
    run_script(main)
