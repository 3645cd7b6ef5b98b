"""What the tests of the scripts share: the modules by the command's name, flags, results, and how a script refuses."""

import importlib
import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
from transformers.utils import logging as transformers_logging

from hf_v0init.cli.scripts import SCRIPTS
from hf_v0init.tasks.script_support import run_script

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SMALL_RUN = {"use_cpu": True, "disable_tqdm": True, "report_to": "none", "seed": 3}


@pytest.fixture(autouse=True)
def quiet_logging():
    """A script rebuilds the logging of its process; a test process goes on afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.getLogger("hf_v0init").setLevel(logging.NOTSET)
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


def start(*command, **environment) -> subprocess.CompletedProcess:
    """Start python with these words; more than `os.environ` as given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)
