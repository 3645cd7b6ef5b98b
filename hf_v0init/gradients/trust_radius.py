"""The trust radius of Adam's first update: how far every weight may move before the gradient no longer tells what happens.

On a batch A at the weights w: g_A the gradient, and -sign(g_A) the direction, since Adam's first update without a v0 moves every
weight by the learning rate against the sign of its gradient. On another batch B, for a displacement d of every element:

    rho(d) = (L_B(w) - L_B(w - d sign g_A)) / (d <sign g_A, g_B>)        decrease of the loss over the decrease predicted

rho is 1 for small d, where the loss is as good as linear, and falls as d grows. **d50** is the d at which it crosses 0.5. It does
not depend on the learning rate; what follows from learning rate / d50 is in `closed_form.length`.

Batches come in twos, and each two give two pairs, (A, B) and (B, A), so that their order does not matter. With several pairs rho
is the sum of the decreases over the sum of the predictions, which weighs a pair by how far its two gradients agree.

How it is measured:
    Two forward-backward passes for each two batches, and a forward for each pair and displacement: about ten displacements, twice
    as far apart each time, from `FIRST_DISPLACEMENT` up until rho is below 0.5 and down until rho is near 1. A crossing counts
    only if rho was seen near 1 at two smaller displacements. Where it was not, rounding or noise is what was measured, and d50 is
    None with a `reason`: weights or losses in bf16 or fp16 may be too coarse for a small trust radius.

What the model is meanwhile:
    In eval mode: no dropout, no regulariser that acts in training alone, and no gradient checkpointing (which transformers does in
    training mode only, so the two backward passes keep all activations). BatchNorm normalises by the batch as in training, because
    its running statistics at initialisation (mean 0, variance 1) are those of no data: a network in which they act is another one
    than is trained. `has_batch_norm` says so, for a rule that treats such networks otherwise. Frozen parameters stay where they
    are.

What it costs beside the activations: a copy of the weights and a quarter as much for each pair (the signs, one byte an element); before
that the gradients of two batches. Of a sharded model each process keeps those of its own shard. That is less than Adam's state,
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

from ..distributed.fsdp import match_placements, reshard
from ..distributed.parts import get_local_part, is_dtensor, is_sharded
from ..distributed.processes import get_rank_and_world_size, raise_together
from ..errors import InputError
from ..preservation import preserve_model, preserve_rng, read_rng_states, write_rng_states
from .statistics import PassCounts, reduce_sums

FIRST_DISPLACEMENT = 1e-4  # of every element; d50 was between 1e-4 and 1e-2 on every network measured
GRID_FACTOR = 2.0  # from one displacement to the next
SMALLEST_DISPLACEMENT, LARGEST_DISPLACEMENT = 1e-10, 16.0
CROSSING = 0.5  # of rho
NEAR_ONE = 0.25  # |rho - 1| up to which the first-order model is said to hold
POINTS_BEYOND = 1  # displacements after the crossing, so that a plot shows how steeply rho falls


@dataclass
class TrustRadius:
    """What was measured at the initial weights.

    Attributes:
        d50: displacement of every element at which rho crosses 0.5, in the weights' unit; None where it could not be measured.
        displacements: the grid, ascending.
        rho: at each of these, over all pairs; -inf where the loss was not finite.
        pair_d50: the same of each pair alone, (A, B), (B, A), (C, D), ...; None where that pair alone does not tell.
        slope: the decrease of the loss per unit of displacement that the gradients predict, mean over the pairs.
        loss: at the initial weights, mean over the pairs.
        num_elements: parameter elements moved, over all processes.
        num_forwards, num_backwards: passes of each process, micro-batches counted one by one.
        seconds: wall-clock time.
        has_batch_norm: whether the network normalises over the batch.
        reason: why d50 is None.
    """

    d50: float | None = None
    displacements: list[float] = field(default_factory=list)
    rho: list[float] = field(default_factory=list)
    pair_d50: list[float | None] = field(default_factory=list)
    slope: float = 0.0
    loss: float = 0.0
    num_elements: int = 0
    num_forwards: int = 0
    num_backwards: int = 0
    seconds: float = 0.0
    has_batch_norm: bool = False
    reason: str | None = None

    @property
    def num_pairs(self) -> int:
        """The number of (A, B)."""
        return len(self.pair_d50)

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON types; a rho of -inf becomes None."""
        content = asdict(self)
        content["rho"] = [value if math.isfinite(value) else None for value in self.rho]
        return content


@dataclass
class _Pair:
    """A direction from one batch, and the batch on which the loss along it is measured."""

    signs: list[torch.Tensor]  # int8, one a parameter, this process's part
    slope: float  # <sign g_A, g_B> over all processes
    batch: Sequence[Any]  # micro-batches of B
    loss: float = 0.0  # L_B(w)
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
        batches: as `loss_fn` takes them: an even number of optimizer steps' batches, two or more.
        loss_fn: maps (model, batch) to the scalar loss as training computes it.
        accumulation: so many consecutive `batches` are one optimizer step's; their losses are added up, so `loss_fn` must have
            divided them.
        loss_scale: the loss is multiplied by it before backward, and the gradients are divided by it (fp16).

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured: no trainable parameter got a
        gradient, the gradients of the batches do not agree, a loss that is not finite, differences below rounding.

    Raises:
        InputError: a number of batches that does not make up pairs.
    """
    num_steps, rest = divmod(len(batches), max(1, accumulation))
    if accumulation < 1 or rest or num_steps < 2 or num_steps % 2:
        raise InputError(
            f"{len(batches)} batches with accumulation={accumulation}: a pair takes the batches of two optimizer steps, so give "
            f"{2 * max(1, accumulation)} batches or a multiple of that"
        )
    steps = [batches[start : start + accumulation] for start in range(0, len(batches), accumulation)]
    started = time.perf_counter()
    with preserve_rng(), preserve_model(model):
        _switch_randomness_off(model)
        measurement = _Measurement(model, loss_fn, loss_scale)
        result = measurement.run(steps)
    result.seconds = time.perf_counter() - started
    return result


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
        pairs = [pair for a, b in zip(steps[::2], steps[1::2], strict=True) for pair in self._make_pairs(a, b)]
        result.slope = sum(pair.slope for pair in pairs) / len(pairs)
        result.pair_d50 = [None] * len(pairs)
        if not (math.isfinite(result.slope) and result.slope > 0.0):
            result.reason = self._explain_slope(pairs)
            return result
        with torch.no_grad():
            for pair in pairs:
                pair.loss = self._compute_loss(pair.batch)
            result.loss = sum(pair.loss for pair in pairs) / len(pairs)
            if not math.isfinite(result.loss):
                result.reason = f"the loss at the initial weights is {result.loss}"
                return result
            with self._keep_weights() as weights:
                rho = walk_grid(lambda d: self._measure_rho(pairs, weights, d), self._find_smallest())
        result.displacements, result.rho = list(rho), list(rho.values())
        result.d50, result.reason = find_crossing(rho)
        result.pair_d50 = [find_crossing(dict(sorted(pair.rho.items())))[0] for pair in pairs]
        return result

    # ---- gradients -------------------------------------------------------------------------------------------------

    def _make_pairs(self, a: Sequence[Any], b: Sequence[Any]) -> list[_Pair]:
        """Run the two backward passes of (A, B) and (B, A); what stays of the gradients are signs and two numbers."""
        grad_a, grad_b = self._compute_gradient(a), self._compute_gradient(b)
        signs_a, signs_b = ([part.sign().to(torch.int8) for part in parts] for parts in (grad_a, grad_b))
        slopes = [self._multiply(signs_a, grad_b), self._multiply(signs_b, grad_a)]
        slope_a, slope_b = self._sum_over_processes(slopes)
        return [_Pair(signs_a, slope_a, b), _Pair(signs_b, slope_b, a)]

    def _compute_gradient(self, micro_batches: Sequence[Any]) -> list[torch.Tensor]:
        """Compute the gradient of an optimizer step's batch, the mean over the processes: this process's part of each
        parameter; zeros where there is none.
        """
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
            reduce_sums(gradients, PassCounts())
            for gradient in gradients:
                gradient /= self.num_processes

    def _multiply(self, signs: list[torch.Tensor], gradients: list[torch.Tensor]) -> float:
        """Compute this process's share of <signs, gradients>; what several processes hold alike is shared out among them."""
        total = 0.0
        for parameter, sign, gradient in zip(self.parameters, signs, gradients, strict=True):
            if gradient.numel():
                total += float((gradient.float() * sign).sum(dtype=torch.float64)) / self._count_copies(parameter)
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

    def _measure_rho(self, pairs: list[_Pair], weights: list[torch.Tensor], displacement: float) -> float:
        decrease = 0.0
        for pair in pairs:
            self._move(weights, pair.signs, displacement)
            change = pair.loss - self._compute_loss(pair.batch)
            decrease += change
            if pair.slope != 0.0:
                pair.rho[displacement] = _compute_rho(change, displacement * pair.slope)
        return _compute_rho(decrease, displacement * sum(pair.slope for pair in pairs))

    def _compute_loss(self, micro_batches: Sequence[Any]) -> float:
        """Compute the loss of an optimizer step's batch at the weights as they are, the mean over the processes."""
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

    def _explain_slope(self, pairs: list[_Pair]) -> str:
        if not self.parameters:
            return "no parameter is trained"
        if not math.isfinite(self.result.slope):
            return "a gradient at the initial weights is not finite"
        if all(pair.slope == 0.0 for pair in pairs):
            return "no parameter got a gradient"
        return (
            "the gradients of different batches point away from each other (the loss on one is predicted to rise along the other's); "
            "larger batches, or more of them, may tell"
        )


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
