"""The paper's pass before training: estimate E[g^2] (eq. 10), then write it. Two functions, so that an estimate can be kept.

    estimate = estimate_grad_sq_mean(plan, run_pass)      # a forward and backward pass over training samples
    write_v0(plan, estimate, scale=1.0, ...)              # or save it, and use it again at another scale

Every state is built aside and put into the optimizer at the very end, so an exception or an interrupt on the way leaves the
optimizer as it was. What `first_steps` does, at the run's own first step, needs none of this.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..estimation.statistics import PassCounts, compute_grad_sq_mean_, make_sum_visitor, reduce_sums
from ..records.report import V0Report, collect_versions
from ..second_moment.state import StateDraft, count_touched, draft_state
from ..sharding.parts import Fragment, get_full_shape, get_local_part
from ..sharding.processes import get_rank_and_world_size, raise_together
from .plan import V0Plan
from .strategies import compute_data_driven_v0_
from .summary import add_parameters, compute_median, take_elements

# Runs forward and backward over the pass's batches and hands each gradient to a visitor; see `visit_gradients`.
RunPass = Callable[[list[tuple[str, nn.Parameter]], Callable], PassCounts]


@dataclass
class GradSqMean:
    """An estimate of E[g^2], in units of gradient squared.

    Attributes:
        tensors: clean name -> tensor of the parameter's shape, fp32 or wider (a DTensor or fragment where it is sharded).
        counts: samples and batches, over all processes.
        measured_ratio: the median over elements of E[g^2] of a sample over that of an optimizer step of this run; None if not
            known.
        seconds: wall-clock time of the pass.
    """

    tensors: dict[str, torch.Tensor | Fragment]
    counts: PassCounts
    measured_ratio: float | None = None
    seconds: float = 0.0
    _drafts: list[StateDraft] = field(default_factory=list, repr=False)  # whose memory the tensors are, until written

    def save(self, path: str | Path) -> None:
        """Save the estimate as a safetensors file.

        Raises:
            InputError: it is sharded.
        """
        from safetensors.torch import save_file

        if any(type(tensor) is not torch.Tensor for tensor in self.tensors.values()):
            raise InputError(
                "an estimate of E[g^2] of sharded parameters cannot be saved: estimate it on one process or under DDP"
            )
        counts = {"num_samples": str(self.counts.num_samples), "num_batches": str(self.counts.num_batches)}
        counts |= {} if self.measured_ratio is None else {"measured_ratio": repr(self.measured_ratio)}
        save_file({name: tensor.detach().contiguous() for name, tensor in self.tensors.items()}, path, metadata=counts)

    @classmethod
    def load(cls, path: str | Path) -> "GradSqMean":
        """Load what `save` wrote.

        Raises:
            InputError: the file is not there, or no such file.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            counts = PassCounts(int(metadata["num_samples"]), int(metadata["num_batches"]), are_global=True)
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path} holds no estimate of E[g^2] ({error}); write one with GradSqMean.save") from error
        ratio = metadata.get("measured_ratio")
        return cls(tensors, counts, None if ratio is None else float(ratio))


def estimate_grad_sq_mean(plan: V0Plan, run_pass: RunPass, effective_batch_size: float | None = None) -> GradSqMean:
    """Estimate E[g^2] of single samples (eq. 10) by a pass over training samples.

    The sums of the pass live in the future state's own `exp_avg` and `exp_avg_sq`; where these are narrower than fp32 or
    quantised, in fp32 buffers instead, since running sums in bf16 lose a fifth over a thousand batches.

    Args:
        run_pass: see `RunPass`; its counts are this process's.
        effective_batch_size: samples of one optimizer step over all processes, for `GradSqMean.measured_ratio`.

    Raises:
        InputError: what the pass raises, on every process.
    """
    start = time.perf_counter()
    chosen = {name for name, _ in plan.named_parameters}
    parameters = dict(plan.named_parameters)
    names = {id(parameter): name for name, parameter in plan.named_parameters}
    drafts, sums = [], {}
    for stored in plan.moments.list_tensors(names):
        inside = [part for part in stored.parts if part.name in chosen]
        if inside:
            draft = draft_state(plan.moments, stored, num_tensors=2, for_sums=True)
            drafts.append(draft)
            sums |= {parameters[part.name]: tuple(part.cut(tensor) for tensor in draft.tensors) for part in inside}
    counts = _run_together(run_pass, plan, make_sum_visitor(sums))
    counts = reduce_sums([tensor for pair in sums.values() for tensor in pair], counts)
    tensors, ratios = {}, []
    with torch.no_grad():
        for name, parameter in plan.named_parameters:
            grad_sum, grad_sq = sums.pop(parameter)
            if effective_batch_size is not None:
                ratios.append(_sample_ratio_to_step(grad_sum, grad_sq, counts, effective_batch_size))
            compute_grad_sq_mean_(get_local_part(grad_sum), get_local_part(grad_sq), counts, 1.0)
            tensors[name] = grad_sq
    ratio = compute_median(ratios, plan.is_sharded) if ratios else None
    for draft in drafts:
        if not draft.lent:
            draft.tensors = draft.tensors[-1:]  # the sum of the gradients has been used
    return GradSqMean(tensors, counts, ratio, time.perf_counter() - start, drafts)


def write_v0(
    plan: V0Plan, estimate: GradSqMean, scale: float | Callable[[float | None], float], *, seed: int = 0, **described
) -> V0Report:
    """Write v0 = scale * E[g^2] into the optimizer's states, all of them or none.

    Args:
        estimate: used up, where it was made for this plan and its memory is that of the states; else copied. For several scales,
            save it and load it for each.
        scale: sigma of eq. 10, or a function of a parameter group's beta2 (None where m(t) does not hold) that gives it.
        described: further fields of the report.

    Raises:
        InputError: a parameter of the plan that the estimate lacks or has in another shape; state that is there already; a v0 that
            is not finite.
    """
    start = time.perf_counter()
    find_scale = scale if callable(scale) else lambda _: scale
    chosen = {name for name, _ in plan.named_parameters}
    for name, parameter in plan.named_parameters:
        shape = get_full_shape(parameter)
        found = estimate.tensors.get(name)
        found_shape = None if found is None else tuple(getattr(found, "full_shape", None) or found.shape)
        if found_shape != shape:
            raise InputError(
                f"the estimate of E[g^2] has {'no' if found is None else f'a tensor of shape {found_shape} for'} parameter {name!r}, whose "
                f"shape is {shape}: it was made for another model"
            )
    names = {id(parameter): name for name, parameter in plan.named_parameters}
    stored = [one for one in plan.moments.list_tensors(names) if any(part.name in chosen for part in one.parts)]
    taken = count_touched(plan.moments, stored)
    if taken:
        raise InputError(
            f"{taken} of {len(stored)} parameters already have optimizer state: v0 is written only before the first step; "
            "build a new optimizer to start again"
        )
    drafts = {id(draft.stored.tensor): draft for draft in estimate._drafts}
    estimate_is_consumed, estimate._drafts = bool(drafts), []
    report = V0Report(
        strategy="data_driven",
        scale=find_scale(plan.beta2),
        seed=seed,
        estimator="per_sample",
        optimizer=plan.moments.name,
        beta2=plan.beta2,
        num_samples=estimate.counts.num_samples,
        num_batches=estimate.counts.num_batches,
        num_skipped=estimate.counts.num_skipped,
        mean_loss=estimate.counts.mean_loss,
        num_parameters_without_v0=len(plan.skipped),
        num_elements_without_v0=plan.skipped_elements,
        num_processes=get_rank_and_world_size()[1],
        versions=collect_versions(),
        **described,
    )
    named = []
    with torch.no_grad():
        for one in stored:
            inside = [part for part in one.parts if part.name in chosen]
            draft = drafts.get(id(one.tensor))
            own = draft is not None  # its last tensor holds E[g^2] already
            if draft is None:
                draft = drafts[id(one.tensor)] = draft_state(plan.moments, one)
            factor = find_scale(plan.moments.read_beta2(one.group))
            for part in inside:
                v0 = get_local_part(part.cut(draft.tensors[-1]))
                if not own:
                    v0.copy_(get_local_part(estimate.tensors[part.name]))
                compute_data_driven_v0_(v0, factor)
                del v0
                named.append((part.name, part.full_shape, part.cut(draft.tensors[-1])))
            del draft
        add_parameters(report, named, plan.is_sharded)  # refuses what is not finite, before anything is written
        if estimate_is_consumed:
            estimate.tensors = {}  # or its memory would lie beside that of the states
        named.clear()
        for one in stored:
            drafts.pop(id(one.tensor)).finish()
    report.without_gradient = [name for name, figures in report.parameters.items() if figures["max"] == 0.0]
    ratio = estimate.measured_ratio
    report.measured_ratio = None if ratio is None else ratio * report.scale
    report.seconds = estimate.seconds + time.perf_counter() - start
    return report


def _run_together(run_pass: RunPass, plan: V0Plan, visit: Callable) -> PassCounts:
    """Run the pass; an exception on one process is raised on all, an interrupt only where it happened."""
    counts, error = PassCounts(), None
    try:
        counts = run_pass(plan.named_parameters, visit)
    except Exception as exception:  # the others must hear of it before they wait for this process
        error = exception
    raise_together(error)
    return counts


def _sample_ratio_to_step(
    grad_sum: torch.Tensor, grad_sq_sum: torch.Tensor, counts: PassCounts, step_batch_size: float
) -> torch.Tensor:
    """E[g^2] of a sample over that of one optimizer step, for some elements of the tensor."""
    pairs = [take_elements(tensor).clone() for tensor in (grad_sum, grad_sq_sum)]
    of_step = compute_grad_sq_mean_(pairs[0].clone(), pairs[1].clone(), counts, step_batch_size)
    of_sample = compute_grad_sq_mean_(pairs[0], pairs[1], counts, 1.0)
    nonzero = of_step > 0
    return (of_sample[nonzero] / of_step[nonzero]).cpu()
