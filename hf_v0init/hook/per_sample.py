"""The paper's v0 from E[g^2] of single samples (eq. 10), by a pass before training, into an optimizer before its first step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..estimation.per_sample import SampleBatch, estimate_grad_sq_mean
from ..records.report import V0Report
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.parts import ParamShard, is_sharded, name_parameters
from .shards import NOTHING_TO_WRITE, SteppedShards

USE_MINIBATCH = "use v0_estimator=minibatch (the default; attach_v0 in a loop of your own), which takes v0 from the run's own first steps"


def write_per_sample_v0(
    optimizer,
    model: nn.Module,
    plan: V0Plan,
    batches: Iterable[SampleBatch],
    compute_loss: Callable[[Any], torch.Tensor],
    *,
    batch_size: int,
    effective_batch_size: float,
    loss_scale: float = 1.0,
    other_parameters: Iterable[nn.Parameter] = (),
) -> V0Report:
    """Write v0 = scale * E[g^2] of single samples into an optimizer's second moments.

    Args:
        optimizer: whose second moments are written; it has made no step.
        model: whose parameters get a v0, not inside DDP.
        plan: with the per-sample estimator.
        batches, compute_loss, effective_batch_size, loss_scale, other_parameters: see `estimate_grad_sq_mean`.
        batch_size: samples per batch, for the report.

    Returns:
        What was written.

    Raises:
        InputError: the optimizer has no second moment that is known here, or has state already; the model is sharded; no parameter is
            left to give a v0 to; a scale that beta2 does not give; what the estimate refuses. Nothing is written then.
    """
    moments = SecondMoment(optimizer)
    chosen, skipped = _choose_parameters(moments, model, plan)
    scales = [plan.get_scale(moments.read_beta2(shard.group) or 0.0) for shard in chosen]
    named = [(shard.name, shard.param) for shard in chosen]
    estimate = estimate_grad_sq_mean(
        named,
        batches,
        compute_loss,
        model=model,
        seed=plan.seed,
        loss_scale=loss_scale,
        effective_batch_size=effective_batch_size,
        other_parameters=other_parameters,
    )
    report = V0Report.begin(plan, moments, chosen, skipped, scale=scales[0])
    report.num_samples, report.num_batches = estimate.num_samples, estimate.num_batches
    report.num_skipped, report.mean_loss, report.seconds = estimate.num_skipped, estimate.mean_loss, estimate.seconds
    report.stats_batch_size, report.effective_batch_size = batch_size, effective_batch_size
    report.add_parameters(chosen, [estimate.tensors[shard.name] for shard in chosen], scales, over_processes=False)
    report.without_gradient = [name for name, numbers in report.parameters.items() if numbers["max"] == 0.0]
    if estimate.measured_ratio is not None:
        report.measured_ratio = estimate.measured_ratio * report.scale
    with torch.no_grad():
        moments.prime(chosen)
        for shard, scale in zip(chosen, scales, strict=True):
            moments.change(shard, lambda v0, s=estimate.tensors[shard.name], f=scale: v0.copy_(s * f))
    return report


def _choose_parameters(
    moments: SecondMoment, model: nn.Module, plan: V0Plan
) -> tuple[list[ParamShard], list[ParamShard]]:
    """Choose which of a model's parameters, held by an optimizer, get a v0; returns them and the others."""
    if moments.zero is not None or is_sharded(model):
        kind = "FSDP2 or tensor parallelism" if moments.zero is None else "DeepSpeed ZeRO"
        raise InputError(
            f"v0_estimator=per_sample under {kind} is not supported, since no process has whole gradients there: {USE_MINIBATCH}"
        )
    if not moments.is_untouched():
        raise InputError(
            "parameters already have optimizer state: v0 is written only before the first step, and after a resume the checkpoint's state "
            "stands; build a new optimizer to start again"
        )
    shards, names = SteppedShards(moments, model, plan), name_parameters(model)
    shards.require_possible(None)
    trained = [shard for shard in shards.list_all() if id(shard.param) in names and shard.param.requires_grad]
    chosen = [shard for shard in trained if shards.is_eligible(shard)]
    if not chosen:
        raise InputError(NOTHING_TO_WRITE)
    return chosen, [shard for shard in trained if shard not in chosen]
