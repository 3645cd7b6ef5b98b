"""The paper's pass through a Trainer: over training samples, with the Trainer's own collator, precision and loss, before training.

Which samples, in which batches, on which process, and the loss as training computes it. What becomes of the gradients is
decided by whoever asks for them, with a `visit` function as `gradients.statistics.visit_gradients` takes it.
"""

import contextlib
import copy
import functools
import itertools
import logging
from collections.abc import Callable, Iterator

import torch
from torch import nn
from transformers.utils import logging as transformers_logging

from ..errors import InputError
from ..estimation.batches import (
    SampledBatches,
    choose_batch_size,
    choose_samples,
    iterate_streamed_batches,
    require_reiterable,
)
from ..estimation.statistics import PassCounts, visit_gradients
from ..estimation.together import count_row_items, visit_gradients_together
from ..second_moment.state import SecondMoments
from ..settings import V0Plan
from ..sharding.fsdp import find_data_share
from ..sharding.parts import is_sharded
from ..state_guard import preserve_attributes, preserve_generators, preserve_model, preserve_rng

logger = logging.getLogger("hf_v0init")

FP16_LOSS_SCALE = 1024.0  # keeps fp16 gradients of the pass out of the subnormal range; divided out again
NUM_ROWS_TRIED = 3  # of the look whether a loss is a mean over independent samples
TOLERANCE, TOLERANCE_NARROW = 1e-3, 3e-2  # relative, of that look

PER_STEP = "use v0_estimator=minibatch (the default), which takes v0 from the run's own first steps"
BATCH_NORMS = (nn.modules.batchnorm._BatchNorm,)


class TrainerGradients:
    """The passes over training samples that the paper's v0 needs, for a Trainer that this holds.

    Args:
        trainer: a `transformers.Trainer`, its model and optimizer prepared.
        plan: with the per-sample estimator.
        moments: of its optimizer.
        seed: of the choice of samples and of their dropout.
    """

    def __init__(self, trainer, plan: V0Plan, moments: SecondMoments, seed: int) -> None:
        self.trainer, self.plan, self.moments, self.seed = trainer, plan, moments, seed
        self.args = trainer.args

    # ---- what is refused -------------------------------------------------------------------------------------------

    def require_readable_data(self) -> None:
        """Raise `InputError` unless there are training data that can be read before the training reads them."""
        dataset = self.trainer.train_dataset
        if dataset is None or isinstance(dataset, dict):
            what = "without a train_dataset" if dataset is None else "with a dictionary of training data sets"
            raise InputError(f"v0_estimator=per_sample {what}: it reads samples before training; {PER_STEP}")
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise InputError(
                "the training data set is empty, so v0 has no gradients to be taken from: check the data files"
            )
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            require_reiterable(dataset)

    def require_independent_samples(self) -> None:
        """Raise `InputError` if this Trainer's loss is no mean over independent samples, as far as can be told."""
        for name in ("training_step", "get_train_dataloader", "_get_train_sampler"):
            home = _find_home(type(self.trainer), name)
            if home is not None and not home.startswith(("transformers.", "hf_v0init.")):
                raise InputError(
                    f"v0_estimator=per_sample with {type(self.trainer).__name__}, which has a {name} of its own: a pass over single "
                    f"samples would not see what the training sees; {PER_STEP}"
                )
        if self._runs_together():
            return
        with preserve_trainer(self.trainer):
            losses = self._compare_losses()
        if losses is None:
            return
        of_batch, of_rows = losses
        tolerance = TOLERANCE_NARROW if self.args.bf16 or self.args.fp16 else TOLERANCE
        if all(abs(of_batch - value) > tolerance * max(abs(of_batch), abs(value), 1e-12) for value in of_rows):
            raise InputError(
                f"v0_estimator=per_sample with a loss that is no mean over its samples: {of_batch:.6g} for {NUM_ROWS_TRIED} samples "
                f"together, {of_rows[0]:.6g} on average one by one (in-batch negatives?); {PER_STEP}"
            )

    def _compare_losses(self) -> tuple[float, list[float]] | None:
        """The loss of some samples together, and what it may be if they are independent: means over rows and over labels."""
        dataset, collate = self._prepare_data()
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            features = list(itertools.islice(iter(dataset), NUM_ROWS_TRIED))
        else:
            features = [dataset[i] for i in range(min(NUM_ROWS_TRIED, len(dataset)))]
        if len(features) < 2:
            return None
        model = self.trainer.model
        modes = [(module, module.training) for module in model.modules()]
        try:
            model.eval()
            with torch.no_grad():
                together = collate(list(features))
                rows = [collate([one]) for one in features]
                losses = torch.tensor([self._compute_loss_alone(model, batch) for batch in (together, *rows)])
        finally:
            for module, training in modes:
                module.training = training
        if not losses.isfinite().all():
            return None  # rows without targets
        weights = [torch.ones(len(rows))]
        for num_skipped in (0, 1):
            items = [sum(count_row_items(batch, 1, num_skipped)) for batch in rows]
            if sum(items):
                weights.append(torch.tensor(items, dtype=torch.float32))
        return float(losses[0]), [float((losses[1:] * w).sum() / w.sum()) for w in weights]

    def _compute_loss_alone(self, model, batch) -> float:
        """The loss of one batch, after which all is as before, also what the model's forward moves."""
        with preserve_rng(), preserve_model(model, self._find_other_parameters()):
            return float(self._compute_loss(model, batch))

    # ---- the pass --------------------------------------------------------------------------------------------------

    def run(self, named_parameters, visit) -> PassCounts:
        """Run the pass over random training samples through `compute_loss`, on this process's batches."""
        with preserve_trainer(self.trainer):
            batches, total = self._make_batches()
            hidden = self.args.disable_tqdm or self.args.process_index != 0
            bar = transformers_logging.tqdm(total=total, desc="v0: gradient statistics", unit="batch", disable=hidden)
            zero = self.moments.zero
            with bar, self._count_items_locally(), zero.take_off_gradient_hooks() if zero else contextlib.nullcontext():
                return self._get_visit_function()(
                    self.trainer.model,
                    named_parameters,
                    batches,
                    self._compute_loss,
                    visit,
                    seed=self.seed,
                    loss_scale=FP16_LOSS_SCALE if self.args.fp16 else 1.0,
                    on_batch=lambda batch: bar.update(1),
                    other_parameters=self._find_other_parameters(),
                )

    def choose_batch_size(self) -> int:
        """Return the samples per batch of the pass: 1, unless asked for or needed otherwise."""
        at_once = 1
        if self._runs_together():  # a batch is shared out: each process gets its training batch's part of it
            at_once = self.trainer.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
        elif any(isinstance(module, BATCH_NORMS) for module in self.trainer.model.modules()):
            at_once = min(self.trainer._train_batch_size, max(2, self._count_samples() // 2))
        return choose_batch_size(self.plan.stats_batch_size, at_once)

    def _count_samples(self) -> int:
        """The most samples that the pass takes: as asked for, or all there are."""
        num_samples = self.plan.num_samples
        with contextlib.suppress(TypeError):
            num_samples = min(num_samples, len(self.trainer.train_dataset))
        return num_samples

    def _prepare_data(self):
        """The data set and a collator of its own, as the Trainer's loader would use them."""
        trainer = self.trainer
        # Streams hand out segments that bring their context along.
        dataset = getattr(trainer, "get_v0_dataset", lambda: trainer.train_dataset)()
        collator = copy.deepcopy(trainer.data_collator)
        try:
            import datasets

            is_arrow = isinstance(dataset, datasets.Dataset)
        except ImportError:
            is_arrow = False
        if is_arrow:
            return trainer._remove_unused_columns(dataset, description="training"), collator
        return dataset, trainer._get_collator_with_removed_columns(collator, description="training")

    def _make_batches(self):
        """Make this process's batches of the pass (all, where it is run together), and say how many (None for a stream)."""
        dataset, collate = self._prepare_data()
        world_size = 1 if self._runs_together() else self.args.world_size
        batch_size, num_samples = self.choose_batch_size(), self.plan.num_samples
        place = {"seed": self.seed, "rank": self.args.process_index % world_size, "world_size": world_size}
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            return iterate_streamed_batches(dataset, collate, num_samples, batch_size, **place), None
        if num_samples > len(dataset):
            logger.info(f"v0_num_samples={num_samples} is more than the {len(dataset)} training samples: all are used")
        samples = choose_samples(len(dataset), num_samples, self.seed)
        batches = SampledBatches(dataset, collate, samples, batch_size, **place)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=self.args.dataloader_num_workers)
        return loader, len(batches)

    def _runs_together(self) -> bool:
        """Whether all processes run each batch of the pass together, since none has all parameters or optimizer states."""
        return is_sharded(self.trainer.model) or self.moments.zero is not None

    def _get_visit_function(self) -> Callable[..., PassCounts]:
        """Each process alone where it has the whole model, else all processes together."""
        if not self._runs_together():
            return visit_gradients
        self.trainer.accelerator.gradient_state._set_sync_gradients(True)
        options = {"count_items": self._count_loss_items, "is_narrow": self.args.bf16 or self.args.fp16}
        if self.moments.zero is not None:
            options |= {"share": self.moments.zero.share, "place_gradient": self.moments.zero.place_gradient}
        else:
            options["share"] = find_data_share(self.trainer.model)
        return functools.partial(visit_gradients_together, **options)

    def _count_loss_items(self, batch):
        """Count what the loss of a batch is the mean over, as `compute_loss` takes it; None if it takes nothing."""
        num_items = self.trainer._get_num_items_in_batch([batch], self.args.device)
        # The Trainer divides by the processes that see the same batch, expecting the sum over all of them.
        return None if num_items is None else num_items * self.trainer.get_tp_size()

    def _compute_loss(self, model, batch, num_items=None) -> torch.Tensor:
        """The mean loss of one batch, as training computes it, without the division by accumulation steps."""
        trainer = self.trainer
        if num_items is None:
            num_items = trainer._get_num_items_in_batch([batch], self.args.device)
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, trainer._prepare_inputs(batch), num_items_in_batch=num_items)
        return loss.mean() if loss.dim() > 0 else loss

    def _find_other_parameters(self) -> list[nn.Parameter]:
        """The parameters outside the model that the loss may use: the optimizer's, and those of modules that the Trainer holds."""
        held = [p for group in self.moments.list_groups() for p in group["params"]]
        for value in vars(self.trainer).values():
            if isinstance(value, nn.Module) and value is not self.trainer.model:
                held += list(value.parameters())
        return held

    @contextlib.contextmanager
    def _count_items_locally(self) -> Iterator[None]:
        """Count the loss's items per process, not over all: processes may have different batches."""
        before = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before


@contextlib.contextmanager
def preserve_trainer(trainer) -> Iterator[None]:
    """Leave a Trainer's logs, counters and metric stores, its state, and all private and global generators as they were."""
    had_log, log = "log" in vars(trainer), vars(trainer).get("log")
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(preserve_generators(trainer.train_dataset, trainer.data_collator, trainer))
        stack.enter_context(preserve_attributes(trainer, trainer.state))
        for module in vars(trainer).values():  # a teacher, a loss with weights of its own
            if isinstance(module, nn.Module) and module not in (trainer.model, trainer.model_wrapped):
                stack.enter_context(preserve_model(module, copies_frozen=False))
        if hasattr(trainer, "_set_state_aside"):  # contiguous streams
            stack.enter_context(trainer._set_state_aside())
        trainer.log = lambda *_, **__: None
        try:
            yield
        finally:
            if had_log:
                trainer.log = log
            else:
                del trainer.log


def _find_home(cls: type, name: str) -> str | None:
    """The module in which the method that a class uses is defined."""
    for base in cls.__mro__:
        if name in vars(base):
            return base.__module__
    return None
