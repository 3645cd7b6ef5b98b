"""Where an optimizer keeps its second moment, and how a start value is written there. Knows no Trainer and no maths of v0.

The state of a parameter is written whole, exactly as the optimizer itself would create it at its first step: a missing
`exp_avg` is a KeyError in that step, an integer `step` a RuntimeError, and a state created by a dummy step starts the
bias correction one step late.
"""

from dataclasses import dataclass

import torch
from torch import nn

from .errors import InputError


@dataclass(frozen=True)
class SecondMomentLayout:
    """How one family of optimizers keeps its state.

    Attributes:
        second_moment: key of the running mean of g^2 in `optimizer.state[p]`.
        first_moment: key of the running mean of g, starting at zero.
    """

    second_moment: str
    first_moment: str


_ADAM = SecondMomentLayout(second_moment="exp_avg_sq", first_moment="exp_avg")

# Subclasses are looked at by `type`, not isinstance: a subclass may keep its state elsewhere.
SUPPORTED: dict[type, SecondMomentLayout] = {torch.optim.AdamW: _ADAM, torch.optim.Adam: _ADAM}

_REMEDY = "use optim=adamw_torch or adamw_torch_fused (torch's AdamW or Adam), or v0_init=zeros"


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer:
    """Return the innermost optimizer, out of accelerate's `AcceleratedOptimizer` and the like."""
    seen = set()
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    return optimizer


def find_layout(optimizer) -> SecondMomentLayout:
    """Find where the optimizer keeps its second moment.

    Raises:
        InputError: the optimizer has none, or is not one whose state is known.
    """
    optimizer = unwrap_optimizer(optimizer)
    layout = SUPPORTED.get(type(optimizer))
    if layout is not None:
        return layout
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    if isinstance(optimizer, torch.optim.SGD):
        raise InputError(f"optimizer {name} has no second moment that a v0 could start; {_REMEDY}")
    raise InputError(f"optimizer {name}: where it keeps its second moment is not known here; {_REMEDY}")


def find_group(optimizer, parameter: nn.Parameter) -> dict:
    """Return the parameter group that holds `parameter`; `KeyError` if none does."""
    for group in unwrap_optimizer(optimizer).param_groups:
        if any(parameter is other for other in group["params"]):
            return group
    raise KeyError("the parameter is in none of the optimizer's groups")


def has_state(optimizer, parameter: nn.Parameter) -> bool:
    """Whether the optimizer already holds state for `parameter` (without creating any)."""
    state = unwrap_optimizer(optimizer).state
    return parameter in state and len(state[parameter]) > 0


def is_untouched(optimizer) -> bool:
    """Whether the optimizer holds no state at all: it has made no step and loaded none."""
    return not any(len(state) > 0 for state in unwrap_optimizer(optimizer).state.values())


def create_state(optimizer, parameter: nn.Parameter, group: dict | None = None) -> dict[str, torch.Tensor]:
    """Create the state that the optimizer itself would create for `parameter` before its first step, all zero.

    Returns:
        `step` (fp32 scalar; on the parameter's device for fused and capturable groups, else on the CPU), `exp_avg`,
        `exp_avg_sq` and, under amsgrad, `max_exp_avg_sq`, each of the parameter's shape, dtype and device. The dict is
        not yet part of the optimizer.
    """
    layout = find_layout(optimizer)
    group = find_group(optimizer, parameter) if group is None else group
    on_device = bool(group.get("fused") or group.get("capturable"))
    step = torch.zeros((), dtype=_step_dtype(group), device=parameter.device if on_device else "cpu")
    state = {"step": step}
    keys = [layout.first_moment, layout.second_moment]
    if group.get("amsgrad"):
        # Stays at zero: the maximum is over the second moments from step 1 on, so step 1 is exact (eq. 12).
        keys.append("max_exp_avg_sq")
    for key in keys:
        state[key] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state


def _step_dtype(group: dict) -> torch.dtype:
    # As torch: fp32, or fp64 where that is the default dtype and the kernel is not fused.
    if group.get("fused"):
        return torch.float32
    return torch.float64 if torch.get_default_dtype() == torch.float64 else torch.float32


def write_states(optimizer, states: dict[nn.Parameter, dict[str, torch.Tensor]]) -> None:
    """Put finished states into the optimizer; all of them or, where one is refused, none.

    Raises:
        InputError: a parameter already has state (a resumed or running optimizer), which is never overwritten.
    """
    optimizer = unwrap_optimizer(optimizer)
    taken = sum(has_state(optimizer, parameter) for parameter in states)
    if taken:
        raise InputError(
            f"{taken} of {len(states)} parameters already have optimizer state: v0 is written only before the first step; "
            "build a new optimizer to start again"
        )
    for parameter, state in states.items():
        optimizer.state[parameter] = state


def read_second_moment(optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the live second-moment tensor of `parameter` (its shape and dtype), or None before it has state."""
    if not has_state(optimizer, parameter):
        return None
    return unwrap_optimizer(optimizer).state[parameter][find_layout(optimizer).second_moment]
