"""Checkpoints that a kill at any moment leaves valid or marked as cut off, for any Trainer; see `records.checkpoints`."""

import logging
import os
from typing import Any

from ..errors import InputError
from ..records.checkpoints import (
    begin_save,
    complete_save,
    delete_old_checkpoints,
    find_newest_valid,
    list_checkpoints,
    require_valid,
)
from ..sharding.processes import fail_together, gather_objects

logger = logging.getLogger("hf_v0init")


class SafeCheckpointsMixin:
    """Gives a `transformers.Trainer`, ours or any other, checkpoints that can be cut off without harm.

    Put it first: `class MyTrainer(SafeCheckpointsMixin, V0InitTrainer)`. While a checkpoint is being saved it has a mark, which goes when all
    processes have written their files and all callbacks have had their `on_save`.

    - `train(resume_from_checkpoint=True)` takes the newest valid checkpoint of the output folder and names those skipped
      in a warning; if there are only broken ones it starts from scratch. A broken one asked for by name is an `InputError`.
    - `save_total_limit` never deletes the only valid checkpoint.
    - A finished run that is resumed makes no further step.
    """

    _on_save_follows = _is_saving = False
    _saved_folder: str | None = None  # saved, and still marked

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, from the checkpoint that `choose_checkpoint` finds."""
        return super().train(self.choose_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint folder that `train(resume_from_checkpoint=wanted)` resumes from; None for a new run.

        Every process must call it, and gets what the first one finds.

        Raises:
            InputError: `wanted` is no valid checkpoint; or it is True and there is no checkpoint at all. The message
                begins as the stock Trainer's.
        """
        if wanted is None or wanted is False:
            return None
        if wanted is not True:
            with fail_together():
                require_valid(wanted)
            return os.fspath(wanted)
        checkpoints = list_checkpoints(self.args.output_dir)
        exist, (chosen, skipped) = gather_objects((bool(checkpoints), find_newest_valid(checkpoints)))[0]
        if not exist:
            raise InputError(
                f"No valid checkpoint found in output directory ({self.args.output_dir}): give resume_from_checkpoint the "
                "folder of a checkpoint, or leave it out to start from scratch"
            )
        if skipped and self.args.process_index == 0:
            logger.warning(skipped)
        return chosen

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of the next step as the Trainer does; none for a run that is resumed at its end.

        The Trainer itself makes one step too many there, unless the end is that of an epoch.
        """
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _maybe_log_save_evaluate(self, *args, **kwargs) -> None:
        """Log, evaluate and save as the Trainer does; a checkpoint is complete when the callbacks have had their `on_save`."""
        self._on_save_follows, self._saved_folder = True, None
        try:
            super()._maybe_log_save_evaluate(*args, **kwargs)
        finally:
            self._on_save_follows = False
        self._complete_save()

    def _save_checkpoint(self, model, trial) -> None:
        """Save as the Trainer does, under the mark; what `save_total_limit` deletes goes after the checkpoint is complete."""
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            begin_save(folder)
        self.accelerator.wait_for_everyone()  # no process writes into an older valid checkpoint of this step
        limit, self._is_saving = self.args.save_total_limit, True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self.args.save_total_limit, self._is_saving = limit, False
        self._saved_folder = folder
        if not self._on_save_follows:
            self._complete_save()

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self._is_saving:  # the Trainer, whose arguments are saved, would delete before this checkpoint is complete
            self.args.save_total_limit = None

    def _complete_save(self) -> None:
        folder, self._saved_folder = self._saved_folder, None
        if folder is None:
            return
        self.accelerator.wait_for_everyone()  # every process has written its files
        if self.args.should_save:
            complete_save(folder)
            limit, best = self.args.save_total_limit, self.state.best_model_checkpoint
            delete_old_checkpoints(os.path.dirname(folder), limit, folder, best)
