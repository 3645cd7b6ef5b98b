"""The second moment of an optimizer: where it is, what it starts from, how it is read and changed. Knows no Trainer and no maths of v0.

Which optimizer keeps it where is in `table`, in what form in `formats`; an optimizer that nobody listed is looked at by `probe`,
DeepSpeed's partitions by `deepspeed`.
"""

from collections.abc import Callable, Iterable

import torch
from torch import nn

from ..errors import InputError
from ..sharding.parts import ParamShard, get_full_shape
from .deepspeed import find_partitions
from .formats import FORMATS, State, StateFormat
from .probe import probe_optimizer
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


def find_format(optimizer) -> StateFormat:
    """Find how an innermost optimizer keeps its second moment: by the table, or by a dry run on a copy.

    Raises:
        InputError: it has none, a v0 would have no effect or no meaning, or the dry run did not find out.
    """
    optimizer = unwrap_optimizer(optimizer)
    name = f"{type(optimizer).__module__}.{type(optimizer).__qualname__}"
    row = find_row(name)
    if row is not None and row.refusal:
        raise InputError(f"optimizer {name}: {row.refusal}; {_REMEDY}")
    if row is None or row.is_probed:
        row, reason = probe_optimizer(optimizer)
        if row is None:
            raise InputError(f"optimizer {name} is not listed, and a dry run on a copy refused it: {reason}; {_REMEDY}")
    return FORMATS[row.format](row)


class SecondMoment:
    """The second moment of an optimizer, plain, prepared by accelerate, or partitioned by ZeRO. Made once, cheap to keep.

    Attributes:
        inner: the optimizer that makes the steps and holds the states.
        format: how it keeps the state of one tensor.
        zero: where shards of parameters lie, under ZeRO, else None.

    Raises:
        InputError: as `find_format`; a kind of DeepSpeed optimizer that is not known here.
    """

    def __init__(self, optimizer) -> None:
        self.zero = find_partitions(optimizer)
        self.inner = unwrap_optimizer(optimizer)
        self.format = find_format(self.inner) if self.zero is None else self.zero.format

    @property
    def name(self) -> str:
        """The class name of the optimizer that makes the steps, such as "AdamW"."""
        return type(self.inner).__name__

    @property
    def key(self) -> str:
        """The second moment's key in the state of a tensor, such as "exp_avg_sq"."""
        return self.format.row.key

    # ---- what there is -----------------------------------------------------------------------------------------------

    def list_groups(self) -> list[dict]:
        """List the parameter groups with the model's own parameters in them."""
        return self.inner.param_groups if self.zero is None else self.zero.param_groups

    def list_shards(self, names: dict[int, str]) -> list[ParamShard]:
        """List what the optimizer steps now, parameter by parameter.

        Args:
            names: id of a parameter -> its name. A parameter without one, of a loss module for example, gets the name that its
                group gives it, or "group 0, parameter 3".
        """
        if self.zero is not None:
            return self.zero.list_shards(names)
        shards = []
        for number, group in enumerate(self.inner.param_groups):
            given = group.get("param_names") or [None] * len(group["params"])
            for place, (parameter, own) in enumerate(zip(group["params"], given, strict=True)):
                name = names.get(id(parameter)) or own or f"group {number}, parameter {place}"
                shards.append(ParamShard(name, get_full_shape(parameter), parameter, group))
        return shards

    def read_beta2(self, group: dict | None = None) -> float | None:
        """Read the decay of the second moment that the closed form m(t) takes, of one group (default: the first).

        None for optimizers that m(t) does not describe, such as Adagrad, whose sum never decays.
        """
        return self.format.row.read_beta2(self.inner.param_groups[0] if group is None else group)

    def count_steps(self, shard: ParamShard) -> int | None:
        """Return how many steps the optimizer has made on a shard's tensor; None where it keeps no such count."""
        state = self.find_state(shard.param, shard.group)
        if state is None:
            return 0
        for place, key in ((state, "step"), (shard.group, "step"), (shard.group, "k")):
            if key in place:
                return int(place[key])
        return None

    def is_untouched(self) -> bool:
        """Whether the optimizer has made no step, loaded no state and got no v0."""
        return all(self.find_state(shard.param, shard.group) is None for shard in self.list_shards({}))

    def require_linear_decay(self) -> None:
        """Raise `InputError` if a v0 cannot decay linearly in every group, naming what to use."""
        if getattr(getattr(self.inner, "args", None), "optim_bits", 32) == 8:  # bitsandbytes
            raise InputError(
                f"v0_decay=linear with {self.name}: its second moment is kept in 8 bits, in which g^2 is lost beside v0; use "
                "v0_decay=beta2, or optim=adamw_torch"
            )
        for group in self.inner.param_groups:
            reason = self.format.row.explain_no_linear_decay(group)
            if reason:
                raise InputError(
                    f"v0_decay=linear with {self.name}: {reason}; use v0_decay=beta2, or optim=adamw_torch"
                )

    # ---- states ------------------------------------------------------------------------------------------------------

    def find_state(self, param: torch.Tensor, group: dict) -> State | None:
        """Return the state that steps, a checkpoint or a v0 have left for a stepped tensor, or None; creates nothing."""
        state = self.format.get_state(self.inner, param, group)
        return state if state is not None and self.format.is_touched(self.inner, state) else None

    def prime(self, shards: Iterable[ParamShard]) -> None:
        """Let the optimizer have the state that it would make before its first step, for tensors that have none.

        For torch's Adam that is `step` (fp32 scalar; on the parameter's device for fused and capturable groups, else on the CPU),
        `exp_avg`, `exp_avg_sq` and, under amsgrad, `max_exp_avg_sq`, each zero, of the parameter's shape, dtype and device; for other
        optimizers what they keep. State that is there is never replaced.
        """
        by_group: dict[int, tuple[dict, dict[torch.Tensor, None]]] = {}
        for shard in shards:
            if self.find_state(shard.param, shard.group) is None:
                by_group.setdefault(id(shard.group), (shard.group, {}))[1][shard.param] = None
        with torch.no_grad():
            for group, params in by_group.values():
                self.format.prime(self.inner, list(params), group)

    def read(self, shard: ParamShard) -> torch.Tensor | None:
        """Return the second moment of a shard in units of gradient squared, or None before it has state.

        The live tensor in the parameter's dtype; a new one, in fp32, where the state is quantised or stores the root; under ZeRO
        the 1-D part of it that lies on this process.
        """
        whole = self.read_whole(shard)
        return None if whole is None else shard.cut(whole)

    def read_whole(self, shard: ParamShard) -> torch.Tensor | None:
        """Return the second moment of the tensor that a shard lies in, as `read`."""
        state = self.find_state(shard.param, shard.group)
        return None if state is None else self.format.read(state)

    def change(self, shard: ParamShard, change: Callable[[torch.Tensor], object]) -> None:
        """Let `change` act in place on the second moment of a shard; the state is created where there is none.

        Args:
            change: gets the second moment in units of gradient squared: the live tensor, or a copy in fp32 that is stored
                afterwards where the state is quantised or a root.
        """
        state = self.find_state(shard.param, shard.group)
        if state is None:
            self.prime([shard])
            state = self.format.get_state(self.inner, shard.param, shard.group)
        moment = self.format.read(state)
        change(shard.cut(moment))
        if moment is not state[self.key]:
            self.format.write_(state, moment)


def read_second_moment(optimizer, parameter: nn.Parameter) -> torch.Tensor | None:
    """Return the second moment that `optimizer` keeps of `parameter`, see `SecondMoment.read`; None also where it does not step that.

    Raises:
        InputError: as `SecondMoment`.
    """
    moments = SecondMoment(optimizer)
    if moments.zero is None:
        shards = (shard for shard in moments.list_shards({}) if shard.param is parameter)
    else:
        shards = (shard for own, shard in moments.zero.shards.items() if own is parameter)
    return next((moments.read(shard) for shard in shards), None)
