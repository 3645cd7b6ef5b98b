"""What run_clm and run_mlm share of a run: flags, refusals, preparation, training and evaluation, card."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments, set_seed

from ...errors import InputError
from ..checkpoint_averaging import require_enough_checkpoints
from ..early_stopping import EarlyStoppingArguments, make_early_stopping
from ..probing import ProbeArguments, turn_into_probe
from ..run_identity import describe_run, require_same_model
from ..script_stages import (
    count_steps,
    describe_for_card,
    flag,
    publish_card,
    require_positive_counts,
    require_possible_run,
    train_and_save,
)
from ..script_support import start_logging
from ..step_decay import StepDecayArguments
from ..value_checks import require_available_metric
from .model import ModelArguments, choose_block_size, load_model, load_tokenizer
from .rows import TextArguments, iterate_texts, load_rows


@dataclass
class LanguageRunArguments(EarlyStoppingArguments, StepDecayArguments):
    """How a language model is trained, beside what the Trainer knows.

    Raises:
        InputError: numbers out of range.
    """

    overwrite_output_dir: bool = flag(
        False, "Start afresh in an output folder that has files; checkpoints of the earlier run are deleted."
    )
    average_checkpoints: int | None = flag(
        None, "After training, average the last so many checkpoints; evaluate and save the average."
    )
    max_tokens_per_batch: int | None = flag(
        None,
        "Where samples differ in length: training batches by token budget, padded tokens per batch, process and forward pass; "
        "replaces --per_device_train_batch_size.",
    )

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        require_positive_counts(self)


@dataclass
class PreparedRun:
    """What is loaded before any text is tokenized."""

    rows: dict[str, Any]
    tokenizer: PreTrainedTokenizerBase
    network: PreTrainedModel
    block_size: int


def require_possible(data: TextArguments, run: LanguageRunArguments, training: TrainingArguments) -> None:
    """Refuse what the arguments alone rule out."""
    if data.streaming and training.do_train and training.max_steps <= 0:
        raise InputError("--streaming: the length of a stream is unknown; give --max_steps")
    budget = run.max_tokens_per_batch
    if data.streaming and budget:
        raise InputError(f"--max_tokens_per_batch={budget}: not with --streaming; drop one of the two")
    if budget and not getattr(data, data.uneven_flag):
        raise InputError(
            f"--max_tokens_per_batch={budget}: blocks all have --block_size tokens, so give --per_device_train_batch_size "
            f"instead; the budget is for --{data.uneven_flag}"
        )


@dataclass
class BegunRun:
    """What is known once the flags have been checked and before data are read."""

    callbacks: list
    identity: dict[str, Any]
    checkpoint: str | None
    config: PreTrainedConfig


def begin_run(
    model: ModelArguments, data: TextArguments, run: LanguageRunArguments, probe: ProbeArguments, training, metrics
) -> BegunRun:
    """Refuse what can be refused before data are read, find the checkpoint to go on from, and set the seed.

    Raises:
        InputError: the flags, the output folder, its checkpoint or the model's configuration do not go together.
    """
    if probe.probe_only:
        turn_into_probe(training)
    require_possible(data, run, training)
    require_available_metric(training, metrics)
    callbacks = make_early_stopping(run, training)
    start_logging(training)
    identity = describe_run(training, model, data, run)
    checkpoint = require_possible_run(training, model.model_name_or_path, run.overwrite_output_dir, identity)
    config = model.load_config()
    require_same_model(checkpoint, config)
    set_seed(training.seed)
    return BegunRun(callbacks, identity, checkpoint, config)


def prepare_run(
    model: ModelArguments,
    data: TextArguments,
    run: LanguageRunArguments,
    training: TrainingArguments,
    config: PreTrainedConfig,
    checkpoint: str | None,
) -> PreparedRun:
    """Load rows, tokenizer and model, and refuse sizes that do not fit each other.

    Raises:
        InputError: something cannot be loaded, or a number is too large or too small for the others.
    """
    rows = load_rows(data, model, training)
    tokenizer = load_tokenizer(model, iterate_texts(rows.get("train"), data), checkpoint)
    if training.do_train and run.average_checkpoints is not None:
        require_enough_checkpoints(training, run.average_checkpoints)
    network = load_model(model, config, tokenizer)
    block_size = choose_block_size(data.block_size, network, tokenizer, model.longest_default_block)
    if run.max_tokens_per_batch is not None and run.max_tokens_per_batch < block_size:
        raise InputError(
            f"--max_tokens_per_batch={run.max_tokens_per_batch}: is less than the {block_size} tokens that a sample "
            "may have; raise it, or lower --block_size"
        )
    return PreparedRun(rows, tokenizer, network, block_size)


def choose_map_options(data: TextArguments, training: TrainingArguments, cache_dir: str | None) -> dict[str, Any]:
    """Choose how rows are tokenized and kept; a stream takes no such options."""
    if data.streaming:
        return {}
    return {
        "num_proc": data.preprocessing_num_workers,
        "cache_dir": cache_dir,
        # the other processes read what the first has just written
        "overwrite_cache": data.overwrite_cache and training.local_process_index == 0,
    }


def prepare_all_samples(
    prepared: PreparedRun,
    prepare: Callable[[Any, str], Any],
    data: TextArguments,
    run: LanguageRunArguments,
    training: TrainingArguments,
) -> dict[str, Any]:
    """Make the samples of each role by `prepare(rows, role)`, on the main process first.

    Raises:
        InputError: as `prepare`; or the run will leave too few checkpoints to average.
    """
    samples = {}
    for role, rows in prepared.rows.items():
        with training.main_process_first(desc=f"tokenizing {role}"):
            samples[role] = prepare(rows, role)
    if training.do_train and run.average_checkpoints is not None and not data.streaming:
        is_known = run.max_tokens_per_batch is None or training.max_steps > 0
        num_steps = count_steps(training, len(samples["train"])) if is_known else None
        require_enough_checkpoints(training, run.average_checkpoints, num_steps)
    return samples


def train_and_evaluate(trainer, checkpoint: str | None, run: LanguageRunArguments, test_samples) -> None:
    """Train, evaluate and test as the Trainer's arguments say, and write each stage's metrics."""
    training = trainer.args
    if training.do_train:
        metrics = train_and_save(trainer, checkpoint, run.overwrite_output_dir, run.average_checkpoints)
        save_results(trainer, "train", metrics)
        trainer.save_state()
    if training.do_eval:
        save_results(trainer, "eval", trainer.evaluate(metric_key_prefix="eval"))
    if training.do_predict:
        save_results(trainer, "test", trainer.predict(test_samples, metric_key_prefix="test").metrics)


def save_results(trainer, role: str, metrics: dict) -> None:
    """Print one stage's metrics, and write them to its JSON file and to all_results.json."""
    trainer.log_metrics(role, metrics)
    trainer.save_metrics(role, metrics)
    name = trainer.perplexity_name
    if f"{role}_{name}" in metrics and trainer.is_world_process_zero():
        perplexity, accuracy = metrics[f"{role}_{name}"], metrics[f"{role}_accuracy"]
        words = f"{name.replace('_', '-')} {perplexity:.3f}, accuracy {accuracy:.4f}"
        print(f"{role}: {words} over {metrics[f'{role}_num_tokens']:,} tokens")


def finish(trainer, task: str, model: ModelArguments, data: TextArguments) -> None:
    """Write the model card, and push if asked."""
    files = [path for path in (data.train_file, data.test_file, data.validation_file) if path][:1]
    publish_card(trainer, describe_for_card(task, model.model_name_or_path, data, files))
    trainer.accelerator.end_training()
