"""The gradients that v0 is taken from, through the Trainer's own data, collator, precision and loss.

Which samples, in which batches, on which process, and the loss as training computes it. What becomes of the gradients is
decided by whoever asks for them, with a `visit` function as `gradient_statistics.visit_gradients` takes it.
"""

import contextlib
import functools
import logging
from collections.abc import Callable, Iterator

import torch
from transformers.utils import logging as transformers_logging

from ..distributed.parts import find_data_share, is_sharded
from ..errors import InputError
from ..gradients.batches import (
    SampledBatches,
    choose_batch_size,
    choose_samples,
    iterate_streamed_batches,
    require_reiterable,
)
from ..gradients.statistics import PassCounts, StatisticsBatch, visit_gradients
from ..gradients.stopping import BATCH_SIZE
from ..gradients.together import visit_gradients_together
from ..optimizers.deepspeed import adapt_optimizer, visit_partitioned_gradients
from ..preservation import preserve_rng
from ..settings import AUTO, V0InitArguments, read_v0_arguments

logger = logging.getLogger("hf_v0init")

FP16_LOSS_SCALE = 1024.0  # keeps fp16 gradients of the pass out of the subnormal range; divided out again


class TrainerGradientsMixin:
    """Gives a `transformers.Trainer` subclass the passes over training samples that a v0 needs."""

    _v0_given_arguments: V0InitArguments | None = None
    _v0_looks_ahead = False  # at the first step's batches, before that step

    @property
    def v0_arguments(self) -> V0InitArguments:
        """The v0 settings of this Trainer; from the start of a training on, a share of the run is a number of steps."""
        state = getattr(self, "state", None)
        max_steps = getattr(state, "max_steps", 0) or self.args.max_steps
        return (self._v0_given_arguments or read_v0_arguments(self.args)).resolve(max_steps)

    def _get_v0_seed(self) -> int:
        return self.args.seed if self.v0_arguments.v0_seed is None else self.v0_arguments.v0_seed

    def _count_statistics_samples(self) -> int:
        """The most samples that the pass takes: as asked for, or all there are."""
        num_samples = self.v0_arguments.get_max_num_samples()
        with contextlib.suppress(TypeError):
            num_samples = min(num_samples, len(self.train_dataset))
        return num_samples

    def _choose_stats_batch_size(self) -> int:
        at_once = self._train_batch_size
        if self.v0_arguments.v0_num_samples == AUTO:
            at_once = min(at_once, BATCH_SIZE)
        if self._runs_together():  # a batch is shared out: each process gets its training batch's part of it
            at_once = self.get_total_train_batch_size(self.args) // self.args.gradient_accumulation_steps
        return choose_batch_size(self.v0_arguments.v0_stats_batch_size, at_once, self._count_statistics_samples())

    def _count_parts(self) -> int:
        """Among how many processes the batches of the pass are dealt out: 1, where it is run together."""
        return 1 if self._runs_together() else self.args.world_size

    def _make_statistics_batches(self, batch_range: tuple[int, int] | None):
        """Make this process's batches of the pass (all, where it is run together), and say how many (None for a stream).

        With `batch_range` only those of these numbers: from the first to the one before the second.
        """
        seed, dataset = self._get_v0_seed(), self.train_dataset
        world_size = self._count_parts()
        rank = self.args.process_index % world_size
        batch_size, num_samples = self._choose_stats_batch_size(), self.v0_arguments.get_max_num_samples()
        try:
            import datasets

            is_arrow = isinstance(dataset, datasets.Dataset)
        except ImportError:
            is_arrow = False
        if is_arrow:
            dataset, collate = self._remove_unused_columns(dataset, description="training"), self.data_collator
        else:
            collate = self._get_collator_with_removed_columns(self.data_collator, description="training")
        place = {"seed": seed, "rank": rank, "world_size": world_size, "batch_range": batch_range}
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            return iterate_streamed_batches(dataset, collate, num_samples, batch_size, **place), None
        if batch_range is None and num_samples > len(dataset):
            logger.info(f"v0_num_samples={num_samples} is more than the {len(dataset)} training samples: all are used")
        samples = choose_samples(len(dataset), num_samples, seed)
        batches = SampledBatches(dataset, collate, samples, batch_size, **place)
        loader = torch.utils.data.DataLoader(batches, batch_size=None, num_workers=self.args.dataloader_num_workers)
        return loader, len(batches)

    def _run_statistics_pass(
        self, named_parameters, visit, batch_range: tuple[int, int] | None = None, show_progress: bool = True
    ) -> PassCounts:
        """Run the pass over random training samples through `compute_loss`, on this process's batches."""
        batches, total = self._make_statistics_batches(batch_range)
        hidden = self.args.disable_tqdm or self.args.process_index != 0 or not show_progress
        bar = transformers_logging.tqdm(total=total, desc="v0: gradient statistics", unit="batch", disable=hidden)
        with bar, self._count_items_locally():
            return self._get_visit_function(count_items=self._count_loss_items)(
                self.model,
                named_parameters,
                batches,
                self._compute_statistics_loss,
                visit,
                seed=self._get_v0_seed(),
                loss_scale=FP16_LOSS_SCALE if self.args.fp16 else 1.0,
                on_batch=lambda batch: bar.update(1),
            )

    def _runs_together(self) -> bool:
        """Whether all processes run each batch of the pass together, since none has all parameters or optimizer states."""
        return is_sharded(self.model) or self.is_deepspeed_enabled

    def _get_visit_function(self, **options) -> Callable[..., PassCounts]:
        """Each process alone where it has the whole model, else all processes together."""
        if not self._runs_together():
            return visit_gradients
        self.accelerator.gradient_state._set_sync_gradients(True)
        options["is_narrow"] = self.args.bf16 or self.args.fp16
        if self.is_deepspeed_enabled:
            return functools.partial(visit_partitioned_gradients, adapt_optimizer(self.optimizer), **options)
        return functools.partial(visit_gradients_together, share=find_data_share(self.model), **options)

    def _count_loss_items(self, batch):
        """Count what the loss of a batch is the mean over, as `compute_loss` takes it; None if it takes nothing."""
        num_items = self._get_num_items_in_batch([batch], self.args.device)
        # The Trainer divides by the processes that see the same batch, expecting the sum over all of them.
        return None if num_items is None else num_items * self.get_tp_size()

    def _compute_statistics_loss(self, model, batch, num_items=None) -> torch.Tensor:
        """The mean loss of one batch, as training computes it, without the division by accumulation steps."""
        if num_items is None:
            num_items = self._get_num_items_in_batch([batch], self.args.device)
        with self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(batch), num_items_in_batch=num_items)
        return loss.mean() if loss.dim() > 0 else loss

    def _run_first_step(self, named_parameters, visit, train_dataloader) -> PassCounts:
        """Run the micro-batches that the first optimizer step will see, with the dropout it will see."""
        with preserve_rng():
            iterator = iter(train_dataloader)
            self._v0_looks_ahead = True
            try:
                micro_batches, num_items = self.get_batch_samples(
                    iterator, self.args.gradient_accumulation_steps, self.args.device
                )
                if not micro_batches:
                    raise InputError("the training data set is empty, so there is no first gradient to take v0 from")
                scaled = self.loss_is_scaled_for_ga
                if scaled is None:
                    scaled = (
                        self.model_accepts_loss_kwargs and num_items is not None
                    ) or self.compute_loss_func is not None
                divisor = 1 if scaled else len(micro_batches)

                def compute_loss(model, inputs, _=None) -> torch.Tensor:
                    with self.compute_loss_context_manager():
                        loss = self.compute_loss(model, self._prepare_inputs(inputs), num_items_in_batch=num_items)
                    return (loss.mean() if loss.dim() > 0 else loss) / divisor

                return self._get_visit_function(own_batches=True)(
                    self.model,
                    named_parameters,
                    (StatisticsBatch(b, _count_samples(b), index) for index, b in enumerate(micro_batches)),
                    compute_loss,
                    visit,
                    seed=None,
                    loss_scale=FP16_LOSS_SCALE if self.args.fp16 else 1.0,
                )
            finally:
                self._v0_looks_ahead = False
                iterator.close() if hasattr(iterator, "close") else None
                if hasattr(train_dataloader, "end"):
                    train_dataloader.end()  # accelerate: this look is not an iteration of the run

    @contextlib.contextmanager
    def _count_items_locally(self) -> Iterator[None]:
        """Count the loss's items a process, not over all: processes may have different numbers of batches."""
        before = self.args.average_tokens_across_devices
        self.args.average_tokens_across_devices = False
        try:
            yield
        finally:
            self.args.average_tokens_across_devices = before

    def _require_readable_data(self) -> None:
        dataset = self.train_dataset
        if dataset is None:
            raise InputError(
                f"v0_init={self.v0_arguments.v0_init} takes v0 from training samples: give a train_dataset"
            )
        if hasattr(dataset, "__len__") and len(dataset) == 0:
            raise InputError(
                "the training data set is empty, so v0 has no gradients to be taken from: check the data files"
            )
        if isinstance(dataset, torch.utils.data.IterableDataset) or not hasattr(dataset, "__len__"):
            require_reiterable(dataset)


def _count_samples(inputs) -> int:
    """The samples of a collated batch: the length of its first tensor."""
    sizes = [value.shape[0] for value in inputs.values() if isinstance(value, torch.Tensor) and value.dim() > 0]
    return sizes[0] if sizes else 1
