"""Looks at a few elements of every parameter, so that watching a training costs next to nothing.

Of each parameter up to 4,096 evenly spaced elements are looked at, through views into its own memory: no tensor of a
parameter's size is made. The spacing has no common divisor with the length of a row, so that all columns have their turn.
Sums and shares over all elements are estimated by weighting each element looked at with the number that it stands for.
Knows no Trainer.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from ..second_moment.state import SecondMoment, unwrap_optimizer
from ..sharding.parts import ParamShard, get_local_part, order_of_memory, view_flat

MAX_PER_TENSOR = 4096


@dataclass
class _Sampled:
    """One parameter: what of its local part is looked at, in which group of the optimizer it is."""

    parameter: nn.Parameter
    group: int
    spacing: int
    count: int
    view: torch.Tensor | None = None
    pointer: int = -1


@dataclass
class _Device:
    """The parameters on one device, ordered by group, and how many elements each element looked at stands for."""

    sampled: list[_Sampled] = field(default_factory=list)
    weights: torch.Tensor | None = None
    bounds: list[tuple[int, int, int]] = field(default_factory=list)  # (group, first, end) in the joined elements


class ElementSamples:
    """The elements looked at of the trainable parameters that an optimizer holds.

    Of a sharded parameter (a DTensor), elements of this process's part, standing for the whole. Parameters whose memory is
    not dense are left out (`num_left_out`).

    Args:
        max_per_tensor: of each tensor.
        max_total: of all tensors together, by looking at fewer of each (16 at least).
    """

    def __init__(self, optimizer, max_per_tensor: int = MAX_PER_TENSOR, max_total: int | None = None) -> None:
        self.optimizer = unwrap_optimizer(optimizer)
        self.num_elements, self.num_looked_at, self.num_left_out = 0, 0, 0
        parameters = [
            (index, parameter)
            for index, group in enumerate(self.optimizer.param_groups)
            for parameter in group["params"]
            if parameter.requires_grad and parameter.is_floating_point()
        ]
        if max_total is not None:
            max_per_tensor = max(16, min(max_per_tensor, max_total // max(1, len(parameters))))
        self._devices: dict[torch.device, _Device] = {}
        weights: dict[torch.device, list[torch.Tensor]] = {}
        for group, parameter in parameters:
            local = get_local_part(parameter)
            flat = view_flat(local)
            if flat is None or flat.numel() == 0:
                self.num_left_out += flat is None
                continue
            spacing = _choose_spacing(flat.numel(), local.shape[-1] if local.dim() > 1 else 1, max_per_tensor)
            count = -(-flat.numel() // spacing)
            device = self._devices.setdefault(local.device, _Device())
            start = device.bounds[-1][2] if device.bounds else 0
            if device.bounds and device.bounds[-1][0] == group:
                device.bounds[-1] = (group, device.bounds[-1][1], start + count)
            else:
                device.bounds.append((group, start, start + count))
            device.sampled.append(_Sampled(parameter, group, spacing, count))
            weights.setdefault(local.device, []).append(torch.full((count,), parameter.numel() / count))
            self.num_elements += parameter.numel()
            self.num_looked_at += count
        for key, device in self._devices.items():
            device.weights = torch.cat(weights[key]).to(key)

    def read_parameters(self) -> list[torch.Tensor]:
        """Read the values: for each device a 1-D tensor there, fp32 or wider. A copy of the elements looked at only."""
        return [_widen(torch.cat([_find_view(one) for one in device.sampled])) for device in self._devices.values()]

    def sum_squares(self, before: list[torch.Tensor], after: list[torch.Tensor]) -> list[torch.Tensor]:
        """Estimate the sum over all elements of (after - before)^2, by group of the optimizer.

        Returns:
            For each device a tensor of shape (groups,), not yet waited for.
        """
        sums = []
        for device, old, new in zip(self._devices.values(), before, after, strict=True):
            weighted = (new - old).square_().mul_(device.weights)
            total = weighted.new_zeros(len(self.optimizer.param_groups))
            for group, first, end in device.bounds:
                total[group] += weighted[first:end].sum()
            sums.append(total)
        return sums

    @property
    def weights(self) -> np.ndarray:
        """How many elements each element looked at stands for, shape (n,)."""
        return np.concatenate([device.weights.cpu().double().numpy() for device in self._devices.values()])

    @property
    def groups(self) -> np.ndarray:
        """The number of the optimizer's group that each element looked at is in, shape (n,)."""
        return np.concatenate([np.full(s.count, s.group) for device in self._devices.values() for s in device.sampled])

    def read_second_moments(self) -> np.ndarray:
        """Read the second moments on the CPU: shape (n,), fp64, 0 where the optimizer has no state yet.

        A second moment that is kept as codes is decoded one tensor at a time.

        Raises:
            InputError: the optimizer keeps no second moment that is known.
        """
        parts, moments = [], SecondMoment(self.optimizer)
        for key, device in self._devices.items():
            values = [self._read_second_moment(moments, one, key) for one in device.sampled]
            parts.append(_widen(torch.cat(values)).cpu().double().numpy())
        return np.concatenate(parts)

    def _read_second_moment(self, moments: SecondMoment, one: _Sampled, device: torch.device) -> torch.Tensor:
        group = self.optimizer.param_groups[one.group]
        moment = moments.read(ParamShard("", tuple(one.parameter.shape), one.parameter, group))
        if moment is None:
            return torch.zeros(one.count, device=device)
        local = get_local_part(one.parameter)
        return get_local_part(moment).detach().permute(order_of_memory(local)).reshape(-1)[:: one.spacing].to(device)


def compute_weighted_quantiles(values: np.ndarray, weights: np.ndarray, quantiles: tuple[float, ...]) -> list[float]:
    """Compute quantiles of values that stand for `weights` elements each; NaN of nothing."""
    if values.size == 0:
        return [math.nan] * len(quantiles)
    order = np.argsort(values)
    cumulated = np.cumsum(weights[order])
    positions = np.searchsorted(cumulated, np.asarray(quantiles) * cumulated[-1])
    return values[order][np.minimum(positions, values.size - 1)].tolist()


def _choose_spacing(numel: int, row_length: int, limit: int) -> int:
    """Choose the smallest spacing that takes at most `limit` elements and has no common divisor with the row length."""
    spacing = -(-numel // limit)
    while math.gcd(spacing, row_length) > 1:
        spacing += 1
    return spacing


def _find_view(one: _Sampled) -> torch.Tensor:
    """Find the view of the elements looked at; kept until the parameter's memory is another."""
    local = get_local_part(one.parameter)
    if one.view is None or local.data_ptr() != one.pointer:
        one.view, one.pointer = view_flat(local)[:: one.spacing], local.data_ptr()
    return one.view


def _widen(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()
