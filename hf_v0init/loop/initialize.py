"""The paper's per-sample estimation (eq. 10): `initialize_v0` for a loop without a Trainer; `trainer.per_sample` makes a Trainer's batches."""

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, find_batch_size, send_to_device
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from ..estimation.per_sample import FP16_LOSS_SCALE, estimate_grad_sq_mean
from ..hook.shards import NOTHING_TO_WRITE, SteppedShards
from ..records.report import V0Report
from ..second_moment.state import SecondMoment
from ..settings import DEFAULT_NUM_SAMPLES, V0InitArguments, V0Plan
from ..sharding.parts import is_sharded, name_parameters
from ..sharding.processes import fail_together, gather_objects, get_rank_and_world_size
from ..state_guard import defer_interrupts, preserve_attributes, preserve_generators, preserve_model, preserve_rng

USE_MINIBATCH = "use v0_estimator=minibatch (the default; attach_v0 in a loop of your own), which takes v0 from the run's own first steps"


def initialize_v0(
    optimizer,
    *,
    model: nn.Module,
    batches: Iterable,
    loss_fn: Callable[[nn.Module, Any], torch.Tensor],
    accelerator=None,
    v0_scale: float | None = None,
    v0_decay_steps: float | None = None,
    v0_num_samples: int | None = DEFAULT_NUM_SAMPLES,
    v0_seed: int = 0,
    v0_include_bias_and_norm: bool = False,
    effective_batch_size: float | None = None,
    other_modules: Sequence[nn.Module] = (),
    max_steps: int | None = None,
) -> V0Report:
    """Give an optimizer's second moment the paper's data-driven v0, scale * E[g^2] of single samples, before its first step.

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        initialize_v0(optimizer, model=model, batches=loader, loss_fn=loss_fn, accelerator=accelerator)

    `attach_v0` needs no pass and no batches. Nothing but the second moment changes, also when an exception passes. Under DDP each
    process gives its own batches, and v0 is that of all of them together.

    Args:
        optimizer: torch's or another's with a second moment, plain or prepared by accelerate.
        model: whose parameters get a v0, plain, compiled or inside DDP.
        batches: this process's batches, read once and no further than needed. Of a `DataLoader`, accelerate's too, the order of
            the next epoch is kept. E[g^2] is estimated as mean^2 + b*Var over batches of b samples, exact for single samples; b is
            the length of a batch's first tensor.
        loss_fn: maps (model, batch) to the scalar mean loss over the batch's samples, as the loop computes it and without
            division by accumulation steps. It must use the model it is given, which is not inside DDP.
        accelerator: places the batches on its device and tells precision and accumulation.
        v0_scale, v0_decay_steps, v0_seed, v0_include_bias_and_norm: as the flags of these names.
        v0_num_samples: samples over all processes, rounded up to whole batches; None: all of `batches`.
        effective_batch_size: samples of one optimizer step over all processes, which the log's outlook needs. Default: samples
            of the first batch x the accelerator's `gradient_accumulation_steps` x processes.
        other_modules: further modules that `loss_fn` runs, such as a GAN's other network, which are left as they were.
        max_steps: optimizer steps of the whole run. With it the report and the log say what v0 will do over the run, and
            `v0_decay_steps` below 1 is a fraction of them.

    Returns:
        What was done, see `V0Report`; `report.to_dict()` are plain JSON types.

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment or with state already; a model that is sharded
            (FSDP2, ZeRO, tensor parallelism); no batches; a loss that is no scalar, not finite or without gradient. The optimizer is then
            as before.
    """
    plan = V0InitArguments(
        v0_init="data_driven",
        v0_estimator="per_sample",
        v0_scale=v0_scale,
        v0_decay_steps=v0_decay_steps,
        v0_seed=v0_seed,
        v0_include_bias_and_norm=v0_include_bias_and_norm,
        v0_num_samples=v0_num_samples,
    ).resolve(max_steps)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(f"initialize_v0 under FSDP1 is not supported: use DDP; or FSDP2, and there {USE_MINIBATCH}")
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    rank, num_processes = get_rank_and_world_size()

    def compute_loss(batch: Any) -> torch.Tensor:
        if accelerator is not None and accelerator.device_placement:
            batch = send_to_device(batch, accelerator.device)
        loss = loss_fn(inner, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.requires_grad:
            raise InputError(
                f"loss_fn returned {type(loss).__name__} {tuple(getattr(loss, 'shape', ()))}: it must return the mean loss of the batch, a "
                "scalar tensor with a gradient, computed from the model that it is given"
            )
        return loss

    with contextlib.ExitStack() as stack:
        for context in (defer_interrupts(), preserve_rng(), _preserve_order(batches)):
            stack.enter_context(context)
        for module in model.modules():
            if isinstance(module, (DistributedDataParallel, DataParallel)):
                stack.enter_context(module.register_forward_pre_hook(_refuse_wrapped))
        for module in other_modules:
            stack.enter_context(preserve_model(module))
        with fail_together():
            iterator = iter(batches)
            first = next(iterator, None)
            if first is None:
                raise InputError("batches is empty, so there are no gradients to take v0 from: check the data")
            size = find_batch_size(first)
        sizes, mine = gather_objects(size), None
        if v0_num_samples is not None:
            mine = max(0, math.ceil((math.ceil(v0_num_samples / sizes[0]) - rank) / num_processes))
        chosen = itertools.islice(itertools.chain([first], iterator), mine)
        report = write_per_sample_v0(
            optimizer,
            inner,
            plan,
            ((batch, find_batch_size(batch)) for batch in chosen),
            compute_loss,
            batch_size=sizes[0],
            effective_batch_size=float(
                effective_batch_size or sum(sizes) * getattr(accelerator, "gradient_accumulation_steps", 1)
            ),
            is_fp16=getattr(accelerator, "mixed_precision", "no") == "fp16",
        )
    if max_steps is not None:
        report.add_expectation(max_steps)
    if rank == 0:
        report.log()
    return report


def write_per_sample_v0(
    optimizer,
    model: nn.Module,
    plan: V0Plan,
    batches: Iterable[tuple[Any, int]],
    compute_loss: Callable[[Any], torch.Tensor],
    *,
    batch_size: int,
    effective_batch_size: float,
    is_fp16: bool,
) -> V0Report:
    """Write v0 = scale * E[g^2] of single samples into an optimizer's second moments; nothing where it raises `InputError`.

    Args:
        model: whose parameters get a v0, not inside DDP.
        plan: with the per-sample estimator.
        batches, compute_loss, effective_batch_size: see `estimate_grad_sq_mean`.
        batch_size: samples per batch, for the report.
        is_fp16: whether the loss is computed in fp16, in which small gradients would be lost.
    """
    moments = SecondMoment(optimizer)
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
    scales = [plan.get_scale(moments.read_beta2(shard.group) or 0.0) for shard in chosen]
    tensors, numbers = estimate_grad_sq_mean(
        [(shard.name, shard.param) for shard in chosen],
        batches,
        compute_loss,
        model=model,
        seed=plan.seed,
        loss_scale=FP16_LOSS_SCALE if is_fp16 else 1.0,
        effective_batch_size=effective_batch_size,
        other_parameters=[parameter for group in moments.list_groups() for parameter in group["params"]],
    )
    if numbers["measured_ratio"] is not None:
        numbers["measured_ratio"] *= scales[0]
    without = [shard for shard in trained if shard not in chosen]
    report = replace(
        V0Report.begin(plan, moments, chosen, without, scale=scales[0]),
        stats_batch_size=batch_size,
        effective_batch_size=effective_batch_size,
        **numbers,
    )
    report.add_parameters(chosen, list(tensors.values()), scales, over_processes=False)
    report.without_gradient = [name for name, entry in report.parameters.items() if entry["max"] == 0.0]
    with torch.no_grad():
        moments.prime(chosen)
        for shard, scale in zip(chosen, scales, strict=True):
            moments.change(shard, lambda v0, s=tensors[shard.name], f=scale: v0.copy_(s * f))
    return report


def _refuse_wrapped(*_) -> None:
    """Refuse a loss function that runs the model inside DDP, which averages gradients before anyone sees them."""
    raise InputError(
        "loss_fn runs the model inside DDP (or DataParallel), so no process's own gradient is seen: it must run the model that "
        "it is given as its first argument"
    )


@contextlib.contextmanager
def _preserve_order(batches: Any) -> Iterator[None]:
    """Let the next iteration over a `DataLoader` (accelerate's as well) be the one that it would have been."""
    parts, waiting = [], [batches]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (DataLoader, Sampler)) and not any(part is other for other in parts):
            parts.append(part)
            waiting.extend(vars(part).values())
    with preserve_generators(*parts), preserve_attributes(*parts):
        try:
            yield
        finally:
            for part in parts:
                if hasattr(part, "gradient_state") and hasattr(part, "end"):
                    part.end()  # accelerate: this look is not an iteration of the run
