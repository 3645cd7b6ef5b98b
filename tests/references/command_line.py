"""`hf-v0init` as a test calls it: inside this process, or in one of its own."""

import contextlib
import io
import subprocess
import sys
from dataclasses import dataclass
from unittest import mock

import pytest

from hf_v0init.cli import main as cli


@dataclass
class Done:
    """What a run of the command left: exit status and output."""

    returncode: int
    stdout: str
    stderr: str


def run_command(*flags) -> Done:
    """Run `hf-v0init` inside this process."""
    out, err = io.StringIO(), io.StringIO()
    with (
        mock.patch.object(sys, "argv", ["hf-v0init", *map(str, flags)]),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
        pytest.raises(SystemExit) as stop,
    ):
        cli.main()
    return Done(stop.value.code, out.getvalue(), err.getvalue())


def assert_light_imports(*flags: str) -> None:
    """Run `hf-v0init` in a process of its own, and see that it imported nothing that takes its time."""
    code = (
        "import sys, hf_v0init.cli.main as cli\n"
        f"sys.argv = ['hf-v0init', *{flags!r}]\n"
        "try:\n    cli.main()\nexcept SystemExit as stop:\n    assert not stop.code, stop.code\n"
        "heavy = {'torch', 'transformers', 'datasets', 'accelerate', 'matplotlib', 'numpy'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
