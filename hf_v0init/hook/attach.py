"""`attach_v0`: the hook for a training loop of one's own."""

from collections.abc import Callable
from typing import Any

from torch import nn

from ..errors import InputError
from ..method.length import WarmupLength
from ..settings import AUTO, V0InitArguments
from .length import measure_length
from .v0_hook import V0Hook


def attach_v0(
    optimizer,
    model: nn.Module | None = None,
    v0_init: str = "data_driven",
    *,
    v0_decay: str | None = None,
    v0_decay_steps: int | float | str | None = None,
    v0_scale: float | None = None,
    v0_estimation_steps: int | None = None,
    v0_seed: int = 0,
    v0_include_bias_and_norm: bool | None = None,
    max_steps: int | None = None,
    loss_fn: Callable[[], Any] | None = None,
) -> V0Hook | None:
    """Give an optimizer's second moment a v0 in the run's own first steps. One call, before them, in any loop.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        attach_v0(optimizer, model, v0_decay_steps=1_000)
        ...                                          # the loop as it was, prepared by accelerate, Fabric or nobody

    Keep the learning rate at its peak for `v0_decay_steps` (`keep_plateau` does it to a schedule): v0 is the warmup.
    What happens when: the table at the top of `hook.v0_hook`.

    Args:
        optimizer: torch's or another's with a second moment, plain, prepared by accelerate, or ZeRO's.
        model: whose names the parameters have in the report, and by which a random v0 is drawn; without it they are named by
            their place in the optimizer. Plain, compiled, inside DDP, or sharded by FSDP2 or tensor parallelism.
        v0_init: "data_driven", "random" or "first_gradient"; "zeros" attaches nothing.
        v0_decay, v0_decay_steps, v0_scale, v0_estimation_steps, v0_include_bias_and_norm: as the flags of these names; without
            `v0_decay_steps` v0 acts for two thirds of `max_steps`.
        v0_seed: of a random v0.
        max_steps: optimizer steps of the whole run, which fractions of training, a measured length and the log's outlook need.
        loss_fn: takes nothing and returns the loss (a scalar tensor) of the batch of the first step, by which `v0_decay_steps="auto"`
            is measured in that step: some ten forward passes, which leave everything as it was.

    Returns:
        The hook: `report` says what was done once it is, `plan.decay_steps` for how long, `remove()` takes it off; `state_dict()`
        and `load_state_dict()` let a run resume before v0 has gone. None for "zeros".

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment.
    """
    if isinstance(optimizer, nn.Module):
        raise InputError(
            f"attach_v0 was given a {type(optimizer).__name__} as its optimizer, which is a model: write attach_v0(optimizer, model)"
        )
    settings = V0InitArguments(
        v0_init=v0_init,
        v0_decay=v0_decay,
        v0_decay_steps=v0_decay_steps,
        v0_scale=v0_scale,
        v0_estimation_steps=v0_estimation_steps,
        v0_include_bias_and_norm=v0_include_bias_and_norm,
        v0_seed=v0_seed,
    )
    plan = settings.resolve(max_steps)
    if plan.init == "zeros":
        return None
    if plan.decay_steps == AUTO and (loss_fn is None or not max_steps):
        raise InputError(
            f"v0_decay_steps=auto needs {'loss_fn' if loss_fn is None else 'max_steps'}: give attach_v0 loss_fn=lambda: LOSS of the first "
            "batch and max_steps, or v0_decay_steps as a number of optimizer steps"
        )
    if loss_fn is not None and plan.decay_steps != AUTO:
        raise InputError("loss_fn is what v0_decay_steps='auto' measures a length with: give both, or neither")
    if isinstance(plan.decay_steps, float):
        given = "two thirds" if v0_decay_steps is None else f"{plan.decay_steps:g}"
        raise InputError(
            f"v0_decay_steps: {given} of training, which needs max_steps: give attach_v0 max_steps, or v0_decay_steps as a number of steps"
        )

    def find_length() -> WarmupLength:
        length = measure_length(optimizer, model, loss_fn, max_steps)
        length.log("v0 decays over")
        return length

    return V0Hook(optimizer, model, plan, max_steps=max_steps, find_length=find_length)
