"""A folder's run is continued by the same run alone, and said to be; what happens when the disk is full."""

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
from script_runs import load_script, quiet_logging, to_argv  # noqa: F401
from test_right_results import LONG
from test_run_translation import SCRIPT, TINY

from hf_v0init.errors import InputError
from hf_v0init.records.checkpoints import find_defect
from hf_v0init.tasks import run as run_of_tasks
from hf_v0init.tasks.script_support import describe_full_disk


@pytest.fixture(scope="module")
def run_translation():
    return load_script("translate")


@pytest.fixture(scope="module")
def begun(run_translation, tmp_path_factory) -> dict:
    """The flags of a run of which two of six steps are made."""
    folder = tmp_path_factory.mktemp("begun")
    for name, lines in (("a.de", LONG), ("a.en", LONG), ("b.de", LONG[::-1])):
        (folder / name).write_text("".join(f"{line}\n" for line in lines))
    flags = {
        **TINY, "train_source_file": folder / "a.de", "train_target_file": folder / "a.en", "source_lang": "de", "target_lang": "en",
        "do_train": True, "max_steps": 2, "save_steps": 2, "output_dir": folder / "out", "cache_dir": folder / "cache",
    }  # fmt: skip
    run_translation.main(to_argv(flags))
    return {**flags, "max_steps": 6}


SIZES = TINY["config_overrides"]
OTHERS = {
    "data": ({"train_source_file": "b.de"}, ["--train_source_file has other content"]),
    "languages": ({"source_lang": "nl"}, ["source_lang was de and is now nl"]),
    "d_model": ({"config_overrides": SIZES.replace("d_model=32", "d_model=48")}, ["d_model was 32 and is now 48"]),
    "layers": ({"config_overrides": SIZES.replace("encoder_layers=1", "encoder_layers=2")}, ["encoder_layers was 1"]),
    "optimizer": ({"optim": "rmsprop"}, ["optim was adamw_torch", "is now rmsprop"]),
    "its arguments": ({"optim_args": "fused=False"}, ["optim_args was not given and is now fused=False"]),
    "vocabulary": ({"vocab_size": 310}, ["vocab_size was 300 and is now 310"]),
    "another part of the data": ({"max_train_samples": 8}, ["max_train_samples was not given and is now 8"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_does_not_continue_this_one(run_translation, begun, monkeypatch, case):
    changes, words = OTHERS[case]
    flags = begun | changes
    if "train_source_file" in changes:
        flags["train_source_file"] = begun["train_source_file"].parent / changes["train_source_file"]
    monkeypatch.setattr(run_translation.TranslationTask, "load_pairs", lambda *_: pytest.fail("data is read"))
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    before = {path: path.stat().st_mtime_ns for path in Path(begun["output_dir"]).rglob("*")}
    with pytest.raises(InputError) as caught:
        run_translation.main(to_argv(flags))
    message = str(caught.value)
    assert "\n" not in message and "checkpoint-2" in message and "--overwrite_output_dir" in message
    for word in words:
        assert word in message
    assert {path: path.stat().st_mtime_ns for path in Path(begun["output_dir"]).rglob("*")} == before


def test_what_may_change_on_the_way_does(run_translation, begun, monkeypatch, caplog, tmp_path):
    """The learning rate and the folder of the data; another batch size is taken, and named."""
    moved = tmp_path / "elsewhere.de"
    moved.write_bytes(Path(begun["train_source_file"]).read_bytes())
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    monkeypatch.setattr(
        run_translation.TranslationTask, "load_pairs", lambda *_: (_ for _ in ()).throw(InterruptedError)
    )
    changes = {"train_source_file": moved, "learning_rate": 1e-4, "per_device_train_batch_size": 4}
    with caplog.at_level(logging.WARNING, logger="hf_v0init"), pytest.raises(InterruptedError):
        run_translation.main(to_argv(begun | changes))
    assert "it goes on from checkpoint-2; to start anew instead, give --overwrite_output_dir" in caplog.text
    assert "per_device_train_batch_size was 16 and is now 4" in caplog.text
    assert "learning_rate" not in caplog.text and "elsewhere" not in caplog.text


# ---- a full disk ---------------------------------------------------------------------------------------------------------------


FULL = [
    OSError(errno.ENOSPC, "No space left on device", "/data/cache/x.arrow"),
    OSError(errno.EDQUOT, "Disk quota exceeded"),
    RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 576 vs 470"),
    RuntimeError("PytorchStreamWriter failed writing file data/3: file write failed"),
    Exception("Error while serializing: I/O error: No space left on device (os error 28)"),
    Exception('IoError(Os { code: 28, kind: StorageFull, message: "..." })'),
]


@pytest.mark.parametrize("error", FULL, ids=lambda error: type(error).__name__)
def test_errors_of_a_full_disk_are_told_from_others(tmp_path, error):
    line = describe_full_disk(error, str(tmp_path))
    assert "space" in line or "quota" in line
    assert "give the same command again" in line and "no checkpoint was saved yet" in line
    wrapped = ValueError("while saving")
    wrapped.__cause__ = error
    assert describe_full_disk(wrapped, None) == line


def test_other_errors_keep_their_traceback():
    for error in (OSError(errno.ENOENT, "No such file"), RuntimeError("CUDA out of memory"), KeyError(28)):
        assert describe_full_disk(error, None) is None


@pytest.mark.slow
def test_a_disk_that_fills_up_ends_in_one_line_and_the_run_goes_on_when_there_is_room(begun, tmp_path):
    """A limit on the size of files stands for the disk: optimizer states do not fit under it, weights do."""
    out = tmp_path / "out"
    flags = {**begun, "max_steps": 4, "save_steps": 2, "output_dir": out, "log_level": "warning"}
    run = [sys.executable, str(SCRIPT), *to_argv({**flags, "max_steps": 2})]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    subprocess.run(run, check=True, env=environment, capture_output=True)
    optimizer_size = (out / "checkpoint-2" / "optimizer.pt").stat().st_size

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (optimizer_size - 1000, optimizer_size - 1000))

    longer = [sys.executable, str(SCRIPT), *to_argv(flags)]
    ended = subprocess.run(longer, env=environment, capture_output=True, text=True, preexec_fn=limit_files)
    assert ended.returncode == 74, ended.stderr[-2000:]
    assert "Traceback" not in ended.stderr
    assert f"it goes on from {out / 'checkpoint-2'}, which is whole" in ended.stderr.strip().splitlines()[-1]
    assert find_defect(out / "checkpoint-2") is None
    subprocess.run(longer, check=True, env=environment, capture_output=True)
    assert json.loads((out / "trainer_state.json").read_text())["global_step"] == 4
