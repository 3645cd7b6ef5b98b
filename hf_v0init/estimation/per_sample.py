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
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..sharding.processes import add_over_processes, fail_together, get_rank_and_world_size
from ..state_guard import preserve_model, preserve_rng, raise_if_interrupted, seed_everything

FP16_LOSS_SCALE = 1024.0  # keeps gradients in fp16 out of the subnormal range; divided out again
RATIO_ELEMENTS = 4096  # of each tensor, from which the measured ratio is taken
IGNORED_LABEL = -100


def estimate_grad_sq_mean(
    named_parameters: list[tuple[str, nn.Parameter]],
    batches: Iterable[tuple[Any, int]],
    compute_loss: Callable[[Any], torch.Tensor],
    *,
    model: nn.Module,
    seed: int = 0,
    loss_scale: float = 1.0,
    effective_batch_size: float | None = None,
    other_parameters: Iterable[nn.Parameter] = (),
) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Estimate E[g^2] of single samples (eq. 10), in fp32 or wider; see the head of the file for the formula.

    Weights, buffers, train/eval modes, gradients and random states are as before afterwards, also when an exception or Ctrl-C passes.
    Under DDP each process runs its own batches, and the sums of all are added up at the end.

    Args:
        named_parameters: those to estimate, each whole on this process.
        batches: (inputs, number of samples) of this process's: of rank r among W these are batches r, r + W, r + 2W, ... of the pass.
            What has no label that counts is run and skipped. One of 0 samples is run and not counted: a repetition, by which a process
            has as many batches as the others, since losses may be collective.
        compute_loss: maps a batch's inputs to the scalar mean loss over its samples. It must run `model` outside of DDP, whose reducer
            would average the gradients.
        model: put into training mode for the pass, unless it is in it already: parts of it that are in evaluation mode stay so.
        seed: the dropout of batch k is seeded from (seed, k), so that it does not depend on which process runs it.
        loss_scale: the loss is multiplied by it before backward, and the gradients are divided by it (fp16).
        effective_batch_size: samples of one optimizer step over all processes, for `measured_ratio`.
        other_parameters: outside of the model, such as a loss module's, whose gradients must be left as they were, too.

    Returns:
        Name -> E[g^2] (the parameter's shape, fp32 or wider, units of gradient squared); and, over all processes and by the report's names,
        `num_samples`, `num_batches`, `num_skipped` (samples without a label that counts), `mean_loss`, `seconds`, and `measured_ratio`,
        the median over elements of E[g^2] of a sample over that of an optimizer step (None if not known).

    Raises:
        InputError: on every process: no sample, or a single batch of several, whose spread is not known; a loss that is not finite; a
            forward that changes the weights. What the loss or the batches raise is raised on every process, too.
    """
    start, (rank, num_processes) = time.perf_counter(), get_rank_and_world_size()
    numbers = {"num_samples": 0, "num_batches": 0, "num_skipped": 0, "mean_loss": 0.0}
    sums: dict[str, list[torch.Tensor]] = {}  # A and Q
    for name, parameter in named_parameters:
        kind = {"dtype": torch.promote_types(parameter.dtype, torch.float32), "device": parameter.device}
        sums[name] = [torch.zeros(parameter.shape, **kind) for _ in range(2)]
    with fail_together(), preserve_rng(), preserve_model(model, other_parameters):
        if not model.training:
            model.train()
        versions = {name: parameter._version for name, parameter in named_parameters}
        for place, (inputs, size) in enumerate(batches):
            index = rank + place * num_processes
            seed_everything(compute_batch_seed(seed, index))
            with torch.enable_grad():
                loss = compute_loss(inputs)
                (loss * loss_scale).backward()
            if not has_targets(inputs):
                numbers["num_skipped"] += size
            elif size:
                value = float(loss.detach())
                if not math.isfinite(value):
                    raise InputError(
                        f"the loss is {value} in batch {index} of the gradient statistics ({size} samples): no v0 can be taken from it. "
                        "Look at that batch (labels all ignored? bad values?), at the learning task's loss scale and precision, or use "
                        "v0_init=random, which needs no gradients"
                    )
                for count, more in (("num_samples", size), ("num_batches", 1), ("mean_loss", value * size)):
                    numbers[count] += more
                for name, parameter in named_parameters:
                    if parameter.grad is not None:
                        sums[name][0].add_(parameter.grad, alpha=size / loss_scale)
                        sums[name][1].addcmul_(parameter.grad, parameter.grad, value=size / loss_scale**2)
            for parameter in model.parameters():
                parameter.grad = None
            changed = [name for name, parameter in named_parameters if parameter._version != versions[name]]
            if changed:
                raise InputError(
                    f"the model's forward changes its own weights ({changed[0]!r}), so a pass before training would change the run: use "
                    "v0_estimator=minibatch, which takes v0 from the run's own first steps"
                )
            raise_if_interrupted()
    if num_processes > 1:
        whole = torch.tensor([*numbers.values()], dtype=torch.float64, device=named_parameters[0][1].device)
        add_over_processes([*(total for pair in sums.values() for total in pair), whole])
        numbers = {name: type(numbers[name])(number) for name, number in zip(numbers, whole.tolist(), strict=True)}
    tensors, ratios, counts = {}, [], (numbers["num_samples"], numbers["num_batches"])
    for name in list(sums):
        grad_sum, grad_sq_sum = sums.pop(name)
        tensors[name] = compute_grad_sq_mean(grad_sum, grad_sq_sum, *counts)
        if effective_batch_size is not None:
            spacing = max(1, grad_sum.numel() // RATIO_ELEMENTS)
            some = [total.view(-1)[::spacing] for total in (grad_sum, grad_sq_sum)]
            of_step = compute_grad_sq_mean(*some, *counts, effective_batch_size)
            ratios.append((tensors[name].view(-1)[::spacing] / of_step)[of_step > 0].float().cpu())
    ratio = float(torch.cat(ratios).median()) if ratios else math.nan
    numbers["mean_loss"] /= numbers["num_samples"]
    numbers["seconds"] = time.perf_counter() - start
    return tensors, numbers | {"measured_ratio": ratio if math.isfinite(ratio) else None}


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


def compute_batch_seed(seed: int, index: int) -> int:
    """Compute the random seed of batch `index` of the pass, the same on whichever process runs it."""
    return (seed * 1_000_003 + index * 7_919 + 1) % (1 << 63)


def has_targets(inputs: Any) -> bool:
    """Whether a batch has any label that is not ignored (-100), beside the first of each row; True without labels."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() == 0 or labels.numel() == 0:
        return True
    return bool((labels[:, 1:] if labels.dim() > 1 and labels.shape[1] > 1 else labels).ne(IGNORED_LABEL).any())
