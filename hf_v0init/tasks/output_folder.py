"""The output folder of a run: from where it goes on, what in it belongs to an earlier run, and whether the run is done."""

from __future__ import annotations

import logging
import os
import shutil
from pathlib import Path

from transformers import TrainerCallback, TrainingArguments

from hf_v0init import InputError

from ..records.checkpoints import (
    delete_checkpoint,
    describe_skipped,
    find_newest_valid,
    list_checkpoints,
    require_valid,
)
from .run_identity import find_finished_step, list_differences, require_same_run
from .script_support import NothingToDoError
from .value_checks import require_makeable_folder

logger = logging.getLogger("hf_v0init")

RESULT_NAMES = {"eval": ("eval",), "predict": ("predict", "test")}  # of the files in which scripts keep them
# What a run writes at its end, and a new training makes untrue.
OF_THE_LAST_MODEL = (
    "*_results.json", "generated_*", "v0_init.json", "README.md", "trainer_state.json",
)  # fmt: skip
IS_TRUE = ("true", "True", True)


def require_writable_output(path: str | os.PathLike, overwrite: bool) -> None:
    """Refuse an output folder that cannot be written, or that holds something without `overwrite`. Makes nothing."""
    path = Path(path)
    if path.is_dir() and any(path.iterdir()) and not overwrite:
        raise InputError(f"the output folder {path} is not empty; give another --output_dir, or --overwrite_output_dir")
    require_makeable_folder("output_dir", path)


def find_place_to_start(training: TrainingArguments, overwrite: bool, run: dict) -> str | None:
    """Find where a run begins, and refuse what can be refused before any data is read.

    Args:
        overwrite: whether the user asked to start afresh.
        run: what `describe_run` returned, held against the run that the output folder or the checkpoint is of.

    Returns:
        The folder to continue from, if any: a checkpoint, or the output folder of a run that is trained but not evaluated.

    Raises:
        InputError: an output folder that cannot be used, a checkpoint of another run, a finished run that had other settings.
        NothingToDoError: the output folder holds this run from beginning to end.
    """
    if not training.do_train:
        require_writable_output(training.output_dir, overwrite=True)
        return None
    if not overwrite and training.resume_from_checkpoint in (None, *IS_TRUE):
        step = find_finished_step(training)
        if step is not None:
            require_stages_left(training, step, run)
            return training.output_dir
    checkpoint = find_checkpoint_to_resume(training, overwrite)
    if checkpoint is not None:
        require_same_run(checkpoint, run)
    return checkpoint


def require_stages_left(training: TrainingArguments, step: int, run: dict) -> None:
    """Of a run that has been trained to its end: return if results are still to be made of it.

    Raises:
        InputError: it was trained with other settings, which are named.
        NothingToDoError: all its results are there.
    """
    folder = Path(training.output_dir)
    require_same_run(folder, run)
    changed = list_differences(folder, run, "settings")
    anew = "to train anew give --overwrite_output_dir or another --output_dir"
    if changed:
        raise InputError(
            f"{folder} holds a finished run (step {step}) with other settings: {'; '.join(changed)}; {anew}"
        )
    wanted = [stage for stage in RESULT_NAMES if getattr(training, f"do_{stage}")]
    left = [stage for stage in wanted if not any((folder / f"{n}_results.json").is_file() for n in RESULT_NAMES[stage])]
    if not left:
        raise NothingToDoError(
            f"{folder}: finished at step {step}; nothing to do; {anew}; to measure again, --model_name_or_path {folder} without "
            "--do_train"
        )
    logger.warning(f"{folder}: training finished at step {step}; what is left is {' and '.join(left)}")


def find_checkpoint_to_resume(training: TrainingArguments, overwrite: bool) -> str | None:
    """Find the checkpoint folder this run continues from, or None for a fresh start; checks the output folder.

    `--resume_from_checkpoint FOLDER` is taken as given and `--resume_from_checkpoint true` means the newest
    valid checkpoint of the output folder. Without either, an output folder with checkpoints is continued from
    its newest whole one, unless `overwrite`. Checkpoints whose save was cut off are skipped with a warning;
    if there are only such, the run starts anew in the same folder.

    Raises:
        InputError: the checkpoint does not exist or is not whole, or `require_writable_output` refuses the folder.
    """
    output_dir, wanted = Path(training.output_dir), training.resume_from_checkpoint
    wanted = None if wanted in ("false", "False", False) else wanted
    if wanted not in (None, *IS_TRUE):
        if not Path(wanted).is_dir():
            raise InputError(f"--resume_from_checkpoint: there is no folder {wanted}; give a checkpoint-*, or 'true'")
        require_valid(wanted)
        require_writable_output(output_dir, overwrite=True)
        return wanted
    checkpoints = list_checkpoints(output_dir)
    if wanted is not None and not checkpoints:
        raise InputError(f"--resume_from_checkpoint: {output_dir} holds no checkpoint-* folder")
    continues = wanted is not None or (bool(checkpoints) and not overwrite)
    require_writable_output(output_dir, overwrite=overwrite or continues)
    if not continues:
        return None
    newest, skipped = find_newest_valid(checkpoints)
    if skipped and training.process_index == 0:
        logger.warning(describe_skipped(skipped, newest))
    if newest is not None and wanted is None and training.process_index == 0:
        logger.warning(
            f"{output_dir} holds checkpoints of this run: it goes on from {Path(newest).name}; to start anew instead, give "
            "--overwrite_output_dir or another --output_dir"
        )
    return newest


def remove_what_is_stale(output_dir: str | os.PathLike, with_checkpoints: bool) -> None:
    """Delete what an earlier training left in a folder and a new one makes untrue; call it on the main process only.

    Args:
        with_checkpoints: `checkpoint-*` folders and sample images too, so that neither resume nor averaging meets them.
    """
    output_dir = Path(output_dir)
    for pattern in OF_THE_LAST_MODEL:
        for path in output_dir.glob(pattern):
            path.unlink()
    if with_checkpoints:
        for folder in list_checkpoints(output_dir):
            delete_checkpoint(folder)
        shutil.rmtree(output_dir / "samples", ignore_errors=True)


class RemoveWhatIsStale(TrainerCallback):
    """Calls `remove_what_is_stale` when nothing stands between a training and its first step any more.

    Add it last, so that it is called when v0 has been chosen: a run that is refused costs the user nothing.
    """

    def __init__(self, with_checkpoints: bool) -> None:
        self.with_checkpoints = with_checkpoints

    def on_train_begin(self, args, state, control, **kwargs):
        """Remove it, on the main process."""
        if state.is_world_process_zero:
            remove_what_is_stale(args.output_dir, self.with_checkpoints)
