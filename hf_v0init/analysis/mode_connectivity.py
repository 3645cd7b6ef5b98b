"""Linear mode connectivity: the error along the straight line between two sets of weights (arXiv 2412.02153, eq. 22).

    E_a = error of a * theta1 + (1 - a) * theta2,    barrier = sup over a in [0, 1] of E_a - (E(theta1) + E(theta2)) / 2

Both ends belong to the line, so the barrier is never negative, and two connected checkpoints of different error have one of
half the difference. `barrier_above_line` takes the straight line between the two errors off instead (Entezari et al., 2022,
arXiv 2110.06296); it is 0 for any convex error and equals eq. 22 where both errors are the same.

BatchNorm: running statistics belong to one network's activations, and those of a mixture are not the mixture of the
statistics. Floating-point buffers are mixed like weights here, which is the usual choice and makes barriers of networks with
BatchNorm too high; LayerNorm and RMSNorm keep no such statistics and are not affected.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..state_guard import preserve_rng, seed_everything


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
    first: nn.Module,
    second: nn.Module,
    measure_error: Callable[[nn.Module], float],
    *,
    num_points: int = 11,
    seed: int = 0,
) -> Connectivity:
    """Compute the error along the line from the weights of `second` (a = 0) to those of `first` (a = 1).

    Weights and floating-point buffers are mixed in fp32 (fp64 for fp64 weights); at the ends they are those of the models, which
    themselves are left alone.

    Args:
        first, second: models of one architecture on one device.
        measure_error: called with a third model in evaluation mode and without gradients, with the same random states at each
            point; `make_batch_loss` makes one from batches.
        num_points: values of a, evenly spaced, both ends included.
        seed: of what `measure_error` draws.

    Raises:
        InputError: two architectures.
    """
    one, other, mixed = _list_tensors(first), _list_tensors(second), copy.deepcopy(first).eval()
    if {name: tensor.shape for name, tensor in one.items()} != {name: tensor.shape for name, tensor in other.items()}:
        raise InputError("the two checkpoints have other weights or shapes; give two of one architecture")
    shares, errors = np.linspace(0.0, 1.0, num_points), np.empty(num_points)
    with torch.no_grad(), preserve_rng():
        for i, share in enumerate(transformers_logging.tqdm(shares, desc="mode connectivity", unit="point")):
            for name, target in _list_tensors(mixed).items():
                if share in (0.0, 1.0):
                    target.copy_(one[name] if share else other[name])
                else:
                    dtype = torch.promote_types(target.dtype, torch.float32)
                    target.copy_(share * one[name].to(dtype) + (1.0 - share) * other[name].to(dtype))
            seed_everything(seed)
            errors[i] = measure_error(mixed)
    return Connectivity(shares, errors)


def _list_tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    tensors = dict(model.named_parameters()) | dict(model.named_buffers())
    return {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
