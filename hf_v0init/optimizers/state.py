"""Writes a start value into an optimizer's second moment and reads it back. Knows no Trainer and no maths of v0.

Which optimizer keeps it where is in `optimizer_table`, how it is created and written in `optimizer_layouts`; an optimizer
that nobody listed is looked at by `optimizer_probe`. A state is written whole, exactly as the optimizer itself would create
it before its first step, and put into the optimizer only when it is finished.
"""

from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from .layouts import LAYOUTS, PlainLayout, State
from .probe import probe_layout
from .table import find_row

WIDE_DTYPES = (torch.float32, torch.float64)  # wide enough to add up a thousand gradients

_REMEDY = "use an optimizer that `hf-v0init optimizers` lists as supported, such as optim=adamw_torch, or v0_init=zeros"


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer:
    """Return the innermost optimizer, out of accelerate's `AcceleratedOptimizer` and the like."""
    seen = set()
    while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer) and id(optimizer) not in seen:
        seen.add(id(optimizer))
        optimizer = optimizer.optimizer
    return optimizer


def name_optimizer(optimizer) -> str:
    """Return the class name of the optimizer that makes the steps, such as "AdamW"."""
    optimizer = unwrap_optimizer(optimizer)
    return type(optimizer.inner if getattr(optimizer, "is_partitioned", False) else optimizer).__name__


def find_layout(optimizer) -> PlainLayout:
    """Find how the optimizer keeps its second moment: by the table, or by a dry run on a copy.

    Raises:
        InputError: it has none, a v0 would have no effect or no meaning, or the dry run did not find out.
    """
    optimizer = unwrap_optimizer(optimizer)
    if getattr(optimizer, "is_partitioned", False):
        return optimizer.v0_layout  # see `deepspeed_state`
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    row = find_row(name)
    if row is not None and row.refusal:
        raise InputError(f"optimizer {name}: {row.refusal}; {_REMEDY}")
    if row is not None and row.layout is not None:
        return LAYOUTS[row.layout]
    layout, reason = probe_layout(optimizer)
    if layout is None:
        raise InputError(f"optimizer {name} is not listed, and a dry run on a copy refused it: {reason}; {_REMEDY}")
    return layout


def find_group(optimizer, parameter: nn.Parameter) -> dict:
    """Return the parameter group that holds `parameter`; `KeyError` if none does."""
    for group in unwrap_optimizer(optimizer).param_groups:
        if any(parameter is other for other in group["params"]):
            return group
    raise KeyError("the parameter is in none of the optimizer's groups")


def has_state(optimizer, parameter: nn.Parameter, group: dict | None = None) -> bool:
    """Whether steps, a checkpoint or a v0 have left state for `parameter` (without creating any)."""
    group = find_group(optimizer, parameter) if group is None else group
    try:
        layout = find_layout(optimizer)
    except InputError:
        layout = PlainLayout()  # refused for a v0: what lies in `optimizer.state` is its state all the same
    return layout.find_state(unwrap_optimizer(optimizer), parameter, group) is not None


def is_untouched(optimizer) -> bool:
    """Whether the optimizer has made no step, loaded no state and got no v0."""
    return not any(
        has_state(optimizer, parameter, group)
        for group in unwrap_optimizer(optimizer).param_groups
        for parameter in group["params"]
    )


def read_beta2(optimizer, group: dict | None = None) -> float | None:
    """Read the decay of the second moment that the closed form m(t) takes, of one group (default: the first).

    None for optimizers that m(t) does not describe, such as Adagrad, whose sum never decays.
    """
    group = unwrap_optimizer(optimizer).param_groups[0] if group is None else group
    return find_layout(optimizer).read_beta2(group)


def create_state(optimizer, parameter: nn.Parameter, group: dict | None = None) -> State:
    """Create the state that the optimizer itself would create for `parameter` before its first step.

    Returns:
        For torch's Adam: `step` (fp32 scalar; on the parameter's device for fused and capturable groups, else on the CPU),
        `exp_avg`, `exp_avg_sq` and, under amsgrad, `max_exp_avg_sq`, each zero, of the parameter's shape, dtype and device;
        for other optimizers what they keep. The dict is not yet part of the optimizer.
    """
    group = find_group(optimizer, parameter) if group is None else group
    with torch.no_grad():
        return find_layout(optimizer).create_state(unwrap_optimizer(optimizer), parameter, group)


@dataclass
class StateDraft:
    """The state of one parameter while its v0 is being computed.

    Attributes:
        tensors: zero-filled tensors of the parameter's shape to compute in, the last for v0. Where they can, they are the
            future state's own tensors, so that the gradient sums of a pass need no memory beyond it.
        lent: those of the state's own that v0 will not stand in; cleared at the end.
    """

    optimizer: torch.optim.Optimizer
    layout: PlainLayout
    parameter: nn.Parameter
    group: dict
    state: State | None
    tensors: tuple[torch.Tensor, ...]
    lent: tuple[torch.Tensor, ...] = ()

    def finish(self, v0: torch.Tensor) -> State:
        """Write v0 (in units of gradient squared; may be the last of `tensors`) and return the finished state."""
        if self.state is None:
            self.state = create_state(self.optimizer, self.parameter, self.group)
        with torch.no_grad():
            for tensor in self.lent:
                tensor.zero_()
            self.layout.write_(self.state, v0)
        self.tensors = self.lent = ()
        return self.state


def draft_state(
    optimizer, parameter: nn.Parameter, group: dict | None = None, *, num_tensors: int = 1, for_sums: bool = False
) -> StateDraft:
    """Begin the state of `parameter`, which `StateDraft.finish` completes. The optimizer is not touched.

    Args:
        num_tensors: 1 (v0 alone) or 2 (the sums of g and of g^2).
        for_sums: many values will be added up, so the tensors must be fp32 or wider: running sums in bf16 lose a fifth
            over a thousand batches.
    """
    layout, inner = find_layout(optimizer), unwrap_optimizer(optimizer)
    if getattr(inner, "is_partitioned", False):
        return layout.draft_state(parameter, num_tensors, for_sums)
    group = find_group(optimizer, parameter) if group is None else group
    state: State | None = None
    found: list[torch.Tensor | None] = [None] * num_tensors
    if not for_sums or parameter.dtype in WIDE_DTYPES:
        state = create_state(inner, parameter, group)
        found = layout.find_sum_tensors(state, num_tensors)
    if all(tensor is None for tensor in found):
        state = None  # made when v0 is known, so that sums and state do not lie in memory at once
    dtype = parameter.dtype if parameter.dtype in WIDE_DTYPES else torch.float32
    with torch.no_grad():
        tensors = tuple(
            torch.zeros_like(parameter, dtype=dtype, requires_grad=False) if tensor is None else tensor
            for tensor in found
        )
    lent = tuple(tensor for tensor in found[:-1] if tensor is not None)
    return StateDraft(inner, layout, parameter, group, state, tensors, lent)


def write_states(optimizer, states: dict[nn.Parameter, State]) -> None:
    """Put finished states into the optimizer; all of them or, where one is refused, none.

    Raises:
        InputError: a parameter already has state (a resumed or running optimizer), which is never overwritten.
    """
    layout, optimizer = find_layout(optimizer), unwrap_optimizer(optimizer)
    groups = {id(parameter): group for group in optimizer.param_groups for parameter in group["params"]}
    taken = sum(has_state(optimizer, parameter, groups[id(parameter)]) for parameter in states)
    if taken:
        raise InputError(
            f"{taken} of {len(states)} parameters already have optimizer state: v0 is written only before the first step; "
            "build a new optimizer to start again"
        )
    if getattr(optimizer, "is_partitioned", False):
        layout.put_states(states)
        return
    for parameter, state in states.items():
        layout.put_state(optimizer, parameter, groups[id(parameter)], state)


def read_second_moment(optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the second moment of `parameter` in units of gradient squared, or None before it has state.

    The live tensor in the parameter's dtype; a new one, in fp32, where the state is quantised or stores the root.

    Raises:
        InputError: as `find_layout`.
    """
    try:
        group = find_group(optimizer, parameter)
    except KeyError:
        return None
    layout = find_layout(optimizer)
    state = layout.find_state(unwrap_optimizer(optimizer), parameter, group)
    return None if state is None else layout.read(state)
