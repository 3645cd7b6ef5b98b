"""The commands `hf-v0init saddle`, `linear-loss`, `landscape` and `connectivity`.

Importing this imports neither torch nor numpy nor matplotlib: each command imports what it needs when it runs.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated

import typer

from ..errors import InputError
from ..plots import require_figure_path, require_writable
from .console import CONSOLE, make_table

Figure = Annotated[str | None, typer.Option("--figure", help="Also draw a picture into this .png, .svg or .pdf file.")]
Json = Annotated[str | None, typer.Option("--json", help="Also write the numbers into this file.")]
Seed = Annotated[int, typer.Option("--seed", min=0, max=2**62 - 1, help="Seed of all draws.")]
TextFile = Annotated[
    str | None,
    typer.Option("--file", help="Text to measure the loss on; for translation models, tab-separated pairs or a table."),
]
NumSamples = Annotated[
    int, typer.Option("--num_samples", min=1, help="Windows of text, or sentence pairs, to measure on.")
]
MaxLength = Annotated[
    int,
    typer.Option(
        "--max_length", min=2, help="Tokens of a window, at most the model's positions; longer sentences are cut."
    ),
]


def saddle(
    v0: Annotated[float, typer.Option("--v0", min=0, help="The random v0, one draw.")] = 100.0,
    warmup_steps: Annotated[int, typer.Option("--warmup_steps", min=0, help="Length of the linear warmup.")] = 100,
    num_steps: Annotated[int, typer.Option("--num_steps", min=1, help="Optimizer steps.")] = 50,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Run Adam over the paper's toy saddle: where its first step sends a point that starts next to the optimum.

    The optimum is at 0, the saddles are at -1 and 1, the start is -1e-6. The defaults give the paper's four final values.
    """
    from ..analysis.saddle import run_saddle

    _require_outputs(figure, json_file)
    runs = run_saddle(v0=v0, warmup_steps=warmup_steps, num_steps=num_steps)
    table = make_table(f"x after {num_steps} steps", "paper", first="optimizer")
    for run in runs:
        table.add_row(run.name, f"{run.final:.4g}", run.published or "")
    CONSOLE.print(table)
    CONSOLE.print(
        "Optimum 0, saddles -1 and 1. The data-driven v0, which the paper does not run here, is the square of the first gradient: at a "
        "start this flat it is far too small, and is gone after one step."
    )
    if figure:
        from ..analysis.plots import draw_saddle

        draw_saddle(figure, runs)
    results = [{"name": r.name, "final": r.final, "published": r.published, "path": r.path} for r in runs]
    _write_outputs(figure, json_file, results)


def linear_loss(
    gradient_mean: Annotated[float, typer.Option("--gradient_mean", help="g, mean of the gradients.")] = 0.001,
    gradient_std: Annotated[float, typer.Option("--gradient_std", min=0, help="s, their standard deviation.")] = 0.01,
    beta2: Annotated[float, typer.Option("--beta2", help="Decay of the second moment, in (0, 1).")] = 0.99,
    random_mean: Annotated[
        float, typer.Option("--random_mean", help="Scale / (fan_in + fan_out) of the random v0 (eq. 11).")
    ] = 100.0 / 1024,
    data_scale: Annotated[float, typer.Option("--data_scale", help="Scale of the data-driven v0 (eq. 10).")] = 1.0,
    num_steps: Annotated[
        int | None, typer.Option("--num_steps", min=1, help="Steps. [default: 10 / (1 - beta2)]")
    ] = None,
    seed: Seed = 0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Drift of the second moment and RMSprop's step on a linear loss with Gaussian gradients, simulated."""
    from ..analysis.linear_loss import STARTS, LinearLoss, compute_expected_second_moment, simulate_linear_loss

    _require_outputs(figure, json_file)
    loss = LinearLoss(gradient_mean, gradient_std, beta2, random_mean, data_scale)
    num_steps = num_steps or math.ceil(10.0 / (1.0 - beta2))
    runs = [simulate_linear_loss(loss, start, num_steps=num_steps, seed=seed) for start in STARTS]
    CONSOLE.print(f"The second moment settles at v_inf = g^2 + s^2 = {loss.stationary:.6g} (eq. 8).")
    table = make_table("|v_inf - v0| / v_inf", "step", "E[v] / v_inf", "simulated", "RMSprop step / lr", first="v0")
    results = []
    for run in runs:
        steps = []
        for step, moment, update in zip(run.steps, run.second_moments, run.updates, strict=True):
            expected = compute_expected_second_moment(loss, run.start, step)
            steps.append({"step": step, "second_moment": expected, "second_moment_simulated": moment, "update": update})
            cells = (run.drift / loss.stationary, step, expected / loss.stationary, moment / loss.stationary, update)
            table.add_row(run.start, *(f"{cell:.4g}" for cell in cells))
        results.append({"start": run.start, "drift": run.drift, "steps": steps})
    CONSOLE.print(table)
    if figure:
        from ..analysis.plots import draw_linear_loss

        draw_linear_loss(figure, loss, runs)
    _write_outputs(figure, json_file, results)


def landscape(
    checkpoint: Annotated[str, typer.Argument(help="Folder with a saved model and its tokenizer.")],
    file: TextFile = None,
    num_samples: NumSamples = 256,
    max_length: MaxLength = 128,
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
) -> None:
    """Compute the loss around a checkpoint on two filter-normalised random directions, and a sharpness number.

    Sharpness is 100 * (highest loss within the radius - loss) / (1 + loss), in per cent.
    """
    if not 0.0 < radius <= extent:
        raise InputError(f"radius={radius}: must be above 0 and at most extent={extent}")
    _require_outputs(figure, json_file)
    from ..analysis.checkpoint_loss import load_batch_loss, load_model
    from ..analysis.loss_landscape import compute_loss_landscape

    model = load_model(checkpoint)
    measure = load_batch_loss(checkpoint, model.config, file, num_samples, max_length)
    found = compute_loss_landscape(model, measure, num_points=num_points, extent=extent, seed=seed)
    sharpness = found.compute_sharpness(radius)
    title = f"loss {found.centre_loss:.4f}, sharpness {sharpness:.4g}% within {radius:g} filter lengths (seed {seed})"
    CONSOLE.print(title)
    if figure:
        from ..analysis.plots import draw_landscape

        draw_landscape(figure, found, title=f"{checkpoint}: {title}")
    results = {
        "checkpoint": checkpoint,
        "seed": seed,
        "radius": radius,
        "centre_loss": found.centre_loss,
        "sharpness": sharpness,
        "coordinates": found.coordinates.tolist(),
        "losses": found.losses.tolist(),
    }
    _write_outputs(figure, json_file, results)


def connectivity(
    first: Annotated[str, typer.Argument(help="A checkpoint, or a run's output folder with checkpoints.")],
    second: Annotated[str, typer.Argument(help="Another; of two runs, checkpoints at the same steps are paired.")],
    file: TextFile = None,
    num_samples: NumSamples = 256,
    max_length: MaxLength = 128,
    num_points: Annotated[
        int, typer.Option("--num_points", min=3, help="Mixtures along the line, with both ends.")
    ] = 11,
    seed: Seed = 0,
    figure: Figure = None,
    json_file: Json = None,
) -> None:
    """Compute the loss along the line between two checkpoints, or between two runs' checkpoints along training.

    barrier = max over a of E(a theta1 + (1 - a) theta2) - (E(theta1) + E(theta2)) / 2 (eq. 22). Networks with BatchNorm get
    too high a barrier: their running statistics do not mix.
    """
    _require_outputs(figure, json_file)
    from ..analysis.checkpoint_loss import load_batch_loss, load_model, pair_checkpoints
    from ..analysis.mode_connectivity import compute_connectivity

    headings = ("loss of first", "loss of second", "highest between", "barrier (eq. 22)", "above the line")
    table, found, results = make_table(*headings, first="step"), {}, []
    for step, *folders in pair_checkpoints(first, second):
        one, other = map(load_model, folders)
        measure = load_batch_loss(folders[0], one.config, file, num_samples, max_length)
        curve = found[step] = compute_connectivity(one, other, measure, num_points=num_points, seed=seed)
        cells = (curve.errors[-1], curve.errors[0], curve.errors.max(), curve.barrier, curve.barrier_above_line)
        table.add_row(f"{step:,}", *(f"{cell:.4f}" for cell in cells))
        result = {"step": step, "barrier": curve.barrier, "barrier_above_line": curve.barrier_above_line}
        results.append(result | {"shares": curve.shares.tolist(), "errors": curve.errors.tolist()})
    CONSOLE.print(table)
    if figure:
        from ..analysis.plots import draw_connectivity

        draw_connectivity(figure, found, title=f"{first} (a = 1) and {second} (a = 0)")
    _write_outputs(figure, json_file, results)


def _require_outputs(figure: str | None, json_file: str | None) -> None:
    """Find out whether the files can be written, before anything is computed."""
    if figure:
        require_figure_path(figure)
    if json_file:
        require_writable(json_file, "json")


def _write_outputs(figure: str | None, json_file: str | None, results) -> None:
    """Write the results and name the files written. What is no finite number is written as Python does, NaN or Infinity."""
    if figure:
        CONSOLE.print(f"Figure: {figure}", soft_wrap=True)
    if json_file:
        Path(json_file).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
        CONSOLE.print(f"Numbers: {json_file}", soft_wrap=True)
