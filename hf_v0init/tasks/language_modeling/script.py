"""Trains, evaluates and samples from a causal language model, with a v0 for Adam if asked.

    python scripts/run_clm.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_clm.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

The text is one stream of tokens cut into blocks; or, with --model_type awd_lstm, as many contiguous streams as a batch has
rows, read from beginning to end with the state carried on; or, with --prompt_column and --completion_column, one sample a
row with the loss on the completion. Losses and perplexities are exact: each token of the set counts once.
"""

import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import set_seed

from hf_v0init import V0InitTrainer, V0InitTrainingArguments

from ...errors import InputError
from ..probing import ProbeArguments, probe_and_print
from ..script_stages import flag
from ..script_support import explain_hub_errors, parse_arguments, run_script
from ..script_trainer import ScriptTrainerMixin
from ..step_decay import StepDecayMixin
from ..token_budget import TokenBudgetMixin
from .awd_lstm import AwdLstmConfig
from .completions import generate_completions
from .model import ModelArguments
from .perplexity import ExactPerplexityMixin
from .rows import DataArguments, limit_rows
from .samples import (
    PaddingCollator,
    StreamedTokenWindows,
    TokenWindows,
    encode_prompts,
    find_first_token,
    tokenize_completions,
    tokenize_texts,
)
from .shared_script import (
    LanguageRunArguments,
    begin_run,
    choose_map_options,
    finish,
    prepare_all_samples,
    prepare_run,
    train_and_evaluate,
)
from .stream_training import ContiguousStreamsMixin, require_possible_streams
from .token_streams import SegmentCollator, TokenStreams

METRICS = ("loss", "perplexity", "accuracy", "num_tokens")
EXAMPLES = """
# GPT-2's architecture from scratch on a text file, with its data-driven v0
run_clm.py --model_type gpt2 --train_file train.txt --do_train --do_eval --v0_init data_driven --output_dir out
# flags from a file, a smaller model, the best checkpoint by perplexity
run_clm.py FILE.yaml --config_overrides n_embd=256,n_layer=4,n_head=4 --eval_strategy epoch --save_strategy best \\
  --metric_for_best_model perplexity
# fine-tune a pretrained model on prompts with their completions
run_clm.py FILE.yaml --model_name_or_path gpt2 --train_file qa.jsonl --prompt_column q --completion_column a
# data that does not fit on the disk
run_clm.py FILE.yaml --dataset_name allenai/c4 --dataset_config_name en --streaming --max_steps 10000
# two processes
torchrun --nproc_per_node 2 run_clm.py FILE.yaml --output_dir out
"""


@dataclass
class RunArguments(LanguageRunArguments):
    """How a causal language model is trained, and what it writes at the end."""

    sample_prompt: str | None = flag(
        None, "At the end, continue this text by sampling; printed and saved to generated_sample.txt."
    )
    max_new_tokens: int = flag(64, "Tokens generated at most, for --sample_prompt and for completions of the test set.")


class CausalTrainer(
    ScriptTrainerMixin, ExactPerplexityMixin, ContiguousStreamsMixin, TokenBudgetMixin, StepDecayMixin, V0InitTrainer
):
    """With exact evaluation and, where asked, contiguous streams, token-budget batches and step decay."""


def reads_streams(config, data: DataArguments) -> bool:
    """Whether the model carries a state along contiguous streams."""
    return isinstance(config, AwdLstmConfig) and data.prompt_column is None


def require_possible_for_model(config, data: DataArguments, training) -> None:
    """Refuses what kind of model and arguments rule out together."""
    if reads_streams(config, data) and data.streaming:
        raise InputError("--streaming: an awd_lstm reads several places of the text at once; leave it out")
    if data.vary_block_size and not reads_streams(config, data):
        raise InputError("--vary_block_size: is for running text and --model_type awd_lstm; leave it out")
    if isinstance(config, AwdLstmConfig) and training.label_smoothing_factor:
        raise InputError(
            f"--label_smoothing_factor={training.label_smoothing_factor}: would replace the loss of awd_lstm with its "
            "regularisers; leave it out"
        )


def prepare_samples(rows, role: str, tokenizer, block_size: int, config, data: DataArguments, training, cache_dir):
    """Blocks, streams, or prompts with completions: what the Trainer indexes or iterates."""
    limit = data.get_limit(role)
    options = choose_map_options(data, training, cache_dir)
    if data.prompt_column is not None:
        columns = data.prompt_column, data.completion_column
        rows = limit_rows(rows, limit)
        return tokenize_completions(
            rows, tokenizer, *columns, max_length=block_size, prompt_prefix=data.prompt_prefix, **options
        )
    tokenized = tokenize_texts(
        rows,
        tokenizer,
        *data.choose_text_columns(rows),
        text_suffix=data.choose_text_suffix(role),
        append_eos=data.append_eos,
        **options,
    )
    first_token = find_first_token(tokenizer)
    if not reads_streams(config, data):
        windows = StreamedTokenWindows if data.streaming else TokenWindows
        return windows(tokenized, block_size, first_token, limit)
    batch_size = training.train_batch_size if role == "train" else training.eval_batch_size
    varies = data.vary_block_size and role == "train"
    num_streams = batch_size * training.world_size
    return TokenStreams(tokenized, num_streams, block_size, first_token, limit, varies=varies, seed=training.seed)


# ----------------------------------------------------------------------------------------------- after training


def complete(trainer: CausalTrainer, prompts: list[list[int]], max_new_tokens: int, **options) -> list[str]:
    """Continue prompts, given as token ids, and return the texts."""
    network = trainer.accelerator.unwrap_model(trainer.model)
    first_token = find_first_token(trainer.processing_class)
    prompts = [ids or first_token for ids in prompts]
    return generate_completions(
        network, trainer.processing_class, prompts, max_new_tokens, trainer.accelerator, **options
    )


def write_test_completions(trainer: CausalTrainer, rows, data: DataArguments, max_new_tokens: int) -> None:
    """Greedy completions of the test prompts, beside the true ones, to generated_completions.jsonl."""
    rows = list(limit_rows(rows, data.max_predict_samples))
    prompts = [row[data.prompt_column] for row in rows]
    token_ids = encode_prompts(prompts, trainer.processing_class, data.prompt_prefix)
    generated = complete(trainer, token_ids, max_new_tokens, do_sample=False)
    if trainer.is_world_process_zero():
        write_lines(
            Path(trainer.args.output_dir, "generated_completions.jsonl"),
            (
                json.dumps(
                    {"prompt": row[data.prompt_column], "completion": row[data.completion_column], "generated": text},
                    ensure_ascii=False,
                )
                for row, text in zip(rows, generated, strict=True)
            ),
        )


def write_sample(trainer: CausalTrainer, prompt: str, max_new_tokens: int) -> None:
    """One sampled continuation of `prompt`, printed and to generated_sample.txt."""
    set_seed(trainer.args.seed)
    prompts = encode_prompts([prompt], trainer.processing_class)
    text = prompt + complete(trainer, prompts, max_new_tokens, do_sample=True)[0]
    if trainer.is_world_process_zero():
        print(f"sample: {text}")
        write_lines(Path(trainer.args.output_dir, "generated_sample.txt"), [text])


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write one text per line."""
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")


ARGUMENTS = (ModelArguments, DataArguments, RunArguments, ProbeArguments, V0InitTrainingArguments)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    model_args, data_args, run_args, probe_args, training_args = parse_arguments(ARGUMENTS, argv, EXAMPLES)
    begun = begin_run(model_args, data_args, run_args, probe_args, training_args, METRICS)
    config, checkpoint = begun.config, begun.checkpoint

    require_possible_for_model(config, data_args, training_args)
    prepared = prepare_run(model_args, data_args, run_args, training_args, config, checkpoint)
    tokenizer, block_size = prepared.tokenizer, prepared.block_size

    def prepare(rows, role: str):
        return prepare_samples(
            rows, role, tokenizer, block_size, config, data_args, training_args, model_args.cache_dir
        )

    samples = prepare_all_samples(prepared, prepare, data_args, run_args, training_args)
    require_possible_streams(training_args, samples.get("train"), [samples.get("validation"), samples.get("test")])
    if reads_streams(config, data_args):
        collator = SegmentCollator(tokenizer.pad_token_id)
    else:
        # A stream's batches are cut and joined across processes, so they must all be of one length.
        collator = PaddingCollator(tokenizer.pad_token_id, length=block_size if data_args.streaming else None)
    with explain_hub_errors(training_args):
        trainer = CausalTrainer(
            model=prepared.network,
            args=training_args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("validation"),
            processing_class=tokenizer,
            data_collator=collator,
            max_tokens_per_batch=run_args.max_tokens_per_batch if training_args.do_train else None,
            step_decay=run_args,
            run_identity=begun.identity,
            callbacks=begun.callbacks,
        )

    if probe_args.probe_only:
        probe_and_print(trainer, probe_args)
        return
    train_and_evaluate(trainer, checkpoint, run_args, samples.get("test"))
    if training_args.do_predict and data_args.prompt_column is not None:
        write_test_completions(trainer, prepared.rows["test"], data_args, run_args.max_new_tokens)
    if run_args.sample_prompt is not None:
        write_sample(trainer, run_args.sample_prompt, run_args.max_new_tokens)
    finish(trainer, "text-generation", model_args, data_args)


if __name__ == "__main__":
    run_script(main)
