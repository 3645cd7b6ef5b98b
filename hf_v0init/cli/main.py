"""The command `hf-v0init`: `explain` says what a v0 will do before anything is trained, and the files beside this one have the rest.

Importing it imports neither torch nor transformers. Commands import what they need when they run.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import math
import platform
from collections.abc import Mapping
from typing import Annotated

import typer
from rich.table import Column, Table

from ..errors import InputError
from ..method.decay import compute_linear_factor
from ..method.length import compute_bounds
from ..method.multiplier import (
    PRINTED_STEPS,
    WASHED_OUT,
    compute_multiplier,
    compute_multiplier_table,
    compute_similar_linear_warmup,
    compute_steps_to_multiplier,
    compute_washout_warning,
    require_beta2,
)
from ..method.strategies import SCALED_BY_GRADIENTS, STRATEGIES
from ..second_moment.table import ROWS
from ..settings import AUTO, StepCount, V0InitArguments, V0Plan
from ..third_party_messages import drop_known_messages
from .analysis import connectivity, landscape, linear_loss, saddle
from .compare import compare, report
from .console import CONSOLE, exit_with_error, make_table
from .scripts import SCRIPTS, make_command

PACKAGES = (
    "hf_v0init torch transformers accelerate numpy safetensors datasets trl peft deepspeed bitsandbytes torchao".split()
)
TARGETS = (0.5, 0.9, 0.99)
RATIOS = (1.0, 1e2, 1e4, 1e6)

UsageError = typer.BadParameter.__base__  # what typer raises for flags it cannot read, whichever click it uses

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def read_version(package: str) -> str:
    """Read the version of an installed distribution, or say that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"hf_v0init {read_version('hf_v0init')}")
        raise typer.Exit()


@app.callback(invoke_without_command=True)
def introduce(
    context: typer.Context,
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """A non-zero start (v0) for Adam's second moment, instead of a learning-rate warmup."""
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


for name, script in SCRIPTS.items():
    settings = {"allow_extra_args": True, "ignore_unknown_options": True, "help_option_names": []}
    app.command(name, short_help=script.summary, context_settings=settings)(make_command(name))
app.command(short_help="Tune v0 and warmup on a grid, confirm on fresh seeds.")(compare)
app.command(short_help="Write the report on a comparison's folder.")(report)


@app.command(short_help="Print what v0 does to the step size, without training.")
def explain(
    v0_init: Annotated[str, typer.Option("--v0_init", help=f"Strategy: {', '.join(STRATEGIES)}.")] = "data_driven",
    v0_decay: Annotated[
        str | None,
        typer.Option("--v0_decay", help="linear or beta2. [default: linear; beta2 with --v0_scale]"),
    ] = None,
    v0_decay_steps: Annotated[
        str | None,
        typer.Option(
            "--v0_decay_steps",
            help="Optimizer steps of the decay; below 1, a fraction of max_steps. [default: two thirds of them with linear]",
        ),
    ] = None,
    v0_scale: Annotated[
        float | None,
        typer.Option("--v0_scale", help="sigma, > 0. [default: 1; for random, where it is 100, without effect here]"),
    ] = None,
    adam_beta2: Annotated[float, typer.Option("--adam_beta2", help="Adam's beta2, in (0, 1).")] = 0.999,
    max_steps: Annotated[int, typer.Option("--max_steps", min=1, help="Optimizer steps of the run.")] = 10_000,
) -> None:
    """Print what v0 will do to the step size, in closed form and without training.

    With --v0_decay linear the step is multiplied by min(1, t / L), L = --v0_decay_steps. With beta2, for stationary gradients and
    v0 = scale * E[g^2], by m(t) = 1 / sqrt(1 + scale * beta2^t / (1 - beta2^t)). The flags are those of training.
    """
    require_beta2(adam_beta2)
    try:
        steps = None if v0_decay_steps is None else StepCount(v0_decay_steps)
    except argparse.ArgumentTypeError as error:
        raise InputError(f"v0_decay_steps={error}") from None
    arguments = V0InitArguments(v0_init=v0_init, v0_decay=v0_decay, v0_decay_steps=steps, v0_scale=v0_scale)
    plan = arguments.resolve(max_steps)
    lengths = compute_bounds(max_steps) if plan.decay_steps == AUTO else (plan.decay_steps,)
    if plan.decay_steps == AUTO and plan.decay == "beta2":
        raise InputError(
            f"v0_decay_steps=auto is measured in a run's first step: here give a number, as in --v0_decay_steps {lengths[0]}; "
            "--probe_only of a training script prints what a run would measure"
        )
    scale = compute_scale_in_force(plan, adam_beta2)
    settings = {"v0_init": v0_init, "v0_decay": plan.decay, "v0_decay_steps": plan.decay_steps, "v0_scale": scale}
    settings |= {"adam_beta2": adam_beta2, "max_steps": max_steps}
    shown = {name: f"{v:.6g}" if isinstance(v, float) else v for name, v in settings.items() if v is not None}
    CONSOLE.print(", ".join(f"{name} {value}" for name, value in shown.items()), style="bold")
    if v0_init == "zeros":
        CONSOLE.print("v0 = 0 is Adam as it is: m(t) = 1 at every step, no warmup, nothing to wash out.")
    elif plan.decay == "linear":
        _print_linear(lengths, max_steps)
    elif scale is None:
        _print_random(adam_beta2, max_steps)
    else:
        _print_multiplier(scale, adam_beta2, max_steps)


@app.command(short_help="Print which optimizers take a v0, and how.")
def optimizers() -> None:
    """Print which optimizers take a v0, and which are refused and why; docs/optimizers.md says how exactly each keeps it."""
    columns = ("optimizer", "--optim", "linear", "beta2", "remark")
    caption = "linear: takes a v0 with --v0_decay linear, the default; beta2: what holds it with --v0_decay beta2"
    table = Table(*(Column(name, overflow="fold") for name in columns), show_lines=True, caption=caption)
    for row in ROWS:
        beta2 = f"{row.key}{row.kept}: starts as {row.start}" if row.key else "found by a dry run, or refused"
        beta2, linear = "refused" if row.refusal else beta2, row.describe_linear_decay().partition(":")[0]
        remark = (row.refusal or row.note).replace("`", "")
        table.add_row(row.full_name, ", ".join(row.optim), linear, beta2.replace("`", ""), remark)
    table.add_row("any other", "--v0_optimizer package:Class", "no", "found by a dry run, or refused", "")
    CONSOLE.print(table)


@app.command(short_help="Print versions and devices, for a report of a problem.")
def env() -> None:
    """Print the versions and devices that a report of a problem should contain."""
    for package in PACKAGES:
        typer.echo(f"- {package}: {read_version(package)}")
    typer.echo(f"- Python: {platform.python_version()}")
    typer.echo(f"- system: {platform.platform()}")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"- devices: {', '.join(names) or 'no CUDA device'} (CUDA {torch.version.cuda})")


app.command(short_help="Draw the loss on a plane through a checkpoint.")(landscape)
app.command(short_help="Draw the loss on the line between two checkpoints.")(connectivity)
app.command(short_help="The paper's toy saddle: Adam's first step, four ways.")(saddle)
app.command(short_help="The paper's linear loss: how the second moment drifts.")(linear_loss)


def compute_scale_in_force(plan: V0Plan, beta2: float) -> float | None:
    """Return the size of v0 beside g^2, as far as it is known beforehand: not for `random` without a length, nor with linear."""
    if plan.decay != "beta2" or (plan.init not in SCALED_BY_GRADIENTS and plan.decay_steps is None):
        return None
    return plan.get_scale(beta2)


def _print_factors(factors: Mapping[str, Mapping[int, float]], max_steps: int) -> None:
    """Print a column for each entry: heading -> step -> factor; all have the same steps."""
    table = make_table("step t", *factors)
    for step in next(iter(factors.values())):
        end = " (end)" if step == max_steps else ""
        table.add_row(f"{step:,}{end}", *(_format_multiplier(column[step]) for column in factors.values()))
    CONSOLE.print(table)


def _print_linear(lengths: tuple[int, ...], max_steps: int) -> None:
    if len(lengths) > 1:
        shortest, longest = lengths
        CONSOLE.print(
            f"The run's first step measures L, from {shortest:,} to {longest:,} of {max_steps:,} steps; --probe_only of a training "
            "script prints it beforehand."
        )
    CONSOLE.print("Effective learning-rate factor of an element whose g² keeps its size:")
    steps = sorted({*PRINTED_STEPS, *(n // 2 for n in lengths), *lengths, max_steps})
    columns = {
        f"min(1, t / {length:,})": {t: compute_linear_factor(t, length) for t in steps if 1 <= t <= max_steps}
        for length in lengths
    }
    _print_factors(columns, max_steps)
    CONSOLE.print(
        "The schedule stays at its peak for these L steps, as after a linear warmup of that length. Elements whose gradients "
        "grow meanwhile are slowed less, those whose gradients shrink are slowed more."
    )
    if min(lengths) >= max_steps > 1:
        CONSOLE.print(
            f"Warning: the run has {max_steps:,} steps, so v0 never leaves. Remedy: --v0_decay_steps 0.33",
            style="yellow",
        )


def _print_multiplier(scale: float, beta2: float, max_steps: int) -> None:
    CONSOLE.print("m(t), the factor on Adam's step:")
    _print_factors({"m(t)": compute_multiplier_table(scale, beta2, max_steps)}, max_steps)

    reached = make_table("m(t) reaches", "at step")
    for target in TARGETS:
        step = compute_steps_to_multiplier(target, scale, beta2)
        reached.add_row(f"{target:g}", f"{max(1, math.ceil(step)):,}")
    CONSOLE.print(reached)

    linear_warmup = compute_similar_linear_warmup(scale, beta2, max_steps)
    longer = f", longer than the run of {max_steps:,}, so it never reaches the full rate" * (linear_warmup > max_steps)
    CONSOLE.print(
        f"Within this run v0 takes away as much step size as a linear warmup over {linear_warmup:,.0f} steps{longer} "
        "(the sum of 1 - m over the run, which for a linear warmup over L steps is L/2)."
    )
    warning = compute_washout_warning(scale, beta2, max_steps)
    if warning:
        CONSOLE.print(f"Warning: {warning}", style="yellow")
    else:
        at_end = _format_multiplier(compute_multiplier(max_steps, scale, beta2))
        CONSOLE.print(f"v0 will have washed out by the end of the run: m({max_steps:,}) = {at_end}.")
    CONSOLE.print(
        "m(t) takes the gradients' size as constant. In a real network it changes by orders of magnitude in "
        "the first hundred steps: m is a guide, not a prediction."
    )


def _print_random(beta2: float, max_steps: int) -> None:
    CONSOLE.print(
        "A random v0 knows nothing of the gradients' size, so m(t) cannot be known before gradients have "
        "been measured; a training run measures v0 against one batch and prints it. m(t) by that ratio:"
    )
    steps = [step for step in PRINTED_STEPS if step < max_steps] + [max_steps]
    table = make_table("v0 / E[g^2]", *(f"m({step:,})" for step in steps), f"{WASHED_OUT:g} at step")
    too_late = []
    for ratio in RATIOS:
        washed_out = math.ceil(compute_steps_to_multiplier(WASHED_OUT, ratio, beta2))
        if washed_out > max_steps:
            too_late.append(ratio)
        values = [_format_multiplier(compute_multiplier(step, ratio, beta2)) for step in steps]
        table.add_row(f"{ratio:,.0f}", *values, f"{washed_out:,}")
    CONSOLE.print(table)
    if too_late:
        CONSOLE.print(
            f"Warning: from a ratio of {too_late[0]:,.0f} on, v0 will not have washed out at step "
            f"{max_steps:,}. Remedy: --v0_decay_steps 0.33, which sizes v0 by the gradients of the run's first step.",
            style="yellow",
        )


def _format_multiplier(value: float) -> str:
    return f"{value:.4f}" if value >= 1e-3 else f"{value:.1e}"


def main() -> None:
    """Run the command line; bad input is one line on stderr and exit status 2."""
    drop_known_messages()
    try:
        status = app(standalone_mode=False)
    except InputError as error:
        exit_with_error(str(error))
    except UsageError as error:
        message = error.format_message().rstrip(".")
        exit_with_error(f"{message}{'' if message.endswith('?') else ';'} --help lists the commands and flags")
    except typer.Abort:
        raise SystemExit(130) from None
    raise SystemExit(status or 0)


if __name__ == "__main__":
    main()
