"""The trust radius of Adam's first update: how far every weight may move before the gradient no longer tells what happens.

On a batch at the weights w: L the loss, g its gradient, and -sign(g) the direction, since Adam's first update without a v0 moves
every weight by the learning rate against the sign of its gradient. For a displacement d of every element:

    rho(d) = (L(w) - L(w - d sign g)) / (d |g|_1)        decrease of the loss over the decrease predicted

It is the ratio by which trust-region methods judge a step (Conn, Gould & Toint, 2000). rho is 1 for small d, where the loss is as
good as linear, and falls as d grows. **d50** is the d at which it crosses 0.5. It does not depend on the learning rate; what
follows from learning rate / d50 is in `closed_form.length`.

With several batches rho is the sum of the decreases over the sum of the predictions. Each batch is judged along its own gradient:
along that of another one the prediction is the small part that the two have in common, which on small batches, or with a head
that was just drawn, is noise of either sign (a pretrained MiniLM with a new head, 32 sentences: negative over 16 batches).

How it is measured:
    A forward-backward pass for each batch, and a forward for each batch and displacement: about ten displacements, twice as far
    apart each time, from `FIRST_DISPLACEMENT` up until rho is below 0.5 and down until rho is near 1. A crossing counts
    only if rho was seen near 1 at two smaller displacements. Where it was not, rounding or noise is what was measured, and d50 is
    None with a `reason`: weights or losses in bf16 or fp16 may be too coarse for a small trust radius.

What the model is meanwhile:
    In eval mode: no dropout, no regulariser that acts in training alone, and no gradient checkpointing (which transformers does in
    training mode only, so the backward pass keeps all activations). BatchNorm normalises by the batch as in training, because
    its running statistics at initialisation (mean 0, variance 1) are those of no data: a network in which they act is another one
    than is trained. `has_batch_norm` says so, for a rule that treats such networks otherwise. Frozen parameters stay where they
    are.

What it costs beside the activations: a copy of the weights and a quarter as much for each batch (the signs, one byte an element);
before that the gradient of one batch. Of a sharded model each process keeps those of its own shard. That is less than Adam's state,
which does not exist yet before the first step.

Afterwards weights, buffers, gradients, modes and random states are as before bit for bit, also when an exception passes. Nothing here
knows an optimizer or a Trainer: the loss is a callable.
"""

import contextlib
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..sharding.fsdp import match_placements, reshard
from ..sharding.parts import get_local_part, is_dtensor, is_sharded
from ..sharding.processes import add_over_processes, get_rank_and_world_size, raise_together
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
POINTS_BEYOND = 1  # displacements after the crossing, so that a plot shows how steeply rho falls


class LossNotComputed(Exception):
    """Raised by a loss function that has nothing to compute the loss of; says why."""


@dataclass
class TrustRadius:
    """What was measured at the initial weights.

    Attributes:
        d50: displacement of every element at which rho crosses 0.5, in the weights' unit; None where it could not be measured.
        displacements: the grid, ascending.
        rho: at each of these, over all batches; -inf where the loss was not finite.
        batch_d50: d50 of each batch alone; None where that batch alone does not tell.
        slope: the decrease of the loss per unit of displacement that the gradients predict, |g|_1, mean over the batches.
        loss: at the initial weights, mean over the batches.
        num_elements: parameter elements moved, over all processes.
        num_forwards, num_backwards: passes of each process, micro-batches counted one by one.
        seconds: wall-clock time.
        has_batch_norm: whether the network normalises over the batch.
        reason: why d50 is None.
    """

    d50: float | None = None
    displacements: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    batch_d50: list[float | None] = field(default_factory=list)
    slope: float = 0.0
    loss: float = 0.0
    num_elements: int = 0
    num_forwards: int = 0
    num_backwards: int = 0
    seconds: float = 0.0
    has_batch_norm: bool = False
    reason: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a rho of -inf becomes None."""
        content = asdict(self)
        content["rho"] = [value if math.isfinite(value) else None for value in self.rho]
        return content


@dataclass
class _Direction:
    """A batch, and the signs of its gradient, along which its loss is measured."""

    batch: Sequence[Any]  # micro-batches
    signs: list[torch.Tensor]  # int8, one a parameter, this process's part
    slope: float  # |g|_1 over all processes
    loss: float = 0.0  # L(w)
    rho: dict[float, float] = field(default_factory=dict)


LossFunction = Callable[[nn.Module, Any], torch.Tensor]


def measure_trust_radius(
    model: nn.Module,
    batches: Sequence[Any],
    loss_fn: LossFunction,
    *,
    accumulation: int = 1,
    loss_scale: float = 1.0,
) -> TrustRadius:
    """Measure d50 at the model's present weights; see the top of the file.

    With several processes all of them call this, each with as many batches of its own: gradients and losses are means over the
    processes, as in training, and every process gets the same result.

    Args:
        model: in the form that is trained, but *not* inside DDP (whose reducer would act on the backward passes). `fully_shard`ed
            and tensor-parallel models stay as they are.
        batches: as `loss_fn` takes them: those of one optimizer step or more.
        loss_fn: maps (model, batch) to the scalar loss as training computes it.
        accumulation: so many consecutive `batches` are one optimizer step's; their losses are added up, so `loss_fn` must have
            divided them.
        loss_scale: the loss is multiplied by it before backward, and the gradients are divided by it (fp16).

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured: no trainable parameter got a
        gradient, a loss that is not finite, differences below rounding.

    Raises:
        InputError: a number of batches that does not make up optimizer steps.
    """
    if accumulation < 1 or not batches or len(batches) % accumulation:
        raise InputError(
            f"{len(batches)} batches with accumulation={accumulation}: give the batches of whole optimizer steps, "
            f"{max(1, accumulation)} or a multiple of that"
        )
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    started = time.perf_counter()
    with defer_interrupts(), preserve_rng(), preserve_model(model):
        _switch_randomness_off(model)
        measurement = _Measurement(model, loss_fn, loss_scale)
        result = measurement.run(steps)
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
    walk = _StepWalk([(p, p.grad, rate) for p, rate in parameters], loss_fn, model)
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
    """The forwards of `measure_in_step`: where the weights are, and what the loss is there."""

    def __init__(self, parameters, loss_fn: Callable[[], Any], model: nn.Module | None) -> None:
        self.loss_fn, self.model = loss_fn, model
        self.weights = [p for p, _, _ in parameters]
        self.gradients = [match_placements(g.detach(), p) if is_dtensor(p) else g.detach() for p, g, _ in parameters]
        self.rates = [rate for _, _, rate in parameters]
        self.num_processes = get_rank_and_world_size()[1]
        self.is_sharded = any(is_dtensor(p) for p in self.weights)
        self.decreases: dict[float, float] = {}
        self.result = TrustRadius(
            has_batch_norm=model is not None and has_batch_norm(model),
            num_elements=sum(p.numel() for p in self.weights),
        )

    def run(self) -> None:
        result = self.result
        self._reshard()
        copies = [get_local_part(p.detach()).clone() for p in self.weights]
        try:
            result.loss = self._compute_loss()
            if not math.isfinite(result.loss):
                result.reason = f"the loss at the initial weights is {result.loss}"
                return
            slope, smallest = self._find_slope(copies)
            if slope is None:
                return
            result.slope = slope
            rho = walk_grid(lambda d: self._measure(copies, d) / (d * slope), smallest)
        finally:
            self._move(copies, 0.0)
        result.displacements, result.rho = list(rho), list(rho.values())
        result.d50, result.reason = find_crossing(rho)

    def _find_slope(self, copies: list[torch.Tensor]) -> tuple[float | None, float]:
        """Find the decrease per unit of displacement as the displacement goes to zero, and the smallest one to try."""
        narrow = [p for p in self.weights if p.dtype in (torch.bfloat16, torch.float16)]
        predicted = self._sum(
            [
                sum(
                    rate * float(get_local_part(g).float().abs().sum(dtype=torch.float64))
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
        d = FIRST_DISPLACEMENT
        while d / GRID_FACTOR >= smallest:
            upper, lower = self._measure(copies, d) / d, self._measure(copies, d / GRID_FACTOR) / (d / GRID_FACTOR)
            rounding = 4.0 * torch.finfo(torch.float32).eps * abs(self.result.loss) / d
            if lower > rounding and abs(upper / lower - 1.0) <= SLOPE_TOLERANCE:
                return (GRID_FACTOR * lower - upper) / (GRID_FACTOR - 1.0), d / GRID_FACTOR
            if max(abs(lower), abs(upper)) <= rounding:
                break
            d /= GRID_FACTOR
        self.result.reason = (
            "the loss does not fall in proportion to any small displacement along the gradient's sign: it is below the rounding of "
            "the loss or of the weights, or the loss is not smooth; measure in fp32"
        )
        return None, smallest

    def _measure(self, copies: list[torch.Tensor], displacement: float) -> float:
        """Measure the decrease of the loss at a displacement, once for each."""
        if displacement not in self.decreases:
            self._move(copies, displacement)
            change = self.result.loss - self._compute_loss()
            self.decreases[displacement] = change if math.isfinite(change) else -math.inf
        return self.decreases[displacement]

    def _move(self, copies: list[torch.Tensor], displacement: float) -> None:
        self._reshard()
        for weight, copy, gradient, rate in zip(self.weights, copies, self.gradients, self.rates, strict=True):
            part = get_local_part(weight.detach())
            part.copy_(copy)
            if displacement and rate:
                part.sub_(get_local_part(gradient).sign().to(part.dtype), alpha=displacement * rate)

    def _compute_loss(self) -> float:
        raise_if_interrupted()
        total, error = 0.0, None
        try:
            loss = self.loss_fn()
            total = float(loss.detach().double() if isinstance(loss, torch.Tensor) else loss)
            self.result.num_forwards += 1
        except Exception as exception:
            error = exception
        if error is not None and self.is_sharded:
            error.raised_alone = True  # the others wait inside the model's own passes
        if error is not None or self.num_processes > 1:
            raise_together(error)
        return self._sum([total])[0] / self.num_processes

    def _sum(self, numbers: list[float]) -> list[float]:
        if self.num_processes == 1:
            return numbers
        device = self.weights[0].device if self.weights else torch.device("cpu")
        totals = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        return totals.tolist()

    def _reshard(self) -> None:
        """Free the whole parameters that FSDP2 keeps after a forward, which would hide what is written into the shards."""
        if self.is_sharded and self.model is not None:
            reshard(self.model)


def has_batch_norm(model: nn.Module) -> bool:
    """Whether any module normalises over the batch."""
    return any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())


def _switch_randomness_off(model: nn.Module) -> None:
    """Put the model into eval mode, but let normalisations use the batch's own statistics as in training."""
    model.eval()
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.training = True


class _Measurement:
    """The passes of one measurement: its parameters, its losses and where the weights are."""

    def __init__(self, model: nn.Module, loss_fn: LossFunction, loss_scale: float) -> None:
        self.model, self.loss_fn, self.loss_scale = model, loss_fn, loss_scale
        self.is_sharded = is_sharded(model)
        self.num_processes = get_rank_and_world_size()[1]
        self.is_several = self.num_processes > 1
        self.rng_states = read_rng_states()
        self._reshard()
        self.parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.result = TrustRadius(
            has_batch_norm=has_batch_norm(model), num_elements=sum(parameter.numel() for parameter in self.parameters)
        )

    def run(self, steps: list[Sequence[Any]]) -> TrustRadius:
        result = self.result
        directions = [self._find_direction(batch) for batch in steps]
        result.slope = sum(direction.slope for direction in directions) / len(directions)
        result.batch_d50 = [None] * len(directions)
        if not (math.isfinite(result.slope) and result.slope > 0.0):
            result.reason = self._explain_slope()
            return result
        with torch.no_grad():
            for direction in directions:
                direction.loss = self._compute_loss(direction.batch)
            result.loss = sum(direction.loss for direction in directions) / len(directions)
            if not math.isfinite(result.loss):
                result.reason = f"the loss at the initial weights is {result.loss}"
                return result
            with self._keep_weights() as weights:
                rho = walk_grid(lambda d: self._measure_rho(directions, weights, d), self._find_smallest())
        result.displacements, result.rho = list(rho), list(rho.values())
        result.d50, result.reason = find_crossing(rho)
        result.batch_d50 = [find_crossing(dict(sorted(direction.rho.items())))[0] for direction in directions]
        return result

    # ---- gradients -------------------------------------------------------------------------------------------------

    def _find_direction(self, batch: Sequence[Any]) -> _Direction:
        """Run the backward pass of an optimizer step's batch; what stays of the gradient are its signs and |g|_1."""
        gradient = self._compute_gradient(batch)
        (slope,) = self._sum_over_processes([self._compute_norm(gradient)])
        return _Direction(batch, [part.sign().to(torch.int8) for part in gradient], slope)

    def _compute_gradient(self, micro_batches: Sequence[Any]) -> list[torch.Tensor]:
        """Compute the gradient of an optimizer step's batch, the mean over the processes: this process's part of each
        parameter; zeros where there is none.
        """
        raise_if_interrupted()
        error = None
        try:
            with torch.enable_grad():
                for batch in micro_batches:
                    write_rng_states(self.rng_states)
                    loss = self.loss_fn(self.model, batch)
                    (loss * self.loss_scale if self.loss_scale != 1.0 else loss).backward()
                    self.result.num_backwards += 1
        except Exception as exception:
            error = exception
        self._agree(error)
        self._reshard()
        gradients = []
        for parameter in self.parameters:
            gradient, parameter.grad = parameter.grad, None
            if gradient is None:
                gradient = torch.zeros_like(parameter)
            gradients.append(gradient.to_dense() if gradient.is_sparse else gradient)
        for parameter in self.model.parameters():  # frozen ones that a hook gave a gradient all the same
            parameter.grad = None
        self._average(gradients)
        parts = [get_local_part(gradient).detach() for gradient in gradients]
        return parts if self.loss_scale == 1.0 else [part / self.loss_scale for part in parts]

    def _average(self, gradients: list[torch.Tensor]) -> None:
        """Average the gradients over the processes where the backward pass has not done it."""
        if self.is_sharded:
            for index, parameter in enumerate(self.parameters):
                gradients[index] = match_placements(gradients[index], parameter)
        elif self.is_several:
            add_over_processes(gradients)
            for gradient in gradients:
                gradient /= self.num_processes

    def _compute_norm(self, gradient: list[torch.Tensor]) -> float:
        """Compute this process's share of |g|_1; what several processes hold alike is shared out among them."""
        total = 0.0
        for parameter, part in zip(self.parameters, gradient, strict=True):
            if part.numel():
                total += float(part.float().abs().sum(dtype=torch.float64)) / self._count_copies(parameter)
        return total

    def _count_copies(self, parameter: nn.Parameter) -> float:
        """Count the processes that hold the same part of a parameter."""
        num_parts = 1
        if is_dtensor(parameter):
            for mesh_dim, placement in enumerate(parameter.placements):
                num_parts *= parameter.device_mesh.size(mesh_dim) if placement.is_shard() else 1
        return self.num_processes / num_parts

    # ---- losses along the directions -------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _keep_weights(self) -> Iterator[list[torch.Tensor]]:
        """Give a copy of this process's part of the weights, and put the weights back on leaving."""
        self._reshard()
        weights = [get_local_part(parameter.detach()).clone() for parameter in self.parameters]
        try:
            yield weights
        finally:
            self._reshard()
            self._move(weights, None, 0.0)

    def _move(self, weights: list[torch.Tensor], signs: list[torch.Tensor] | None, displacement: float) -> None:
        """Put the weights at `weights - displacement * signs`."""
        self._reshard()
        for index, parameter in enumerate(self.parameters):
            part = get_local_part(parameter.detach())
            part.copy_(weights[index])
            if signs is not None:
                part.sub_(signs[index].to(part.dtype), alpha=displacement)

    def _measure_rho(self, directions: list[_Direction], weights: list[torch.Tensor], displacement: float) -> float:
        decrease = 0.0
        for direction in directions:
            self._move(weights, direction.signs, displacement)
            change = direction.loss - self._compute_loss(direction.batch)
            decrease += change
            if direction.slope > 0.0:
                direction.rho[displacement] = _compute_rho(change, displacement * direction.slope)
        return _compute_rho(decrease, displacement * sum(direction.slope for direction in directions))

    def _compute_loss(self, micro_batches: Sequence[Any]) -> float:
        """Compute the loss of an optimizer step's batch at the weights as they are, the mean over the processes."""
        raise_if_interrupted()
        total, error = 0.0, None
        try:
            for batch in micro_batches:
                write_rng_states(self.rng_states)
                total += float(self.loss_fn(self.model, batch).detach().double())
                self.result.num_forwards += 1
        except Exception as exception:
            error = exception
        self._agree(error)
        return self._sum_over_processes([total])[0] / self.num_processes

    def _find_smallest(self) -> float:
        """Find the displacement below which rounding is all there is: of a loss in fp32, or of weights in bf16 or fp16."""
        narrow = [parameter for parameter in self.parameters if parameter.dtype in (torch.bfloat16, torch.float16)]
        smallest = max(
            SMALLEST_DISPLACEMENT, 4.0 * torch.finfo(torch.float32).eps * abs(self.result.loss) / self.result.slope
        )
        if not narrow:
            return smallest
        parts = [get_local_part(parameter.detach()) for parameter in narrow]
        sums = [float(part.float().square().sum()) for part in parts], [part.numel() for part in parts]
        total, count = self._sum_over_processes([float(sum(numbers)) for numbers in sums])
        coarsest = max(torch.finfo(parameter.dtype).eps for parameter in narrow)
        return max(smallest, 0.25 * coarsest * math.sqrt(total / max(1.0, count)))

    # ---- processes -------------------------------------------------------------------------------------------------

    def _agree(self, error: Exception | None) -> None:
        """Raise on every process if any process failed; where the model is sharded, the others wait inside its own passes."""
        if error is not None and self.is_sharded:
            error.raised_alone = True
        if error is not None or self.is_several:
            raise_together(error)

    def _sum_over_processes(self, numbers: list[float]) -> list[float]:
        if not self.is_several:
            return numbers
        device = self.parameters[0].device if self.parameters else torch.device("cpu")
        totals = torch.tensor(numbers, dtype=torch.float64, device=device)
        dist.all_reduce(totals)
        return totals.tolist()

    def _reshard(self) -> None:
        """Free the whole parameters that FSDP2 keeps after a forward, which would hide what is written into the shards."""
        if self.is_sharded:
            reshard(self.model)

    def _explain_slope(self) -> str:
        if not self.parameters:
            return "no parameter is trained"
        if not math.isfinite(self.result.slope):
            return "a gradient at the initial weights is not finite"
        return "no parameter got a gradient"


def _compute_rho(decrease: float, predicted: float) -> float:
    return decrease / predicted if math.isfinite(decrease) else -math.inf


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
