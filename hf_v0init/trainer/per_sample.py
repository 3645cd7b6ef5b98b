"""The paper's per-sample estimation through a Trainer: over training samples, with its own collator, precision and loss, before training.

Random samples (of a stream the first), one to a batch unless asked otherwise, on all processes; the loss as training computes it, without
the division by accumulation steps. What `compute_loss` alone does not say is refused: a loss that is no mean over its samples,
training steps and loaders of a Trainer's own, data that can be read only once.
"""

import contextlib
import copy
import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import nn
from transformers.utils import is_datasets_available, logging as transformers_logging

from ..errors import InputError
from ..estimation.batches import IGNORED_LABEL, choose_samples, iterate_batches, require_reiterable
from ..estimation.per_sample import FP16_LOSS_SCALE, estimate_grad_sq_mean
from ..initialization.plan import USE_MINIBATCH, plan_v0
from ..initialization.writing import write_v0
from ..records.report import V0Report
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.processes import fail_together
from ..state_guard import preserve_model, preserve_rng
from .state import preserve_trainer
from .supported_runs import require_supported_pass

logger = logging.getLogger("hf_v0init")

NUM_COMPARED = 3  # samples whose loss together is compared with theirs one by one
TOLERANCE, TOLERANCE_NARROW = 1e-3, 3e-2  # relative, of that comparison


def write_per_sample_v0(trainer, plan: V0Plan, moments: SecondMoment) -> V0Report:
    """Estimate E[g^2] over training samples of a Trainer and write v0 from it (eq. 10). Nothing else of the run changes.

    Args:
        trainer: a `transformers.Trainer`, its model and optimizer prepared.
        plan: with the per-sample estimator.
        moments: of its optimizer, without state.

    Returns:
        What was written, see `V0Report`.

    Raises:
        InputError: (on every process) what the head of the file refuses; a model that is sharded; what the estimate and `write_v0`
            raise.
    """
    args = trainer.args
    seed = args.seed if plan.seed is None else plan.seed
    require_supported_pass(trainer)
    _require_readable_data(trainer)
    _require_stock_training(trainer)
    chosen = plan_v0(moments, trainer.model, plan.include_bias_and_norm)
    plan.get_scale(chosen.beta2 or 0.0)  # one that is too large is refused before the pass
    batch_size = _choose_batch_size(trainer, plan)
    step_size = float(trainer.get_total_train_batch_size(args))
    if hasattr(trainer, "get_v0_effective_batch_size"):  # batches under a budget of tokens have another size
        step_size = trainer.get_v0_effective_batch_size()
    others = _list_parameters_outside(trainer, moments)
    with fail_together(), preserve_trainer(trainer), _count_items_locally(args):
        _require_mean_over_samples(trainer, others)
    with preserve_trainer(trainer), _count_items_locally(args):
        samples, read, collate = _choose_samples(trainer, plan.num_samples, seed)
        total = math.ceil(len(samples) / batch_size / args.world_size) if isinstance(samples, list) else None
        hidden = args.disable_tqdm or args.process_index != 0
        with transformers_logging.tqdm(
            total=total, desc="v0: gradient statistics", unit="batch", disable=hidden
        ) as bar:
            estimate = estimate_grad_sq_mean(
                chosen.named_parameters,
                iterate_batches(samples, read, collate, batch_size, seed, args.process_index, args.world_size),
                lambda batch: _compute_loss(trainer, batch, in_training=True),
                model=trainer.model,
                seed=seed,
                loss_scale=FP16_LOSS_SCALE if args.fp16 else 1.0,
                effective_batch_size=step_size,
                on_batch=bar.update,
                other_parameters=others,
            )
    return write_v0(
        chosen,
        estimate,
        lambda beta2: plan.get_scale(beta2 or 0.0),
        seed=seed,
        decay=plan.decay,
        decay_steps=plan.decay_steps,
        include_bias_and_norm=plan.include_bias_and_norm,
        num_samples_requested=plan.num_samples,
        stats_batch_size=batch_size,
        effective_batch_size=step_size,
        global_step=trainer.state.global_step,
    )


# ---- samples and loss --------------------------------------------------------------------------------------------------


def _is_stream(dataset) -> bool:
    return isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__")


def _is_table(dataset) -> bool:
    """Whether a data set is one of the `datasets` library with a length, whose unused columns the Trainer removes itself."""
    if not is_datasets_available():
        return False
    import datasets

    return isinstance(dataset, datasets.Dataset)


def _choose_samples(trainer, num_samples: int, seed: int) -> tuple[Iterable, Callable[[list], list], Callable]:
    """Choose samples as numbers, or take the first ones of a stream; with what reads them, and a collator of their own."""
    dataset = getattr(trainer, "get_v0_dataset", lambda: trainer.train_dataset)()  # segments bring their context along
    collate = copy.deepcopy(trainer.data_collator)
    if _is_table(dataset):
        dataset = trainer._remove_unused_columns(dataset, description="training")
    else:
        collate = trainer._get_collator_with_removed_columns(collate, description="training")
    if _is_stream(dataset):
        return itertools.islice(iter(dataset), num_samples), list, collate
    if hasattr(dataset, "__getitems__"):
        read = dataset.__getitems__
    else:
        read = lambda numbers: [dataset[number] for number in numbers]  # noqa: E731
    if num_samples > len(dataset):
        logger.info(f"v0_num_samples={num_samples} is more than the {len(dataset)} training samples: all are used")
    return choose_samples(len(dataset), num_samples, seed), read, collate


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


def _compute_loss(trainer, batch, in_training: bool) -> torch.Tensor:
    """The mean loss of one batch, as training computes it, without the division by accumulation steps."""
    trainer.model.train(in_training)
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


def _list_parameters_outside(trainer, moments: SecondMoment) -> list[nn.Parameter]:
    """List what the loss may use outside of the model: the optimizer's parameters, and those of modules that the Trainer holds."""
    held = [parameter for group in moments.list_groups() for parameter in group["params"]]
    modules = [value for value in vars(trainer).values() if isinstance(value, nn.Module) and value is not trainer.model]
    return held + [parameter for module in modules for parameter in module.parameters()]


# ---- what is refused ---------------------------------------------------------------------------------------------------


def _require_readable_data(trainer) -> None:
    """Raise `InputError` unless there are training data that can be read before the training reads them."""
    dataset = trainer.train_dataset
    if dataset is None or isinstance(dataset, dict):
        what = "without a train_dataset" if dataset is None else "with a dictionary of training data sets"
        raise InputError(f"v0_estimator=per_sample {what}: it reads samples before training; {USE_MINIBATCH}")
    if _is_stream(dataset):
        require_reiterable(dataset)


def _require_stock_training(trainer) -> None:
    """Raise `InputError` if the Trainer has a training step or a loader of its own, which a pass would not follow."""
    for name in ("training_step", "get_train_dataloader", "_get_train_sampler"):
        home = next((base.__module__ for base in type(trainer).__mro__ if name in vars(base)), "transformers.")
        if not home.startswith(("transformers.", "hf_v0init.")):
            raise InputError(
                f"v0_estimator=per_sample with {type(trainer).__name__}, which has a {name} of its own: a pass over single samples would not "
                f"see what the training sees; {USE_MINIBATCH}"
            )


def _require_mean_over_samples(trainer, others: list[nn.Parameter]) -> None:
    """Raise `InputError` if the loss of some samples together is the mean of theirs neither over samples nor over labels."""
    samples, read, collate = _choose_samples(trainer, NUM_COMPARED, seed=0)
    features = read(list(samples))
    if len(features) < 2:
        return
    rows = [collate([feature]) for feature in features]
    of_batch, *alone = [_evaluate_loss(trainer, batch, others) for batch in (collate(list(features)), *rows)]
    means = []
    for num_skipped in (None, 0, 1):  # a causal loss is a mean over all labels but the first of a row
        weights = [1 if num_skipped is None else _count_labels(row, num_skipped) for row in rows]
        if sum(weights):
            means.append(sum(w * loss for w, loss in zip(weights, alone, strict=True)) / sum(weights))
    if not math.isfinite(of_batch + sum(alone)):
        return  # rows without targets
    tolerance = TOLERANCE_NARROW if trainer.args.bf16 or trainer.args.fp16 else TOLERANCE
    if not any(math.isclose(of_batch, mean, rel_tol=tolerance) for mean in means):
        raise InputError(
            f"v0_estimator=per_sample with a loss that is no mean over its samples: {of_batch:.6g} for {len(features)} samples "
            f"together, {means[0]:.6g} on average one by one (in-batch negatives?); {USE_MINIBATCH}"
        )


def _evaluate_loss(trainer, batch, others: list[nn.Parameter]) -> float:
    """The loss of a batch in evaluation mode, after which all is as before, also what the model's forward moves."""
    with preserve_rng(), preserve_model(trainer.model, others), torch.no_grad():
        return float(_compute_loss(trainer, batch, in_training=False))


def _count_labels(row, num_skipped: int) -> int:
    """Count the labels of a row that are not ignored (-100), but for the first `num_skipped`; 1 without labels."""
    labels = row.get("labels") if hasattr(row, "get") else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point():
        return 1
    return int(labels.reshape(-1)[num_skipped:].ne(IGNORED_LABEL).sum())
