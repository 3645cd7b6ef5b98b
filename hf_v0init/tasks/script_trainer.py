"""What the scripts' Trainers share: whole weights, true counts and losses of a resumed run, a card that evaluation adds to.

The stock Trainer forgets at a resume what it had summed up: `train_loss` is then a mean over the steps since. Here the sums
travel in `trainer_state.json`, together with what tells one run from another (`run_identity`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path

import torch
from huggingface_hub import EvalResult, RepoCard
from huggingface_hub.repocard_data import eval_results_to_model_index
from transformers import Trainer, TrainerCallback, TrainerState
from transformers.trainer_pt_utils import find_batch_size

from hf_v0init import SafeCheckpointsMixin

from ..records.model_card import add_results_section
from ..records.report import read_report
from .run_identity import RECORD_KEY, STATE_FILE, TRAIN_RESULTS_FILE, get_record
from .schedules import ScheduleMixin
from .whole_weights import WholeWeightsMixin

logger = logging.getLogger("hf_v0init")

CARD_FILE, RESULTS_FILE = "README.md", "all_results.json"
CARD_METRICS = ("accuracy", "bleu", "chrf", "perplexity", "loss")
STAGES = {"eval": "validation", "predict": "test", "test": "test"}


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


class ScriptTrainerMixin(SafeCheckpointsMixin, WholeWeightsMixin, ScheduleMixin, Trainer):
    """Put before a Trainer.

    Args:
        run_identity: what `describe_run` returned; kept in every checkpoint.
    """

    def __init__(self, *args, run_identity: dict | None = None, **kwargs) -> None:
        self.run_identity = run_identity or {}
        self.card_samples: list[dict[str, str]] = []
        self._has_trained = False
        self._num_samples_seen = 0
        self._summed_before: dict | None = None  # what a checkpoint had summed up, until it joins this call's sums
        self._pending_loss: torch.Tensor | None = None  # of the steps since the last log line
        self._knows_all_steps = True
        super().__init__(*args, **kwargs)

    # ---- losses and counts -------------------------------------------------------------------------------------------

    def train(self, *args, **kwargs):
        """Train as the Trainer does. `train_loss` and `train_samples_seen` are of all steps of the run, those before a resume
        included; the speeds count the samples and steps of this call.
        """
        self._num_samples_seen, self._summed_before, self._pending_loss, self._knows_all_steps = 0, None, None, True
        self._num_samples_before = 0
        output = super().train(*args, **kwargs)
        self._has_trained = True
        return output._replace(training_loss=output.metrics.get("train_loss", output.training_loss))

    def training_step(self, model, inputs, *args, **kwargs):
        """Make a step as the Trainer does, and count its samples."""
        self._num_samples_seen += find_batch_size(inputs) or 0
        return super().training_step(model, inputs, *args, **kwargs)

    def _maybe_log_save_evaluate(self, tr_loss, *args, **kwargs):
        if self._summed_before is not None:
            before, self._summed_before = self._summed_before, None
            tr_loss += before["pending_loss"]
            self._total_loss_scalar += before["total_loss"]
            self._globalstep_last_logged = before["last_logged_step"]
        self._pending_loss = tr_loss
        return super()._maybe_log_save_evaluate(tr_loss, *args, **kwargs)

    def _save_checkpoint(self, model, trial) -> None:
        sums = self._summed_before  # resumed at its end: not a step was made
        if sums is None and self._pending_loss is not None and self._knows_all_steps:
            sums = {
                "pending_loss": self.accelerator.gather(self._pending_loss.detach().reshape(1)).mean().item(),
                "total_loss": self._total_loss_scalar,
                "last_logged_step": self._globalstep_last_logged,
                "num_samples": self._count_samples() + self._num_samples_before,
            }
        self._record_run(sums)
        super()._save_checkpoint(model, trial)

    def save_state(self) -> None:
        """Save the Trainer's state as the Trainer does, with the record of this run."""
        self._record_run(None)
        super().save_state()

    def _record_run(self, sums: dict | None) -> None:
        """Put identity and sums where the Trainer's state is saved, in the form in which it keeps callbacks."""
        self.state.stateful_callbacks[RECORD_KEY] = {"args": {}, "attributes": {**self.run_identity, "sums": sums}}

    def _load_callback_state(self) -> None:
        record = get_record(self.state.stateful_callbacks) or {}
        self.state.stateful_callbacks.pop(RECORD_KEY, None)  # or it would be named as a callback that is missing
        super()._load_callback_state()
        self._summed_before = record.get("sums")
        self._knows_all_steps = self._summed_before is not None
        self._num_samples_before = (self._summed_before or {}).get("num_samples", 0)

    def log(self, logs: dict[str, float], *args, **kwargs) -> None:
        """Log as the Trainer does, with true sums at the end of training."""
        if "train_loss" in logs and "train_runtime" in logs:
            self._correct_totals(logs)
        super().log(logs, *args, **kwargs)

    def _count_samples(self) -> int:
        counted = torch.tensor([self._num_samples_seen], device=self.args.device)
        return int(self.accelerator.gather(counted).sum())

    def _correct_totals(self, metrics: dict[str, float]) -> None:
        before = self._summed_before
        if self._knows_all_steps and self.state.global_step:
            total = self._total_loss_scalar if before is None else before["total_loss"] + before["pending_loss"]
            metrics["train_loss"] = total / self.state.global_step
        num_samples = self._count_samples()
        metrics["train_samples_per_second"] = round(num_samples / max(metrics["train_runtime"], 1e-9), 3)
        if self._knows_all_steps:
            metrics["train_samples_seen"] = num_samples + self._num_samples_before

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
        self._has_trained = True
        return json.loads((folder / TRAIN_RESULTS_FILE).read_text(encoding="utf-8"))

    # ---- results and card --------------------------------------------------------------------------------------------

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the model card, or, where this Trainer has not trained and there is one, add the results to it."""
        if not self.is_world_process_zero():
            return
        path = Path(self.args.output_dir, CARD_FILE)
        if self._has_trained or not path.is_file():
            super().create_model_card(*args, **kwargs)
        if path.is_file():
            results = self.read_results()
            text = add_results_section(path.read_text(encoding="utf-8"), results, self.card_samples)
            card = RepoCard(text)
            listed = self._list_card_results(results, kwargs.get("tasks") or "other", kwargs.get("dataset") or "local")
            if listed:
                card.data["model-index"] = eval_results_to_model_index(
                    Path(self.args.output_dir).absolute().name, listed
                )
            path.write_text(str(card), encoding="utf-8")

    def _list_card_results(self, results: dict, task: str, dataset: str) -> list[EvalResult]:
        return [
            EvalResult(
                task,
                dataset.replace(" ", "-"),
                dataset,
                name,
                round(results[f"{stage}_{name}"], 4),
                dataset_split=split,
            )
            for stage, split in STAGES.items()
            for name in CARD_METRICS
            if isinstance(results.get(f"{stage}_{name}"), (int, float))
        ]

    def read_results(self) -> dict:
        """Read what `save_metrics` has written into the output folder; empty if there is nothing."""
        path = Path(self.args.output_dir, RESULTS_FILE)
        return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
