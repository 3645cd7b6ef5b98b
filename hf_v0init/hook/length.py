"""How long a run warms up, measured in its first optimizer step: see `estimation.trust_radius` and `method.length`."""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from ..estimation.trust_radius import LossNotComputed, TrustRadius, measure_in_step
from ..method.length import WarmupLength, choose_length
from ..second_moment.deepspeed import find_partitions
from ..second_moment.state import unwrap_optimizer
from ..sharding.parts import get_local_part


class LengthHook:
    """Measures in an optimizer's first step how long a warmup its run needs, hands it on before the update, and is gone.

    Args:
        optimizer: any that steps its own gradients; needs no second moment.
        on_length: gets what was measured.
        on_failed: called where an exception or Ctrl-C cuts the measurement off.
    """

    def __init__(
        self,
        optimizer,
        model: nn.Module | None,
        *,
        max_steps: int,
        loss_fn: Callable[[], Any],
        on_length: Callable[[WarmupLength], None],
        on_failed: Callable[[], None] | None = None,
    ) -> None:
        self.on_failed = on_failed
        self.model, self.max_steps, self.loss_fn, self.on_length = model, max_steps, loss_fn, on_length
        self.inner = unwrap_optimizer(optimizer)
        self._optimizer = optimizer
        self._handle = self.inner.register_step_pre_hook(torch.compiler.disable(self._before_step))

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.on_length is None or not any(bool(get_local_part(g).any()) for g in gradients):
            return  # measured already, or the step by which a distributed checkpoint is loaded
        on_length, self.on_length = self.on_length, None
        with call_if_cut_off(self.on_failed):
            length = measure_length(self._optimizer, self.model, self.loss_fn, self.max_steps)
        on_length(length)


@contextlib.contextmanager
def call_if_cut_off(on_failed: Callable[[], None] | None) -> Iterator[None]:
    """Call `on_failed` where an exception or Ctrl-C passes."""
    try:
        yield
    except BaseException:
        if on_failed is not None:
            on_failed()
        raise


def measure_radius(optimizer, model: nn.Module | None, loss_fn: Callable[[], Any] | None) -> TrustRadius:
    """Measure the trust radius at the gradients in hand, along the update that each group's learning rate would make.

    Args:
        optimizer: whose present gradients are those of the step.
        loss_fn: computes the loss of the present step's batch at the weights as they are; None where it cannot be had.
    """
    groups = unwrap_optimizer(optimizer).param_groups
    largest = find_largest_rate(optimizer)
    if find_partitions(optimizer) is not None:
        return TrustRadius(reason="DeepSpeed's engine keeps the gradients")
    if loss_fn is None:
        return TrustRadius(reason="there is no loss_fn")
    if largest == 0.0:
        return TrustRadius(reason="every learning rate is 0")
    stepped = [(p, _read_rate(group) / largest) for group in groups for p in group["params"] if p.grad is not None]
    try:
        return measure_in_step(stepped, loss_fn, model)
    except LossNotComputed as error:
        return TrustRadius(reason=str(error))


def measure_length(
    optimizer, model: nn.Module | None, loss_fn: Callable[[], Any] | None, max_steps: int | None
) -> WarmupLength:
    """Measure how long a warmup this run needs, at the gradients in hand; arguments as of `measure_radius`."""
    radius = measure_radius(optimizer, model, loss_fn)
    return choose_length(
        radius.d50,
        find_largest_rate(optimizer),
        max_steps,
        reason=radius.reason,
        num_forwards=radius.num_forwards,
        seconds=radius.seconds,
    )


def find_largest_rate(optimizer) -> float:
    """Return the largest peak learning rate of an optimizer's groups."""
    return max((_read_rate(group) for group in unwrap_optimizer(optimizer).param_groups), default=0.0)


def _read_rate(group: dict) -> float:
    return float(group.get("initial_lr", group["lr"]))
