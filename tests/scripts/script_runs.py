"""What the tests of the scripts share: the modules by the command's name, flags, results, and how a script refuses."""

import importlib
import json
import logging
import sys
from pathlib import Path

import datasets
import pytest
import torch
from safetensors.torch import load_file
from transformers.utils import logging as transformers_logging

from hf_v0init.cli.scripts import SCRIPTS
from hf_v0init.tasks.script_support import run_script

SMALL_RUN = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 3}


@pytest.fixture(autouse=True)
def quiet_logging():
    """A script rebuilds the logging of its process; a test process goes on afterwards."""
    root, ours = logging.getLogger(), logging.getLogger("hf_v0init")
    handlers, levels = root.handlers[:], (root.level, ours.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    ours.setLevel(levels[1])
    transformers_logging.set_verbosity_warning()
    datasets.enable_progress_bars()


def load_script(name: str):
    """The module of `hf-v0init NAME`."""
    return importlib.import_module(f"hf_v0init.tasks.{SCRIPTS[name].module}")


def to_argv(flags: dict) -> list[str]:
    """Flags as they are typed; None leaves one out."""
    argv = []
    for name, value in flags.items():
        if isinstance(value, list):
            argv += [f"--{name}", *map(str, value)]
        elif value is not None:
            argv.append(f"--{name}={value}")
    return argv


def read_results(folder) -> dict:
    return json.loads(Path(folder, "all_results.json").read_text())


def read_state(folder) -> dict:
    return json.loads(Path(folder, "trainer_state.json").read_text())


def of_trained(folder: Path, **changes) -> dict:
    """What changes in the flags of a run from scratch where the trained model in a folder is evaluated."""
    dropped = dict.fromkeys(("model_type", "config_name", "config_overrides", "max_steps", "do_train"))
    return {**dropped, "model_name_or_path": folder, "do_eval": True, **changes}


def assert_equal_weights(one: Path, other: Path) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    assert all(torch.equal(one[name], other[name]) for name in one)


def refuse(script, argv: list[str], words: list[str], capsys, monkeypatch) -> str:
    """Run a script that must end with status 2 and one line on stderr that holds these words; return that line."""
    monkeypatch.setattr(sys, "argv", ["script", *argv])
    with pytest.raises(SystemExit) as ended:
        run_script(script.main)
    said = capsys.readouterr().err
    assert ended.value.code == 2, said
    assert said.startswith("error: ") and said.count("\n") == 1, said
    assert all(word in said for word in words), said
    return said
