"""The commands `hf-v0init translate`, `clm`, `mlm`, `images`, `dcgan`: the training scripts of an installed package.

Each hands its flags to the `main` of a module below `hf_v0init.tasks`, which launchers start by name:
`torchrun --nproc_per_node 2 -m hf_v0init.tasks.translation.script FILE.yaml`. The files in `scripts/` do the same.
`python -m hf_v0init.cli.scripts` writes anew what `--help` of each prints.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import typer

from ..extras import EXTRAS, MissingExtraError, require_extra
from .console import exit_with_error

HELP_FOLDER = Path(__file__).parents[1] / "tasks" / "help"


@dataclass(frozen=True)
class Script:
    """A training script: its file in `scripts/`, its module below `hf_v0init.tasks`, what `--help` of `hf-v0init` says of it."""

    file: str
    module: str
    summary: str
    extra: str = "scripts"


SCRIPTS = {
    "translate": Script(
        "run_translation", "translation.script", "Train and evaluate an encoder-decoder model for translation."
    ),
    "clm": Script("run_clm", "language_modeling.script", "Train and evaluate a causal language model (GPT, LSTM)."),
    "mlm": Script("run_mlm", "language_modeling.masked_script", "Train and evaluate a masked language model (BERT)."),
    "images": Script("run_image_classification", "images.script", "Train and evaluate an image classifier.", "images"),
    "dcgan": Script("run_dcgan", "gan.script", "Train a DCGAN on images.", "images"),
}


def run_named(name: str) -> None:
    """Run the script of this name on `sys.argv[1:]`; bad input, and an extra that is absent, is one line and exit status 2.

    `--help` is printed from a file, before anything is imported that only a training needs.
    """
    if {"-h", "--help"} & {*sys.argv[1:]}:
        typer.echo((HELP_FOLDER / f"{name}.txt").read_text(encoding="utf-8"), nl=False)
        return
    try:
        if SCRIPTS[name].extra != "scripts":  # all of it at once, not one extra and then another
            require_extra(SCRIPTS[name].extra, *EXTRAS["scripts"], *EXTRAS[SCRIPTS[name].extra])
        module = importlib.import_module(f"hf_v0init.tasks.{SCRIPTS[name].module}")
        run_script = importlib.import_module("hf_v0init.tasks.script_support").run_script
    except MissingExtraError as error:
        exit_with_error(str(error))
    run_script(module.main)


def compose_help_of(name: str) -> str:
    """Compose the `--help` of a script from its flags."""
    module = importlib.import_module(f"hf_v0init.tasks.{SCRIPTS[name].module}")
    compose = importlib.import_module("hf_v0init.tasks.help_page").compose_help
    parser = importlib.import_module("hf_v0init.tasks.script_support").make_parser(module.ARGUMENTS)
    return compose(parser, module.ARGUMENTS, f"hf-v0init {name}", module.EXAMPLES)


def write_help_files() -> None:
    """Write the `--help` of every script to its file."""
    HELP_FOLDER.mkdir(exist_ok=True)
    for name in SCRIPTS:
        (HELP_FOLDER / f"{name}.txt").write_text(compose_help_of(name), encoding="utf-8")


def make_command(name: str) -> Callable[[typer.Context], None]:
    """Make the command of a script; what follows its name goes to the script as it is, `--help` too."""

    def command(context: typer.Context) -> None:
        sys.argv = [f"hf-v0init {name}", *context.args]
        run_named(name)

    return command


if __name__ == "__main__":
    write_help_files()
