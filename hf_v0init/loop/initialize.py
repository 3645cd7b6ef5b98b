"""The paper's per-sample estimation for a training loop without a Trainer: E[g^2] over the loop's own batches, before training (eq. 10).

    model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
    initialize_v0(optimizer, model=model, batches=loader, loss_fn=loss_fn, accelerator=accelerator)
    for batch in loader: ...                        # as ever

`attach_v0` needs no pass, no batches and no loss function; this is for those who want the paper's statistic.

Call it when model and optimizer are prepared and nothing has been trained; after a resume the checkpoint's state stands, so
do not call it then (it refuses). Nothing but the optimizer's second moment changes: weights, buffers, modes, gradients, random
states and the order of a `DataLoader` given as `batches` are as before, also after an exception.

Under DDP each process gives its own batches, as accelerate's loaders do, and v0 is that of all of them together.
"""

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
from ..estimation.batches import SampleBatch
from ..estimation.per_sample import FP16_LOSS_SCALE, estimate_grad_sq_mean
from ..initialization.plan import USE_MINIBATCH, plan_v0
from ..initialization.writing import write_v0
from ..records.report import V0Report
from ..second_moment.state import SecondMoment
from ..settings import DEFAULT_NUM_SAMPLES, V0InitArguments, V0Plan
from ..sharding.processes import fail_together, gather_objects, get_rank_and_world_size
from ..state_guard import defer_interrupts, preserve_model, preserve_rng

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
    batches_per_step: int | None = None,
    effective_batch_size: float | None = None,
    count_samples: Callable[[Any], int] | None = None,
    other_modules: Sequence[nn.Module] = (),
    max_steps: int | None = None,
) -> V0Report:
    """Give an optimizer's second moment the paper's data-driven v0, scale * E[g^2] of single samples, before its first step.

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
        InputError: (a ValueError) bad settings; an optimizer without a second moment or with state already; a model that is sharded
            (FSDP2, ZeRO, tensor parallelism); no batches; a loss that is no scalar, not finite or without gradient. The optimizer is then
            as before.
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
    _require_one_model_per_process(model, accelerator)
    for name, value in (("batches", batches), ("loss_fn", loss_fn)):
        if value is None:
            raise InputError(f"initialize_v0 takes v0 from gradients: give {name}; attach_v0 needs none")
    inner = extract_model_from_parallel(model, keep_torch_compile=False)
    plan = plan_v0(optimizer, inner, v0_include_bias_and_norm)
    _require_scale_known(wanted, plan.moments)
    with contextlib.ExitStack() as stack:
        for context in (defer_interrupts(), preserve_rng(), _preserve_order(batches), _refuse_wrapped(model)):
            stack.enter_context(context)
        for module in other_modules:
            stack.enter_context(preserve_model(module))
            stack.enter_context(_without_gradients(module, inner))
        first, batches, sizes = _open(batches, count_samples or _count_samples)
        num_batches = None if v0_num_samples is None else math.ceil(v0_num_samples / sizes[0])
        per_step = batches_per_step or getattr(accelerator, "gradient_accumulation_steps", 1)
        of_step = float(effective_batch_size or sum(sizes) * per_step)
        estimate = estimate_grad_sq_mean(
            plan.named_parameters,
            _number(itertools.chain(first, batches), num_batches, accelerator, count_samples or _count_samples),
            lambda batch: _compute_loss(loss_fn, inner, batch),
            model=inner,
            seed=v0_seed,
            loss_scale=FP16_LOSS_SCALE if getattr(accelerator, "mixed_precision", "no") == "fp16" else 1.0,
            effective_batch_size=of_step,
        )
        report = write_v0(
            plan,
            estimate,
            lambda beta2: wanted.get_scale(beta2 or 0.0),
            seed=v0_seed,
            include_bias_and_norm=v0_include_bias_and_norm,
            decay=wanted.decay,
            decay_steps=wanted.decay_steps,
            num_samples_requested=v0_num_samples,
            stats_batch_size=sizes[0],
            effective_batch_size=of_step,
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


def _count_samples(batch: Any) -> int:
    """Return the length of a batch's first tensor."""
    try:
        return find_batch_size(batch)
    except (TypeError, ValueError, IndexError) as error:
        raise InputError(
            f"a batch of type {type(batch).__name__} does not begin with a tensor whose length is its number of samples: give count_samples"
        ) from error


def _compute_loss(loss_fn: LossFunction, model: nn.Module, batch: Any) -> torch.Tensor:
    loss = loss_fn(model, batch)
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
        raise InputError(f"loss_fn returned {what}: it must return the mean loss of the batch, a scalar tensor")
    if not loss.requires_grad:
        raise InputError(
            "loss_fn's loss has no gradient: it must be computed from the model that loss_fn is given, without no_grad, "
            "detach or item"
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
    parts = _find_loader_parts(batches)
    kept = [(part, name, vars(part)[name]) for part in parts for name in _ORDER if name in vars(part)]
    generators = [(value, value.get_state()) for _, _, value in kept if isinstance(value, torch.Generator)]
    try:
        yield
    finally:
        for part in parts:
            if hasattr(part, "gradient_state") and hasattr(part, "end"):
                part.end()  # accelerate: this look is not an iteration of the run
        for part, name, value in kept:
            setattr(part, name, value)
        for generator, state in generators:
            generator.set_state(state)


_ORDER = ("generator", "synchronized_generator", "iteration", "epoch")


def _find_loader_parts(batches: Any) -> list:
    """A loader, the loaders inside it and their samplers."""
    found, waiting = [], [batches]
    while waiting:
        part = waiting.pop()
        if isinstance(part, (DataLoader, Sampler)) and not any(part is other for other in found):
            found.append(part)
            waiting.extend(vars(part).values())
    return found


# ---- what is refused -------------------------------------------------------------------------------------------------


def _require_counts(batches_per_step, effective_batch_size) -> None:
    value = batches_per_step
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise InputError(f"batches_per_step={value!r}: must be a whole number >= 1, or None")
    if effective_batch_size is not None and not 1 <= effective_batch_size < math.inf:
        raise InputError(f"effective_batch_size={effective_batch_size!r}: must be a number >= 1, or None")


def _require_one_model_per_process(model: nn.Module, accelerator) -> None:
    """Refuse what cuts the model up in ways that its parameters do not show; `plan_v0` refuses the others."""
    kind = str(getattr(getattr(accelerator, "distributed_type", None), "value", ""))
    if kind in ("DEEPSPEED", "MEGATRON_LM") or type(model).__name__ == "DeepSpeedEngine":
        raise InputError(f"initialize_v0 under DeepSpeed (ZeRO) or Megatron-LM is not supported: {USE_MINIBATCH}")
    if any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules()):
        raise InputError(
            f"initialize_v0 under FSDP1 is not supported: use DDP; or FSDP2 (fsdp_version: 2), and there {USE_MINIBATCH}"
        )


def _require_scale_known(wanted: V0Plan, moments: SecondMoment) -> None:
    for group in moments.list_groups():
        beta2 = moments.read_beta2(group)
        if beta2 is not None:
            wanted.get_scale(beta2)
        elif wanted.decay_steps is not None:
            raise InputError(
                f"v0_decay_steps={wanted.decay_steps} with {moments.name}: its second moment "
                "is no decaying mean of g^2, so the closed form gives no scale; use v0_scale"
            )
