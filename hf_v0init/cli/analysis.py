"""The commands `hf-v0init saddle`, `linear-loss`, `landscape` and `connectivity`.

Importing this imports neither torch nor numpy nor matplotlib: each command imports what it needs when it runs.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import math
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import InputError
from ..plots import require_figure_path, require_writable
from .console import CONSOLE, make_table

Figure = Annotated[str | None, typer.Option("--figure", help="Also draw a picture into this .png, .svg or .pdf file.")]
Json = Annotated[str | None, typer.Option("--json", help="Also write the numbers into this file.")]
Seed = Annotated[int, typer.Option("--seed", help="Seed of all draws, >= 0.")]


@dataclasses.dataclass
class Measurement:
    """The flags that say on what text, where and how the loss of a checkpoint is measured."""

    file: Annotated[
        str | None,
        typer.Option(
            "--file",
            help="Text to measure the loss on; for translation models, tab-separated pairs or a .jsonl/.csv table.",
        ),
    ] = None
    source_file: Annotated[
        str | None, typer.Option("--source_file", help="Source sentences, one per line, for translation models.")
    ] = None
    target_file: Annotated[str | None, typer.Option("--target_file", help="Their translations, line by line.")] = None
    num_samples: Annotated[
        int, typer.Option("--num_samples", help="Windows of text, or sentence pairs, to measure on.")
    ] = 256
    batch_size: Annotated[int, typer.Option("--batch_size", help="Samples per forward pass.")] = 16
    max_length: Annotated[
        int,
        typer.Option(
            "--max_length", help="Tokens of a window, at most the model's positions; longer sentences are cut."
        ),
    ] = 128
    device: Annotated[str | None, typer.Option("--device", help="cpu, cuda, ... [default: a GPU if there is one]")] = (
        None
    )

    def load(self, checkpoint: str | Path) -> tuple[Any, Callable[[Any], float]]:
        """Load the model of a checkpoint, and the function that measures its loss."""
        from ..analysis.checkpoint_data import load_batch_loss, load_model

        options = dataclasses.asdict(self)
        model = load_model(checkpoint, options.pop("device"))
        return model, load_batch_loss(checkpoint, model.config, **options)


def with_flags_of(kind: type) -> Callable:
    """Replace the parameter `options` of a command by the fields of this dataclass, as flags of their names."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)
        def run(**flags) -> None:
            given = {field.name: flags.pop(field.name) for field in dataclasses.fields(kind)}
            command(**flags, options=kind(**given))

        hints = typing.get_type_hints(command, include_extras=True) | typing.get_type_hints(kind, include_extras=True)
        own = [(name, p.default) for name, p in inspect.signature(command).parameters.items() if name != "options"]
        of_kind = [(field.name, field.default) for field in dataclasses.fields(kind)]
        run.__annotations__ = {name: hints[name] for name, _ in [*own, *of_kind]}
        run.__signature__ = inspect.Signature(
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=hints[name])
            for name, default in [*own, *of_kind]
        )
        return run

    return decorate


def saddle(
    v0: Annotated[float, typer.Option("--v0", help="The random v0, one draw.")] = 100.0,
    warmup_steps: Annotated[int, typer.Option("--warmup_steps", help="Length of the linear warmup.")] = 100,
    num_steps: Annotated[int, typer.Option("--num_steps", help="Optimizer steps.")] = 50,
    scan_warmups: Annotated[
        bool, typer.Option("--scan_warmups", help="Also list the warmups that end where the paper's ends.")
    ] = False,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Run Adam over the paper's toy saddle: where its first step sends a point that starts next to the optimum.

    The optimum is at 0, the saddles are at -1 and 1, the start is -1e-6. The defaults give the paper's four final values.
    """
    from ..analysis.saddle import describe_data_driven, find_matching_warmups, run_saddle

    figure_path, json_path = _require_outputs(figure, json_file)
    runs = run_saddle(v0=v0, warmup_steps=warmup_steps, num_steps=num_steps)
    table = make_table(f"x after {num_steps} steps", "paper", "agrees", first="optimizer")
    for run in runs:
        agrees = {True: "yes", False: "no", None: ""}[run.agrees]
        table.add_row(run.name, f"{run.final:.4g}", run.published or "", agrees)
    CONSOLE.print(table)
    CONSOLE.print(describe_data_driven(runs))
    if scan_warmups:
        lengths = _join_ranges(find_matching_warmups())
        CONSOLE.print(f"Linear warmups that end at 0.01 after 50 steps, of 1 to 100 steps: {lengths}")
    if figure_path:
        from ..analysis.plots import draw_saddle

        draw_saddle(figure_path, runs)
    results = [{"name": r.name, "final": r.final, "published": r.published, "path": r.path} for r in runs]
    _write_outputs(figure_path, json_path, results)


def linear_loss(
    gradient_mean: Annotated[float, typer.Option("--gradient_mean", help="g, mean of the gradients.")] = 0.001,
    gradient_std: Annotated[float, typer.Option("--gradient_std", help="s, their standard deviation.")] = 0.01,
    beta2: Annotated[float, typer.Option("--beta2", help="Decay of the second moment, in (0, 1).")] = 0.99,
    random_scale: Annotated[float, typer.Option("--random_scale", help="Scale of the random v0 (eq. 11).")] = 100.0,
    fans: Annotated[int, typer.Option("--fans", help="fan_in + fan_out of the random v0.")] = 1024,
    data_scale: Annotated[float, typer.Option("--data_scale", help="Scale of the data-driven v0 (eq. 10).")] = 1.0,
    num_samples: Annotated[
        int, typer.Option("--num_samples", help="Gradients the data-driven v0 is taken from.")
    ] = 5000,
    num_coordinates: Annotated[int, typer.Option("--num_coordinates", help="Coordinates simulated.")] = 2000,
    num_steps: Annotated[int | None, typer.Option("--num_steps", help="Steps. [default: 10 / (1 - beta2)]")] = None,
    seed: Seed = 0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Drift of the second moment and RMSprop's step on a linear loss with Gaussian gradients: closed form and simulation."""
    from ..analysis.linear_loss import (
        STARTS,
        LinearLoss,
        compute_drift,
        compute_expected_second_moment,
        compute_rmsprop_step,
        simulate_linear_loss,
    )

    _require_seed(seed)
    loss = LinearLoss(gradient_mean, gradient_std, beta2, random_scale, fans, data_scale, num_samples)
    figure_path, json_path = _require_outputs(figure, json_file)
    options = {"num_steps": num_steps, "num_coordinates": num_coordinates, "seed": seed}
    runs = [simulate_linear_loss(loss, start, **options) for start in STARTS]
    CONSOLE.print(f"The second moment settles at v_inf = g^2 + s^2 = {loss.stationary:.6g} (eq. 8).")
    drifts = make_table("drift |v_inf - v0|", "simulated", "/ v_inf", first="v0")
    over_time = make_table("step", "E[v]/v_inf", "simulated", "RMSprop step/lr", "simulated", first="v0")
    results = []
    for run in runs:
        drift = compute_drift(loss, run.start)
        drifts.add_row(run.start, f"{drift:.4g}", f"{run.drift:.4g}", f"{drift / loss.stationary:.4g}")
        results.append({"start": run.start, "drift": drift, "drift_simulated": run.drift, "steps": []})
        for step, moment, update in zip(run.steps, run.second_moments, run.updates, strict=True):
            figures = {
                "second_moment": compute_expected_second_moment(loss, run.start, step),
                "second_moment_simulated": moment,
                "update": compute_rmsprop_step(loss, run.start, step),
                "update_simulated": update,
            }
            results[-1]["steps"].append({"step": step} | figures)
            settled = (figures["second_moment"] / loss.stationary, moment / loss.stationary)
            cells = (*settled, figures["update"], update)
            over_time.add_row(run.start, f"{step:,}", *(f"{cell:.4g}" for cell in cells))
    CONSOLE.print(drifts)
    CONSOLE.print(over_time)
    if figure_path:
        from ..analysis.plots import draw_linear_loss

        draw_linear_loss(figure_path, loss, runs)
    _write_outputs(figure_path, json_path, results)


@with_flags_of(Measurement)
def landscape(
    checkpoint: Annotated[str, typer.Argument(help="Folder with a saved model and its tokenizer.")],
    num_points: Annotated[int, typer.Option("--num_points", help="Grid points along each direction, odd.")] = 21,
    extent: Annotated[
        float, typer.Option("--extent", help="The grid reaches from -extent to extent filter lengths.")
    ] = 1.0,
    radius: Annotated[
        float, typer.Option("--radius", help="Half the side of the square that sharpness looks at.")
    ] = 0.5,
    seed: Seed = 0,
    figure: Figure = None,
    json_file: Json = None,
    *,
    options: Measurement,
) -> None:
    """Compute the loss around a checkpoint on two filter-normalised random directions, and a sharpness number.

    Sharpness is 100 * (highest loss within the radius - loss) / (1 + loss), in per cent.
    """
    _require_seed(seed)
    if not (math.isfinite(radius) and 0.0 < radius <= extent):
        raise InputError(f"radius={radius}: must be above 0 and at most extent={extent}")
    figure_path, json_path = _require_outputs(figure, json_file)
    from ..analysis.loss_landscape import compute_loss_landscape

    model, measure = options.load(checkpoint)
    found = compute_loss_landscape(model, measure, num_points=num_points, extent=extent, seed=seed)
    sharpness = found.compute_sharpness(radius)
    CONSOLE.print(
        f"loss {found.centre_loss:.4f}; sharpness {sharpness:.4g}% within {radius:g} filter lengths (seed {seed})"
    )
    if figure_path:
        from ..analysis.plots import draw_landscape

        title = f"{checkpoint}: loss {found.centre_loss:.4f}, sharpness {sharpness:.3g}% within {radius:g}"
        draw_landscape(figure_path, found, title=title)
    results = {
        "checkpoint": checkpoint,
        "seed": seed,
        "radius": radius,
        "centre_loss": found.centre_loss,
        "sharpness": sharpness,
        "coordinates": found.coordinates.tolist(),
        "losses": found.losses.tolist(),
    }
    _write_outputs(figure_path, json_path, results)


@with_flags_of(Measurement)
def connectivity(
    first: Annotated[str, typer.Argument(help="A checkpoint, or a run's output folder with checkpoints.")],
    second: Annotated[str, typer.Argument(help="Another; of two runs, checkpoints at the same steps are paired.")],
    num_points: Annotated[int, typer.Option("--num_points", help="Mixtures along the line, with both ends.")] = 11,
    seed: Seed = 0,
    figure: Figure = None,
    json_file: Json = None,
    *,
    options: Measurement,
) -> None:
    """Compute the loss along the line between two checkpoints, or between two runs' checkpoints along training.

    barrier = max over a of E(a theta1 + (1 - a) theta2) - (E(theta1) + E(theta2)) / 2 (eq. 22). Networks with BatchNorm get
    too high a barrier: their running statistics do not mix.
    """
    _require_seed(seed)
    figure_path, json_path = _require_outputs(figure, json_file)
    from ..analysis.checkpoint_data import pair_checkpoints
    from ..analysis.mode_connectivity import compute_connectivity_along_training

    pairs = pair_checkpoints(first, second)
    model, measure = options.load(pairs[0][1])
    found = compute_connectivity_along_training(model, pairs, measure, num_points=num_points, seed=seed)
    headings = ("loss of first", "loss of second", "highest between", "barrier (eq. 22)", "above the line")
    table = make_table(*headings, first="step" if len(pairs) > 1 else "pair")
    results = []
    for step, curve in found.items():
        cells = (curve.errors[-1], curve.errors[0], curve.errors.max(), curve.barrier, curve.barrier_above_line)
        table.add_row(f"{step:,}" if len(pairs) > 1 else "", *(f"{cell:.4f}" for cell in cells))
        figures = {"barrier": curve.barrier, "barrier_above_line": curve.barrier_above_line}
        results.append({"step": step} | figures | {"shares": curve.shares.tolist(), "errors": curve.errors.tolist()})
    CONSOLE.print(table)
    if figure_path:
        from ..analysis.plots import draw_connectivity

        draw_connectivity(figure_path, found, title=f"{first} (a = 1) and {second} (a = 0)")
    _write_outputs(figure_path, json_path, results)


def add_commands(app: typer.Typer) -> None:
    """Add the commands of this file to the command line."""
    app.command("saddle")(saddle)
    app.command("linear-loss")(linear_loss)
    app.command("landscape")(landscape)
    app.command("connectivity")(connectivity)


def _require_seed(seed: int) -> None:
    if not 0 <= seed < 2**62:
        raise InputError(f"seed={seed}: must be a whole number from 0 to 2^62 - 1")


def _require_outputs(figure: str | None, json_file: str | None) -> tuple[Path | None, Path | None]:
    """Return the paths to write to, after finding out that they can be written."""
    figure_path = require_figure_path(figure) if figure else None
    return figure_path, require_writable(json_file, "json") if json_file else None


def _write_outputs(figure_path: Path | None, json_path: Path | None, results) -> None:
    """Write the results and name the files written."""
    if figure_path:
        CONSOLE.print(f"Figure: {figure_path}", soft_wrap=True)
    if json_path:
        json_path.write_text(json.dumps(_without_nan(results), indent=1) + "\n", encoding="utf-8")
        CONSOLE.print(f"Numbers: {json_path}", soft_wrap=True)


def _without_nan(value):
    """Replace numbers that JSON does not have by null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _join_ranges(numbers: list[int]) -> str:
    """Write ascending numbers with runs drawn together: 2, 7, 74-100."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)
