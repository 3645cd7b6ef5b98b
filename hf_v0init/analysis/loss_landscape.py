"""The loss around a point in weight space, on the plane of two random directions (Li et al., 2018, arXiv 1712.09913).

The directions are filter-normalised: each filter of a direction (one index of the first dimension of a weight, so one output
unit or one embedding row) is scaled to the length of the same filter of the weights. So a coordinate of 1 changes every
filter by its own length, and models whose weights are larger are not flatter for it. Biases and norm weights
(one-dimensional tensors) stay as they are, as in that paper, and so does what is not trained: frozen weights, sinusoidal
positions. Weights are evaluated in evaluation mode.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..sharding.draws import draw_standard_normal_
from ..sharding.parts import clean_parameter_name
from ..state_guard import preserve_rng, seed_everything


@dataclass(frozen=True)
class LossLandscape:
    """Losses on a square grid.

    Attributes:
        coordinates: shape (points,), from -extent to extent, in units of the filter-normalised directions; 0 is the middle.
        losses: shape (points, points), `losses[i, j]` at coordinates[i] along the first and coordinates[j] along the second
            direction; not finite where the loss is not.
    """

    coordinates: np.ndarray
    losses: np.ndarray

    @property
    def centre_loss(self) -> float:
        """The loss at the given weights."""
        middle = len(self.coordinates) // 2
        return float(self.losses[middle, middle])

    def compute_sharpness(self, radius: float = 0.5) -> float:
        """Compute the sharpness of Keskar et al. (2017, arXiv 1609.04836, eq. 4) within the plane, in per cent.

        100 * (max of L over the grid points with |a|, |b| <= radius - L(0)) / (1 + L(0)): how much the loss can rise
        when every filter is changed by up to `radius` of its length along each direction. 0: nowhere higher. Infinite
        if a loss in the square is not finite.

        Raises:
            InputError: no grid point but the middle lies within `radius`.
        """
        spacing = self.coordinates[1] - self.coordinates[0]
        inside = np.abs(self.coordinates) <= radius * (1.0 + 1e-9)
        if inside.sum() < 2:
            raise InputError(
                f"radius={radius}: the grid's points lie {spacing:g} apart; take a larger one or more points"
            )
        values = self.losses[np.ix_(inside, inside)]
        if not np.isfinite(values).all():
            return math.inf
        return float(100.0 * (values.max() - self.centre_loss) / (1.0 + self.centre_loss))


def draw_filter_normalised_direction(model: nn.Module, seed: int) -> dict[str, torch.Tensor]:
    """Draw one filter-normalised random direction.

    The numbers depend on the seed and the parameters' names and shapes, not on the device or on global random states.

    Returns:
        For each trained parameter of two or more dimensions a tensor of its shape, on its device, fp32 (fp64 for fp64 weights), each
        of whose filters is as long as the parameter's; a filter of zeros gets zeros.
    """
    direction = {}
    computed = getattr(model, "_keys_to_ignore_on_save", None) or ()  # as sinusoidal positions
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or not parameter.is_floating_point() or not parameter.requires_grad or name in computed:
            continue
        dtype = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        drawn = torch.zeros(parameter.shape, dtype=dtype, device=parameter.device)
        draw_standard_normal_(drawn, name=clean_parameter_name(name), seed=seed, full_shape=tuple(parameter.shape))
        lengths = parameter.detach().to(dtype).flatten(1).norm(dim=1)
        own = drawn.flatten(1).norm(dim=1).clamp_min(torch.finfo(dtype).tiny)
        direction[name] = drawn.mul_((lengths / own).view(-1, *[1] * (parameter.dim() - 1)))
    return direction


def compute_loss_landscape(
    model: nn.Module,
    measure_loss: Callable[[nn.Module], float],
    *,
    num_points: int = 21,
    extent: float = 1.0,
    seed: int = 0,
) -> LossLandscape:
    """Compute the loss on a grid of `num_points` x `num_points` points around the model's weights.

    Costs num_points^2 calls of `measure_loss` and three copies of the weights on the model's device. The model itself is left alone.

    Args:
        measure_loss: called with a copy of the model in evaluation mode and without gradients; `make_batch_loss` makes one from
            batches. Random states are the same at each call, so every point sees the same draws.
        num_points: along each direction; odd, so that the middle is the model itself.
        extent: the grid reaches from -extent to extent.
        seed: of the directions and of what `measure_loss` draws.

    Raises:
        InputError: an even or too small `num_points`.
    """
    if num_points < 3 or num_points % 2 == 0:
        raise InputError(f"num_points={num_points}: must be odd and at least 3, so that the middle is the model itself")
    directions = [draw_filter_normalised_direction(model, 2 * seed + i) for i in range(2)]
    half = num_points // 2
    coordinates = np.arange(-half, half + 1) * (extent / half)
    losses = np.empty((num_points, num_points))
    weights, moved = dict(model.named_parameters()), copy.deepcopy(model).eval()
    with torch.no_grad(), preserve_rng():
        for i, j in transformers_logging.tqdm(list(np.ndindex(losses.shape)), desc="loss landscape", unit="point"):
            for name, first in directions[0].items():
                place = coordinates[i] * first
                place.add_(directions[1][name], alpha=float(coordinates[j])).add_(weights[name])
                moved.get_parameter(name).copy_(place)
            seed_everything(seed)
            losses[i, j] = measure_loss(moved)
    return LossLandscape(coordinates, losses)
