"""How long a run warms up, measured in its first optimizer step: see `estimation.trust_radius` and `method.length`."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..estimation.trust_radius import LossNotComputed, TrustRadius, measure_in_step
from ..method.length import WarmupLength, choose_length
from ..second_moment.deepspeed import find_partitions
from ..second_moment.state import unwrap_optimizer
from ..sharding.parts import get_local_part
from .step_hooks import StepHooks


def call_before_first_update(optimizer, act: Callable[[], object]) -> StepHooks:
    """Call `act` once, in the first step whose gradients are not all zero, before its update; returns the hooks, to be taken off.

    Args:
        optimizer: any that steps its own gradients; needs no second moment.
    """

    def before_step(inner) -> None:
        gradients = [p.grad for group in inner.param_groups for p in group["params"] if p.grad is not None]
        # Loading a distributed checkpoint makes a step of zero gradients.
        if any(bool(get_local_part(gradient).any()) for gradient in gradients):
            hooks.retire()
            act()

    hooks = StepHooks(unwrap_optimizer(optimizer), before_step)
    return hooks


def measure_trust_radius(optimizer, model: nn.Module | None, loss_fn: Callable[[], Any] | None) -> TrustRadius:
    """Measure the trust radius d50 at the gradients in hand, along the update that each group's learning rate would make.

        loss = loss_fn()
        loss.backward()                                                   # accumulated, reduced, clipped as for a step
        radius = measure_trust_radius(optimizer, model, loss_fn)          # some ten forwards, and all is as before

    With several processes all of them call it; losses are means over the processes, and every process gets the same result.

    Args:
        optimizer: whose parameters have the gradients of a step; any that has groups with a learning rate.
        model: whose buffers, modes and plain tensors are to be as before afterwards; None: the loss has nothing of the kind.
        loss_fn: computes the loss of the batch of these gradients at the weights as they are: a number or a scalar tensor. None where it
            cannot be had.

    Returns:
        What was measured. `d50` is None, and `reason` says why, where it could not be measured: no parameter got a gradient, a loss that
        is not finite, differences below rounding.
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
    """Measure how long a warmup this run needs, at the gradients in hand; arguments as of `measure_trust_radius`."""
    radius = measure_trust_radius(optimizer, model, loss_fn)
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
