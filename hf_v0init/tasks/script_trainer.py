"""What the scripts' Trainers share: whole weights, the record of the run, steps of the learning rate, a card that evaluation adds to."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import Trainer, TrainerCallback, TrainerState

from hf_v0init import SafeCheckpointsMixin

from ..records.model_card import add_results_section
from ..records.report import read_report
from ..trainer.schedule import multiply_schedule
from .output_folder import RECORD_KEY, STATE_FILE, TRAIN_RESULTS_FILE, make_run_record
from .summary import find_scores, read_results
from .whole_weights import WholeWeightsMixin

logger = logging.getLogger("hf_v0init")

CARD_FILE = "README.md"


class AnnounceEpoch(TrainerCallback):
    """Tells samples whose draws depend on the epoch which one begins; accelerate tells it to some and under some samplers only.

    Args:
        tell: takes the number of the epoch, counted from 0.
    """

    def __init__(self, tell: Callable[[int], None]) -> None:
        self.tell = tell

    def on_epoch_begin(self, args, state, control, **kwargs):
        """Tell the number of the epoch that begins; it is complete steps of the one before, so whole up to rounding."""
        self.tell(int((state.epoch or 0) + 1e-6))


class ScriptTrainerMixin(SafeCheckpointsMixin, WholeWeightsMixin, Trainer):
    """Put before a Trainer.

    Args:
        run_identity: what `describe_run` returned; kept in every checkpoint.
        lr_decay_epochs: the learning rate falls after each of these epochs, counted from 1, on top of its schedule.
        lr_decay_factor: what it is multiplied by each time.

    Raises:
        InputError: before any training, decay epochs of a schedule that watches the loss.
    """

    _steps_per_epoch = 0

    def __init__(
        self,
        *args,
        run_identity: dict | None = None,
        lr_decay_epochs: list[int] | None = None,
        lr_decay_factor: float = 0.1,
        **kwargs,
    ) -> None:
        self.run_identity, self.lr_decay_epochs, self.lr_decay_factor = run_identity, lr_decay_epochs, lr_decay_factor
        super().__init__(*args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        self._record_run()
        super()._save_checkpoint(model, trial)

    def save_state(self) -> None:
        """Save the Trainer's state as the Trainer does, with the record of this run."""
        self._record_run()
        super().save_state()

    def _record_run(self) -> None:
        """Put the identity where the Trainer's state is saved, in the form in which it keeps callbacks."""
        self.state.stateful_callbacks |= make_run_record(self.run_identity)

    def _load_callback_state(self) -> None:
        self.state.stateful_callbacks.pop(RECORD_KEY, None)  # or it would be named as a callback that is missing
        super()._load_callback_state()

    # ---- the schedule ------------------------------------------------------------------------------------------------

    def set_initial_training_values(self, args, dataloader, *others):
        """Count the steps of an epoch as the Trainer does."""
        values = super().set_initial_training_values(args, dataloader, *others)
        self._steps_per_epoch = values[1] or 0
        return values

    def create_scheduler(self, num_training_steps: int, *args, **kwargs):
        """Create the schedule as the Trainer does, with the steps of `lr_decay_epochs`."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(num_training_steps, *args, **kwargs)
        if not exists and self.lr_decay_epochs:
            ends = [epoch * self._steps_per_epoch for epoch in self.lr_decay_epochs]
            multiply_schedule(
                scheduler, lambda made: self.lr_decay_factor ** sum(made >= end for end in ends), "--lr_decay_epochs"
            )
        return scheduler

    # ---- what is loaded ----------------------------------------------------------------------------------------------

    def _load_optimizer_and_scheduler(self, checkpoint) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        report = None if checkpoint is None else read_report(checkpoint)
        if report is not None and report.get("strategy") != "zeros" and self.v0_arguments.v0_init == "zeros":
            if self.is_world_process_zero():
                logger.warning(
                    f"{checkpoint} is of a run that began with --v0_init {report['strategy']}, and --v0_init zeros was given: the "
                    "optimizer's state stands, and the record of its v0 goes along"
                )
            self._v0_callback.report = report

    def load_trained(self) -> dict[str, float]:
        """Load model, state and v0 record of the output folder's run, which has been trained to its end.

        Returns:
            The metrics of its training.
        """
        folder = Path(self.args.output_dir)
        self._load_from_checkpoint(str(folder))
        self._move_model_to_device(self.model, self.args.device)
        self.state = TrainerState.load_from_json(str(folder / STATE_FILE))
        self._v0_callback.report = read_report(folder)
        return json.loads((folder / TRAIN_RESULTS_FILE).read_text(encoding="utf-8"))

    # ---- results and card --------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card, or, where this Trainer has not trained and there is one, add the results to it."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, CARD_FILE)
        if self.state.global_step or not path.is_file():
            super().create_model_card(*args, **kwargs)
        if path.is_file():
            results = read_results(self.args.output_dir)
            text = add_results_section(path.read_text(encoding="utf-8"), results)
            card = RepoCard(text)
            task, dataset = kwargs.get("tasks") or "other", kwargs.get("dataset") or "local"
            listed = [
                EvalResult(task, dataset.replace(" ", "-"), dataset, name, round(value, 4), dataset_split=split)
                for split, name, value in find_scores(results)
                if split != "training"
            ]
            if listed:
                card.data["model-index"] = eval_results_to_model_index(
                    Path(self.args.output_dir).absolute().name, listed
                )
                measured = [result.metric_type for result in listed if result.metric_type != "loss"]
                card.data["metrics"] = list(dict.fromkeys([*(card.data.get("metrics") or []), *measured])) or None
            path.write_text(str(card), encoding="utf-8")
