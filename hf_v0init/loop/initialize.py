"""The paper's pass for a training loop without a Trainer: E[g^2] over the loop's own batches, before training (eq. 10).

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialize_v0(optimizer, model=model, batches=loader, loss_fn=loss_fn, accelerator=accelerator)
    for batch in loader: ...                        # as ever

`attach_v0` needs no pass, no batches and no loss function; this is for those who want the paper's statistic.

Call it when model and optimizer are prepared and nothing has been trained; after a resume the checkpoint's state stands, so
do not call it then (it refuses). Nothing but the optimizer's second moment changes: weights, buffers, modes, gradients, random
states and the order of a `DataLoader` given as `batches` are as before, also after an exception.

With several processes each gives its own batches, as accelerate's loaders do, and v0 is that of all of them together: under
DDP by one reduction of the sums; where parameters are sharded (FSDP2, tensor parallelism) by running every batch together.
"""

import functools
import logging
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from torch import nn

from ..errors import InputError
from ..initialization.plan import plan_v0
from ..initialization.writing import estimate_grad_sq_mean, write_v0
from ..records.report import V0Report
from ..second_moment.state import SecondMoments
from ..settings import DEFAULT_NUM_SAMPLES, V0InitArguments, V0Plan
from ..sharding.processes import get_rank_and_world_size
from ..state_guard import defer_interrupts
from .gradients import LoopGradients, LossFunction, count_first_dimension, unwrap_model

logger = logging.getLogger("hf_v0init")


def initialize_v0(
    optimizer,
    *,
    model: nn.Module,
    batches: Iterable,
    loss_fn: LossFunction,
    accelerator=None,
    v0_scale: float | None = None,
    v0_decay_steps: float | None = None,
    v0_num_samples: int | None = DEFAULT_NUM_SAMPLES,
    v0_seed: int = 0,
    v0_include_bias_and_norm: bool = False,
    batches_per_step: int | None = None,
    effective_batch_size: float | None = None,
    count_samples: Callable[[Any], int] | None = None,
    other_modules: Sequence[nn.Module] = (),
    max_steps: int | None = None,
) -> V0Report:
    """Give an optimizer's second moment the paper's data-driven v0, scale * E[g^2] of single samples, before its first step.

    Args:
        optimizer: torch's or another's with a second moment, plain or prepared by accelerate.
        model: whose parameters get a v0, plain, compiled, inside DDP, or sharded by FSDP2 or tensor parallelism.
        batches: this process's batches, read once and no further than needed. Of a `DataLoader`, accelerate's too, the order of
            the next epoch is kept. E[g^2] is estimated as mean^2 + b*Var over batches of b samples, exact for single samples.
        loss_fn: maps (model, batch) to the scalar mean loss over the batch's samples, as the loop computes it and without
            division by accumulation steps. It must use the model it is given, which is not inside DDP.
        accelerator: places the batches on its device and tells precision and accumulation.
        v0_scale, v0_decay_steps, v0_seed, v0_include_bias_and_norm: as the flags of these names.
        v0_num_samples: samples over all processes, rounded up to whole batches; None: all of `batches`.
        batches_per_step: batches per process that one optimizer step averages over. Default: the accelerator's
            `gradient_accumulation_steps`, or 1.
        effective_batch_size: samples of one optimizer step over all processes, which the log's outlook needs. Default: samples
            of the first batch x `batches_per_step` x processes.
        count_samples: maps a batch to its number of samples. Default: the length of its first tensor.
        other_modules: further modules that `loss_fn` runs, such as a GAN's other network. They are left as they were, and their
            gradients are neither computed nor kept.
        max_steps: optimizer steps of the whole run. With it the report and the log say what v0 will do over the run, and
            `v0_decay_steps` below 1 is a fraction of them.

    Returns:
        What was done, see `V0Report`; `report.to_dict()` are plain JSON types.

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment or with state already; no batches; a
            loss that is no scalar, not finite or without gradient. The optimizer is then as before.
    """
    wanted = V0InitArguments(
        v0_init="data_driven",
        v0_estimator="per_sample",
        v0_scale=v0_scale,
        v0_decay_steps=v0_decay_steps,
        v0_seed=v0_seed,
        v0_include_bias_and_norm=v0_include_bias_and_norm,
        **({} if v0_num_samples is None else {"v0_num_samples": v0_num_samples}),
    ).resolve(max_steps)
    _require_counts(batches_per_step, effective_batch_size)
    _require_supported(model, accelerator)
    for name, value in (("batches", batches), ("loss_fn", loss_fn)):
        if value is None:
            raise InputError(f"initialize_v0 takes v0 from gradients: give {name}; attach_v0 needs none")
    plan = plan_v0(optimizer, unwrap_model(model), v0_include_bias_and_norm)
    _require_fresh(plan.moments)
    _require_scale_known(wanted, plan.moments)
    gradients = LoopGradients(
        model, loss_fn, accelerator, count_samples or count_first_dimension, other_modules, v0_seed
    )
    minibatch = batches_per_step or getattr(accelerator, "gradient_accumulation_steps", 1)
    with defer_interrupts(), gradients.open(batches):
        num_batches = math.inf if v0_num_samples is None else math.ceil(v0_num_samples / gradients.first_size)
        run = functools.partial(gradients.run, batch_range=(0, num_batches))
        of_step = float(effective_batch_size or gradients.num_samples_at_once * minibatch)
        estimate = estimate_grad_sq_mean(plan, run, of_step)
        report = write_v0(
            plan,
            estimate,
            lambda beta2: wanted.get_scale(beta2 or 0.0),
            seed=v0_seed,
            include_bias_and_norm=v0_include_bias_and_norm,
            decay=wanted.decay,
            decay_steps=wanted.decay_steps,
            num_samples_requested=v0_num_samples,
            stats_batch_size=gradients.first_size,
            effective_batch_size=of_step,
        )
    if max_steps is not None:
        report.add_expectation(max_steps)
    if get_rank_and_world_size()[0] == 0:
        report.log()
    return report


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
        raise InputError("initialize_v0 under DeepSpeed or Megatron-LM is not supported: use attach_v0, FSDP2 or DDP")
    from torch.distributed.fsdp import FullyShardedDataParallel

    if any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise InputError(
            "initialize_v0 under FSDP1 is not supported: its parameters are one-dimensional pieces; use FSDP2 (fsdp_version: 2)"
        )


def _require_fresh(moments: SecondMoments) -> None:
    if not moments.is_untouched():
        raise InputError(
            "parameters already have optimizer state: v0 is written only before the first step, and after a resume the "
            "checkpoint's state stands; do not call initialize_v0 then"
        )


def _require_scale_known(wanted: V0Plan, moments: SecondMoments) -> None:
    for group in moments.list_groups():
        beta2 = moments.read_beta2(group)
        if beta2 is not None:
            wanted.get_scale(beta2)
        elif wanted.decay_steps is not None:
            raise InputError(
                f"v0_decay_steps={wanted.decay_steps} with {moments.name}: its second moment "
                "is no decaying mean of g^2, so the closed form gives no scale; use v0_scale"
            )
