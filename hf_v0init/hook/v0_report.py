"""The report of a v0: what was asked for, and the numbers of what was written."""

import math

import torch

from ..errors import InputError
from ..records.report import V0Report, collect_versions
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.parts import Fragment, ParamShard
from ..sharding.processes import get_rank_and_world_size
from ..sharding.tensor_statistics import compute_figures


def begin_report(
    plan: V0Plan,
    moments: SecondMoment,
    chosen: list[ParamShard],
    without: list[ParamShard],
    *,
    scale: float | None,
    seed: int,
) -> V0Report:
    """Begin a report: what was asked for, and of what; `chosen` get a v0, `without` do not."""
    return V0Report(
        strategy=plan.init,
        scale=scale,
        seed=seed,
        decay=plan.decay,
        decay_steps=plan.decay_steps,
        estimator=plan.estimator,
        num_samples_requested=plan.num_samples,
        include_bias_and_norm=plan.include_bias_and_norm,
        optimizer=moments.name,
        beta2=moments.read_beta2(chosen[0].group),
        num_processes=get_rank_and_world_size()[1],
        num_parameters_without_v0=len(without),
        num_elements_without_v0=sum(math.prod(shard.full_shape) for shard in without),
        versions=collect_versions(),
    )


def add_parameters(
    report: V0Report,
    shards: list[ParamShard],
    moments: list[torch.Tensor | Fragment],
    scales: list[float],
    over_processes: bool,
) -> None:
    """Add the statistics of v0 to the report.

    Args:
        shards: that have got one.
        moments: what it is a multiple of, for each: whole, DTensor or fragment.
        scales: from these to v0, one for each.
        over_processes: whether any is sharded; then all processes must call this.

    Raises:
        InputError: a v0 that is not finite.
    """
    total = (report.v0_mean or 0.0) * report.num_elements_with_v0
    figures = compute_figures(moments, over_processes)
    for shard, (mean, low, high, zeros), scale in zip(shards, figures, scales, strict=True):
        if not all(math.isfinite(value) for value in (mean, low, high)):
            raise InputError(describe_not_finite(shard.name))
        mean, low, high, numel = mean * scale, low * scale, high * scale, math.prod(shard.full_shape)
        shape = list(shard.full_shape)
        report.parameters[shard.name] = {"mean": mean, "min": low, "max": high, "zeros": zeros, "shape": shape}
        report.num_zero_elements += zeros
        report.num_parameters_with_v0 += 1
        total += mean * numel
        report.num_elements_with_v0 += numel
    report.v0_mean = total / max(1, report.num_elements_with_v0)
    report.v0_min = min((entry["min"] for entry in report.parameters.values()), default=0.0)
    report.v0_max = max((entry["max"] for entry in report.parameters.values()), default=0.0)


def describe_not_finite(name: str) -> str:
    """Say that a gradient is not finite, and what to do."""
    return (
        f"the gradient of parameter {name!r} is not finite, so no v0 can be taken from it. Look at the data and the precision (bf16 "
        "rather than fp16); v0_init=zeros trains without a v0"
    )
