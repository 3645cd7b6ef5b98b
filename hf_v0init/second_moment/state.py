"""Where an optimizer keeps its second moments, resolved once: created, written, read. Knows no Trainer and no maths of v0.

Which optimizer keeps it where is in `table`, how it is created and written in `layouts`; an optimizer that nobody listed is
looked at by `probe`, DeepSpeed's partitions by `deepspeed`. A state is written whole, exactly as the optimizer itself would
create it before its first step.

What the optimizer steps is called a *stored tensor*: a parameter, or under ZeRO a flat partition in which parts of many
parameters lie. `StoredTensor.parts` are these parts, with the names and shapes of the whole parameters.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError
from ..sharding.parts import Fragment, get_full_shape
from .deepspeed import ZeroPartitions, find_partitions
from .layouts import LAYOUTS, PlainLayout, State
from .probe import probe_layout
from .table import find_row

_REMEDY = "use an optimizer that `hf-v0init optimizers` lists as supported, such as optim=adamw_torch, or v0_init=zeros"


def unwrap_optimizer(optimizer) -> torch.optim.Optimizer:
    """Return the innermost optimizer, out of accelerate's `AcceleratedOptimizer` and the like, and out of ZeRO's."""
    seen = set()
    while id(optimizer) not in seen:
        seen.add(id(optimizer))
        inner = getattr(optimizer, "optimizer", None)
        if isinstance(inner, torch.optim.Optimizer) or hasattr(inner, "param_groups"):
            optimizer = inner
    return optimizer


def find_layout(optimizer) -> PlainLayout:
    """Find how an innermost optimizer keeps its second moment: by the table, or by a dry run on a copy.

    Raises:
        InputError: it has none, a v0 would have no effect or no meaning, or the dry run did not find out.
    """
    optimizer = unwrap_optimizer(optimizer)
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


@dataclass(frozen=True, eq=False)
class Part:
    """What of one parameter lies in a stored tensor.

    Attributes:
        name: the parameter's name in the model, or its group and place in the optimizer.
        full_shape: the shape of the whole parameter.
        cut: maps a tensor that lies like the stored one (a state, a gradient) to the parameter's part of it: the tensor itself,
            or a `Fragment`.
    """

    name: str
    full_shape: tuple[int, ...]
    cut: Callable[[torch.Tensor], torch.Tensor | Fragment] = lambda tensor: tensor


@dataclass(frozen=True, eq=False)
class StoredTensor:
    """A tensor that the innermost optimizer steps.

    Attributes:
        tensor: it itself; `tensor.grad` is what the optimizer sees.
        group: the parameter group it is in.
        parts: the parameters in it.
    """

    tensor: torch.Tensor
    group: dict
    parts: tuple[Part, ...]


@dataclass
class SecondMoments:
    """The second moments of an optimizer, plain, prepared by accelerate, or partitioned by ZeRO. Made once, cheap to keep.

    Attributes:
        inner: the optimizer that makes the steps and holds the states.
        layout: how it keeps the state of one tensor.
        zero: where parts of parameters lie, under ZeRO, else None.

    Raises:
        InputError: as `find_layout`; a kind of DeepSpeed optimizer that is not known here.
    """

    inner: torch.optim.Optimizer = field(init=False)
    layout: PlainLayout = field(init=False)
    zero: ZeroPartitions | None = field(init=False)

    def __init__(self, optimizer) -> None:
        self.zero = find_partitions(optimizer)
        self.inner = unwrap_optimizer(optimizer)
        self.layout = find_layout(self.inner) if self.zero is None else self.zero.layout

    @property
    def name(self) -> str:
        """The class name of the optimizer that makes the steps, such as "AdamW"."""
        return type(self.inner).__name__

    def list_groups(self) -> list[dict]:
        """List the parameter groups with the model's own parameters in them."""
        return self.inner.param_groups if self.zero is None else self.zero.param_groups

    def list_tensors(self, names: dict[int, str]) -> list[StoredTensor]:
        """List the tensors that the optimizer steps now, with what lies in them.

        Args:
            names: id of a parameter -> its name. A parameter without one, of a loss module for example, gets the name that its
                group gives it, or "group 0, parameter 3".
        """
        if self.zero is not None:
            return [
                StoredTensor(
                    flat,
                    group,
                    tuple(
                        Part(names.get(id(p), "?"), get_full_shape(p), lambda t, p=p: self.zero.cut(t, p))
                        for p in parameters
                    ),
                )
                for flat, group, parameters in self.zero.list_flat()
            ]
        tensors = []
        for number, group in enumerate(self.inner.param_groups):
            given = group.get("param_names") or [None] * len(group["params"])
            for place, (parameter, own) in enumerate(zip(group["params"], given, strict=True)):
                name = names.get(id(parameter)) or own or f"group {number}, parameter {place}"
                tensors.append(StoredTensor(parameter, group, (Part(name, get_full_shape(parameter)),)))
        return tensors

    def read_beta2(self, group: dict | None = None) -> float | None:
        """Read the decay of the second moment that the closed form m(t) takes, of one group (default: the first).

        None for optimizers that m(t) does not describe, such as Adagrad, whose sum never decays.
        """
        return self.layout.read_beta2(self.inner.param_groups[0] if group is None else group)

    def find_state(self, tensor: torch.Tensor, group: dict) -> State | None:
        """Return the state that steps, a checkpoint or a v0 have left for a stored tensor, or None; creates nothing."""
        return self.layout.find_state(self.inner, tensor, group)

    def create_state(self, tensor: torch.Tensor, group: dict) -> State:
        """Create the state that the optimizer itself would create for a stored tensor before its first step.

        Returns:
            For torch's Adam: `step` (fp32 scalar; on the parameter's device for fused and capturable groups, else on the CPU),
            `exp_avg`, `exp_avg_sq` and, under amsgrad, `max_exp_avg_sq`, each zero, of the parameter's shape, dtype and device;
            for other optimizers what they keep. The dict is not yet part of the optimizer.
        """
        with torch.no_grad():
            return self.layout.create_state(self.inner, tensor, group)

    def put_state(self, tensor: torch.Tensor, group: dict, state: State) -> None:
        """Make a finished state part of the optimizer.

        Raises:
            InputError: there is state already (a resumed or running optimizer), which is never overwritten.
        """
        if self.find_state(tensor, group) is not None:
            raise InputError(
                "parameters already have optimizer state: v0 is written only before the first step; build a new optimizer to "
                "start again"
            )
        self.layout.put_state(self.inner, tensor, group, state)

    def change(
        self, stored: StoredTensor, parts: Iterable[Part], change: Callable[[Part, torch.Tensor | Fragment], None]
    ) -> None:
        """Let `change` act on the second moment, part by part, in place; the state is created where there is none.

        Args:
            stored: one of `list_tensors`.
            parts: those of `stored.parts` that change.
            change: gets a part and its second moment in units of gradient squared: the live tensor, or a copy in fp32 that is stored
                afterwards where the state is quantised or a root.
        """
        state = self.find_state(stored.tensor, stored.group)
        is_new = state is None
        if is_new:
            state = self.create_state(stored.tensor, stored.group)
        own = state[self.layout.second_moment]
        moment = self.layout.read(state)
        for part in parts:
            change(part, part.cut(moment))
        if moment is not own:
            self.layout.write_(state, moment)
        if is_new:
            self.put_state(stored.tensor, stored.group, state)

    def count_steps(self, stored: StoredTensor) -> int | None:
        """Return how many steps the optimizer has made on a stored tensor; None where it keeps no such count."""
        state = self.find_state(stored.tensor, stored.group)
        if state is None:
            return 0
        for place, key in ((state, "step"), (stored.group, "step"), (stored.group, "k")):
            if key in place:
                return int(place[key])
        return None

    def require_linear_decay(self) -> None:
        """Raise `InputError` if a v0 cannot decay linearly in every group, naming what to use."""
        if getattr(getattr(self.inner, "args", None), "optim_bits", 32) == 8:  # bitsandbytes
            raise InputError(
                f"v0_decay=linear with {self.name}: its second moment is kept in 8 bits, in which g^2 is lost beside v0; use "
                "v0_decay=beta2, or optim=adamw_torch"
            )
        for group in self.inner.param_groups:
            reason = self.layout.explain_no_linear_decay(group)
            if reason:
                raise InputError(
                    f"v0_decay=linear with {self.name}: {reason}; use v0_decay=beta2, or optim=adamw_torch"
                )

    def is_untouched(self) -> bool:
        """Whether the optimizer has made no step, loaded no state and got no v0."""
        return not any(self.find_state(stored.tensor, stored.group) is not None for stored in self.list_tensors({}))

    def read(self, parameter: nn.Parameter) -> torch.Tensor | Fragment | None:
        """Return the second moment of a parameter in units of gradient squared, or None before it has state.

        The live tensor in the parameter's dtype; a new one, in fp32, where the state is quantised or stores the root; under ZeRO
        the `Fragment` that this process holds.
        """
        if self.zero is not None:
            return self.zero.read(parameter)
        for group in self.inner.param_groups:
            if any(parameter is other for other in group["params"]):
                state = self.find_state(parameter, group)
                return None if state is None else self.layout.read(state)
        return None


def read_second_moment(optimizer, parameter: nn.Parameter) -> torch.Tensor | Fragment | None:
    """Return the second moment that `optimizer` keeps of `parameter`; see `SecondMoments.read`.

    Raises:
        InputError: as `SecondMoments`.
    """
    return SecondMoments(optimizer).read(parameter)


def is_untouched(optimizer) -> bool:
    """Whether the optimizer has made no step, loaded no state and got no v0; also of one that could not get a v0."""
    try:
        return SecondMoments(optimizer).is_untouched()
    except InputError:  # refused for a v0: what lies in `optimizer.state` is its state all the same
        return not any(unwrap_optimizer(optimizer).state.values())
