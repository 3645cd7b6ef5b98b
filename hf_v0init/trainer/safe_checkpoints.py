"""Checkpoints that a kill cannot turn into a trap, for any Trainer: `class MyTrainer(SafeCheckpointsMixin, Trainer)`.

Which checkpoint is whole is decided in `records/checkpoints.py`; this file says when the Trainer asks. It knows no v0. With
several processes the first of every machine looks and all take the same decision, so that a checkpoint counts only if every
machine can read it.
"""

import logging
import os
from typing import Any

import torch.distributed as dist
from transformers import TrainerCallback

from ..errors import InputError
from ..records.checkpoints import (
    begin_save,
    complete_save,
    delete_old_checkpoints,
    describe_passed_over,
    find_newest_whole,
    inspect_checkpoint,
    list_checkpoints,
    require_whole,
    update_record,
)

logger = logging.getLogger("hf_v0init")


class _UpdateRecord(TrainerCallback):
    """Lets what other callbacks add to a fresh checkpoint or take out of it (`on_save`) count as part of it."""

    def __init__(self, trainer: "SafeCheckpointsMixin") -> None:
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if args.should_save and self.trainer._last_checkpoint is not None:
            folder, stamps = self.trainer._last_checkpoint
            self.trainer._last_checkpoint = folder, update_record(folder, stamps)

    def on_step_begin(self, args, state, control, **kwargs):  # callbacks later in the row have had their turn too
        self.on_save(args, state, control)
        self.trainer._last_checkpoint = None

    on_train_end = on_step_begin


class SafeCheckpointsMixin:
    """Gives a `transformers.Trainer`, ours or any other, checkpoints that can be cut off or damaged without harm.

    Put it first: `class MyTrainer(SafeCheckpointsMixin, V0InitTrainer)`. Every checkpoint gets a `save_state.json`; with it

    - `train(resume_from_checkpoint=True)` takes the newest whole checkpoint of the output folder and names those passed over
      in a warning; if there are only broken ones it starts anew. A broken one asked for by name is an `InputError`.
    - files that were changed on purpose and are whole (re-saved in bf16, resharded, the optimizer removed) are named in a
      warning and taken; bytes that are not those that were saved are damage. `records/checkpoints.py` has the rule.
    - `save_total_limit` never deletes the only whole checkpoint.
    - a finished run that is resumed makes no further step.

    What it costs: every byte of a checkpoint is brought to the disk and read once more when it is saved, and once before it
    is resumed from, by one process of a machine.
    """

    _last_checkpoint: tuple[str, dict] | None = None  # the one saved a moment ago, and how its files looked
    _unfinished_save: tuple[str, int | None] | None = None  # its folder, and save_total_limit

    def __init__(self, *args, **kwargs) -> None:
        self._changes: dict[str, list[str]] = {}  # what was changed on purpose, by checkpoint
        super().__init__(*args, **kwargs)
        self.add_callback(_UpdateRecord(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """Train as the Trainer does, from the checkpoint that `choose_checkpoint` finds."""
        return super().train(self.choose_checkpoint(resume_from_checkpoint), *args, **kwargs)

    def choose_checkpoint(self, wanted: str | bool | None) -> str | None:
        """Return the checkpoint folder that `train(resume_from_checkpoint=wanted)` resumes from; None for a new run.

        Every process must call it, and gets the same answer.

        Raises:
            InputError: `wanted` is no folder, or one that is not whole; or it is True and there is no checkpoint at all. The
                message begins as the stock Trainer's.
        """
        if wanted is None or wanted is False:
            return None
        if wanted is True:
            checkpoints = _gather(list_checkpoints(self.args.output_dir))[0]
            if not checkpoints:
                raise InputError(
                    f"No valid checkpoint found in output directory ({self.args.output_dir}): give resume_from_checkpoint the "
                    "folder of a checkpoint, or leave it out to start anew"
                )
            chosen, passed_over = find_newest_whole(checkpoints, self._find_defect)
            if passed_over:
                self._warn(describe_passed_over(passed_over, chosen))
        else:
            chosen = os.fspath(wanted)
            others = list_checkpoints(os.path.dirname(os.path.abspath(chosen)))
            require_whole(chosen, _gather(others)[0], self._find_defect)
        if self._changes.get(chosen):
            self._warn(f"{chosen} is not as it was saved, and taken as it is: {'; '.join(self._changes[chosen])}")
        return chosen

    def _warn(self, message: str) -> None:
        if self.args.process_index == 0:
            logger.warning(message)

    def _find_defect(self, folder: str) -> str | None:
        """What is wrong with a checkpoint on the first machine where something is."""
        mine = None
        if self.args.local_process_index == 0:
            mine, self._changes[folder] = inspect_checkpoint(folder)
        return next((defect for defect in _gather(mine) if defect is not None), None)

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Fetch the batches of the next step as the Trainer does; none for a run that is resumed at its end.

        The Trainer itself makes one step too many there, unless the end is that of an epoch.
        """
        if self.is_in_train and self.state.global_step >= self.state.max_steps:
            return [], None
        return super().get_batch_samples(epoch_iterator, num_batches, device)

    # ---- saving ------------------------------------------------------------------------------------------------------

    def _save_checkpoint(self, model, trial) -> None:
        """Save as the Trainer does, between two marks; what `save_total_limit` deletes goes after the second."""
        folder = os.path.join(self._get_output_dir(trial=trial), f"checkpoint-{self.state.global_step}")
        if self.args.should_save:
            begin_save(folder)
        self.accelerator.wait_for_everyone()  # no process writes into an older whole checkpoint of this step
        self._unfinished_save = (folder, self.args.save_total_limit)
        try:
            super()._save_checkpoint(model, trial)
            self._complete_save()
        finally:
            if self._unfinished_save is not None:
                self.args.save_total_limit, self._unfinished_save = self._unfinished_save[1], None

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self._unfinished_save is not None:
            # From here to `_complete_save`. The Trainer's own rotation may take a folder for newer than the one just saved
            # because of its number, and delete the only whole one. Not earlier: `save_model` saves the arguments.
            self.args.save_total_limit = None

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does, after the checkpoint has got its second mark."""
        self._complete_save()
        super()._push_from_checkpoint(checkpoint_folder)

    def _complete_save(self) -> None:
        if self._unfinished_save is None:
            return
        self.accelerator.wait_for_everyone()  # every process has written its part
        (folder, limit), self._unfinished_save = self._unfinished_save, None
        self.args.save_total_limit = limit
        if self.args.should_save:
            self._last_checkpoint = folder, complete_save(folder)
            best = self.state.best_model_checkpoint
            deleted = delete_old_checkpoints(os.path.dirname(folder), limit, folder, best)
            if deleted:
                logger.debug(f"deleted under save_total_limit={limit}: " + ", ".join(deleted))


def _gather(mine) -> list:
    """What every process has, by rank."""
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return [mine]
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, mine)
    return everyone
