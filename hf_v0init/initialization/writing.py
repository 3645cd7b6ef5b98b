"""The paper's v0 from an estimate of E[g^2] (eq. 10) into an optimizer, before its first step: all of it or nothing.

    plan = plan_v0(optimizer, model)
    estimate = estimate_grad_sq_mean(plan.named_parameters, batches, compute_loss, model=model)     # or GradSqMean.load
    write_v0(plan, estimate, scale=1.0)

An estimate stays as it is, so it can be saved and written at several scales.
"""

import contextlib
import time
from collections.abc import Callable, Iterator

import torch

from ..errors import InputError
from ..estimation.per_sample import GradSqMean
from ..records.report import V0Report, collect_versions
from ..second_moment.state import SecondMoment
from ..sharding.processes import get_rank_and_world_size
from .plan import PerSamplePlan, require_untouched
from .summary import add_parameters


def write_v0(
    plan: PerSamplePlan,
    estimate: GradSqMean,
    scale: float | Callable[[float | None], float],
    *,
    seed: int = 0,
    **described,
) -> V0Report:
    """Write v0 = scale * E[g^2] into the optimizer's second moments, all of them or none.

    Args:
        plan: of an optimizer that has made no step.
        estimate: of a model with these parameters.
        scale: sigma of eq. 10, or a function of a parameter group's beta2 (None where m(t) does not hold) that gives it.
        seed: of the samples, for the report.
        described: further fields of the report.

    Returns:
        What was written, see `V0Report`.

    Raises:
        InputError: a parameter of the plan that the estimate lacks or has in another shape; state that is there already; a v0 that
            is not finite.
    """
    start = time.perf_counter()
    moments = plan.moments
    _require_fit(plan, estimate)
    require_untouched(moments)

    def find_scale(beta2: float | None) -> float:
        return scale(beta2) if callable(scale) else scale

    report = V0Report(
        strategy="data_driven",
        scale=find_scale(plan.beta2),
        seed=seed,
        estimator="per_sample",
        optimizer=moments.name,
        beta2=plan.beta2,
        num_samples=estimate.num_samples,
        num_batches=estimate.num_batches,
        num_skipped=estimate.num_skipped,
        mean_loss=estimate.mean_loss,
        num_parameters_without_v0=len(plan.skipped),
        num_elements_without_v0=plan.skipped_elements,
        num_processes=get_rank_and_world_size()[1],
        versions=collect_versions(),
        **described,
    )
    factors = [find_scale(moments.read_beta2(shard.group)) for shard in plan.chosen]
    named = [(shard.name, shard.full_shape, estimate.tensors[shard.name]) for shard in plan.chosen]
    add_parameters(report, named, False, factors)
    with _undo_on_failure(moments), torch.no_grad():
        moments.prime(plan.chosen)
        for shard, factor in zip(plan.chosen, factors, strict=True):
            moments.change(shard, lambda v0, s=estimate.tensors[shard.name], f=factor: v0.copy_(s * f))
    report.without_gradient = [name for name, figures in report.parameters.items() if figures["max"] == 0.0]
    if estimate.measured_ratio is not None:
        report.measured_ratio = estimate.measured_ratio * report.scale
    report.seconds = estimate.seconds + time.perf_counter() - start
    return report


def _require_fit(plan: PerSamplePlan, estimate: GradSqMean) -> None:
    """Raise `InputError` unless the estimate has a tensor for each parameter."""
    for name, parameter in plan.named_parameters:
        found = estimate.tensors.get(name)
        if found is None or found.shape != parameter.shape:
            what = "no tensor for" if found is None else f"a tensor of shape {tuple(found.shape)} for"
            raise InputError(
                f"the estimate of E[g^2] has {what} parameter {name!r}, whose shape is {tuple(parameter.shape)}: it was made for another model"
            )


@contextlib.contextmanager
def _undo_on_failure(moments: SecondMoment) -> Iterator[None]:
    """Take out again what was put into an optimizer without state, if an exception or an interrupt passes."""
    places = [moments.inner.state, *(group["state"] for group in moments.list_groups() if "state" in group)]
    before = [dict(place) for place in places]
    try:
        yield
    except BaseException:
        for place, content in zip(places, before, strict=True):
            place.clear()
            place.update(content)
        raise
