"""The pass over the data where parameters are sharded, so that every forward and backward is made by all processes together.

Under FSDP2 the gradient that comes out of a backward is already the mean over the processes. So all processes run the same
batch, each on its part of the rows, with its loss weighted so that the mean of the gradients is the gradient of the whole
batch, as one process would have it:

    loss_r = num_parts * (sum over the items of part r) / (items of the whole batch).

A process without rows (fewer rows than processes) runs a row of another with weight 0. A batch that cannot be cut into rows,
or a loss that is no such sum (it couples rows, or ignores the number of items), is found out by a look at the losses of three
rows; then every process runs the whole batch, which is exact for any loss and costs `num_parts` times as much.

Two agreements a batch, of two numbers each, keep the processes in step: on having the next batch, and after its forward.
So an error on one process is raised on all. Only an error in the middle of a forward, where the others wait in a collective
of the model, cannot be told to them: that process raises at once, and the launcher ends the others, as in training.
"""

import itertools
import logging
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..sharding.fsdp import DataShare, match_placements, reshard
from ..sharding.processes import get_rank_and_world_size, raise_together
from ..state_guard import preserve_rng, seed_everything
from .statistics import (
    PassCounts,
    StatisticsBatch,
    Visitor,
    compute_batch_seed,
    require_finite_loss,
    visit_gradients,
)

logger = logging.getLogger("hf_v0init")

# Maps (model, inputs, items) to the scalar loss: the sum over the items of `inputs` / items, or for None the mean over them.
ComputeLoss = Callable[[nn.Module, Any, Any], torch.Tensor]

IGNORED_LABEL = -100
# Relative, of the loss of a batch.
SPLIT_TOLERANCE = 1e-5
SPLIT_TOLERANCE_NARROW = 1e-3


def visit_gradients_together(
    model: nn.Module,
    named_parameters: list[tuple[str, nn.Parameter]],
    batches: Iterable[StatisticsBatch],
    compute_loss: ComputeLoss,
    visit: Visitor,
    *,
    share: DataShare,
    count_items: Callable[[Any], Any] = lambda inputs: None,
    is_narrow: bool = False,
    place_gradient: Callable[[torch.Tensor, nn.Parameter], torch.Tensor] = match_placements,
    seed: int | None = 0,
    loss_scale: float = 1.0,
    on_batch: Callable[[StatisticsBatch], None] | None = None,
    other_parameters: Iterable[nn.Parameter] = (),
) -> PassCounts:
    """Run the same batches on all processes and hand the gradient of each whole batch to `visit`.

    As `gradient_statistics.visit_gradients` otherwise. Dropout is seeded by batch and part, so with dropout the result
    depends on the number of parts; without, only by rounding.

    Args:
        batches: all batches of the pass, the same on every process.
        compute_loss: see `ComputeLoss`.
        visit: gets gradients as `place_gradient` returns them.
        share: this process's part of each batch.
        count_items: counts what the mean loss of a collated batch is over, as `compute_loss` takes it (None: it takes none).
        place_gradient: maps (gradient, parameter) to the mean over the processes, placed as the optimizer's state is; by
            default a DTensor of the parameter's own placement.
        is_narrow: whether the forward computes in bf16 or fp16, which decides how exactly losses of parts can add up.

    Returns:
        The counts over all processes.

    Raises:
        InputError: as `visit_gradients`, on every process.
    """
    with _Lockstep(model) as lockstep:
        tolerance = SPLIT_TOLERANCE_NARROW if is_narrow else SPLIT_TOLERANCE
        splitter = _Splitter(model, compute_loss, count_items, share, lockstep, tolerance)
        loss_sum = 0.0

        def prepare(batch: StatisticsBatch) -> StatisticsBatch:
            part = splitter.split(batch)
            return replace(batch, inputs=(batch, part))

        def compute_part(_: nn.Module, inputs: tuple[StatisticsBatch, _Part]) -> torch.Tensor:
            nonlocal loss_sum
            batch, part = inputs
            if seed is not None:
                seed_everything(compute_batch_seed(seed, batch.index, part.number))
            loss, mean = lockstep.compute(lambda: compute_loss(model, part.inputs, part.num_items) * part.weight)
            if batch.has_loss:
                loss_sum += require_finite_loss(mean, batch.index, batch.num_samples) * batch.num_samples
            return loss

        try:
            counts = visit_gradients(
                model,
                named_parameters,
                lockstep.iterate(batches, prepare),
                compute_part,
                lambda parameter, gradient, num: visit(parameter, place_gradient(gradient, parameter), num),
                seed=seed,
                loss_scale=loss_scale,
                on_batch=on_batch,
                other_parameters=other_parameters,
            )
        finally:
            reshard(model)
        counts.loss_sum, counts.are_global = loss_sum, True
        return counts


@dataclass
class _Part:
    """What this process computes of a batch.

    `num_items` are the items of the whole batch (None: the loss is the mean over its own), `weight` a factor on the loss,
    `number` what the dropout is seeded by.
    """

    inputs: Any
    num_items: Any
    weight: float
    number: int


class _Lockstep:
    """Keeps the processes in step: each agreement is one all-reduce of two numbers, on the CPU where there is a way."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.group, self.forwards = model, None, 0
        self.num_processes = get_rank_and_world_size()[1]
        self.active = self.num_processes > 1

    def __enter__(self) -> "_Lockstep":
        self.hook = self.model.register_forward_hook(self._count_forward)
        if self.active and "gloo" not in str(dist.get_backend_config()):
            self.group = dist.new_group(backend="gloo")  # reading a number from the device would wait for its queue
        return self

    def __exit__(self, *_) -> None:
        self.hook.remove()
        if self.group is not None:
            dist.destroy_process_group(self.group)

    def _count_forward(self, *_) -> None:
        self.forwards += 1

    def agree(self, error: Exception | None, value: float) -> float:
        """Return the sum of `value` over the processes; raise on all if any has an error."""
        if not self.active:
            raise_together(error)
            return float(value)
        numbers = torch.tensor([error is not None, value], dtype=torch.float64)
        dist.all_reduce(numbers, group=self.group)
        if numbers[0] > 0:
            raise_together(error)
        return float(numbers[1])

    def compute(self, compute_loss: Callable[[], torch.Tensor]) -> tuple[torch.Tensor, float]:
        """Return this process's loss, and the mean over the processes; raise on all if any fails after its forward."""
        loss, error, before = None, None, self.forwards
        try:
            loss = compute_loss()
        except Exception as exception:
            if self.active and self.forwards == before:
                exception.raised_alone = True  # the others are in the model's own collectives: they cannot be told
                raise
            error = exception
        total = self.agree(error, 0.0 if error is not None else float(loss.detach()))
        return loss, total / self.num_processes

    def iterate(self, batches: Iterable, prepare: Callable) -> Iterator:
        """Yield the prepared batches, each once all processes have it."""
        iterator = iter(batches)
        while True:
            batch, error = None, None
            try:
                batch = next(iterator, None)
            except Exception as exception:
                error = exception
            num_with_batch = self.agree(error, batch is not None)
            if num_with_batch not in (0, self.num_processes):
                raise RuntimeError(
                    f"only {num_with_batch:.0f} of {self.num_processes} processes have a further batch for the gradient "
                    "statistics: their training data differ"
                )
            if batch is None:
                return
            yield prepare(batch)


class _Splitter:
    """Cuts batches into parts, after a look at the first of each kind that the parts' losses add up to the whole's."""

    def __init__(
        self,
        model: nn.Module,
        compute_loss: ComputeLoss,
        count_items: Callable[[Any], Any],
        share: DataShare,
        lockstep: _Lockstep,
        tolerance: float,
    ) -> None:
        self.model, self.compute_loss, self.count_items = model, compute_loss, count_items
        self.share, self.lockstep, self.tolerance = share, lockstep, tolerance
        self.checked: set[tuple[bool, bool]] = set()
        self.only_whole = False
        self.skipped_labels = 0  # a causal loss is a mean over all labels but the first

    def split(self, batch: StatisticsBatch) -> _Part:
        """Return this process's part, or the whole batch for every process where it cannot be split exactly."""
        whole = _Part(batch.inputs, self.count_items(batch.inputs), 1.0, 0)
        if self.share.num_parts == 1 or batch.num_samples == 1 or self.only_whole:
            return whole
        part, kind = self._cut(whole, batch.num_samples)
        if part is None:
            return whole
        if kind not in self.checked:
            adds_up = self._adds_up(batch.inputs, batch.num_samples, whole.num_items is not None)
            if adds_up is None:
                return whole
            if adds_up:
                self.checked.add(kind)
            elif whole.num_items is None and self.skipped_labels == 0:
                self.skipped_labels = 1
                return self.split(batch)
            else:
                self.only_whole = True
                logger.info(
                    "the loss of a batch is not the sum of its rows' losses, so each process runs the whole batches of the gradient "
                    f"statistics, {self.share.num_parts} times the work; where memory is short, lower v0_stats_batch_size"
                )
                return whole
        return part

    def _cut(self, whole: _Part, num_rows: int) -> tuple[_Part | None, tuple[bool, bool]]:
        """Cut out this process's rows. All processes see the whole batch, so they decide alike."""
        num_parts = self.share.num_parts
        row_items = count_row_items(whole.inputs, num_rows, self.skipped_labels)
        bounds = [part * num_rows // num_parts for part in range(num_parts + 1)]
        parts = [row_items[low:high] for low, high in itertools.pairwise(bounds)]
        items = [sum(part) for part in parts]
        kind = (num_rows > 2, len(set(row_items)) > 1)
        if whole.num_items is None and any(part and not sum(part) for part in parts):
            return None, kind  # a mean over no items
        low, high = bounds[self.share.part], bounds[self.share.part + 1]
        if whole.num_items is not None:
            weight = float(num_parts)
        else:
            weight = num_parts * items[self.share.part] / max(1, sum(items))
        if low == high:
            low = max(range(num_rows), key=row_items.__getitem__)
            high, weight = low + 1, 0.0
        rows = cut_rows(whole.inputs, num_rows, low, high)
        return None if rows is None else _Part(rows, whole.num_items, weight, self.share.part), kind

    def _adds_up(self, inputs: Any, num_rows: int, with_items: bool) -> bool | None:
        """Whether the losses of two parts of a few rows add up to the loss of these rows; None where these rows do not tell.

        Every process looks at the same two or three rows, so that it needs no more memory than for its part of a batch.
        """
        row_items = count_row_items(inputs, num_rows, self.skipped_labels)
        low, high, cut = _choose_probe(row_items)
        if not (with_items or (sum(row_items[low:cut]) and sum(row_items[cut:high]))):
            return None
        rows = cut_rows(inputs, num_rows, low, high)
        num_items = self.count_items(rows) if with_items else None
        total = sum(row_items[low:high])
        whole, parts = _Part(rows, num_items, 1.0, 0), []
        for first, end in ((low, cut), (cut, high)):
            weight = 1.0 if with_items else sum(row_items[first:end]) / total
            parts.append(_Part(cut_rows(inputs, num_rows, first, end), num_items, weight, 0))
        modes = [(module, module.training) for module in self.model.modules()]
        try:
            with torch.no_grad(), preserve_rng():
                self.model.eval()
                value, of_parts = self._compute(whole), sum(map(self._compute, parts))
                exact = math.isclose(value, of_parts, rel_tol=self.tolerance)
                if exact and with_items:
                    # Twice the items must halve the loss: a loss that ignores `num_items` may add up by chance.
                    half = self._compute(_Part(rows, 2 * num_items, 1.0, 0))
                    exact = math.isclose(2 * half, value, rel_tol=SPLIT_TOLERANCE)
        finally:
            for module, training in modes:
                module.training = training
        return exact or not math.isfinite(value)  # a NaN is reported where the batch is run

    def _compute(self, part: _Part) -> float:
        """The mean over the processes of the part's weighted loss."""
        return self.lockstep.compute(lambda: self.compute_loss(self.model, part.inputs, part.num_items) * part.weight)[
            1
        ]


def _choose_probe(row_items: list[int]) -> tuple[int, int, int]:
    """Choose three rows that lie together (two, if there are no more), and where to cut them: (first, end, cut).

    A mean over rows and a mean over items differ where the parts' shares of the items are not their shares of the rows. Such a
    cut is chosen, if the rows have different numbers of items.
    """
    num_rows = len(row_items)
    size = min(3, num_rows)

    def rate(probe: tuple[int, int, int]) -> tuple[bool, bool]:
        first, end, cut = probe
        left, right = sum(row_items[first:cut]), sum(row_items[cut:end])
        return left > 0 and right > 0, left * (end - cut) != right * (cut - first)

    starts = range(num_rows - size + 1)
    return max(((first, first + size, first + cut) for first in starts for cut in range(size - 1, 0, -1)), key=rate)


def count_row_items(inputs: Any, num_rows: int, num_skipped: int = 0) -> list[int]:
    """Count the labels of each row that are not ignored (-100), but for the first `num_skipped`; one a row without labels."""
    labels = inputs.get("labels") if isinstance(inputs, Mapping) else None
    if not isinstance(labels, torch.Tensor) or labels.is_floating_point() or labels.shape[:1] != (num_rows,):
        return [1] * num_rows
    return labels.ne(IGNORED_LABEL).reshape(num_rows, -1)[:, num_skipped:].sum(1).tolist()


def cut_rows(inputs: Any, num_rows: int, low: int, high: int) -> Any | None:
    """Cut rows `low` to `high` out of a collated batch: tensors and lists of `num_rows`, in mappings and sequences.

    Returns None if some tensor has another first dimension, so that it cannot be told what belongs to a row.
    """
    if isinstance(inputs, Mapping):
        cut = {key: cut_rows(value, num_rows, low, high) for key, value in inputs.items()}
        return None if any(cut[key] is None and inputs[key] is not None for key in cut) else cut
    if isinstance(inputs, torch.Tensor):
        if inputs.dim() == 0:
            return inputs
        return inputs[low:high] if inputs.shape[0] == num_rows else None
    if isinstance(inputs, (list, tuple)):
        if not any(isinstance(value, (torch.Tensor, Mapping)) for value in inputs):
            return inputs[low:high] if len(inputs) == num_rows else None
        cut = [cut_rows(value, num_rows, low, high) for value in inputs]
        return None if any(value is None for value in cut) else type(inputs)(cut)
    return inputs
