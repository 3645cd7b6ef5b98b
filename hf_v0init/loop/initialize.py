"""The paper's per-sample estimation (eq. 10) for a training loop without a Trainer, over the loop's own batches."""

import contextlib
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from accelerate.utils import extract_model_from_parallel, find_batch_size, send_to_device
from torch import nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from ..estimation.per_sample import FP16_LOSS_SCALE, SampleBatch
from ..hook.per_sample import USE_MINIBATCH, write_per_sample_v0
from ..records.report import V0Report
from ..settings import DEFAULT_NUM_SAMPLES, V0InitArguments
from ..sharding.processes import fail_together, gather_objects, get_rank_and_world_size
from ..state_guard import defer_interrupts, preserve_generators, preserve_model, preserve_rng

logger = logging.getLogger("hf_v0init")

LossFunction = Callable[[nn.Module, Any], torch.Tensor]


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
    effective_batch_size: float | None = None,
    count_samples: Callable[[Any], int] = find_batch_size,
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
            the next epoch is kept. E[g^2] is estimated as mean^2 + b*Var over batches of b samples, exact for single samples.
        loss_fn: maps (model, batch) to the scalar mean loss over the batch's samples, as the loop computes it and without
            division by accumulation steps. It must use the model it is given, which is not inside DDP.
        accelerator: places the batches on its device and tells precision and accumulation.
        v0_scale, v0_decay_steps, v0_seed, v0_include_bias_and_norm: as the flags of these names.
        v0_num_samples: samples over all processes, rounded up to whole batches; None: all of `batches`.
        effective_batch_size: samples of one optimizer step over all processes, which the log's outlook needs. Default: samples
            of the first batch x the accelerator's `gradient_accumulation_steps` x processes.
        count_samples: maps a batch to its number of samples. Default: the length of its first tensor.
        other_modules: further modules that `loss_fn` runs, such as a GAN's other network. They are left as they were, and their
            gradients are neither computed nor kept.
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
        **({} if v0_num_samples is None else {"v0_num_samples": v0_num_samples}),
    ).resolve(max_steps)
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(f"initialize_v0 under FSDP1 is not supported: use DDP; or FSDP2, and there {USE_MINIBATCH}")
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    with contextlib.ExitStack() as stack:
        for context in (defer_interrupts(), preserve_rng(), _preserve_order(batches), _refuse_wrapped(model)):
            stack.enter_context(context)
        for module in other_modules:
            stack.enter_context(preserve_model(module))
            stack.enter_context(_without_gradients(module, inner))
        first, batches, sizes = _open(batches, count_samples)
        num_batches = None if v0_num_samples is None else math.ceil(v0_num_samples / sizes[0])
        accumulation = getattr(accelerator, "gradient_accumulation_steps", 1)
        report = write_per_sample_v0(
            optimizer,
            inner,
            plan,
            _number(itertools.chain(first, batches), num_batches, accelerator, count_samples),
            lambda batch: _compute_loss(loss_fn, inner, batch),
            batch_size=sizes[0],
            effective_batch_size=float(effective_batch_size or sum(sizes) * accumulation),
            loss_scale=FP16_LOSS_SCALE if getattr(accelerator, "mixed_precision", "no") == "fp16" else 1.0,
        )
    if max_steps is not None:
        report.add_expectation(max_steps)
    if get_rank_and_world_size()[0] == 0:
        report.log()
    return report


# ---- the loop's batches and loss -----------------------------------------------------------------------------------------


def _open(batches: Iterable, count_samples: Callable[[Any], int]) -> tuple[list, Iterator, list[int]]:
    """Begin to read: this process's first batch in a list, the iterator after it, and the samples of every process's first batch."""
    with fail_together():
        iterator = iter(batches)
        first = list(itertools.islice(iterator, 1))
        if not first:
            raise InputError("batches is empty, so there are no gradients to take v0 from: check the data")
        size = count_samples(first[0])
    return first, iterator, gather_objects(size)


def _number(
    batches: Iterator, num_batches: int | None, accelerator, count_samples: Callable[[Any], int]
) -> Iterator[SampleBatch]:
    """Yield this process's of `num_batches` over all processes (None: all), numbered as if one process had dealt them out in turn."""
    rank, num_processes = get_rank_and_world_size()
    mine = None if num_batches is None else max(0, math.ceil((num_batches - rank) / num_processes))
    for place, batch in enumerate(itertools.islice(batches, mine)):
        if accelerator is not None and accelerator.device_placement:
            batch = send_to_device(batch, accelerator.device)
        yield SampleBatch(batch, count_samples(batch), rank + place * num_processes)


def _compute_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> torch.Tensor:
    loss = loss_fn(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0 or not loss.requires_grad:
        raise InputError(
            f"loss_fn returned {type(loss).__name__} {tuple(getattr(loss, 'shape', ()))}: it must return the mean loss of the batch, a "
            "scalar tensor with a gradient, computed from the model that it is given"
        )
    return loss


# ---- what is left alone ----------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _refuse_wrapped(model: nn.Module) -> Iterator[None]:
    """Refuse a loss function that runs the model inside DDP, which averages gradients before anyone sees them."""

    def refuse(*_) -> None:
        raise InputError(
            "loss_fn runs the model inside DDP (or DataParallel), so no process's own gradient is seen: it must run the model that "
            "it is given as its first argument"
        )

    wrappers = [module for module in model.modules() if isinstance(module, (DistributedDataParallel, DataParallel))]
    hooks = [wrapper.register_forward_pre_hook(refuse) for wrapper in wrappers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextlib.contextmanager
def _without_gradients(module: nn.Module, model: nn.Module) -> Iterator[None]:
    """Let no gradient be computed for the parameters of `module` that are not those of `model`."""
    of_model = set(model.parameters())
    switched = [p for p in module.parameters() if p.requires_grad and p not in of_model]
    try:
        for parameter in switched:
            parameter.requires_grad_(False)
        yield
    finally:
        for parameter in switched:
            parameter.requires_grad_(True)


@contextlib.contextmanager
def _preserve_order(batches: Any) -> Iterator[None]:
    """Let the next iteration over a `DataLoader` (accelerate's as well) be the one that it would have been."""
    parts, waiting = [], [batches]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (DataLoader, Sampler)) and not any(part is other for other in parts):
            parts.append(part)
            waiting.extend(vars(part).values())
    kept = [(part, name, vars(part)[name]) for part in parts for name in ("iteration", "epoch") if name in vars(part)]
    with preserve_generators(*parts):
        try:
            yield
        finally:
            for part in parts:
                if hasattr(part, "gradient_state") and hasattr(part, "end"):
                    part.end()  # accelerate: this look is not an iteration of the run
            for part, name, value in kept:
                setattr(part, name, value)
