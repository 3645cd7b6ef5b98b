"""From settings to a written v0: which parameters, which numbers, into which state. Knows no Trainer.

Each `write_...` function builds every state aside and puts them into the optimizer at the very end, so an exception or
an interrupt on the way leaves the optimizer as it was.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from ..distributed.parts import (
    clean_parameter_name,
    compute_figures,
    compute_mean,
    draw_standard_normal_,
    find_pieces,
    gather_values,
    get_full_shape,
    get_local_part,
    is_sharded,
)
from ..errors import InputError
from ..gradients.statistics import (
    PassCounts,
    compute_grad_sq_mean_,
    make_gradient_visitor,
    make_sum_visitor,
    raise_together,
    reduce_sums,
)
from ..gradients.stopping import TOLERANCE, compute_relative_errors, see_sums
from ..optimizers.state import (
    StateDraft,
    draft_state,
    find_layout,
    name_optimizer,
    read_beta2,
    read_second_moment,
    unwrap_optimizer,
    write_states,
)
from ..records.report import V0Report, collect_versions
from ..settings import V0InitArguments
from .strategies import apply_floor_, compute_data_driven_v0_, compute_first_gradient_v0_, compute_random_v0_, takes_v0

RATIO_SAMPLES = 4096  # elements a tensor from which medians are taken

# Runs forward and backward over the pass's batches and hands each gradient to a visitor; see `visit_gradients`.
RunPass = Callable[[list[tuple[str, nn.Parameter]], Callable], PassCounts]


@dataclass
class V0Plan:
    """What will be written: the parameters that get a v0 (clean name, parameter, its group) and the names that do not."""

    parameters: list[tuple[str, nn.Parameter, dict]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    skipped_elements: int = 0
    is_sharded: bool = False  # this process holds only parts of the parameters
    beta2: float | None = None  # of the first group that gets a v0; None where the closed form does not hold

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """The parameters that get a v0, as (clean name, parameter)."""
        return [(name, parameter) for name, parameter, _ in self.parameters]


def plan_v0(optimizer, model: nn.Module, one_dimensional: bool = False) -> V0Plan:
    """Decide which of the optimizer's parameters get a v0.

    Raises:
        InputError: the optimizer has no second moment that is known here, a parameter is on the meta device, or no parameter
            is left to initialise.
    """
    find_layout(optimizer)
    groups = {id(p): group for group in unwrap_optimizer(optimizer).param_groups for p in group["params"]}
    plan = V0Plan()
    for name, parameter in model.named_parameters():
        name = clean_parameter_name(name)
        group = groups.get(id(parameter))
        if group is None or not parameter.requires_grad:
            continue
        if parameter.is_meta:
            raise InputError(
                f"parameter {name!r} is on the meta device, where a v0 written now would be lost; load or materialise the weights "
                "before building the Trainer"
            )
        shape = get_full_shape(parameter)
        if takes_v0(shape, one_dimensional) and parameter.is_floating_point():
            plan.parameters.append((name, parameter, group))
        else:
            plan.skipped.append(name)
            plan.skipped_elements += math.prod(shape)
    if not plan.parameters:
        raise InputError(
            "the optimizer holds no trainable parameter of two or more dimensions of this model, so there is nothing to give a "
            "v0 to; set v0_one_dimensional=True to include vectors, or v0_init=zeros"
        )
    plan.is_sharded = is_sharded(model) or getattr(optimizer, "is_partitioned", False)
    plan.beta2 = read_beta2(optimizer, plan.parameters[0][2])
    return plan


def write_random_v0(optimizer, plan: V0Plan, arguments: V0InitArguments, seed: int) -> V0Report:
    """Draw the random v0 (eq. 11) and write it. The numbers depend on seed, name, shape and nothing else."""
    start = time.perf_counter()
    scale = arguments.get_v0_scale(plan.beta2 or 0.0)
    states = {}
    with torch.no_grad():
        for name, parameter, group in plan.parameters:
            draft = draft_state(optimizer, parameter, group)
            v0, shape = draft.tensors[-1], get_full_shape(parameter)
            for piece in find_pieces(v0):
                draw_standard_normal_(
                    piece.local,
                    name=name,
                    seed=seed,
                    full_shape=piece.full_shape,
                    offset=piece.offset,
                    transform=lambda z, shape=shape: compute_random_v0_(z, shape, scale, arguments.v0_fan_factor),
                )
            states[parameter] = draft.finish(v0)
    report = _compose_report(optimizer, plan, arguments, seed, states, scale)
    report.fan_factor = arguments.v0_fan_factor
    write_states(optimizer, states)
    report.seconds = time.perf_counter() - start
    return report


def write_data_driven_v0(
    optimizer,
    plan: V0Plan,
    arguments: V0InitArguments,
    seed: int,
    run_pass: RunPass | Sequence[RunPass],
    effective_batch_size: float,
) -> V0Report:
    """Estimate E[g^2] and write scale * E[g^2] (eq. 10).

    The sums of the pass live in the future state's own `exp_avg` and `exp_avg_sq`; where these are narrower than fp32 or
    quantised, in fp32 buffers instead, since running sums in bf16 lose a fifth over a thousand batches.

    Args:
        run_pass: see `RunPass`; its counts are this process's. Or several, the stages of one pass, which ends after the first
            at which enough samples have been seen (`enough_samples`).
        effective_batch_size: samples of one optimizer step over all processes, B of `v0_statistic="per_step"`.

    Raises:
        InputError: what the pass raises, on every process; gradients that are not finite.
    """
    start = time.perf_counter()
    scale = arguments.get_v0_scale(plan.beta2 or 0.0)
    drafts = _draft_states(optimizer, plan, num_tensors=2)
    sums = {parameter: draft.tensors for parameter, draft in drafts.items()}
    batch_size = 1.0 if arguments.v0_statistic == "per_sample" else effective_batch_size
    stages = [run_pass] if callable(run_pass) else run_pass
    counts = _run_until_enough(stages, plan, sums, batch_size)
    counts = reduce_sums([tensor for pair in sums.values() for tensor in pair], counts)
    states, ratios = {}, []
    with torch.no_grad():
        for _, parameter, _ in plan.parameters:
            grad_sum, v0 = sums.pop(parameter)
            ratios.append(_sample_ratio_to_step(grad_sum, v0, counts, batch_size, effective_batch_size) * scale)
            local_sum, local_v0 = get_local_part(grad_sum), get_local_part(v0)
            compute_data_driven_v0_(compute_grad_sq_mean_(local_sum, local_v0, counts, batch_size), scale)
            if arguments.v0_floor > 0.0:
                apply_floor_(local_v0, arguments.v0_floor, compute_mean(v0))
            states[parameter] = drafts.pop(parameter).finish(v0)
    report = _compose_report(optimizer, plan, arguments, seed, states, scale)
    report.statistic = arguments.v0_statistic
    report.num_samples_requested = arguments.v0_num_samples
    report.floor = arguments.v0_floor
    report.effective_batch_size = effective_batch_size
    report.measured_ratio = _median(ratios, plan.is_sharded)
    report.without_gradient = _find_all_zero(report)
    report.num_samples, report.num_batches, report.mean_loss = counts.num_samples, counts.num_batches, counts.mean_loss
    write_states(optimizer, states)
    report.seconds = time.perf_counter() - start
    return report


def write_first_gradient_v0(
    optimizer, plan: V0Plan, arguments: V0InitArguments, seed: int, run_pass: RunPass, num_processes: int = 1
) -> V0Report:
    """Write scale * g0^2, g0 the gradient of the first optimizer step's batch over all processes.

    `run_pass` runs this process's micro-batches of that step with losses scaled so that their gradients add up to the
    process's gradient; processes are averaged, as DDP does.
    """
    start = time.perf_counter()
    scale = arguments.get_v0_scale(plan.beta2 or 0.0)
    drafts = _draft_states(optimizer, plan, num_tensors=1)
    sums = {parameter: draft.tensors[-1] for parameter, draft in drafts.items()}

    counts = _run_together(run_pass, plan, make_gradient_visitor(sums))
    num_summed = 1 if counts.are_global else num_processes
    counts = reduce_sums(list(sums.values()), counts)
    states = {}
    with torch.no_grad():
        for _, parameter, _ in plan.parameters:
            v0 = sums.pop(parameter)
            compute_first_gradient_v0_(get_local_part(v0).div_(num_summed), scale)
            states[parameter] = drafts.pop(parameter).finish(v0)
    report = _compose_report(optimizer, plan, arguments, seed, states, scale)
    report.without_gradient = _find_all_zero(report)
    report.num_samples, report.num_batches = counts.num_samples, counts.num_batches
    write_states(optimizer, states)
    report.seconds = time.perf_counter() - start
    return report


def measure_ratio_to_gradients(optimizer, plan: V0Plan, run_pass: RunPass) -> float | None:
    """Measure v0 / g^2 on one batch: the median over up to 4,096 elements a tensor whose gradient is not zero.

    The optimizer's written second moment is read, not changed. None if no gradient is different from zero.
    """
    ratios = []

    def visit(parameter: nn.Parameter, gradient: torch.Tensor, _: int) -> None:
        v0 = read_second_moment(optimizer, parameter)
        taken, squared = _take(v0), _take(gradient, v0.numel()).square()
        nonzero = squared > 0
        ratios.append((taken[nonzero] / squared[nonzero]).cpu())

    _run_together(run_pass, plan, visit)
    return _median(ratios, over_processes=True)


def _draft_states(optimizer, plan: V0Plan, num_tensors: int) -> dict[nn.Parameter, StateDraft]:
    """Begin the state of every planned parameter, with tensors that can hold the sums of a pass."""
    return {
        parameter: draft_state(optimizer, parameter, group, num_tensors=num_tensors, for_sums=True)
        for _, parameter, group in plan.parameters
    }


def _run_together(run_pass: RunPass, plan: V0Plan, visit: Callable) -> PassCounts:
    """Run the pass; an exception on one process is raised on all, an interrupt only where it happened."""
    counts, error = PassCounts(), None
    try:
        counts = run_pass(plan.named_parameters, visit)
    except Exception as exception:  # the others must hear of it before they wait for this process
        error = exception
    raise_together(error)
    return counts


def _run_until_enough(
    stages: Sequence[RunPass],
    plan: V0Plan,
    sums: dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]],
    batch_size: float,
) -> PassCounts:
    """Run the stages into `sums` until two halves of the samples agree; see `enough_samples`. Returns the counts of them all."""
    counts, visit, earlier = PassCounts(), make_sum_visitor(sums), None
    for number, run_stage in enumerate(stages, start=1):
        counts = counts + _run_together(run_stage, plan, visit)
        if number == len(stages):
            break
        now = see_sums(*([_take(pair[i]) for pair in sums.values()] for i in (0, 1)), counts)
        if earlier is not None:
            if now.counts.num_samples < 2 * earlier.counts.num_samples:
                break  # the data have ended
            error = _median([compute_relative_errors(earlier, now, batch_size)], plan.is_sharded)
            if error is None or error <= TOLERANCE:
                break
        earlier = now
    return counts


def _take(tensor: torch.Tensor, numel: int | None = None) -> torch.Tensor:
    """Take, of about 4,096 evenly spaced elements of the whole tensor (of `numel`), those that this process holds, in fp32."""
    local = get_local_part(tensor).detach()
    spacing = max(1, (tensor.numel() if numel is None else numel) // RATIO_SAMPLES)
    if local.is_contiguous():
        return local.view(-1)[::spacing].float()
    places = torch.arange(0, local.numel(), spacing, device=local.device)
    return local[torch.unravel_index(places, local.shape)].float()


def _sample_ratio_to_step(
    grad_sum: torch.Tensor, grad_sq_sum: torch.Tensor, counts: PassCounts, batch_size: float, step_batch_size: float
) -> torch.Tensor:
    """E[g_B^2] of the chosen statistic over that of one optimizer step, for some elements of the tensor."""
    pairs = [_take(tensor).clone() for tensor in (grad_sum, grad_sq_sum)]
    of_step = compute_grad_sq_mean_(pairs[0].clone(), pairs[1].clone(), counts, step_batch_size)
    chosen = compute_grad_sq_mean_(pairs[0], pairs[1], counts, batch_size)
    nonzero = of_step > 0
    return (chosen[nonzero] / of_step[nonzero]).cpu()


def _median(values: list[torch.Tensor], over_processes: bool) -> float | None:
    """Return the median of all values, of this process or over all of them; None if there is none."""
    joined = torch.cat(values) if values else torch.empty(0)
    if over_processes:
        joined = gather_values(joined)
    return float(joined.median()) if joined.numel() else None


def _find_all_zero(report: V0Report) -> list[str]:
    return [name for name, figures in report.parameters.items() if figures["max"] == 0.0]


def _compose_report(
    optimizer, plan: V0Plan, arguments: V0InitArguments, seed: int, states: dict, scale: float
) -> V0Report:
    """Compute the figures of the states about to be written; refuse any that is not finite."""
    layout = find_layout(optimizer)
    report = V0Report(
        strategy=arguments.v0_init,
        scale=scale,
        seed=seed,
        one_dimensional=arguments.v0_one_dimensional,
        warmup_steps=arguments.v0_warmup_steps,
        optimizer=name_optimizer(optimizer),
        beta2=plan.beta2,
        num_parameters_with_v0=len(plan.parameters),
        num_parameters_without_v0=len(plan.skipped),
        num_elements_without_v0=plan.skipped_elements,
        versions=collect_versions(),
    )
    total = 0.0
    figures = compute_figures([layout.read(states[parameter]) for _, parameter, _ in plan.parameters], plan.is_sharded)
    for (name, parameter, _), (mean, low, high, zeros) in zip(plan.parameters, figures, strict=True):
        shape = get_full_shape(parameter)
        if not all(abs(value) < float("inf") for value in (mean, low, high)):  # False for NaN as well
            raise InputError(
                f"v0 of parameter {name!r} is not finite (mean {mean}, max {high}): a gradient of the statistics pass was NaN or "
                "infinite. Look at the data and the precision (bf16 rather than fp16), or use v0_init=random"
            )
        report.parameters[name] = {"mean": mean, "min": low, "max": high, "zeros": int(zeros), "shape": list(shape)}
        report.num_zero_elements += int(zeros)
        total += mean * math.prod(shape)
        report.num_elements_with_v0 += math.prod(shape)
    report.v0_mean = total / max(1, report.num_elements_with_v0)
    report.v0_min = min(figures["min"] for figures in report.parameters.values())
    report.v0_max = max(figures["max"] for figures in report.parameters.values())
    return report
