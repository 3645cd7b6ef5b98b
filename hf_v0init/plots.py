"""Pictures: loss and update size of training runs side by side.

matplotlib is imported inside the functions that draw, so that importing this module costs nothing.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle
from pathlib import Path

from .errors import InputError
from .extras import require_extra

FIGURE_SUFFIXES = (".png", ".svg", ".pdf")
COLOURS = (
    "#0072B2",
    "#D55E00",
    "#009E73",
    "#CC79A7",
    "#E69F00",
    "#56B4E9",
)  # told apart by the colour-blind too
LINE_STYLES = ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
PIXELS_PER_INCH = 150


@dataclass(frozen=True)
class TrainingCurve:
    """One training run to draw: the loss over the steps, and the size of its first updates.

    `update_sizes` are root mean squares over all weights, in units of the peak learning rate: 1 means that
    every weight moved by the peak learning rate.
    """

    name: str
    loss_steps: Sequence[int]
    losses: Sequence[float]
    update_steps: Sequence[int] = field(default_factory=list)
    update_sizes: Sequence[float] = field(default_factory=list)


def require_figure_path(path: str | os.PathLike) -> Path:
    """Return `path` if a figure can be written there; creates nothing.

    Raises:
        InputError: an extension other than .png, .svg, .pdf; a folder that is missing or cannot be written; matplotlib is
            not installed.
    """
    require_extra("compare", "matplotlib")
    if Path(path).suffix.lower() not in FIGURE_SUFFIXES:
        raise InputError(f"figure {path}: the extension must be one of {', '.join(FIGURE_SUFFIXES)}")
    return require_writable(path, "figure")


def require_writable(path: str | os.PathLike, what: str) -> Path:
    """Return `path` if a file, such as a `figure`, can be written there; creates nothing.

    Raises:
        InputError: a folder, or one that is missing or cannot be written.
    """
    path = Path(path)
    if path.is_dir():
        raise InputError(f"{what} {path}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise InputError(f"{what} {path}: there is no folder {path.parent}; create it or give another place")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
        if path.exists():
            with path.open("ab"):
                pass
    except OSError as error:
        raise InputError(f"{what} {path}: cannot be written ({error.strerror}); give another place") from error
    return path


def draw_training_curves(path: str | os.PathLike, curves: Sequence[TrainingCurve], *, title: str) -> None:
    """Draw training loss (left) and update size of the first steps (right) of several runs into `path`."""
    plt = import_pyplot()
    figure, (left, right) = plt.subplots(1, 2, figsize=(11.0, 4.4), layout="constrained")
    for curve, colour, style in zip(curves, cycle(COLOURS), cycle(LINE_STYLES), strict=False):
        left.plot(curve.loss_steps, curve.losses, color=colour, ls=style, lw=1.8, label=curve.name)
        sizes = [size if size > 0 else math.nan for size in curve.update_sizes]  # the axis is logarithmic
        right.plot(curve.update_steps, sizes, color=colour, ls=style, lw=1.8, label=curve.name)
    left.set(xlabel="optimizer step", ylabel="training loss (nats per token)", title="Loss", ylim=(0, None))
    right.set(xlabel="optimizer step", title="Size of the first updates")
    right.set_ylabel("RMS update of a weight / peak learning rate")
    right.set_yscale("log")
    right.axhline(1.0, color="0.6", lw=1)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.set_xlim(left=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
    left.legend(frameon=False)
    figure.suptitle(title)
    write_figure(figure, path)


def import_pyplot():
    """Return `matplotlib.pyplot` with a backend that draws into files; imported late, since it takes its time."""
    require_extra("compare", "matplotlib")
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def write_figure(figure, path: str | os.PathLike) -> None:
    """Write the figure, in the format of the name's ending, and forget it."""
    import matplotlib.pyplot as plt

    try:
        figure.savefig(path, dpi=PIXELS_PER_INCH)
    finally:
        plt.close(figure)
