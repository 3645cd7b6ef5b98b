"""Starts a training script with flags that its command line does not show, or only to see whether it accepts its flags.

    python -m hf_v0init.compare.start_script SCRIPT --flag=value ...    # with the flags of HF_V0INIT_SECRET_FLAGS as well
    python -m hf_v0init.compare.start_script --check SCRIPT < FLAGS     # FLAGS: a JSON list of lists of words

The second prints, for each list, a line of JSON: null, or what the script says against it. Nothing is trained.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import runpy
import sys
from collections.abc import Callable
from pathlib import Path

from hf_v0init.compare.launch import SCRIPT_MODULES, SECRET_FLAGS


class FlagsAccepted(SystemExit):
    """The script has read its flags and would go on."""


def run_script(script: str, flags: list[str]) -> None:
    """Run a script in this process, as `python SCRIPT FLAGS` would."""
    sys.argv = [script, *flags]
    if script in SCRIPT_MODULES:
        runpy.run_module(SCRIPT_MODULES[script], run_name="__main__", alter_sys=True)
    else:
        sys.path.insert(0, str(Path(script).parent))
        runpy.run_path(script, run_name="__main__")


def check_flags(script: str, flags: list[str]) -> str | None:
    """Return what a script says against its flags, None if it accepts them; it is stopped as soon as it has read them."""
    words = io.StringIO()
    try:
        with contextlib.redirect_stderr(words), contextlib.redirect_stdout(io.StringIO()):
            run_script(script, flags)
    except FlagsAccepted:
        return None
    except SystemExit as end:
        lines = [line for line in words.getvalue().splitlines() if "error: " in line]
        return lines[-1].split("error: ", 1)[1] if lines else f"it ended with exit status {end.code}"
    except Exception as error:
        return " ".join(str(error).split()) or repr(error)
    return "it ended without having read its flags"


def _stop_after(method: Callable) -> Callable:
    def parse(*arguments, **named):
        method(*arguments, **named)
        raise FlagsAccepted(0)

    return parse


def main() -> None:
    """Run as a module."""
    if sys.argv[1] != "--check":
        run_script(sys.argv[1], sys.argv[2:] + json.loads(os.environ.pop(SECRET_FLAGS, "[]")))
        return
    from transformers import HfArgumentParser

    script = sys.argv[2]
    HfArgumentParser.parse_args_into_dataclasses = _stop_after(HfArgumentParser.parse_args_into_dataclasses)
    argparse.ArgumentParser.parse_args = _stop_after(argparse.ArgumentParser.parse_args)
    if Path(script).is_file() and "parse_args" not in Path(script).read_text(encoding="utf-8"):
        argparse.ArgumentParser.parse_known_args = _stop_after(argparse.ArgumentParser.parse_known_args)
    for flags in json.load(sys.stdin):
        sys.stdout.write(f"{json.dumps(check_flags(script, flags))}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
