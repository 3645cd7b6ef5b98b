"""The trust radius of Adam's first update: how far every weight may move before the gradient no longer tells what happens.

On a batch at the weights w: L the loss, g its gradient, and -sign(g) the direction, since Adam's first update without a v0 moves
every weight by its learning rate against the sign of its gradient. For a displacement d of every element:

    rho(d) = (L(w) - L(w - d sign g)) / (d L'(0)),     L'(0) the decrease per unit of displacement as d goes to 0

It is the ratio by which trust-region methods judge a step (Conn, Gould & Toint, 2000): decrease over predicted decrease. rho is 1 for small
d, where the loss is as good as linear, and falls as d grows. **d50** is the d at which it crosses 0.5. It does not depend on
the learning rate; what follows from learning rate / d50 is in `method.length`.

How it is measured:
    A forward for each displacement: about ten of them, twice as far apart each time, from `FIRST_DISPLACEMENT` up until rho is below
    0.5 and down until two in a row agree. L'(0) is extrapolated from these two, and not |g|_1, since an optimizer's gradients may
    have been clipped or scaled. A crossing counts only if rho was seen near 1 at two smaller displacements. Where it was
    not, rounding or noise is what was measured, and d50 is None with a `reason`: weights or losses in bf16 or fp16 may be too
    coarse for a small trust radius.

The model stays in its mode, with the same random states at each forward, so that dropout draws the same masks. What it costs beside the
activations is a copy of the weights; of a sharded model each process copies its own shard. Afterwards weights, buffers, gradients,
modes, plain attributes of modules and random states are as before bit for bit, also when an exception or Ctrl-C passes, which acts
within one forward. Nothing here knows an optimizer or a Trainer: the loss is a callable.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..sharding.parts import get_local_part, is_dtensor, is_sharded, read_gradient
from ..sharding.processes import add_over_processes, get_rank_and_world_size, get_wide_dtype, raise_together
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
        num_elements: parameter elements moved, over all processes.
        num_forwards: computations of the step's loss.
        seconds: wall-clock time.
        reason: why d50 is None.
    """

    d50: float | None = None
    displacements: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    slope: float = 0.0
    loss: float = 0.0
    num_elements: int = 0
    num_forwards: int = 0
    seconds: float = 0.0
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a rho of -inf becomes None."""
        content = asdict(self)
        content["rho"] = [value if math.isfinite(value) else None for value in self.rho]
        return content


def measure_trust_radius(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    *,
    loss_scale: float = 1.0,
) -> TrustRadius:
    """Measure d50 at a model's present weights; see the top of the file.

    With several processes all of them call this, each with batches of its own: gradients and losses are means over the
    processes, as in training, and every process gets the same result.

    Args:
        model: in the form that is trained, but *not* inside DDP (whose reducer would act on the backward passes). `fully_shard`ed
            and tensor-parallel models stay as they are.
        batches: those of one optimizer step, as `loss_fn` takes them; their losses are added up.
        loss_fn: maps (model, batch) to the scalar loss as training computes it.
        loss_scale: the loss is multiplied by it before backward (fp16).

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured: no trainable parameter got a
        gradient, a loss that is not finite, differences below rounding.

    Raises:
        InputError: no batch.
    """
    if not batches:
        raise InputError("no batches: give measure_trust_radius those of one optimizer step")
    started, states = time.perf_counter(), read_rng_states()
    with defer_interrupts(), preserve_rng(), preserve_model(model):
        error = None
        try:
            with torch.enable_grad():
                for batch in batches:
                    raise_if_interrupted()
                    (loss_fn(model, batch) * loss_scale).backward()
        except Exception as exception:
            error = exception
        _raise_on_all(error, is_sharded(model))
        parameters = [p for p in model.parameters() if p.requires_grad and p.grad is not None]
        for parameter in parameters:
            if parameter.grad.is_sparse:
                parameter.grad = parameter.grad.to_dense()
        if not is_sharded(model):
            add_over_processes([parameter.grad for parameter in parameters])
            for parameter in parameters:
                parameter.grad /= get_rank_and_world_size()[1]
        write_rng_states(states)  # the losses have the masks of the gradients
        moved = [(parameter, 1.0) for parameter in parameters]
        result = measure_in_step(moved, lambda: sum(float(loss_fn(model, batch)) for batch in batches), model)
    result.seconds = time.perf_counter() - started
    return result


def measure_in_step(
    parameters: Sequence[tuple[torch.Tensor, float]], loss_fn: Callable[[], Any], model: nn.Module | None = None
) -> TrustRadius:
    """Measure d50 while an optimizer step is being made: at the gradients in hand, along the update that Adam would make.

    Adam's first update moves every element by its group's learning rate, so a displacement d moves the elements of a group by d
    times the group's rate over the largest. The gradients may have been clipped or scaled by a factor that is not known here:
    the predicted decrease per unit of displacement is the one measured at the smallest displacements, extrapolated to zero.

    Several processes call it together; losses are means over them.

    Args:
        parameters: (parameter with its gradient, its group's learning rate over the largest one); weights are displaced in place
            and put back bit for bit, also when an exception or Ctrl-C passes, which acts within one pass.
        loss_fn: computes the loss of this step's batch at the weights as they are: a number or a scalar tensor.
        model: whose buffers, modes and plain tensors are to be as before afterwards.

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured.
    """
    started = time.perf_counter()
    walk = _StepWalk(parameters, loss_fn, model)
    with (
        defer_interrupts(),
        preserve_rng(),
        torch.no_grad(),
        preserve_model(model) if model is not None else contextlib.nullcontext(),
    ):
        walk.run()
    walk.result.seconds = time.perf_counter() - started
    return walk.result


class _StepWalk:
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
        self.result = TrustRadius(num_elements=sum(p.numel() for p in self.weights))

    def run(self) -> None:
        result = self.result
        self._reshard()
        self.copies = [get_local_part(p.detach()).clone() for p in self.weights]
        try:
            result.loss = self._compute_loss()
            if not math.isfinite(result.loss):
                result.reason = f"the loss at the initial weights is {result.loss}"
                return
            slope, smallest = self._find_slope()
            if slope is None:
                return
            result.slope = slope
            rho = walk_grid(lambda d: self._measure(d) / (d * slope), smallest)
        finally:
            self._move(0.0)
        result.displacements, result.rho = list(rho), list(rho.values())
        result.d50, result.reason = find_crossing(rho)

    def _find_slope(self) -> tuple[float | None, float]:
        """Find the decrease per unit of displacement as the displacement goes to zero, and the smallest one to try."""
        narrow = [p for p in self.weights if p.dtype in (torch.bfloat16, torch.float16)]
        predicted = self._sum(
            [
                sum(
                    rate * float(get_local_part(g).float().abs().sum(dtype=get_wide_dtype(g.device)))
                    for g, rate in zip(self.gradients, self.rates, strict=True)
                )
            ]
        )[0]
        if not (math.isfinite(predicted) and predicted > 0.0):
            self.result.reason = "no parameter got a gradient" if predicted == 0.0 else "a gradient is not finite"
            return None, 0.0
        smallest = SMALLEST_DISPLACEMENT
        if narrow:
            parts = [get_local_part(p.detach()) for p in narrow]
            total, count = self._sum(
                [sum(float(part.float().square().sum()) for part in parts), sum(part.numel() for part in parts)]
            )
            smallest = max(
                smallest, 0.25 * max(torch.finfo(p.dtype).eps for p in narrow) * math.sqrt(total / max(1.0, count))
            )
        start = max(FIRST_DISPLACEMENT, GRID_FACTOR * smallest)
        d = start
        while not self._is_proportional(d) and d / GRID_FACTOR**2 >= smallest and not self._is_noise(d):
            d /= GRID_FACTOR
        if not self._is_proportional(d):
            d = start
            while not self._is_proportional(d) and d < LARGEST_DISPLACEMENT:
                d *= GRID_FACTOR
        if self._is_proportional(d):
            near = d / GRID_FACTOR
            while self._is_proportional(d * GRID_FACTOR) and d < LARGEST_DISPLACEMENT:
                d *= GRID_FACTOR  # the farther apart, the less rounding; these points are needed anyway
            upper, lower = (self._measure(at) / at for at in (d, d / GRID_FACTOR))
            return (GRID_FACTOR * lower - upper) / (GRID_FACTOR - 1.0), min(near, FIRST_DISPLACEMENT)
        self.result.reason = (
            "the loss does not fall in proportion to any small displacement along the gradient's sign: it is below the rounding of "
            "the loss or of the weights, or the loss is not smooth; measure in fp32"
        )
        return None, smallest

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
        total, error = 0.0, None
        try:
            write_rng_states(self.rng_states)  # the same masks at every displacement
            loss = self.loss_fn()
            total = float(loss.detach() if isinstance(loss, torch.Tensor) else loss)
            self.result.num_forwards += 1
        except Exception as exception:
            error = exception
        _raise_on_all(error, self.is_sharded)
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


def _raise_on_all(error: Exception | None, is_sharded: bool) -> None:
    """Raise on every process if any process failed; where the model is sharded, the others wait inside its own passes."""
    if error is not None and is_sharded:
        error.raised_alone = True
    if error is not None or get_rank_and_world_size()[1] > 1:
        raise_together(error)


def walk_grid(measure: Callable[[float], float], smallest: float = SMALLEST_DISPLACEMENT) -> dict[float, float]:
    """Measure rho on a geometric grid that reaches from where the first-order model holds to beyond the crossing.

    Args:
        measure: maps a displacement to rho.
        smallest: displacements below it are not tried.

    Returns:
        {displacement: rho}, ascending.
    """
    rho: dict[float, float] = {}
    first = FIRST_DISPLACEMENT * GRID_FACTOR ** max(0, math.ceil(math.log(smallest / FIRST_DISPLACEMENT, GRID_FACTOR)))
    displacement, num_beyond = first, 0
    while displacement <= LARGEST_DISPLACEMENT and num_beyond <= POINTS_BEYOND:
        rho[displacement] = measure(displacement)
        num_beyond += rho[displacement] < CROSSING
        displacement *= GRID_FACTOR
    lower = first / GRID_FACTOR
    while lower >= smallest and not _starts_near_one(rho):
        rho = {lower: measure(lower)} | rho
        lower /= GRID_FACTOR
    while displacement <= LARGEST_DISPLACEMENT and find_crossing(rho)[0] is None and math.isfinite([*rho.values()][-1]):
        rho[displacement] = measure(displacement)  # what was low so far was rounding
        displacement *= GRID_FACTOR
    return rho


def _starts_near_one(rho: dict[float, float]) -> bool:
    return all(abs(value - 1.0) <= NEAR_ONE for value in itertools.islice(rho.values(), 2))


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
