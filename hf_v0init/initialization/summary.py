"""From written states to the numbers of the report: what v0 is, and how large it is beside the gradients."""

import math

import torch

from ..errors import InputError
from ..records.report import V0Report, collect_versions
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.parts import Fragment, ParamShard, get_local_part
from ..sharding.processes import get_rank_and_world_size
from ..sharding.tensor_statistics import compute_figures, gather_values

RATIO_SAMPLES = 4096  # elements per tensor from which medians are taken


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


def take_elements(tensor: torch.Tensor | Fragment, numel: int | None = None) -> torch.Tensor:
    """Take, of about 4,096 evenly spaced elements of the whole tensor (of `numel`), those that this process holds, in fp32."""
    local = get_local_part(tensor).detach()
    spacing = max(1, (tensor.numel() if numel is None else numel) // RATIO_SAMPLES)
    return local.reshape(-1)[::spacing].float()


def compute_median(values: list[torch.Tensor], over_processes: bool) -> float | None:
    """Return the median of all values, of this process or over all of them; None if there is none."""
    joined = torch.cat(values) if values else torch.empty(0)
    if over_processes:
        joined = gather_values(joined)
    return float(joined.median()) if joined.numel() else None


def sample_ratio(v0: torch.Tensor | Fragment, gradient: torch.Tensor | Fragment) -> torch.Tensor:
    """Return v0 / g^2 of some elements whose gradient is not zero, 1-D on the CPU."""
    taken, squared = take_elements(v0), take_elements(gradient, v0.numel()).square()
    nonzero = squared > 0
    return (taken[nonzero] / squared[nonzero]).cpu()


def add_parameters(
    report: V0Report,
    named: list[tuple[str, tuple[int, ...], torch.Tensor | Fragment]],
    over_processes: bool,
    scales: list[float] | None = None,
) -> None:
    """Add the statistics of written second moments to the report.

    Args:
        named: name, shape of the whole parameter, its second moment (whole, DTensor or fragment).
        over_processes: whether any is sharded; then all processes must call this.
        scales: from what is stored to v0, one for each of `named`. Default: 1.

    Raises:
        InputError: a v0 that is not finite.
    """
    total = (report.v0_mean or 0.0) * report.num_elements_with_v0
    figures = compute_figures([moment for _, _, moment in named], over_processes)
    scales = [1.0] * len(named) if scales is None else scales
    for (name, shape, _), (mean, low, high, zeros), scale in zip(named, figures, scales, strict=True):
        if not all(math.isfinite(value) for value in (mean, low, high)):
            raise InputError(describe_not_finite(name))
        mean, low, high = mean * scale, low * scale, high * scale
        report.parameters[name] = {"mean": mean, "min": low, "max": high, "zeros": int(zeros), "shape": list(shape)}
        report.num_zero_elements += int(zeros)
        report.num_parameters_with_v0 += 1
        total += mean * math.prod(shape)
        report.num_elements_with_v0 += math.prod(shape)
    report.v0_mean = total / max(1, report.num_elements_with_v0)
    report.v0_min = min((entry["min"] for entry in report.parameters.values()), default=0.0)
    report.v0_max = max((entry["max"] for entry in report.parameters.values()), default=0.0)


def describe_not_finite(name: str) -> str:
    """Say that a gradient is not finite, and what to do."""
    return (
        f"the gradient of parameter {name!r} is not finite, so no v0 can be taken from it. Look at the data and the precision (bf16 "
        "rather than fp16); v0_init=zeros trains without a v0"
    )
