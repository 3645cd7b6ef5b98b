"""The pass over the data: gradients of batches, two sums a parameter, one reduction over the processes.

For batches i of n_i samples with gradient g_i (the mean over the batch's samples), the pass adds up

    A = sum_i n_i g_i,    Q = sum_i n_i g_i^2,    N = sum_i n_i,    K = number of batches.

With per-sample mean mu and variance s^2, E[Q - A^2/N] = (K - 1) s^2 whatever the n_i, and E[(A/N)^2] = mu^2 + s^2/N.
So the expected square of the gradient of a batch of B samples is estimated without bias by

    E[g_B^2] = mu^2 + s^2/B = (A/N)^2 + s^2 (1/B - 1/N).

(The same is the average over all batches of B drawn without replacement from the N samples, if these are all there are.)
B = 1 is the paper's per-sample E[g^2] (eq. 10), and exact, Q/N, when every batch holds one sample. B = the run's
effective batch is what Adam's second moment settles at in this run.

The sums live in tensors that the caller gives: the Adam state's own `exp_avg` and `exp_avg_sq` where their dtype allows.
Nothing here knows an optimizer or a Trainer: the loss is a callable.
"""

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..sharding.parts import CAST_BLOCK_NUMEL, get_local_part, split_rows, view_flat
from ..sharding.processes import get_rank_and_world_size
from ..state_guard import (
    defer_interrupts,
    preserve_model,
    preserve_rng,
    raise_if_interrupted,
    seed_everything,
)

DIRECT_NUMEL = 1 << 18  # elements from which on an all-reduce of a tensor alone costs no more than its bytes
REDUCTION_BUCKET_NUMEL = 1 << 23  # elements that smaller tensors are joined to, 32 MiB of fp32


@dataclass
class StatisticsBatch:
    """One batch of the pass.

    Attributes:
        inputs: as the loss callable takes them.
        num_samples: how many samples they are.
        index: the batch's number in the whole pass (over all processes), which seeds its dropout.
        counts: whether its gradients count. False for a repetition by which a process has as many batches as the others, whose
            losses may be collective.
        has_loss: whether any target is left to compute a loss of. A batch without is run and skipped.
    """

    inputs: Any
    num_samples: int
    index: int
    counts: bool = True
    has_loss: bool = True


@dataclass
class PassCounts:
    """What a pass saw: samples, batches, wall-clock seconds, mean loss, and samples skipped since they had no loss.

    Of this process alone, or, where `are_global`, of all of them; then the gradients that were visited were already those
    of the whole batch, too, and nothing is left to reduce.
    """

    num_samples: int = 0
    num_batches: int = 0
    seconds: float = 0.0
    loss_sum: float = 0.0
    are_global: bool = False
    num_skipped: int = 0

    @property
    def mean_loss(self) -> float:
        """Mean loss over the samples, in the loss's own unit."""
        return self.loss_sum / max(1, self.num_samples)

    def __add__(self, later: "PassCounts") -> "PassCounts":
        """What this pass and a later part of it saw together."""
        return PassCounts(
            self.num_samples + later.num_samples,
            self.num_batches + later.num_batches,
            self.seconds + later.seconds,
            self.loss_sum + later.loss_sum,
            later.are_global,
            self.num_skipped + later.num_skipped,
        )


Visitor = Callable[[nn.Parameter, torch.Tensor, int], None]  # parameter, its gradient, the batch's samples


@contextlib.contextmanager
def _visit_on_backward(named_parameters: list[tuple[str, nn.Parameter]], visit: Visitor, batch: dict) -> Iterator[None]:
    """Hand each gradient to `visit` the moment autograd finishes it, and drop it."""
    handles = []

    def attach(name: str, parameter: nn.Parameter) -> None:
        def hook(finished: torch.Tensor) -> None:
            gradient, finished.grad = finished.grad, None
            if gradient is None:
                return
            if name in batch["seen"]:
                raise InputError(
                    f"parameter {name!r} got its gradient in two parts in one backward pass, so its square is not known; "
                    "this happens under reentrant gradient checkpointing with shared modules: pass "
                    'gradient_checkpointing_kwargs={"use_reentrant": False}'
                )
            batch["seen"].add(name)
            if gradient.is_sparse:
                raise InputError(
                    f"parameter {name!r} has a sparse gradient, which AdamW does not take; build the embedding with "
                    "sparse=False"
                )
            visit(parameter, gradient, batch["num_samples"])

        handles.append(parameter.register_post_accumulate_grad_hook(hook))

    try:
        for name, parameter in named_parameters:
            attach(name, parameter)
        yield
    finally:
        for handle in handles:
            handle.remove()


def visit_gradients(
    model: nn.Module,
    named_parameters: list[tuple[str, nn.Parameter]],
    batches: Iterable[StatisticsBatch],
    compute_loss: Callable[[nn.Module, Any], torch.Tensor],
    visit: Visitor,
    *,
    seed: int | None = 0,
    loss_scale: float = 1.0,
    on_batch: Callable[[StatisticsBatch], None] | None = None,
    other_parameters: Iterable[nn.Parameter] = (),
) -> PassCounts:
    """Run forward and backward on each batch in training mode and hand every finished gradient to `visit`.

    Weights, buffers, train/eval modes, gradients and all random states are as before afterwards, also when an exception
    passes through. A gradient lives only until it was visited.

    Args:
        model: the module in its training form but *not* inside DDP (whose reducer would average the gradients).
        named_parameters: the parameters to look at, each requiring grad.
        batches: this process's batches.
        compute_loss: maps (model, inputs) to the scalar mean loss of the batch.
        visit: called with (parameter, gradient, num_samples).
        seed: the dropout of batch k is seeded from (seed, k), so that it does not depend on which process runs it;
            None leaves the random states alone (they are still restored at the end).
        loss_scale: the loss is multiplied by it before backward, and gradients are divided by it (fp16).
        on_batch: called after each batch, for progress.
        other_parameters: outside the model, such as a loss module's, whose gradients must be left as they were, too.

    Raises:
        InputError: a loss that is NaN or infinite (names the batch), a parameter that got its gradient in parts, a forward that
            changes weights.
    """
    counts = PassCounts()
    start = time.perf_counter()
    current: dict[str, Any] = {"seen": set(), "num_samples": 0, "counts": True}
    pending: list[tuple[int, int, torch.Tensor]] = []

    def check_losses() -> None:
        for index, num_samples, loss in pending:
            counts.loss_sum += require_finite_loss(float(loss), index, num_samples) * num_samples
        pending.clear()

    def unscaled_visit(parameter: nn.Parameter, gradient: torch.Tensor, num_samples: int) -> None:
        if current["counts"]:
            visit(parameter, gradient if loss_scale == 1.0 else gradient.div_(loss_scale), num_samples)

    versions = [(name, parameter, parameter._version) for name, parameter in named_parameters]
    with defer_interrupts(), preserve_rng(), preserve_model(model, other_parameters):
        model.train()
        with torch.enable_grad(), _visit_on_backward(named_parameters, unscaled_visit, current):
            for batch in batches:
                current["seen"], current["num_samples"] = set(), batch.num_samples
                if seed is not None:
                    seed_everything(compute_batch_seed(seed, batch.index))
                current["counts"] = batch.counts and batch.has_loss
                loss = compute_loss(model, batch.inputs)
                if current["counts"]:
                    pending.append((batch.index, batch.num_samples, loss.detach()))
                if loss.device.type == "cpu" or len(pending) >= 16:  # reading a loss waits for the device
                    check_losses()
                (loss * loss_scale if loss_scale != 1.0 else loss).backward()
                for parameter in model.parameters():  # those we do not look at
                    parameter.grad = None
                if current["counts"]:
                    counts.num_samples += batch.num_samples
                    counts.num_batches += 1
                elif batch.counts:
                    counts.num_skipped += batch.num_samples
                if versions:
                    _require_same_versions(versions)
                    versions = []
                if on_batch is not None:
                    on_batch(batch)
                raise_if_interrupted()
            check_losses()
    counts.seconds = time.perf_counter() - start
    return counts


def _require_same_versions(versions: list[tuple[str, nn.Parameter, int]]) -> None:
    """Refuse a model whose forward changes the weights that are being trained, which a pass cannot leave as they were."""
    changed = [name for name, parameter, version in versions if parameter._version != version]
    if changed:
        raise InputError(
            f"the model's forward changes its own weights ({changed[0]!r}), so a pass before training would change the run: use "
            "v0_estimator=minibatch, which takes v0 from the run's own first steps"
        )


def compute_batch_seed(seed: int, index: int, part: int = 0) -> int:
    """Compute the random seed of batch `index` of the pass, the same on whichever process runs it.

    `part` is which part of the batch this process computes, where a batch is shared out; 0 for the whole.
    """
    return (seed * 1_000_003 + index * 7_919 + part * 104_729 + 1) % (1 << 63)


def require_finite_loss(loss: float, index: int, num_samples: int) -> float:
    """Return `loss`; raise `InputError`, naming the batch, if it is NaN or infinite."""
    if math.isfinite(loss):
        return loss
    raise InputError(
        f"the loss is {loss} in batch {index} of the gradient statistics ({num_samples} samples): no v0 can be taken from it. "
        "Look at that batch (labels all ignored? bad values?), at the learning task's loss scale and precision, or use "
        "v0_init=random, which needs no gradients"
    )


def make_sum_visitor(sums: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]]) -> Visitor:
    """Make a visitor that adds n*g to the first and n*g^2 to the second tensor of `sums[parameter]`, in their dtype.

    Of a sharded parameter only this process's part is touched. A gradient in another dtype is cast block by block, so that no
    copy of it is made.
    """
    sums = {parameter: tuple(get_local_part(tensor) for tensor in pair) for parameter, pair in sums.items()}

    def visit(parameter: nn.Parameter, gradient: torch.Tensor, num_samples: int) -> None:
        grad_sum, grad_sq_sum = sums[parameter]
        gradient = get_local_part(gradient.detach())
        for part, total, total_sq in _pair_blocks(gradient, grad_sum, grad_sq_sum):
            total.add_(part, alpha=num_samples)
            total_sq.addcmul_(part, part, value=num_samples)

    return visit


def _pair_blocks(gradient: torch.Tensor, *sums: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    """Yield the gradient in the dtype of the sums, with the sums: whole if it has that dtype, else in blocks of rows."""
    if gradient.dtype == sums[0].dtype:
        yield gradient, *sums
        return
    for part, *totals in zip(*(split_rows(tensor, CAST_BLOCK_NUMEL) for tensor in (gradient, *sums)), strict=True):
        yield part.to(sums[0].dtype), *totals


def reduce_sums(tensors: list[torch.Tensor], counts: PassCounts) -> PassCounts:
    """Add up `tensors` (in place) and `counts` over all processes: one reduction for the whole pass.

    Tensors of `DIRECT_NUMEL` elements or more are reduced where they lie, all under way at once; smaller ones in buckets.

    Returns the counts over all processes (seconds: the slowest's). Nothing happens without a process group, or if
    `counts.are_global`.
    """
    if counts.are_global or get_rank_and_world_size()[1] == 1:
        return counts
    under_way, by_kind = [], {}
    for tensor in tensors:
        flat = view_flat(tensor) if tensor.numel() >= DIRECT_NUMEL else None
        if flat is None:
            by_kind.setdefault((tensor.dtype, tensor.device), []).append(tensor)
        else:
            under_way.append(dist.all_reduce(flat, async_op=True))
    for same_kind in by_kind.values():
        bucket: list[torch.Tensor] = []
        numel = 0
        for tensor in same_kind:
            if bucket and numel + tensor.numel() > REDUCTION_BUCKET_NUMEL:
                _all_reduce_bucket(bucket)
                bucket, numel = [], 0
            bucket.append(tensor)
            numel += tensor.numel()
        if bucket:
            _all_reduce_bucket(bucket)
    for reduction in under_way:
        reduction.wait()
    device = tensors[0].device if tensors else torch.device("cpu")
    totals = torch.zeros(4 + dist.get_world_size(), dtype=torch.float64, device=device)
    mine = [counts.num_samples, counts.num_batches, counts.loss_sum, counts.num_skipped]
    totals[:4] = torch.tensor(mine, dtype=torch.float64)
    totals[4 + dist.get_rank()] = counts.seconds
    dist.all_reduce(totals)
    samples, batches, loss_sum, skipped, *seconds = totals.tolist()
    return PassCounts(int(samples), int(batches), max(seconds), loss_sum, are_global=True, num_skipped=int(skipped))


def _all_reduce_bucket(bucket: list[torch.Tensor]) -> None:
    flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
    dist.all_reduce(flat)
    start = 0
    for tensor in bucket:
        tensor.copy_(flat[start : start + tensor.numel()].view_as(tensor))
        start += tensor.numel()


def compute_grad_sq_mean_(
    grad_sum: torch.Tensor, grad_sq_sum: torch.Tensor, counts: PassCounts, batch_size: float
) -> torch.Tensor:
    """Turn the two sums of the pass into E[g_B^2] of a batch of `batch_size` samples, in place and without temporaries.

    Args:
        grad_sum: A = sum n_i g_i; holds the mean gradient A/N afterwards.
        grad_sq_sum: Q = sum n_i g_i^2; holds the result afterwards, >= 0, in units of gradient squared.
        counts: over all processes.
        batch_size: B, 1 for the paper's per-sample E[g^2]. Beyond the number of samples seen the spread of the mean
            over those samples is what remains, and (A/N)^2 is returned.

    Raises:
        InputError: a single batch of several samples, whose spread cannot be known.
    """
    require_enough_batches(counts.num_batches, counts.num_samples)
    grad_sum.div_(counts.num_samples)
    spread_share = max(1.0 / batch_size - 1.0 / counts.num_samples, 0.0)
    if spread_share == 0.0:
        return grad_sq_sum.copy_(grad_sum).square_()
    grad_sq_sum.addcmul_(grad_sum, grad_sum, value=-counts.num_samples).div_(counts.num_batches - 1).clamp_min_(0.0)
    return grad_sq_sum.mul_(spread_share).addcmul_(grad_sum, grad_sum)


def require_enough_batches(num_batches: int, num_samples: int) -> None:
    """Raise `InputError` if the spread between batches cannot be known: one batch of several samples, or none."""
    if num_batches == 0:
        raise InputError("the gradient statistics saw no sample: the training data set is empty")
    if num_batches == 1 and num_samples > 1:
        raise InputError(
            f"the {num_samples} samples of the gradient statistics fit into one batch, so their spread is not known; give more samples or "
            f"batches of at most {max(1, num_samples // 2)} (v0_stats_batch_size), or use v0_estimator=minibatch"
        )
