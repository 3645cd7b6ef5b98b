"""A v0 for a training loop without a Trainer: plain PyTorch, or with accelerate.

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialize_v0(optimizer, model=model, batches=loader, loss_fn=loss_fn, accelerator=accelerator)
    for batch in loader: ...                        # as ever

Call it when model and optimizer are prepared and nothing has been trained; after a resume the checkpoint's state stands, so
do not call it then (it refuses). Nothing but the optimizer's second moment changes: weights, buffers, modes, gradients, random
states and the order of a `DataLoader` given as `batches` are as before, also after an exception.

With several processes each gives its own batches, as accelerate's loaders do, and v0 is that of all of them together: under
DDP by one reduction of the sums; where parameters are sharded (FSDP2, tensor parallelism) by running every batch together.
"""

import contextlib
import functools
import logging
import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from torch import nn

from ..errors import InputError
from ..gradients.stopping import list_stages
from ..initialization.writing import (
    V0Plan,
    measure_ratio_to_gradients,
    plan_v0,
    write_data_driven_v0,
    write_first_gradient_v0,
    write_random_v0,
)
from ..optimizers.state import has_state, read_beta2, unwrap_optimizer
from ..records.report import V0Report, collect_versions
from ..settings import AUTO, V0InitArguments
from .gradients import (
    LoopGradients,
    LossFunction,
    count_first_dimension,
    get_rank_and_world_size,
    unwrap_model,
)

logger = logging.getLogger("hf_v0init")


def initialize_v0(
    optimizer,
    *,
    model: nn.Module,
    strategy: str = "data_driven",
    batches: Iterable | None = None,
    loss_fn: LossFunction | None = None,
    accelerator=None,
    scale: float | None = None,
    warmup_steps: float | None = None,
    num_samples: int | str | None = V0InitArguments.v0_num_samples,
    statistic: str = V0InitArguments.v0_statistic,
    seed: int = 0,
    one_dimensional: bool = V0InitArguments.v0_one_dimensional,
    floor: float = V0InitArguments.v0_floor,
    fan_factor: float = V0InitArguments.v0_fan_factor,
    batches_per_step: int | None = None,
    effective_batch_size: float | None = None,
    count_samples: Callable[[Any], int] | None = None,
    other_modules: Sequence[nn.Module] = (),
    max_steps: int | None = None,
) -> V0Report:
    """Give an optimizer's second moment a v0 before its first step.

    Args:
        optimizer: torch's or another's with a second moment, plain or prepared by accelerate.
        model: whose parameters get a v0, plain, compiled, inside DDP, or sharded by FSDP2 or tensor parallelism.
        strategy, scale, warmup_steps, statistic, seed, one_dimensional, floor, fan_factor: as the fields of
            `V0InitArguments` with `v0_` (and `v0_init`) before them.
        batches: this process's batches, read once and no further than needed. Of a `DataLoader`, accelerate's too, the order of
            the next epoch is kept. For data_driven and first_gradient; for random, the first one measures v0 against g^2.
        loss_fn: maps (model, batch) to the scalar mean loss over the batch's samples, as the loop computes it and without
            division by accumulation steps. It must use the model it is given, which is not inside DDP.
        accelerator: places the batches on its device and tells precision and accumulation.
        num_samples: samples for data_driven over all processes, rounded up to whole batches; "auto": as many as are enough
            (see `enough_samples`); None: all of `batches`.
        batches_per_step: batches that one optimizer step averages over, a process. Default: the accelerator's
            `gradient_accumulation_steps`, or 1. These are what first_gradient takes.
        effective_batch_size: samples of one optimizer step over all processes, for statistic="per_step". Default: samples of
            the first batch x `batches_per_step` x processes.
        count_samples: maps a batch to its number of samples. Default: the length of its first tensor.
        other_modules: further modules that `loss_fn` runs, such as a GAN's other network. They are left as they were, and their
            gradients are neither computed nor kept.
        max_steps: optimizer steps of the whole run. With it the report and the log say what v0 will do over the run, and
            `warmup_steps` below 1 is a share of them.

    Returns:
        What was done, see `V0Report`; `report.to_dict()` are plain JSON types. For zeros, which changes nothing, all figures
        are 0.

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment or with state already; no batches or no
            loss function; a loss that is no scalar, not finite or without gradient. The optimizer is then as before.
    """
    settings = {"v0_init": strategy, "v0_scale": scale, "v0_warmup_steps": warmup_steps, "v0_statistic": statistic}
    settings |= {"v0_one_dimensional": one_dimensional, "v0_floor": floor, "v0_fan_factor": fan_factor, "v0_seed": seed}
    settings |= {} if num_samples is None else {"v0_num_samples": num_samples}
    with _in_own_words():
        arguments = V0InitArguments(**settings).resolve(max_steps)
        if strategy == "zeros":
            return _report_zeros(seed)
        _require_counts(batches_per_step, effective_batch_size)
        _require_supported(model, accelerator)
        plan = plan_v0(optimizer, unwrap_model(model), one_dimensional)
        _require_fresh(optimizer, plan)
        _require_scale_known(arguments, optimizer)
        missing = "batches" if batches is None else "loss_fn" if loss_fn is None else None
        if missing is not None:
            if strategy != "random":
                raise InputError(
                    f"strategy={strategy!r} takes v0 from gradients: give {missing}, or use strategy='random', which needs none"
                )
            report = write_random_v0(optimizer, plan, arguments, seed)
        else:
            gradients = LoopGradients(
                model, loss_fn, accelerator, count_samples or count_first_dimension, other_modules, seed
            )
            per_step = batches_per_step or getattr(accelerator, "gradient_accumulation_steps", 1)
            with gradients.open(batches):
                if strategy == "random":
                    gradients.run_first_batch(
                        plan.named_parameters, lambda *_: None
                    )  # what fails, fails before the write
                    report = write_random_v0(optimizer, plan, arguments, seed)
                    report.measured_ratio = measure_ratio_to_gradients(optimizer, plan, gradients.run_first_batch)
                elif strategy == "first_gradient":
                    run = functools.partial(gradients.run_first_step, num_batches=per_step)
                    report = write_first_gradient_v0(optimizer, plan, arguments, seed, run, gradients.world_size)
                else:
                    run = [
                        functools.partial(gradients.run, batch_range=stage)
                        for stage in _list_stages(num_samples, gradients.first_size)
                    ]
                    of_step = float(effective_batch_size or gradients.num_samples_at_once * per_step)
                    report = write_data_driven_v0(optimizer, plan, arguments, seed, run, of_step)
                    report.num_samples_requested, report.stats_batch_size = num_samples, gradients.first_size
    report.num_processes = get_rank_and_world_size()[1]
    _log_report(report, max_steps)
    return report


def _list_stages(num_samples: int | str | None, batch_size: int) -> list[tuple[int, float]]:
    """List the ranges of batches after each of which the pass may end; one, unless that is to be found out."""
    if num_samples == AUTO:
        return list_stages(batch_size)
    return [(0, math.inf if num_samples is None else math.ceil(num_samples / batch_size))]


# ---- what is refused -------------------------------------------------------------------------------------------------


def _require_counts(batches_per_step, effective_batch_size) -> None:
    value = batches_per_step
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"batches_per_step={value!r}: must be a whole number >= 1, or None")
    if effective_batch_size is not None and not 1 <= effective_batch_size < math.inf:
        raise InputError(f"effective_batch_size={effective_batch_size!r}: must be a number >= 1, or None")


def _require_supported(model: nn.Module, accelerator) -> None:
    kind = str(getattr(getattr(accelerator, "distributed_type", None), "value", ""))
    if kind in ("DEEPSPEED", "MEGATRON_LM") or type(model).__name__ == "DeepSpeedEngine":
        raise InputError(
            "initialize_v0 under DeepSpeed or Megatron-LM is not supported: use hf_v0init's Trainer (DeepSpeed), FSDP2 or DDP"
        )
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "initialize_v0 under FSDP1 is not supported: its parameters are one-dimensional pieces; use FSDP2 (fsdp_version: 2)"
        )


def _require_fresh(optimizer, plan: V0Plan) -> None:
    taken = sum(has_state(optimizer, parameter, group) for _, parameter, group in plan.parameters)
    if taken:
        raise InputError(
            f"{taken} of {len(plan.parameters)} parameters already have optimizer state: v0 is written only before the first "
            "step, and after a resume the checkpoint's state stands; do not call initialize_v0 then"
        )


def _require_scale_known(arguments: V0InitArguments, optimizer) -> None:
    beta2 = read_beta2(optimizer)
    if beta2 is not None:
        arguments.get_v0_scale(beta2)
    elif arguments.v0_warmup_steps is not None:
        raise InputError(
            f"v0_warmup_steps={arguments.v0_warmup_steps} with {type(unwrap_optimizer(optimizer)).__name__}: its second moment "
            "is no decaying mean of g^2, so the closed form gives no scale; use v0_scale"
        )


@contextlib.contextmanager
def _in_own_words() -> Iterator[None]:
    """Let errors name this function's arguments rather than the Trainer's flags."""
    try:
        yield
    except InputError as error:
        words = re.sub(
            r"v0_num_samples=(\d+) fit into one batch of v0_stats_batch_size",
            r"\1 samples came in one batch",
            str(error),
        )
        words = re.sub(r"v0_stats_batch_size <= (\d+)", r"batches of at most \1", words)
        words = re.sub(r"\bv0_init\b", "strategy", words)
        raise InputError(re.sub(r"\bv0_(?=[a-z])", "", words)) from error


def _report_zeros(seed: int) -> V0Report:
    return V0Report(
        strategy="zeros", scale=0.0, seed=seed, v0_mean=0.0, v0_min=0.0, v0_max=0.0, versions=collect_versions()
    )


def _log_report(report: V0Report, max_steps: int | None) -> None:
    if max_steps is not None:
        report.add_expectation(max_steps)
    if get_rank_and_world_size()[0] != 0:
        return
    for line in report.describe():
        logger.info(line)
    warning = report.find_warning()
    if warning is not None:
        logger.warning(warning)
