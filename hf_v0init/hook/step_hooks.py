"""torch's hooks around an optimizer's step, so that what is called before it sees the gradients that the step will use."""

from collections.abc import Callable
from typing import Any

import torch


class StepHooks:
    """Calls `before`, gradients in hand, and `after` at each step of an optimizer, until `retire` or `remove`.

    Args:
        optimizer: the innermost one.
        before: called before the update, where the step takes a closure after its first call, and behind other hooks, which may
            change the gradients, where the optimizer is known to call a closure.
        after: called after the step.
    """

    def __init__(self, optimizer, before: Callable[[Any], None], after: Callable[[Any], None] = lambda _: None) -> None:
        self._before, self._after, self._is_retired = before, after, False
        self._handles = [
            optimizer.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            optimizer.register_step_post_hook(torch.compiler.disable(self._after_step)),
        ]

    @property
    def are_attached(self) -> bool:
        """Whether steps still call back."""
        return bool(self._handles) and not self._is_retired

    def retire(self) -> None:
        """Call back no more after the present step, and go once it is over."""
        self._is_retired = True

    def remove(self) -> None:
        """Take the hooks off the optimizer."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._is_retired:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        is_last = next(reversed(optimizer._optimizer_step_pre_hooks)) == self._handles[0].id
        calls_closure = type(optimizer).__module__.startswith("torch.optim.")  # others may ignore one
        if closure is None and (is_last or not calls_closure):
            self._before(optimizer)
            return None
        if closure is None:
            return args[:1], kwargs | {"closure": lambda: self._before(optimizer)}
        is_first_call = True  # the gradients are made inside the step (Lightning)

        def call_and_look(*inner_args, **inner_kwargs):
            nonlocal is_first_call
            loss = closure(*inner_args, **inner_kwargs)
            if is_first_call:
                is_first_call = False
                self._before(optimizer)
            return loss

        return args[:1], kwargs | {"closure": call_and_look}

    def _after_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        self._after(optimizer)
        if self._is_retired and self._handles:
            # Hooks may not be taken off while torch goes through them: the one before the step goes now, this one once it is
            # the last of its kind.
            before, after = self._handles
            before.remove()
            if next(reversed(optimizer._optimizer_step_post_hooks)) == after.id:
                self.remove()


def read_inverse_scale(optimizer) -> float | None:
    """Return what a gradient must be multiplied by; None if this step will not be made.

    A GradScaler leaves unscaling to optimizers that can do it inside their kernel (fused Adam): then `grad_scale` holds the factor
    and `found_inf` whether a gradient has overflowed.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and float(found_inf) > 0:
        return None
    return 1.0 if scale is None else 1.0 / float(scale)
