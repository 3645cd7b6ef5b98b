"""Pictures of the analyses. matplotlib is imported inside the functions that draw, as in `hf_v0init.plots`."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import cycle
from typing import TYPE_CHECKING

from ..plots import COLOURS, LINE_STYLES, import_pyplot, write_figure

if TYPE_CHECKING:
    from .linear_loss import LinearLoss, LinearLossRun
    from .loss_landscape import LossLandscape
    from .mode_connectivity import Connectivity
    from .saddle import SaddleRun


def draw_saddle(path: str | os.PathLike, runs: Sequence[SaddleRun]) -> None:
    """Draw the saddle loss (left), and x (middle) and its size (right) over the steps of each run, into the file `path`."""
    from .saddle import SADDLE, compute_saddle_loss

    plt = import_pyplot()
    figure, (loss_axes, path_axes, size_axes) = plt.subplots(1, 3, figsize=(14.0, 4.2), layout="constrained")
    grid = [-1.8 + 3.6 * i / 400 for i in range(401)]
    loss_axes.plot(grid, [compute_saddle_loss(x) for x in grid], color="0.3", lw=1.8)
    for run, colour, style in zip(runs, cycle(COLOURS), cycle(LINE_STYLES), strict=False):
        loss_axes.plot([run.final], [compute_saddle_loss(run.final)], "o", color=colour, ms=7)
        path_axes.plot(run.path, color=colour, ls=style, lw=1.6, label=run.name)
        size_axes.plot([max(abs(x), 1e-12) for x in run.path], color=colour, ls=style, lw=1.6)
    loss_axes.set(xlabel="x", ylabel="f(x)", title="The loss, and where each run ends")
    path_axes.set(xlabel="step", ylabel="x", title="The way")
    size_axes.set(ylabel="|x|, distance from the optimum", title="The same, on a logarithmic scale", yscale="log")
    for axes in (path_axes, size_axes):
        axes.axhline(SADDLE, color="0.7", lw=0.8, ls=":")
        axes.set(xlabel="step", xlim=(0, len(runs[0].path) - 1))
    path_axes.axhline(-SADDLE, color="0.7", lw=0.8, ls=":")
    for axes in (loss_axes, path_axes, size_axes):
        axes.grid(alpha=0.3)
    figure.legend(*path_axes.get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=len(runs))
    write_figure(figure, path)


def draw_linear_loss(path: str | os.PathLike, loss: LinearLoss, runs: Sequence[LinearLossRun]) -> None:
    """Draw the second moment (left; line: closed form, dots: simulation) and RMSprop's step (right) over the steps."""
    from .linear_loss import choose_measured_steps, compute_expected_second_moment

    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.2), layout="constrained")
    steps = choose_measured_steps(runs[0].steps[-1], per_decade=20)
    for run, colour, style in zip(runs, cycle(COLOURS), cycle(LINE_STYLES), strict=False):
        expected = [compute_expected_second_moment(loss, run.start, step) / loss.stationary for step in steps]
        left.plot(steps, expected, color=colour, ls=style, lw=1.8, label=run.start)
        left.plot(run.steps, [v / loss.stationary for v in run.second_moments], "o", color=colour, ms=5)
        right.plot(run.steps, run.updates, "o", color=colour, ls=style, ms=5)
    left.set(ylabel="mean of v / v_inf", title="Second moment")
    right.set(ylabel="root mean square of the step / learning rate", title="RMSprop's step")
    for axes in (left, right):
        axes.set(xlabel="optimizer step", xscale="log", yscale="log")
        axes.axhline(1.0, color="0.6", lw=0.8)
        axes.grid(alpha=0.3)
    left.legend(frameon=False, title="v0")
    figure.suptitle(
        f"Linear loss: g = {loss.gradient_mean:g}, s = {loss.gradient_std:g}, beta2 = {loss.beta2:g}; dots: simulation",
        fontsize=10,
    )
    write_figure(figure, path)


def draw_landscape(path: str | os.PathLike, landscape: LossLandscape, *, title: str) -> None:
    """Draw the contours of a loss landscape into the file `path`; points whose loss is not finite are left white."""
    import numpy as np

    plt = import_pyplot()
    figure, axes = plt.subplots(figsize=(6.2, 5.0), layout="constrained")
    losses = np.ma.masked_invalid(landscape.losses)
    x = landscape.coordinates
    low, high = float(losses.min()), float(losses.max())
    # Close together at the bottom, where the differences are that matter.
    levels = low + (high - low) * np.linspace(0.0, 1.0, 20) ** 2 if high > low else [low, low + 1.0]
    filled = axes.contourf(x, x, losses.T, levels=levels, cmap="viridis")
    if high > low:
        axes.contour(x, x, losses.T, levels=levels, colors="white", linewidths=0.5)
    axes.plot([0.0], [0.0], "x", color="#D55E00", ms=9, mew=2)
    axes.set(xlabel="first direction", ylabel="second direction", aspect="equal")
    axes.set_title(title, fontsize=10, wrap=True)
    figure.colorbar(filled, ax=axes, label="loss", format=lambda value, _: f"{value:.4g}")
    write_figure(figure, path)


def draw_connectivity(path: str | os.PathLike, curves: Mapping[int, Connectivity], *, title: str) -> None:
    """Draw the error along the line of each pair (left) and, of several pairs, the barriers over the steps (right)."""
    plt = import_pyplot()
    several = len(curves) > 1
    figure, panels = plt.subplots(1, 2 if several else 1, figsize=(11.0 if several else 6.0, 4.2), layout="constrained")
    left = panels[0] if several else panels
    colours = plt.get_cmap("viridis")
    for i, (step, curve) in enumerate(curves.items()):
        colour = colours(0.9 * i / max(1, len(curves) - 1))
        left.plot(curve.shares, curve.errors, color=colour, lw=1.6, marker="o", ms=3, label=f"step {step:,}")
    left.set(xlabel="a, share of the first checkpoint", ylabel="error of the mixture", title="Along the line")
    left.grid(alpha=0.3)
    if several:
        left.legend(frameon=False, fontsize=8)
        right, steps = panels[1], list(curves)
        barriers, above = zip(*((curve.barrier, curve.barrier_above_line) for curve in curves.values()), strict=True)
        right.plot(steps, barriers, color=COLOURS[0], marker="o", label="barrier (eq. 22)")
        right.plot(steps, above, color=COLOURS[1], ls="--", marker="s", label="above the line")
        right.set(xlabel="optimizer step", ylabel="barrier", title="Along training")
        right.grid(alpha=0.3)
        right.legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    write_figure(figure, path)
