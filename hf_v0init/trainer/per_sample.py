"""The paper's per-sample estimation through a Trainer: over training samples, with its own collator, precision and loss, before training.

The samples are drawn without replacement from the training data by the v0 seed (of a stream, the first ones) and cut into batches, of one
unless asked otherwise, once for all processes; process r of W runs batches r, r + W, r + 2W, ... The training order is not touched, since
neither the run's data loader nor its sampler is used. The loss is as training computes it, without the division by accumulation steps.

What `compute_loss` alone does not say is refused: training steps and loaders of a Trainer's own, data that can be read only once.
"""

import contextlib
import copy
import itertools
import logging
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..estimation.per_sample import FP16_LOSS_SCALE, SampleBatch, compute_batch_seed
from ..hook.per_sample import USE_MINIBATCH, write_per_sample_v0
from ..records.report import V0Report
from ..second_moment.state import unwrap_optimizer
from ..settings import V0Plan
from ..state_guard import seed_everything
from .first_loss import preserve_trainer

logger = logging.getLogger("hf_v0init")

IGNORED_LABEL = -100


def write_trainers_v0(trainer, plan: V0Plan, optimizer) -> V0Report:
    """Estimate E[g^2] over training samples of a Trainer and write v0 from it (eq. 10). Nothing else of the run changes.

    Args:
        trainer: a `transformers.Trainer`, its model prepared.
        plan: with the per-sample estimator.
        optimizer: its optimizer, without state.

    Raises:
        InputError: (on every process) what the head of the file refuses, and what `write_per_sample_v0` does.
    """
    args = trainer.args
    _require_pass_is_possible(trainer)
    batch_size = _choose_batch_size(trainer, plan)
    step_size = float(trainer.get_total_train_batch_size(args))
    if hasattr(trainer, "get_v0_effective_batch_size"):  # batches under a budget of tokens have another size
        step_size = trainer.get_v0_effective_batch_size()
    with preserve_trainer(trainer), _count_items_locally(args):
        samples, collate = _choose_samples(trainer, plan.num_samples, plan.seed)
        batches = iterate_batches(samples, collate, batch_size, plan.seed, args.process_index, args.world_size)
        total = math.ceil(len(samples) / batch_size / args.world_size) if isinstance(samples, list) else None
        hidden = args.disable_tqdm or args.process_index != 0
        report = write_per_sample_v0(
            optimizer,
            trainer.model,
            plan,
            transformers_logging.tqdm(
                batches, total=total, desc="v0: gradient statistics", unit="batch", disable=hidden
            ),
            lambda batch: _compute_loss(trainer, batch),
            batch_size=batch_size,
            effective_batch_size=step_size,
            loss_scale=FP16_LOSS_SCALE if args.fp16 else 1.0,
            other_parameters=_list_parameters_outside(trainer, optimizer),
        )
    report.global_step = trainer.state.global_step
    return report


def _choose_samples(trainer, num_samples: int, seed: int) -> tuple[Iterable, Callable[[list], object]]:
    """Choose samples as numbers, or take the first ones of a stream; with what makes the loss's inputs of some."""
    dataset = getattr(trainer, "get_v0_dataset", lambda: trainer.train_dataset)()  # segments bring their context along
    collate = copy.deepcopy(trainer.data_collator)
    if hasattr(dataset, "remove_columns") and not _is_stream(
        dataset
    ):  # of `datasets`, whose unused columns the Trainer removes itself
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    if _is_stream(dataset):
        return itertools.islice(iter(dataset), num_samples), collate
    if num_samples > len(dataset):
        logger.info(f"v0_num_samples={num_samples} is more than the {len(dataset)} training samples: all are used")

    def read(numbers: list[int]) -> list:
        return dataset.__getitems__(numbers) if hasattr(dataset, "__getitems__") else [dataset[n] for n in numbers]

    return choose_samples(len(dataset), num_samples, seed), lambda numbers: collate(read(numbers))


def choose_samples(num_available: int, num_samples: int, seed: int) -> list[int]:
    """Choose min(num_samples, num_available) sample numbers at random, without replacement.

    Raises:
        InputError: there is nothing to choose from.
    """
    if num_available == 0:
        raise InputError("the training data are empty, so v0 has no gradients to be taken from: check the data files")
    return random.Random(seed).sample(range(num_available), min(num_samples, num_available))


def cut_into_batches(samples: Iterable, batch_size: int) -> Iterator[list]:
    """Cut samples into batches; a single one that is left joins the batch before it, since not every loss takes one."""
    samples = iter(samples)
    batch = list(itertools.islice(samples, batch_size))
    while batch:
        following = list(itertools.islice(samples, batch_size))
        if batch_size > 1 and len(following) == 1:
            batch, following = batch + following, []
        yield batch
        batch = following


def deal_out(batches: Iterable, rank: int, world_size: int) -> Iterator[tuple[int, Any, bool]]:
    """Deal batches out to process `rank` in turn, as many to each: (number, batch, whether it counts).

    A process that would have one fewer gets the last once more, which does not count: a loss that communicates must be computed as
    often on every process.
    """
    number, batch = -1, None
    for number, batch in enumerate(batches):
        if number % world_size == rank:
            yield number, batch, True
    if number >= 0 and number % world_size < rank:
        yield number, batch, False


def has_targets(inputs: Any) -> bool:
    """Whether collated inputs have any label that is not ignored (-100), beside the first of each row; True without labels."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.dim() == 0 or labels.numel() == 0:
        return True
    return bool((labels[:, 1:] if labels.dim() > 1 and labels.shape[1] > 1 else labels).ne(IGNORED_LABEL).any())


def iterate_batches(
    samples: Iterable, collate: Callable[[list], Any], batch_size: int, seed: int, rank: int, world_size: int
) -> Iterator[SampleBatch]:
    """Yield one process's batches of the pass.

    Args:
        samples: of all processes: their numbers, or the items of a stream.
        collate: makes the loss's inputs of a list of them. Only this process's are read.
        batch_size: samples per batch.
        seed: what collates batch k is seeded from (seed, k).
        rank, world_size: this process, and the number of processes.
    """
    for index, own, counts in deal_out(cut_into_batches(samples, batch_size), rank, world_size):
        seed_everything(compute_batch_seed(seed, index))
        inputs = collate(own)
        yield SampleBatch(inputs, len(own), index, counts, has_targets(inputs))


def _is_stream(dataset) -> bool:
    return isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")


def _choose_batch_size(trainer, plan: V0Plan) -> int:
    """Choose the samples per batch: as asked for, else 1, which is exact, or the training's own where a batch norm needs several."""
    if plan.stats_batch_size is not None:
        return plan.stats_batch_size
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trainer.model.modules()):
        return 1
    num_samples = plan.num_samples
    if not _is_stream(trainer.train_dataset):
        num_samples = min(num_samples, len(trainer.train_dataset))
    return min(trainer._train_batch_size, max(2, num_samples // 2))


def _compute_loss(trainer, batch) -> torch.Tensor:
    """The mean loss of one batch, as training computes it, without the division by accumulation steps."""
    trainer.model.train()
    num_items = trainer._get_num_items_in_batch([batch], trainer.args.device)
    with trainer.compute_loss_context_manager():
        loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=num_items)
    return loss.mean()


@contextlib.contextmanager
def _count_items_locally(args) -> Iterator[None]:
    """Count the loss's items per process, not over all: processes have different batches."""
    before = args.average_tokens_across_devices
    args.average_tokens_across_devices = False
    try:
        yield
    finally:
        args.average_tokens_across_devices = before


def _list_parameters_outside(trainer, optimizer) -> list[nn.Parameter]:
    """List what the loss may use outside of the model: the optimizer's parameters, and those of modules that the Trainer holds."""
    held = [parameter for group in unwrap_optimizer(optimizer).param_groups for parameter in group["params"]]
    modules = [value for value in vars(trainer).values() if isinstance(value, nn.Module) and value is not trainer.model]
    return held + [parameter for module in modules for parameter in module.parameters()]


def _require_pass_is_possible(trainer) -> None:
    """Raise `InputError` where a pass would not see what the training sees, or would take samples from it."""
    if trainer.args.n_gpu > 1:
        raise InputError(
            f"v0_estimator=per_sample with torch.nn.DataParallel over {trainer.args.n_gpu} GPUs is not supported: start one process per "
            f"GPU with `accelerate launch` or `torchrun`; or {USE_MINIBATCH}"
        )
    for name in ("training_step", "get_train_dataloader", "_get_train_sampler"):
        home = next((base.__module__ for base in type(trainer).__mro__ if name in vars(base)), "transformers.")
        if not home.startswith(("transformers.", "hf_v0init.")):
            raise InputError(
                f"v0_estimator=per_sample with {type(trainer).__name__}, which has a {name} of its own: a pass over single samples would not "
                f"see what the training sees; {USE_MINIBATCH}"
            )
    dataset = trainer.train_dataset
    if dataset is None or isinstance(dataset, dict):
        what = "without a train_dataset" if dataset is None else "with a dictionary of training data sets"
        raise InputError(f"v0_estimator=per_sample {what}: it reads samples before training; {USE_MINIBATCH}")
    kept = [name for name, value in getattr(dataset, "__dict__", {}).items() if isinstance(value, Iterator)]
    if _is_stream(dataset) and (isinstance(dataset, Iterator) or kept):
        raise InputError(
            f"train_dataset of type {type(dataset).__name__} can be read only once, so the samples read for v0 would be lost to training; "
            f"use a data set that can be iterated again, or {USE_MINIBATCH}"
        )
