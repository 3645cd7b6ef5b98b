"""The paper's per-sample estimation through a Trainer: over training samples, with its own collator, precision and loss, before training.

The samples are drawn without replacement from the training data by the v0 seed (of a stream, the first ones) and cut into batches, of one
unless asked otherwise, once for all processes; process r of W runs batches r, r + W, r + 2W, ... The training order is not touched, since
neither the run's data loader nor its sampler is used. The loss is as training computes it, without the division by accumulation steps.

What `compute_loss` alone does not say is refused: training steps and loaders of a Trainer's own, data that can be read only once.
"""

import copy
import itertools
import math
import random
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.data import IterableDataset, Subset
from transformers.utils.logging import tqdm

from ..errors import InputError
from ..estimation.per_sample import compute_batch_seed
from ..loop.initialize import USE_MINIBATCH, write_per_sample_v0
from ..records.report import V0Report
from ..settings import V0Plan
from ..state_guard import preserve_attributes, seed_everything
from .first_loss import preserve_trainer


def write_trainers_v0(trainer, plan: V0Plan, optimizer) -> V0Report:
    """Estimate E[g^2] over training samples of a Trainer and write v0 from it (eq. 10). Nothing else of the run changes.

    Args:
        trainer: a `transformers.Trainer`, its model prepared.
        plan: with the per-sample estimator.
        optimizer: its optimizer, without state.

    Raises:
        InputError: (on every process) what the head of the file refuses, and what `write_per_sample_v0` does.
    """
    _require_pass_is_possible(trainer)
    args, batch_size = trainer.args, _choose_batch_size(trainer, plan)
    if hasattr(trainer, "get_v0_effective_batch_size"):  # batches under a budget of tokens have another size
        step_size = trainer.get_v0_effective_batch_size()
    else:
        step_size = float(trainer.get_total_train_batch_size(args))

    def compute_loss(batch: Any) -> torch.Tensor:
        trainer.model.train()
        num_items = trainer._get_num_items_in_batch([batch], args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(trainer.model, trainer._prepare_inputs(batch), num_items_in_batch=num_items)
        return loss.mean()

    with preserve_trainer(trainer), preserve_attributes(args):
        args.average_tokens_across_devices = False  # processes have different batches
        samples, make_inputs = _choose_inputs(trainer, plan)
        batches = iterate_batches(samples, make_inputs, batch_size, plan.seed, args.process_index, args.world_size)
        total = math.ceil(len(samples) / batch_size / args.world_size) if isinstance(samples, list) else None
        hidden = args.disable_tqdm or args.process_index != 0
        report = write_per_sample_v0(
            optimizer,
            trainer.model,
            plan,
            tqdm(batches, total=total, desc="v0: gradient statistics", unit="batch", disable=hidden),
            compute_loss,
            batch_size=batch_size,
            effective_batch_size=step_size,
            is_fp16=args.fp16,
        )
    report.global_step = trainer.state.global_step
    return report


def _choose_inputs(trainer, plan: V0Plan) -> tuple[Iterable, Callable[[list], Any]]:
    """Choose samples as numbers, or take the first ones of a stream; with what makes the loss's inputs of some."""
    dataset = getattr(trainer, "get_v0_dataset", lambda: trainer.train_dataset)()  # segments bring their context along
    collate, is_stream = copy.deepcopy(trainer.data_collator), _is_stream(dataset)
    if hasattr(dataset, "remove_columns") and not is_stream:  # of `datasets`, as the Trainer does
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    if is_stream:
        return itertools.islice(iter(dataset), plan.num_samples), collate
    read = Subset(dataset, range(len(dataset))).__getitems__
    return choose_samples(len(dataset), plan.num_samples, plan.seed), lambda numbers: collate(read(numbers))


def choose_samples(num_available: int, num_samples: int, seed: int) -> list[int]:
    """Choose min(num_samples, num_available) sample numbers at random, without replacement.

    Raises:
        InputError: there is nothing to choose from.
    """
    if num_available == 0:
        raise InputError("the training data are empty, so v0 has no gradients to be taken from: check the data files")
    return random.Random(seed).sample(range(num_available), min(num_samples, num_available))


def iterate_batches(
    samples: Iterable, make_inputs: Callable[[list], Any], batch_size: int, seed: int, rank: int, world_size: int
) -> Iterator[tuple[Any, int]]:
    """Cut samples into batches and yield those of process `rank`, each (inputs, number of samples), as many to every process.

    A single sample that is left joins the batch before it, since not every loss takes one. A process that would have one batch fewer
    gets the last once more as one of 0 samples: a loss that communicates must be computed as often on every process. The inputs of
    batch k are made under a seed from (seed, k), and only this process's are.
    """

    def make(index: int, own: list, size: int) -> tuple[Any, int]:
        seed_everything(compute_batch_seed(seed, index))
        return make_inputs(own), size

    samples, index, batch = iter(samples), -1, []
    following = list(itertools.islice(samples, batch_size))
    while following:
        batch, following = following, list(itertools.islice(samples, batch_size))
        if len(following) == 1 < batch_size:
            batch, following = batch + following, []
        index += 1
        if index % world_size == rank:
            yield make(index, batch, len(batch))
    if batch and index % world_size < rank:
        yield make(index, batch, 0)


def _is_stream(dataset) -> bool:
    return isinstance(dataset, IterableDataset) or not hasattr(dataset, "__len__")


def _choose_batch_size(trainer, plan: V0Plan) -> int:
    """Choose the samples per batch: as asked for, else 1, which is exact, or the training's own where a batch norm needs several."""
    if plan.stats_batch_size is not None:
        return plan.stats_batch_size
    if not any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in trainer.model.modules()):
        return 1
    available = plan.num_samples if _is_stream(trainer.train_dataset) else len(trainer.train_dataset)
    return min(trainer._train_batch_size, max(2, min(plan.num_samples, available) // 2))


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
