"""E[g^2] of single samples, by a pass over training samples before training (eq. 10). Knows no optimizer and no Trainer.

For batches i of n_i samples with gradient g_i (of the mean loss of the batch) the pass adds up

    A = sum_i n_i g_i,    Q = sum_i n_i g_i^2,    N = sum_i n_i,    K = number of batches.

With mean mu and variance s^2 of a sample's gradient, E[Q - A^2/N] = (K - 1) s^2 whatever the n_i, and E[(A/N)^2] = mu^2 + s^2/N. So
the mean square of the gradient of a batch of B samples is estimated without bias by

    E[g_B^2] = mu^2 + s^2/B = (A/N)^2 + s^2 (1/B - 1/N).

B = 1 is the paper's per-sample E[g^2]: Q/N where every batch holds one sample, and else mean^2 + n*Var over batches of n.
"""

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..sharding.processes import add_over_processes, fail_together, get_rank_and_world_size
from ..state_guard import preserve_model, preserve_rng, raise_if_interrupted, seed_everything

FP16_LOSS_SCALE = 1024.0  # keeps gradients in fp16 out of the subnormal range; divided out again
RATIO_ELEMENTS = 4096  # of each tensor, from which `GradSqMean.measured_ratio` is taken


@dataclass
class SampleBatch:
    """One batch of the pass.

    Attributes:
        inputs: as the loss takes them.
        num_samples: how many samples they are.
        index: the batch's number in the whole pass (over all processes), which seeds its dropout.
        counts: False for a repetition, by which a process has as many batches as the others, whose losses may be collective.
        has_loss: whether any target is left to compute a loss of. A batch without is run and skipped.
    """

    inputs: Any
    num_samples: int
    index: int
    counts: bool = True
    has_loss: bool = True


def compute_batch_seed(seed: int, index: int) -> int:
    """Compute the random seed of batch `index` of the pass, the same on whichever process runs it."""
    return (seed * 1_000_003 + index * 7_919 + 1) % (1 << 63)


@dataclass
class GradSqMean:
    """An estimate of E[g^2], in units of gradient squared.

    Attributes:
        tensors: name -> tensor of the parameter's shape, fp32 or wider.
        num_samples, num_batches: what it is from, over all processes.
        num_skipped: samples without any target, whose loss is the mean of nothing.
        mean_loss: over the samples; None if not known.
        measured_ratio: the median over elements of E[g^2] of a sample over that of an optimizer step; None if not known.
        seconds: wall-clock time of the pass.
    """

    tensors: dict[str, torch.Tensor]
    num_samples: int
    num_batches: int
    num_skipped: int = 0
    mean_loss: float | None = None
    measured_ratio: float | None = None
    seconds: float = 0.0


def estimate_grad_sq_mean(
    named_parameters: list[tuple[str, nn.Parameter]],
    batches: Iterable[SampleBatch],
    compute_loss: Callable[[Any], torch.Tensor],
    *,
    model: nn.Module,
    seed: int = 0,
    loss_scale: float = 1.0,
    effective_batch_size: float | None = None,
    other_parameters: Iterable[nn.Parameter] = (),
) -> GradSqMean:
    """Estimate E[g^2] of single samples (eq. 10), in fp32 or wider; see the head of the file for the formula.

    Weights, buffers, train/eval modes, gradients and random states are as before afterwards, also when an exception or Ctrl-C passes.
    Under DDP each process runs its own batches, and the sums of all are added up at the end.

    Args:
        named_parameters: those to estimate, each whole on this process.
        batches: of this process.
        compute_loss: maps a batch's inputs to the scalar mean loss over its samples. It must run `model` outside of DDP, whose reducer
            would average the gradients.
        model: put into training mode for the pass, unless it is in it already: parts of it that are in evaluation mode stay so.
        seed: the dropout of batch k is seeded from (seed, k), so that it does not depend on which process runs it.
        loss_scale: the loss is multiplied by it before backward, and the gradients are divided by it (fp16).
        effective_batch_size: samples of one optimizer step over all processes, for `GradSqMean.measured_ratio`.
        other_parameters: outside of the model, such as a loss module's, whose gradients must be left as they were, too.

    Raises:
        InputError: on every process: no sample, or a single batch of several, whose spread is not known; a loss that is not finite; a
            forward that changes the weights. What the loss or the batches raise is raised on every process, too.
    """
    start = time.perf_counter()
    sums = _Sums(named_parameters)
    with fail_together(), preserve_rng(), preserve_model(model, other_parameters):
        if not model.training:
            model.train()
        versions = {name: parameter._version for name, parameter in named_parameters}
        for batch in batches:
            seed_everything(compute_batch_seed(seed, batch.index))
            with torch.enable_grad():
                loss = compute_loss(batch.inputs)
                (loss * loss_scale).backward()
            if batch.counts and batch.has_loss:
                sums.add(batch, float(loss.detach()), loss_scale)
            elif batch.counts:
                sums.num_skipped += batch.num_samples
            for parameter in model.parameters():
                parameter.grad = None
            changed = [name for name, parameter in named_parameters if parameter._version != versions[name]]
            if changed:
                raise InputError(
                    f"the model's forward changes its own weights ({changed[0]!r}), so a pass before training would change the run: use "
                    "v0_estimator=minibatch, which takes v0 from the run's own first steps"
                )
            raise_if_interrupted()
    sums.reduce()
    num_samples, num_batches = sums.num_samples, sums.num_batches
    tensors, ratios = {}, []
    for name, _ in named_parameters:
        _, grad_sum, grad_sq_sum = sums.tensors.pop(name)
        tensors[name] = compute_grad_sq_mean(grad_sum, grad_sq_sum, num_samples, num_batches)
        if effective_batch_size is not None:
            spacing = max(1, grad_sum.numel() // RATIO_ELEMENTS)
            some = [total.view(-1)[::spacing] for total in (grad_sum, grad_sq_sum)]
            of_step = compute_grad_sq_mean(*some, num_samples, num_batches, effective_batch_size)
            ratios.append((tensors[name].view(-1)[::spacing] / of_step)[of_step > 0].float().cpu())
    ratio = torch.cat(ratios).median() if ratios else torch.tensor(math.nan)
    return GradSqMean(
        tensors,
        num_samples,
        num_batches,
        num_skipped=sums.num_skipped,
        mean_loss=sums.loss / num_samples,
        measured_ratio=float(ratio) if ratio.isfinite() else None,
        seconds=time.perf_counter() - start,
    )


def compute_grad_sq_mean(
    grad_sum: torch.Tensor, grad_sq_sum: torch.Tensor, num_samples: int, num_batches: int, batch_size: float = 1.0
) -> torch.Tensor:
    """Compute E[g_B^2] of a batch of `batch_size` samples from the sums of the pass, in units of gradient squared.

    Args:
        grad_sum: A = sum n_i g_i, any shape.
        grad_sq_sum: Q = sum n_i g_i^2, of the same shape.
        num_samples, num_batches: N and K, over all processes.
        batch_size: B. Beyond N the spread of the mean over the N samples is what remains, and (A/N)^2 is returned.

    Returns:
        A tensor of that shape, >= 0.

    Raises:
        InputError: a single batch of several samples, whose spread is not known, or none.
    """
    if num_batches == 0:
        raise InputError("the gradient statistics saw no sample: the training data set is empty")
    if num_batches == 1 and num_samples > 1:
        raise InputError(
            f"the {num_samples} samples of the gradient statistics fit into one batch, so their spread is not known; give more samples or "
            f"batches of at most {max(1, num_samples // 2)} (v0_stats_batch_size), or use v0_estimator=minibatch"
        )
    mean_sq = (grad_sum / num_samples).square()
    share = 1.0 / batch_size - 1.0 / num_samples
    if share <= 0.0:
        return mean_sq
    variance = (grad_sq_sum - num_samples * mean_sq) / (num_batches - 1)
    return mean_sq.add_(variance.clamp_min_(0.0), alpha=share)


class _Sums:
    """The sums A and Q of each parameter, fp32 or wider, and the counts; of this process until `reduce`."""

    def __init__(self, named_parameters: list[tuple[str, nn.Parameter]]) -> None:
        self.num_samples = self.num_batches = self.num_skipped = 0
        self.loss = 0.0  # times samples
        self.tensors: dict[str, tuple[nn.Parameter, torch.Tensor, torch.Tensor]] = {}
        for name, parameter in named_parameters:
            kind = {"dtype": torch.promote_types(parameter.dtype, torch.float32), "device": parameter.device}
            zeros = [torch.zeros(parameter.shape, **kind) for _ in range(2)]
            self.tensors[name] = (parameter, *zeros)

    def add(self, batch: SampleBatch, loss: float, loss_scale: float) -> None:
        """Add the gradients of a batch.

        Raises:
            InputError: its loss is not finite.
        """
        if not math.isfinite(loss):
            raise InputError(
                f"the loss is {loss} in batch {batch.index} of the gradient statistics ({batch.num_samples} samples): no v0 can be taken from "
                "it. Look at that batch (labels all ignored? bad values?), at the learning task's loss scale and precision, or use "
                "v0_init=random, which needs no gradients"
            )
        self.num_samples += batch.num_samples
        self.num_batches += 1
        self.loss += loss * batch.num_samples
        for parameter, grad_sum, grad_sq_sum in self.tensors.values():
            if parameter.grad is not None:
                gradient = parameter.grad.to(grad_sum.dtype)
                grad_sum.add_(gradient, alpha=batch.num_samples / loss_scale)
                grad_sq_sum.addcmul_(gradient, gradient, value=batch.num_samples / loss_scale**2)

    def reduce(self) -> None:
        """Add up the sums and counts of all processes."""
        if get_rank_and_world_size()[1] == 1:
            return
        sums = [total for _, *totals in self.tensors.values() for total in totals]
        numbers = [self.num_samples, self.num_batches, self.num_skipped, self.loss]
        counts = torch.tensor(numbers, dtype=torch.float64, device=sums[0].device)
        add_over_processes([*sums, counts])
        *whole, self.loss = counts.tolist()
        self.num_samples, self.num_batches, self.num_skipped = map(int, whole)
