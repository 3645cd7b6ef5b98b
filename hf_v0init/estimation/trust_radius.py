"""The trust radius of Adam's first update: how far every weight may move before the gradient no longer tells what happens.

On a batch at the weights w: L the loss, g its gradient, and -sign(g) the direction, since Adam's first update without a v0 moves
every weight by its learning rate against the sign of its gradient. For a displacement d of every element:

    rho(d) = (L(w) - L(w - d sign g)) / (d L'(0)),     L'(0) the decrease per unit of displacement as d goes to 0

It is the ratio by which trust-region methods judge a step (Conn, Gould & Toint, 2000): decrease over predicted decrease. rho is 1 for small
d, where the loss is as good as linear, and falls as d grows. **d50** is the d at which it crosses 0.5. It does not depend on
the learning rate; what follows from learning rate / d50 is in `method.length`.

How it is measured:
    A forward for each displacement: about ten of them, twice as far apart each time, from `FIRST_DISPLACEMENT` down, and else up, until
    the decreases at two in a row are in proportion, and up from there until rho has been below 0.5. L'(0) is extrapolated from two
    that are in proportion, and not |g|_1, since an optimizer's gradients may have been clipped or scaled. A crossing counts only if
    rho was seen near 1 at two smaller displacements. Where it was not, rounding or noise is what was measured, and d50 is None with
    a `reason`: weights or losses in bf16 or fp16 may be too coarse for a small trust radius.

The model stays in its mode, with the same random states at each forward, so that dropout draws the same masks. What it costs beside the
activations is a copy of the weights; of a sharded model each process copies its own shard. Afterwards weights, buffers, gradients,
modes, plain attributes of modules and random states are as before bit for bit, also when an exception or Ctrl-C passes, which acts
within one forward. Nothing here knows an optimizer or a Trainer: the loss is a callable.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..sharding.parts import get_local_part, is_dtensor, read_gradient
from ..sharding.processes import add_over_processes, fail_together, get_rank_and_world_size
from ..state_guard import (
    defer_interrupts,
    preserve_model,
    preserve_rng,
    raise_if_interrupted,
    read_rng_states,
    write_rng_states,
)

FIRST_DISPLACEMENT = 1e-4  # of every element; d50 was between 1e-4 and 1e-2 on every network measured
GRID_FACTOR = 2.0  # from one displacement to the next
SMALLEST_DISPLACEMENT, LARGEST_DISPLACEMENT = 1e-10, 16.0
CROSSING = 0.5  # of rho
NEAR_ONE = 0.25  # |rho - 1| up to which the first-order model is said to hold
SLOPE_TOLERANCE = 0.1  # between two small displacements, up to which the decrease is said to be proportional
NOISE_FACTOR = 100.0  # roundings of the loss, below which a decrease is noise
POINTS_BEYOND = 1  # displacements after the crossing, so that a plot shows how steeply rho falls


class LossNotComputed(Exception):
    """Raised by a loss function that has nothing to compute the loss of; says why."""


@dataclass
class TrustRadius:
    """What was measured at the initial weights.

    Attributes:
        d50: displacement of every element at which rho crosses 0.5, in the weights' unit; None where it could not be measured.
        displacements: the grid, ascending.
        rho: at each of these; -inf where the loss was not finite.
        slope: L'(0), the decrease of the loss per unit of displacement as the displacement goes to zero.
        loss: at the present weights.
        num_forwards: computations of the step's loss.
        seconds: wall-clock time.
        reason: why d50 is None.
    """

    d50: float | None = None
    displacements: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    slope: float = 0.0
    loss: float = 0.0
    num_forwards: int = 0
    seconds: float = 0.0
    reason: str | None = None


def measure_in_step(
    parameters: Sequence[tuple[torch.Tensor, float]], loss_fn: Callable[[], Any], model: nn.Module | None = None
) -> TrustRadius:
    """Measure d50 at the gradients in hand, along the update that Adam would make; see the top of the file.

    Adam's first update moves every element by its group's learning rate, so a displacement d moves the elements of a group by d
    times the group's rate over the largest. Several processes call it together; losses are means over them.

    Args:
        parameters: (parameter with its gradient, its group's learning rate over the largest one).
        loss_fn: computes the loss of this step's batch at the weights as they are: a number or a scalar tensor.
        model: whose buffers, modes and plain tensors are to be as before afterwards.

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured.
    """
    started = time.perf_counter()
    walk = _Walk(parameters, loss_fn, model)
    with (
        defer_interrupts(),
        preserve_rng(),
        torch.no_grad(),
        preserve_model(model) if model is not None else contextlib.nullcontext(),
    ):
        walk.run()
    walk.result.seconds = time.perf_counter() - started
    return walk.result


class _Walk:
    """The forwards of a measurement: where the weights are, and what the loss is there. Made with the gradients in hand."""

    def __init__(
        self, parameters: Sequence[tuple[torch.Tensor, float]], loss_fn: Callable[[], Any], model: nn.Module | None
    ) -> None:
        self.loss_fn, self.model, self.rng_states = loss_fn, model, read_rng_states()
        self.weights, self.rates = [p for p, _ in parameters], [rate for _, rate in parameters]
        self.gradients = [read_gradient(p) for p in self.weights]
        self.num_processes = get_rank_and_world_size()[1]
        self.is_sharded = any(is_dtensor(p) for p in self.weights)
        self.decreases: dict[float, float] = {}
        self.result = TrustRadius()

    def run(self) -> None:
        self._reshard()
        self.copies = [get_local_part(p.detach()).clone() for p in self.weights]
        try:
            self._walk()
        finally:
            self._move(0.0)

    def _walk(self) -> None:
        result = self.result
        result.loss = self._compute_loss()
        norm = self._sum([sum(float(get_local_part(g).float().abs().sum()) for g in self.gradients)])[0]
        if not (math.isfinite(result.loss) and math.isfinite(norm) and norm > 0.0):
            bad_gradient = "no parameter got a gradient" if norm == 0.0 else "a gradient is not finite"
            bad_loss = f"the loss at the initial weights is {result.loss}"
            result.reason = bad_gradient if math.isfinite(result.loss) else bad_loss
            return
        d = next((d for d in self._list_candidates() if self._is_proportional(d)), None)
        if d is None:
            result.reason = (
                "the loss does not fall in proportion to any small displacement along the gradient's sign: it is below the rounding of "
                "the loss or of the weights, or the loss is not smooth; measure in fp32"
            )
            return
        smallest = d / GRID_FACTOR
        while self._is_proportional(d * GRID_FACTOR) and d < LARGEST_DISPLACEMENT:
            d *= GRID_FACTOR  # the farther apart, the less rounding; these points are needed anyway
        upper, lower = (self._measure(at) / at for at in (d, d / GRID_FACTOR))
        result.slope = (GRID_FACTOR * lower - upper) / (GRID_FACTOR - 1.0)
        rho, d, num_beyond = {}, smallest, 0
        while d <= LARGEST_DISPLACEMENT and num_beyond <= POINTS_BEYOND:
            rho[d] = self._measure(d) / (d * result.slope)
            result.d50, result.reason = find_crossing(rho)
            num_beyond += result.d50 is not None or not math.isfinite(rho[d])
            d *= GRID_FACTOR
        result.displacements, result.rho = list(rho), list(rho.values())

    def _list_candidates(self) -> Iterator[float]:
        """List displacements at which the loss may fall in proportion: from the first one down to rounding, then up."""
        smallest = SMALLEST_DISPLACEMENT
        narrow = [get_local_part(p.detach()) for p in self.weights if p.dtype in (torch.bfloat16, torch.float16)]
        if narrow:
            squares = sum(float(part.float().square().sum()) for part in narrow)
            total, count = self._sum([squares, sum(part.numel() for part in narrow)])
            rounding = max(torch.finfo(part.dtype).eps for part in narrow) * math.sqrt(total / max(1.0, count))
            smallest = max(smallest, 0.25 * rounding)
        d = start = max(FIRST_DISPLACEMENT, GRID_FACTOR * smallest)
        yield d
        while d / GRID_FACTOR**2 >= smallest and not self._is_noise(d):
            d /= GRID_FACTOR
            yield d
        while start < LARGEST_DISPLACEMENT:
            start *= GRID_FACTOR
            yield start

    def _is_proportional(self, d: float) -> bool:
        """Whether the decrease at d is that at half of it, doubled."""
        upper, lower = (self._measure(at) / at for at in (d, d / GRID_FACTOR))
        return lower > 0.0 and abs(upper / lower - 1.0) <= SLOPE_TOLERANCE

    def _is_noise(self, d: float) -> bool:
        """Whether the decrease at d is of the size of the loss's rounding."""
        rounding = torch.finfo(torch.float32).eps * abs(self.result.loss)
        return abs(self._measure(d)) <= NOISE_FACTOR * rounding

    def _measure(self, displacement: float) -> float:
        """Measure the decrease of the loss at a displacement, once for each."""
        if displacement not in self.decreases:
            self._move(displacement)
            change = self.result.loss - self._compute_loss()
            self.decreases[displacement] = change if math.isfinite(change) else -math.inf
        return self.decreases[displacement]

    def _move(self, displacement: float) -> None:
        self._reshard()
        for weight, copy, gradient, rate in zip(self.weights, self.copies, self.gradients, self.rates, strict=True):
            part = get_local_part(weight.detach())
            part.copy_(copy)
            if displacement and rate:
                part.sub_(get_local_part(gradient).sign().to(part.dtype), alpha=displacement * rate)

    def _compute_loss(self) -> float:
        raise_if_interrupted()
        with fail_together():
            try:
                write_rng_states(self.rng_states)  # the same masks at every displacement
                loss = self.loss_fn()
                total = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
                self.result.num_forwards += 1
            except Exception as error:
                error.raised_alone = self.is_sharded  # the others wait inside the model's own passes
                raise
        return self._sum([total])[0] / self.num_processes

    def _sum(self, numbers: list[float]) -> list[float]:
        if self.num_processes == 1:
            return numbers
        device = self.weights[0].device if self.weights else torch.device("cpu")
        totals = torch.tensor(numbers, dtype=torch.float64, device=device)
        add_over_processes([totals])
        return totals.tolist()

    def _reshard(self) -> None:
        """Free the whole parameters that FSDP2 keeps after a forward, which would hide what is written into the shards."""
        if self.is_sharded and self.model is not None:
            from torch.distributed.fsdp import FSDPModule

            for module in self.model.modules():
                if isinstance(module, FSDPModule):
                    module.reshard()


def find_crossing(rho: dict[float, float]) -> tuple[float | None, str | None]:
    """Find where rho first crosses 0.5 on its way down, after it was near 1 at two displacements in a row.

    Args:
        rho: {displacement: rho}, ascending.

    Returns:
        (d50, None), interpolated linearly, which is exact where the loss is quadratic; or (None, why there is none).
    """
    points, was_near_one = list(rho.items()), False
    for (low, at_low), (high, at_high) in itertools.pairwise(points):
        was_near_one = was_near_one or (abs(at_low - 1.0) <= NEAR_ONE and abs(at_high - 1.0) <= NEAR_ONE)
        if was_near_one and at_low >= CROSSING > at_high:
            return low + (high - low) * (at_low - CROSSING) / (at_low - at_high), None
    if not was_near_one:
        return None, (
            "the decrease of the loss was not near the predicted one at any small displacement: it is below the rounding of "
            "the loss or of the weights, or the loss is not smooth; measure in fp32"
        )
    return None, f"the decrease stays above half of the predicted one up to a displacement of {points[-1][0]:g}"
