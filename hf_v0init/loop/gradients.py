"""The gradients of a training loop's own loss over its own batches, for a v0. Knows no optimizer.

Under DDP each process runs its batches and the sums are reduced afterwards. Where parameters are sharded no process can run
alone: there every process gets the batches of all, and they run each of them together (`sharded_pass`).
"""

import contextlib
import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch import nn
from torch.utils.data import DataLoader, Sampler

from ..errors import InputError
from ..estimation.statistics import PassCounts, StatisticsBatch, visit_gradients
from ..estimation.together import visit_gradients_together
from ..sharding.fsdp import find_data_share
from ..sharding.parts import is_sharded
from ..sharding.processes import gather_objects, get_rank_and_world_size, raise_together
from ..state_guard import preserve_model, preserve_rng

FP16_LOSS_SCALE = 1024.0  # as in the Trainer: keeps fp16 gradients out of the subnormal range; divided out again

LossFunction = Callable[[nn.Module, Any], torch.Tensor]

_NO_BATCH = object()


class LoopGradients:
    """Runs the loop's loss over its batches and hands the gradients on. What it looks at is left as it was.

    Args:
        model: as the loop has it, in DDP or not.
        loss_fn: maps (model, batch) to the scalar mean loss; gets the model without DDP.
        accelerator: accelerate's, or None.
        count_samples: maps a batch to its number of samples.
        other_modules: what `loss_fn` runs besides the model.
        seed: the dropout of a batch is seeded from (seed, its number).

    Attributes:
        first_size: samples of the first batch.
        num_samples_at_once: samples of the first batches of all processes together.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: LossFunction,
        accelerator,
        count_samples: Callable[[Any], int],
        other_modules: Sequence[nn.Module],
        seed: int,
    ) -> None:
        self.model, self.inner, self.loss_fn, self.accelerator = model, unwrap_model(model), loss_fn, accelerator
        self.count_samples, self.other_modules, self.seed = count_samples, other_modules, seed
        rank, self.world_size = get_rank_and_world_size()
        self.share = find_data_share(self.inner) if is_sharded(self.inner) else None
        # Processes of one tensor-parallel group have the same batches; the first of each group speaks for it.
        parts = gather_objects(rank if self.share is None else self.share.part)
        self.speakers = [parts.index(part) for part in sorted(set(parts))]
        self.part = sorted(set(parts)).index(parts[rank])
        precision = getattr(accelerator, "mixed_precision", "no")
        self.is_narrow, self.loss_scale = precision != "no", FP16_LOSS_SCALE if precision == "fp16" else 1.0
        # A loop may keep parts of its model in evaluation mode (frozen BatchNorms): then they stay so in the pass.
        self.modes = [(module, module.training) for module in self.inner.modules()] if self.inner.training else []

    @contextlib.contextmanager
    def open(self, batches: Iterable) -> Iterator[None]:
        """Begin to read `batches`; at the end put back random states and, of a `DataLoader`, the order.

        Raises:
            InputError: there is none on some process, or its samples cannot be counted.
        """
        with preserve_rng(), _preserve_order(batches):
            iterator, error, size = None, None, 0
            try:
                iterator = iter(batches)
                self.first = next(iterator, _NO_BATCH)
                if self.first is _NO_BATCH:
                    raise InputError("batches is empty, so there are no gradients to take v0 from: check the data")
                size = self.count_samples(self.first)
            except Exception as exception:  # the others must hear of it before they wait for this process
                error = exception
            try:
                raise_together(error)
                sizes = gather_objects(size)
                self.first_size = sizes[self.speakers[0]]
                self.num_samples_at_once = sum(sizes[rank] for rank in self.speakers)
                self.batches = itertools.chain([self.first], iterator)
                yield
            finally:
                if iterator is not batches and hasattr(iterator, "close"):
                    iterator.close()

    def run(self, named_parameters, visit, batch_range: tuple[int, float] = (0, math.inf)) -> PassCounts:
        """Run the batches of these numbers, counted over all processes, the second not included; see `RunPass`.

        Batches are read in turn: a further call goes on where the last one ended, with a range that does so.
        """
        return self._run(named_parameters, visit, self._number(self.batches, batch_range))

    def _run(self, named_parameters, visit, numbered: Iterator[StatisticsBatch]) -> PassCounts:
        return self._visit(
            named_parameters, visit, self._gather_batches(numbered) if self.share else numbered, self.seed
        )

    def _visit(self, named_parameters, visit, batches, seed) -> PassCounts:
        function = visit_gradients
        if self.share is not None:
            options = {"share": self.share, "is_narrow": self.is_narrow}
            function = functools.partial(visit_gradients_together, **options)
        options = {"seed": seed, "loss_scale": self.loss_scale}
        with contextlib.ExitStack() as stack:
            stack.enter_context(_refuse_wrapped(self.model))
            for module in self.other_modules:
                stack.enter_context(preserve_model(module))
                stack.enter_context(_without_gradients(module, self.inner))
            return function(self.inner, named_parameters, batches, self._compute_loss, visit, **options)

    def _compute_loss(self, model: nn.Module, batch: Any, _=None) -> torch.Tensor:
        if model.training:
            for module, training in self.modes:
                module.training = training
        loss = self.loss_fn(model, batch)
        if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, torch.Tensor) else repr(loss)
            raise InputError(f"loss_fn returned {what}: it must return the mean loss of the batch, a scalar tensor")
        if not loss.requires_grad and torch.is_grad_enabled():
            raise InputError(
                "loss_fn's loss has no gradient: it must be computed from the model that loss_fn is given, without no_grad, "
                "detach or item"
            )
        return loss

    def _number(self, batches: Iterator, batch_range: tuple[int, float] = (0, math.inf)) -> Iterator[StatisticsBatch]:
        """Yield this process's batches, numbered as if one process had dealt them out in turn."""
        first, end = batch_range
        num_parts = len(self.speakers)
        for number in itertools.count(first + (self.part - first) % num_parts, num_parts):
            batch = next(batches, _NO_BATCH) if number < end else _NO_BATCH
            if batch is _NO_BATCH:
                return
            yield StatisticsBatch(self._place(batch), self.count_samples(batch), number)

    def _gather_batches(self, mine: Iterator[StatisticsBatch]) -> Iterator[StatisticsBatch]:
        """Yield the batches of all processes on each process, in the order of their numbers."""
        while True:
            batch, error = None, None
            try:
                batch = next(mine, None)
            except Exception as exception:
                error = exception
            raise_together(error)
            if batch is not None:
                batch.inputs = send_to_device(batch.inputs, "cpu")
            everyone = gather_objects(batch)
            theirs = [everyone[rank] for rank in self.speakers if everyone[rank] is not None]
            if not theirs:
                return
            for batch in theirs:
                batch.inputs = self._place(batch.inputs)
                yield batch

    def _place(self, batch: Any) -> Any:
        if self.accelerator is not None and self.accelerator.device_placement:
            return send_to_device(batch, self.accelerator.device)
        if self.share is not None:  # it has been to the CPU and back
            return send_to_device(batch, next(self.inner.parameters()).device)
        return batch


def count_first_dimension(batch: Any) -> int:
    """Return the length of the first tensor (of one or more dimensions) in a tensor, mapping or sequence, however nested.

    Raises:
        InputError: there is none.
    """
    found = _find_first_length(batch)
    if found is None:
        raise InputError(
            f"a batch of type {type(batch).__name__} holds no tensor whose length is its number of samples: give count_samples"
        )
    return found


def _find_first_length(batch: Any) -> int | None:
    if isinstance(batch, torch.Tensor):
        return batch.shape[0] if batch.dim() > 0 else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    if isinstance(batch, (list, tuple)):
        return next((length for length in map(_find_first_length, batch) if length is not None), None)
    return None


# ---- what is left alone ----------------------------------------------------------------------------------------------


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the module inside DDP or DataParallel, whose backward would average or scatter; compiled ones stay compiled."""
    return _find_wrappers(model)[1]


def _find_wrappers(model: nn.Module) -> tuple[list[nn.Module], nn.Module]:
    wrappers, inner = [], model
    while isinstance(inner, (nn.parallel.DistributedDataParallel, nn.DataParallel)) or (
        hasattr(inner, "_orig_mod") and _find_wrappers(inner._orig_mod)[0]
    ):
        wrappers.append(inner)
        inner = inner._orig_mod if hasattr(inner, "_orig_mod") else inner.module
    return wrappers, inner


@contextlib.contextmanager
def _refuse_wrapped(model: nn.Module) -> Iterator[None]:
    """Refuse a loss function that runs the model inside DDP, which averages gradients before anyone sees them."""

    def refuse(*_) -> None:
        raise InputError(
            "loss_fn runs the model inside DDP (or DataParallel), so no process's own gradient is seen: it must run the model that "
            "it is given as its first argument"
        )

    hooks = [wrapper.register_forward_pre_hook(refuse) for wrapper in _find_wrappers(model)[0]]
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
