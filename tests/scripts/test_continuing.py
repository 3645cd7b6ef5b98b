"""A folder's run is continued by the same run alone, and said to be."""

import logging
from pathlib import Path

import pytest
from script_runs import load_script, quiet_logging, to_argv  # noqa: F401
from test_right_results import LONG
from test_run_translation import TINY

from hf_v0init.errors import InputError
from hf_v0init.tasks import run as run_of_tasks


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
    "data": ({"train_source_file": "b.de"}, ["train_source_file has other content"]),
    "languages": ({"source_lang": "nl"}, ["source_lang was de and is now nl"]),
    "sizes": ({"config_overrides": SIZES.replace("d_model=32", "d_model=48")}, ["config_overrides was d_model=32"]),
    "optimizer": ({"optim": "rmsprop"}, ["optim was adamw_torch", "is now rmsprop"]),
    "its arguments": ({"optim_args": "fused=False"}, ["optim_args was None and is now fused=False"]),
    "vocabulary": ({"vocab_size": 310}, ["vocab_size was 300 and is now 310"]),
    "another part of the data": ({"max_train_samples": 8}, ["max_train_samples was None and is now 8"]),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_run_does_not_continue_this_one(run_translation, begun, monkeypatch, case):
    changes, words = OTHERS[case]
    flags = begun | changes
    if "train_source_file" in changes:
        flags["train_source_file"] = begun["train_source_file"].parent / changes["train_source_file"]
    monkeypatch.setattr(run_translation.DataArguments, "load_roles", lambda *_: pytest.fail("data is read"))
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
    """The learning rate, the batch size and the folder of the data."""
    moved = tmp_path / "elsewhere.de"
    moved.write_bytes(Path(begun["train_source_file"]).read_bytes())
    monkeypatch.setattr(run_of_tasks, "start_logging", lambda *_: None)
    monkeypatch.setattr(run_translation.DataArguments, "load_roles", lambda *_: (_ for _ in ()).throw(InterruptedError))
    changes = {"train_source_file": moved, "learning_rate": 1e-4, "per_device_train_batch_size": 4}
    with caplog.at_level(logging.WARNING, logger="hf_v0init"), pytest.raises(InterruptedError):
        run_translation.main(to_argv(begun | changes))
    assert "it goes on from checkpoint-2; to start anew instead, give --overwrite_output_dir" in caplog.text
