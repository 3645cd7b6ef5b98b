"""Linear mode connectivity: the error along the straight line between two sets of weights (arXiv 2412.02153, eq. 22).

    E_a = error of a * theta1 + (1 - a) * theta2,    barrier = sup over a in [0, 1] of E_a - (E(theta1) + E(theta2)) / 2

Both ends belong to the line, so the barrier is never negative, and two connected checkpoints of different error have one of
half the difference. `barrier_above_line` takes the straight line between the two errors off instead (Entezari et al., 2022,
arXiv 2110.06296); it is 0 for any convex error and equals eq. 22 where both errors are the same.

BatchNorm: running statistics belong to one network's activations, and those of a mixture are not the mixture of the
statistics. Floating-point buffers are mixed like weights here, which is the usual choice and makes barriers of networks with
BatchNorm too high; LayerNorm and RMSNorm keep no such statistics and are not affected.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..state_guard import seed_everything
from .weights import Weights, borrow_model, match_weights, read_weights, write_mixture_

DEFAULT_POINTS = 11


@dataclass(frozen=True)
class Connectivity:
    """The errors along the line between two sets of weights.

    Attributes:
        shares: a, from 0 (theta2) to 1 (theta1), shape (points,).
        errors: E_a, shape (points,), in the unit of the error measured (a loss in nats, or a rate).
    """

    shares: np.ndarray
    errors: np.ndarray

    @property
    def barrier(self) -> float:
        """The barrier of eq. 22, in the unit of the errors; NaN if an error is NaN."""
        return float(self.errors.max() - (self.errors[0] + self.errors[-1]) / 2.0)

    @property
    def barrier_above_line(self) -> float:
        """max over a of E_a - (a E(theta1) + (1 - a) E(theta2)), in the unit of the errors."""
        line = self.shares * self.errors[-1] + (1.0 - self.shares) * self.errors[0]
        return float((self.errors - line).max())


def compute_connectivity(
    model: nn.Module,
    weights1: Weights,
    weights2: Weights,
    measure_error: Callable[[nn.Module], float],
    *,
    num_points: int = DEFAULT_POINTS,
    seed: int = 0,
    show_progress: bool = True,
) -> Connectivity:
    """Compute the error along the line from `weights2` (a = 0) to `weights1` (a = 1).

    `model` lends its architecture and device; on leaving it is as before (weights, buffers, gradients, modes, random
    states), also when an exception passes.

    Args:
        weights1, weights2: tensors by parameter name, such as `read_weights` or `model.state_dict()` return.
        measure_error: called with the model in evaluation mode and without gradients, with the same random states at each
            point; `make_batch_loss` makes one from batches.
        num_points: values of a, evenly spaced, both ends included.
        seed: of what `measure_error` draws.

    Raises:
        InputError: weights of another model, or fewer than 3 points.
    """
    if num_points < 3:
        raise InputError(f"num_points={num_points}: must be at least 3, both ends and something between")
    first, second = (
        match_weights(model, weights1, "the first weights"),
        match_weights(model, weights2, "the second weights"),
    )
    if first.keys() != second.keys():
        odd = sorted(first.keys() ^ second.keys())[0]
        raise InputError(f"only one of the two has {odd!r}; give two checkpoints of one architecture, saved alike")
    shares = np.linspace(0.0, 1.0, num_points)
    errors = np.empty(num_points)
    bar = transformers_logging.tqdm(total=num_points, desc="mode connectivity", unit="point", disable=not show_progress)
    with bar, borrow_model(model):
        for i, share in enumerate(shares):
            write_mixture_(model, first, second, float(share))
            seed_everything(seed)
            errors[i] = measure_error(model)
            bar.update(1)
    return Connectivity(shares, errors)


def compute_connectivity_along_training(
    model: nn.Module,
    pairs: Sequence[tuple[int, str, str]],
    measure_error: Callable[[nn.Module], float],
    *,
    num_points: int = DEFAULT_POINTS,
    seed: int = 0,
    show_progress: bool = True,
) -> dict[int, Connectivity]:
    """Compute the connectivity of several pairs of checkpoints, such as two runs at the same steps.

    Args:
        pairs: (step, folder of theta1, folder of theta2), folders with safetensors weights; read one pair at a time.
            The rest as `compute_connectivity`.

    Returns:
        {step: connectivity}, in the order given.

    Raises:
        InputError: no pairs, two of the same step, or what `read_weights` and `compute_connectivity` refuse.
    """
    steps = [step for step, _, _ in pairs]
    if not steps:
        raise InputError("no pairs of checkpoints given; give at least one (step, folder, folder)")
    if len(set(steps)) != len(steps):
        raise InputError(f"steps {steps}: each pair needs a step of its own")
    options = {"num_points": num_points, "seed": seed, "show_progress": show_progress}
    return {
        step: compute_connectivity(model, read_weights(one), read_weights(other), measure_error, **options)
        for step, one, other in pairs
    }
