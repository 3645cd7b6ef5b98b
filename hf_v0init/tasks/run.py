"""One run of a training script, from the flags to the model card. `run` is the whole course; a `Task` says what is trained.

flags -> refusals -> where to start -> configuration -> data, tokenizer, model, samples -> Trainer
      -> training -> evaluation -> prediction -> card, summary
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import (
    EarlyStoppingCallback,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from hf_v0init import InputError

from .data import ROLES
from .output_folder import RemoveWhatIsStale, describe_run, find_place_to_start
from .probing import probe_and_print, turn_into_probe
from .script_support import flag, parse_arguments, start_logging
from .script_trainer import CARD_FILE, AnnounceEpoch
from .summary import print_summary
from .token_loss import TokenCrossEntropy
from .value_checks import require_available_metric
from .whole_weights import load_average_of_last, require_enough_checkpoints

logger = logging.getLogger("hf_v0init")


@dataclass
class RunArguments:
    """run: how it trains and what it keeps, beside transformers' own flags"""

    overwrite_output_dir: bool = flag(
        False,
        "Start afresh in an output folder that has files; checkpoints and results of the earlier run are deleted.",
    )
    average_checkpoints: int | None = flag(
        None, "After training, average the last so many checkpoints; evaluate and save the average."
    )
    early_stopping_patience: int | None = flag(
        None,
        "End when --metric_for_best_model (default: loss) has not become better in so many evaluations one after the other, and "
        "keep the best model. Needs --eval_strategy and --load_best_model_at_end.",
    )
    lr_decay_epochs: list[int] | None = field(
        default=None,
        metadata={
            "help": "Multiply the learning rate by --lr_decay_factor after each of these epochs, counted from 1, for example 100 145; "
            "on top of --lr_scheduler_type, so give 'constant' or 'constant_with_warmup' for steps alone. Default: none."
        },
    )
    lr_decay_factor: float | None = flag(None, "Factor of --lr_decay_epochs, between 0 and 1. Default: 0.1.")
    probe_only: bool = flag(
        False,
        "Train nothing: measure at the initial weights how far a first step may go, and print the warmup that this run needs.",
    )


class Task:
    """What is trained and how it is measured. A script makes a subclass, and `run(itself, argv)` does the rest.

    Attributes:
        arguments: dataclasses of flags: model, data, run, the Trainer's, and further ones.
        trainer_class: of the Trainer that trains and measures.
        examples: commands for `--help`.
        metrics: names of what its evaluations measure, without "eval_".
        has_own_loss: whether the model's own loss trains it, not `TokenCrossEntropy`.
        card_task: the Hub's name of the task.
        test_name: under which results of the test set are kept.
    """

    arguments: ClassVar[tuple[type, ...]]
    trainer_class: ClassVar[type[Trainer]]
    examples: ClassVar[str] = ""
    metrics: Sequence[str] = ("loss",)
    has_own_loss: ClassVar[bool] = False
    card_task: ClassVar[str]
    test_name: ClassVar[str] = "predict"

    def __init__(self, model, data, options: RunArguments, training: TrainingArguments, *others) -> None:
        self.model, self.data, self.options, self.training, self.others = model, data, options, training, others

    @property
    def data_seed(self) -> int:
        """The seed of what is drawn of the training data."""
        return self.training.seed if self.training.data_seed is None else self.training.data_seed

    def refuse(self) -> None:
        """Raise `InputError` for what the flags alone rule out."""

    def load_config(self) -> PreTrainedConfig:
        """Load the model's configuration, before any data is read."""
        return self.model.load_config()

    def prepare(self, config: PreTrainedConfig, place: str | None) -> dict[str, Any]:
        """Load data, tokenizer and model (`network`); return the samples of each role: "train", "validation", "test".

        Training samples whose draws depend on the epoch are told it by `begin_epoch`.

        Args:
            place: the folder that the run goes on from, if any.
        """
        raise NotImplementedError

    def make_collator(self) -> Any:
        """Make what joins samples to a batch; None: transformers' own."""
        return None

    def choose_trainer_options(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Choose what the Trainer takes beside the model, the samples and what all tasks share."""
        raise NotImplementedError

    def evaluate(self, trainer: Trainer) -> dict[str, Any]:
        """Evaluate on the validation samples; return the metrics."""
        return trainer.evaluate(metric_key_prefix="eval")

    def predict(self, trainer: Trainer, samples) -> None:
        """Measure the test samples, and write what is predicted."""
        trainer.save_metrics(self.test_name, trainer.predict(samples, metric_key_prefix=self.test_name).metrics)

    def describe_for_card(self) -> dict[str, Any]:
        """Describe the run to `create_model_card`; of local files or folders only the names are told, and not those of a role."""
        card = {"tasks": self.card_task, "finetuned_from": self.model.model_name_or_path}
        if self.data.dataset_name:
            card |= {"dataset_tags": self.data.dataset_name, "dataset": self.data.dataset_name}
            return card | ({"dataset_args": self.data.dataset_config_name} if self.data.dataset_config_name else {})
        path = Path(self.data.list_local()[0]).absolute()
        return card | {"dataset": path.parent.name if path.name in ROLES else path.name}


class TextTask(Task):
    """A task on text: rows, a tokenizer that is loaded or trained on them, a model that fits it, samples of tokens."""

    def prepare(self, config: PreTrainedConfig, place: str | None) -> dict[str, Any]:
        """Load rows, tokenizer and model, and make the samples: on the main process first, whose cache the others read."""
        self.rows, samples = self.data.load_roles(self.model, self.training), {}
        texts = self.iterate_texts(self.rows["train"]) if "train" in self.rows else None
        self.tokenizer = self.model.get_tokenizer(texts, place, self.train_tokenizer)
        self.network = self.build_network(config)
        for role, rows in self.rows.items():
            with self.training.main_process_first(desc=f"tokenizing {role}"):
                samples[role] = self.make_samples(rows, role)
        return samples

    def iterate_texts(self, rows) -> Iterator[str]:
        """Yield the training texts, for a tokenizer to be trained on."""
        raise NotImplementedError

    def train_tokenizer(self, texts: Iterable[str]) -> PreTrainedTokenizerBase:
        """Train a tokenizer on texts."""
        raise NotImplementedError

    def build_network(self, config: PreTrainedConfig) -> PreTrainedModel:
        """Load the pretrained model, or make one from scratch that fits the tokenizer."""
        return self.model.build_for(config, self.tokenizer)

    def make_samples(self, rows, role: str) -> Any:
        """Make the samples of one role: what the Trainer indexes or iterates."""
        raise NotImplementedError

    def choose_trainer_options(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Choose tokenizer and token budget."""
        budget = self.data.max_tokens_per_batch if self.training.do_train else None
        return {"processing_class": self.tokenizer, "max_tokens_per_batch": budget}


def run(task_class: type[Task], argv: list[str]) -> None:
    """Do what the flags in `argv` say.

    Raises:
        InputError: what the user must change.
    """
    task = task_class(*parse_arguments(task_class.arguments, argv, task_class.examples))
    training, options = task.training, task.options
    if options.probe_only:
        turn_into_probe(training)
    start_logging(training)
    callbacks: list[TrainerCallback] = []
    if options.early_stopping_patience is not None and not options.probe_only:
        callbacks = [EarlyStoppingCallback(options.early_stopping_patience)]
        training.restore_callback_states_from_checkpoint = True  # a resumed run goes on with its count
    require_available_metric(training, task.metrics)
    require_possible_run(task)
    task.refuse()
    identity = describe_run(training, task.model, task.data, options, *task.others)
    place = find_place_to_start(training, options.overwrite_output_dir, identity)
    config = task.load_config()
    set_seed(training.seed)

    samples = task.prepare(config, place)
    if training.do_train:
        require_a_batch(samples["train"], training)
    if hasattr(samples.get("train"), "begin_epoch"):
        callbacks.append(AnnounceEpoch(samples["train"].begin_epoch))
    trainer = task.trainer_class(
        model=task.network,
        args=training,
        train_dataset=samples.get("train"),
        eval_dataset=samples.get("validation"),
        data_collator=task.make_collator(),
        callbacks=callbacks,
        run_identity=identity,
        lr_decay_epochs=options.lr_decay_epochs,
        lr_decay_factor=options.lr_decay_factor or 0.1,
        compute_loss_func=None if task.has_own_loss else TokenCrossEntropy(training.label_smoothing_factor),
        **task.choose_trainer_options(samples),
    )
    if options.probe_only:
        probe_and_print(trainer)
        return
    if training.do_train:
        trainer.save_metrics("train", train_and_save(trainer, place, options))
        trainer.save_state()
    if training.do_eval:
        trainer.save_metrics("eval", task.evaluate(trainer))
    if training.do_predict:
        task.predict(trainer, samples["test"])
    publish(trainer, task.describe_for_card())


def require_possible_run(task: Task) -> None:
    """Refuse what the flags that all tasks share rule out."""
    training, options = task.training, task.options
    if not (training.do_train or training.do_eval or training.do_predict):
        raise InputError("nothing to do: give --do_train, --do_eval or --do_predict")
    if not training.do_train and task.model.model_name_or_path is None:
        raise InputError("evaluation needs a trained model; give --model_name_or_path, or --do_train")
    if task.data.streaming and training.do_train and training.max_steps <= 0:
        raise InputError("--streaming: the length of a stream is unknown; give --max_steps")
    if training.do_train:
        epochs = options.lr_decay_epochs or []
        if epochs != sorted({epoch for epoch in epochs if epoch >= 1}):
            raise InputError(
                f"--lr_decay_epochs {epochs}: must be whole numbers >= 1 in increasing order, such as 100 145"
            )
        if options.average_checkpoints is not None:
            require_enough_checkpoints(training, options.average_checkpoints)


def require_a_batch(samples, training: TrainingArguments) -> None:
    """Refuse `--dataloader_drop_last` where it leaves nothing to train on."""
    batch_size = training.train_batch_size * training.world_size
    if training.dataloader_drop_last and hasattr(samples, "__len__") and len(samples) < batch_size:
        raise InputError(
            f"--dataloader_drop_last: leaves nothing of {len(samples)} training samples, fewer than the {batch_size} of a batch; "
            "drop it, or lower --per_device_train_batch_size"
        )


def train_and_save(trainer: Trainer, place: str | None, options: RunArguments) -> dict[str, Any]:
    """Train, from the checkpoint `place` if there is one, and save the model: the last, or the average of the last checkpoints.

    Where `place` is the output folder itself, the run has been trained: its model is loaded, and nothing is trained.

    Returns:
        The metrics of training, with `train_samples` where their number is known.
    """
    if place is not None and Path(place) == Path(trainer.args.output_dir):
        return trainer.load_trained()
    fresh = place is None and options.overwrite_output_dir
    trainer.add_callback(RemoveWhatIsStale(with_checkpoints=fresh))  # added last, so called when v0 has been chosen
    metrics = dict(trainer.train(resume_from_checkpoint=place).metrics)
    if not metrics.get("train_steps_per_second"):  # resumed at its end: not a step was made
        metrics.pop("train_loss", None)
    if options.average_checkpoints is not None:
        load_average_of_last(trainer, options.average_checkpoints)
    trainer.save_model()
    if hasattr(trainer.train_dataset, "__len__"):
        metrics["train_samples"] = len(trainer.train_dataset)
    return metrics


def publish(trainer: Trainer, card: dict[str, Any]) -> None:
    """Write the model card, or add to it; push everything if `--push_to_hub` was given; and sum the run up on the terminal."""
    if trainer.args.push_to_hub:
        trainer.push_to_hub(**card)
    elif trainer.args.do_train or Path(trainer.args.output_dir, CARD_FILE).is_file():
        trainer.create_model_card(**card)  # results of a model that is kept elsewhere need no card here
    if trainer.is_world_process_zero():
        print_summary(trainer)
    trainer.accelerator.end_training()
