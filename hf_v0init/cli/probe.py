"""The command `hf-v0init probe`: how long a training run must hold back, measured at its initial weights."""

from __future__ import annotations

import dataclasses
import importlib
from typing import Annotated

import typer

from ..errors import InputError
from .scripts import SCRIPTS as TRAINING_SCRIPTS

SCRIPTS = {script.file: script.module for script in TRAINING_SCRIPTS.values() if script.file != "run_dcgan"}
OPTIONS = {"allow_extra_args": True, "ignore_unknown_options": True}


def probe(
    context: typer.Context,
    config: Annotated[str, typer.Argument(help="File of a training script's flags (.yaml, .yml, .json).")],
    script: Annotated[
        str | None,
        typer.Option("--script", help=f"Whose flags they are: {', '.join(SCRIPTS)}. [default: found by the flags]"),
    ] = None,
    figure: Annotated[
        str | None, typer.Option("--figure", help="Also draw the curve into this .png, .svg or .pdf file.")
    ] = None,
) -> None:
    """Measure how far a first step may go, and print the warmup that the training run of CONFIG needs. Trains nothing.

    Further flags are the script's and override CONFIG's, for example --learning_rate 3e-3. rho(d) is the decrease of the loss over
    the decrease that the gradient predicts, when every weight moves by d along the sign of its gradient; d50 is where it is 0.5,
    and x = learning rate / d50 says how long to hold back.
    """
    flags = [config, *context.args]
    if script is None:
        script = find_script(config)
    elif script not in SCRIPTS:
        raise InputError(f"script={script!r}: choose one of {', '.join(SCRIPTS)}")
    main = _load(script).main
    main([*flags, "--probe_only", *(["--probe_figure", figure] if figure is not None else [])])


def find_script(config: str) -> str:
    """Find the training script that takes the flags of the file `config`: all names, and if that leaves several, all values.

    Raises:
        InputError: the file cannot be read; no script takes all of it, or several do.
    """
    from ..tasks.script_support import read_configuration_file

    keys = set(read_configuration_file(config))
    missing = {name: keys - _list_flags(name) for name in SCRIPTS}
    takers = [name for name, unknown in missing.items() if not unknown]
    if not takers:
        closest = min(missing, key=lambda name: len(missing[name]))
        raise InputError(
            f"{config}: no script takes all of its flags; {closest} takes all but {', '.join(sorted(missing[closest]))}; "
            f"correct them, or give --script (of {', '.join(SCRIPTS)})"
        )
    if len(takers) > 1:
        takers = [name for name in takers if _takes_values(name, config)] or takers
    if len(takers) > 1:
        raise InputError(f"{config}: may be meant for {' or '.join(takers)}; say which, --script {takers[0]}")
    return takers[0]


def _takes_values(script: str, config: str) -> bool:
    from ..tasks.script_support import parse_arguments

    try:
        parse_arguments(_load(script).ARGUMENTS, [config])
    except InputError:
        return False
    return True


def _load(script: str):
    return importlib.import_module(f"..tasks.{SCRIPTS[script]}", __package__)


def _list_flags(script: str) -> set[str]:
    return {field.name for kind in _load(script).ARGUMENTS for field in dataclasses.fields(kind)}


def add_commands(app: typer.Typer) -> None:
    """Add the command of this file to the command line."""
    app.command("probe", context_settings=OPTIONS)(probe)
