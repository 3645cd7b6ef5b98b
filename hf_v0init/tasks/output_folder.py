"""The output folder of a run: which run it holds, from where it goes on, whether it is done, what a new training makes untrue.

What tells one run from another stands in `trainer_state.json` (of every checkpoint, and of the output folder when the run has
finished) among the Trainer's callbacks. Runs without it, of the stock Trainer, are continued as the Trainer does.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainingArguments

from hf_v0init import InputError, V0InitArguments

from ..records.checkpoints import (
    delete_checkpoint,
    find_newest_valid,
    list_checkpoints,
    require_valid,
)
from .script_support import NothingToDoError
from .value_checks import require_makeable_folder

logger = logging.getLogger("hf_v0init")

RECORD_KEY, STATE_FILE, TRAIN_RESULTS_FILE = "HfV0InitRun", "trainer_state.json", "train_results.json"
# With another value it is another run. What may be changed on the way (learning rate, length, how often to log) is not here.
IDENTITY_FLAGS = (
    "dataset_name", "dataset_config_name", "dataset_revision", "source_lang", "target_lang", "source_column", "target_column",
    "text_column", "prompt_column", "completion_column", "image_column", "label_column", "source_prefix", "prompt_prefix",
    "model_name_or_path", "model_type", "config_overrides", "tokenizer_name", "tokenizer_kind", "vocab_size", "max_source_length",
    "max_target_length", "block_size", "max_train_samples", "streaming", "whole_word_mask", "line_by_line",
    "mlm_probability", "optim", "optim_args", "v0_optimizer", "latent_size", "base_channels",
)  # fmt: skip
LENGTH_FLAGS = ("max_steps", "num_train_epochs")
# What may be changed on the way, but not once a run has finished: it would be measured under flags that it was not trained with.
SETTING_FLAGS = (
    "max_steps", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "lr_decay_epochs", "lr_decay_factor", "warmup_steps",
    "per_device_train_batch_size", "gradient_accumulation_steps", "max_tokens_per_batch", "weight_decay", "adam_beta1", "adam_beta2",
    "adam_epsilon", "max_grad_norm", "label_smoothing_factor", "seed", "data_seed", "bf16", "fp16", "average_checkpoints",
    "load_best_model_at_end", "metric_for_best_model", "early_stopping_patience", "weight_initialization", "append_eos",
    "vary_block_size", "random_crop", "crop_padding", "random_flip", "image_size", "image_mode", "crop_fraction",
    "validation_split_percentage", "validation_split_rows",
    *(name for name in V0InitArguments.__dataclass_fields__ if name != "v0_record_run"),
)  # fmt: skip
TRAIN_PATHS = ("train_file", "train_source_file", "train_target_file", "train_dir")
HASHED_BYTES = 1 << 24  # of a file: whoever edits or replaces it changes its size or these
RESULT_NAMES = {"eval": ("eval",), "predict": ("predict", "test")}  # of the files in which scripts keep them
# What a run writes at its end, and a new training makes untrue.
OF_THE_LAST_MODEL = ("*_results.json", "generated_*", "v0_init.json", "README.md", STATE_FILE)
IS_TRUE = ("true", "True", True)
FRESH = "--overwrite_output_dir or another --output_dir"


# ---- which run it is ---------------------------------------------------------------------------------------------------


def describe_run(training: TrainingArguments, *others) -> dict[str, Any]:
    """Describe a run by its flags and the contents of its training files.

    Args:
        training: the Trainer's arguments.
        others: the script's other dataclasses of flags.

    Returns:
        "identity", "settings" and "length", each a mapping of flags (and files) to plain values.
    """
    flags: dict[str, Any] = {}
    for arguments in (*others, training):
        flags |= vars(arguments)
    for name in ("model_name_or_path", "tokenizer_name", "dataset_name"):  # whose folder may have been moved
        if flags.get(name):
            flags[name] = Path(flags[name]).name
    identity = {name: _make_plain(flags[name]) for name in IDENTITY_FLAGS if name in flags}
    if training.do_train:
        paths = {name: Path(flags[name]) for name in TRAIN_PATHS if flags.get(name) is not None}
        identity |= {name: describe_content(path) for name, path in paths.items()}
    settings, length = (
        {name: _make_plain(flags[name]) for name in names if name in flags} for names in (SETTING_FLAGS, LENGTH_FLAGS)
    )
    return {"identity": identity, "settings": settings, "length": length}


def _make_plain(value: Any) -> Any:
    value = getattr(value, "value", value)
    return value if isinstance(value, (str, int, float, bool, type(None))) else str(value)


def describe_content(path: Path) -> str:
    """A word that is another one for other content of a file or folder; one that is missing is found by whoever reads it."""
    digest = hashlib.sha256()
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            digest.update(f"{file.relative_to(path).as_posix()} {file.stat().st_size}\n".encode())
    if path.is_file():
        with open(path, "rb") as content:
            digest.update(content.read(HASHED_BYTES))
    return digest.hexdigest()[:16]


def make_run_record(run: Mapping[str, Any] | None) -> dict[str, Any]:
    """Make the entry that a description of a run is among the callbacks of a `TrainerState`."""
    return {RECORD_KEY: {"args": {}, "attributes": run or {}}}


def read_state(folder: str | os.PathLike) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a folder's `trainer_state.json` and the description of its run; both empty if missing or damaged."""
    try:
        state = json.loads(Path(folder, STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, {}
    stored = state.get("stateful_callbacks", {}).get(RECORD_KEY, {})
    return state, stored["attributes"] if isinstance(stored, dict) and stored else {}


def require_same_run(folder: str | os.PathLike, now: Mapping[str, Any], finished_at: int | None = None) -> None:
    """Refuse to continue a run with what makes it another one, or to take a finished run for one of other settings.

    Args:
        folder: a checkpoint, or the output folder of a finished run.
        now: what `describe_run` returned.
        finished_at: the step at which a finished run ended.

    Raises:
        InputError: naming the flags with their values then and now.
    """
    old = read_state(folder)[1]
    changes = list_changes(old.get("identity", {}), now["identity"])
    if changes:
        raise InputError(
            f"{folder} is of another run: {'; '.join(changes)}. To continue it, give what it was started with; to start from scratch, {FRESH}"
        )
    changes = [] if finished_at is None else list_changes(old.get("settings", {}), now["settings"])
    if changes:
        raise InputError(
            f"{folder} holds a run that finished at step {finished_at} with other flags: {'; '.join(changes)}. To evaluate "
            f"that run, give what it was trained with; to train with these, {FRESH}"
        )


def list_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """List, in words, the flags whose values differ; of flags that one of the two does not know only training files count."""
    return [
        f"{name} has other content" if name in TRAIN_PATHS else f"{name} was {old[name]} and is now {new[name]}"
        for name in {**old, **new}
        if ((name in old and name in new) or (old and name in TRAIN_PATHS)) and old.get(name) != new.get(name)
    ]


# ---- from where it goes on ---------------------------------------------------------------------------------------------


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
        InputError: an output folder that cannot be used, a checkpoint of another run, or a finished run with other flags.
        NothingToDoError: the output folder holds this run from beginning to end.
    """
    if not training.do_train:
        require_writable_output(training.output_dir, overwrite=True)
        return None
    continues = not overwrite and training.resume_from_checkpoint in (None, *IS_TRUE)
    step = find_finished_step(training) if continues else None
    place = find_checkpoint_to_resume(training, overwrite) if step is None else training.output_dir
    if place is not None:
        require_same_run(place, run, finished_at=step)
    if step is not None:
        require_stages_left(training, step, run)
    return place


def find_finished_step(training: TrainingArguments) -> int | None:
    """Return the step at which the run of the output folder ended, if it is as long as `training` asks for; else None."""
    state, run = read_state(training.output_dir)
    if "global_step" not in state or not Path(training.output_dir, TRAIN_RESULTS_FILE).is_file():
        return None
    step, length = state["global_step"], run.get("length", {})
    if training.max_steps > 0:
        is_as_long = step >= training.max_steps or length.get("max_steps") == training.max_steps
    else:
        is_as_long = length == {name: _make_plain(getattr(training, name)) for name in LENGTH_FLAGS}
    return step if is_as_long else None


def require_stages_left(training: TrainingArguments, step: int, now: Mapping[str, Any]) -> None:
    """Of a run that has been trained to its end: return if results are still to be made of it, else raise `NothingToDoError`."""
    folder = Path(training.output_dir)
    wanted = [stage for stage in RESULT_NAMES if getattr(training, f"do_{stage}")]
    left = [stage for stage in wanted if not any((folder / f"{n}_results.json").is_file() for n in RESULT_NAMES[stage])]
    if not left:
        takes_model = "model_name_or_path" in now["identity"]
        again = f"; to measure again, --model_name_or_path {folder} without --do_train" if takes_model else ""
        raise NothingToDoError(
            f"{folder}: finished at step {step}; nothing to do; to train from scratch, give {FRESH}{again}"
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
        logger.warning(skipped)
    if newest is not None and wanted is None and training.process_index == 0:
        logger.warning(
            f"{output_dir} holds checkpoints of this run: it goes on from {Path(newest).name}; to start from scratch instead, give {FRESH}"
        )
    return newest


# ---- what a new training makes untrue ----------------------------------------------------------------------------------


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
