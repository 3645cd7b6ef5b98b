"""How each family of optimizers stores its state: creates it, writes v0 into it, reads it.

A layout knows the state of one parameter at a time. The state it creates is the one that the optimizer itself would create
before its first step: a missing `exp_avg` is a KeyError in that step, an integer `step` a RuntimeError in torch, and a state
created by a dummy step starts the bias correction one step late. Which optimizer has which layout: `optimizer_table`.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import nn

from ..errors import InputError
from ..sharding.parts import get_local_part, is_dtensor

State = dict[str, object]

BNB_BLOCK_SIZE = 256  # elements that share a scale in bitsandbytes' 8-bit state


def _second_beta(group: dict) -> float | None:
    return float(group["betas"][1]) if "betas" in group else None


def _no_beta(group: dict) -> None:
    return None


def _alpha(group: dict) -> float:
    return float(group["alpha"])


def _first_beta(group: dict) -> float:
    return float(group["betas"][0])


@dataclass(frozen=True)
class PlainLayout:
    """State in tensors of the parameter's shape and dtype, as torch's own optimizers and most others keep it.

    Attributes:
        second_moment: key of the tensor that v0 starts.
        scratch: key of a tensor that starts at zero, such as the first moment.
        scalars: keys of the scalar tensors and their start values. They lie where torch puts them.
        others: keys of further tensors of zeros.
        conditional: (group option, key): a further tensor of zeros where the option is on.
        parameter_copy: key of a copy of the parameter (the z of schedule-free optimizers).
        fill: group option that says with what the tensors are filled instead of zero; v0 takes its place.
        square_root: whether the tensor holds the root of the second moment (Adamax).
        unknown_options: group options that add state which is not known here, and so must be off.
        find_decay: the decay of the second moment from a parameter group; None where it is no decaying mean of g^2.
        no_linear_decay: why v0 cannot decay linearly; "" if it can.
    """

    second_moment: str = "exp_avg_sq"
    scratch: str | None = "exp_avg"
    scalars: dict[str, float] = field(default_factory=dict)
    others: tuple[str, ...] = ()
    conditional: tuple[tuple[str, str], ...] = ()
    parameter_copy: str | None = None
    fill: str | None = None
    square_root: bool = False
    unknown_options: tuple[str, ...] = ()
    find_decay: Callable[[dict], float | None] = _second_beta
    no_linear_decay: str = ""

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Create the state of `parameter` before the first step; not yet part of the optimizer.

        Raises:
            InputError: an option is on whose state is not known here.
        """
        for option in self.unknown_options:
            if group.get(option):
                raise InputError(
                    f"{type(optimizer).__name__} with {option}={group[option]!r} keeps state that is not known here; leave "
                    f"{option} out, or use v0_init=zeros"
                )
        state: State = {key: _make_scalar(value, parameter, group) for key, value in self.scalars.items()}
        if self.parameter_copy is not None:
            state[self.parameter_copy] = torch.clone(parameter.detach(), memory_format=torch.preserve_format)
        start = 0.0 if self.fill is None else float(group[self.fill])
        keys = [self.scratch] if self.scratch is not None else []
        keys += [self.second_moment, *self.others, *(key for option, key in self.conditional if group.get(option))]
        for key in keys:
            state[key] = torch.full_like(parameter, start, memory_format=torch.preserve_format, requires_grad=False)
        return state

    def read_beta2(self, group: dict) -> float | None:
        """Read beta2 of the closed form m(t); None where m(t) does not hold, also where the largest v is what counts."""
        return None if group.get("amsgrad") or group.get("ams_bound") else self.find_decay(group)

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write v0 (in units of gradient squared), which may be the state's own tensor."""
        own = state[self.second_moment]
        if v0 is not own:
            own.copy_(v0)
        if self.square_root:
            own.sqrt_()

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment: the live tensor, or its square where the root is what is stored."""
        own = state[self.second_moment]
        return own.square() if self.square_root else own

    def explain_no_linear_decay(self, group: dict) -> str:
        """Say why v0 cannot decay linearly in this group; "" if it can."""
        if self.no_linear_decay:
            return self.no_linear_decay
        if group.get("amsgrad") or group.get("ams_bound"):
            return "it keeps the largest second moment, which never decays"
        if self.find_decay is not _second_beta or "betas" not in group:
            return "its second moment is no mean of g^2 that decays by betas[1]"
        return ""

    def find_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State | None:
        """Return the state that steps, a checkpoint or a v0 have left for `parameter`, or None; creates nothing."""
        return optimizer.state.get(parameter) or None

    def put_state(self, optimizer, parameter: nn.Parameter, group: dict, state: State) -> None:
        """Make a finished state part of the optimizer."""
        optimizer.state[parameter] = state


@dataclass(frozen=True)
class AdagradLayout(PlainLayout):
    """torch's Adagrad, whose `sum` exists from construction on: its state is untouched while it stands at its start."""

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Create the state as Adagrad does at construction."""
        start = optimizer.defaults["initial_accumulator_value"]
        own = torch.full_like(parameter, start, memory_format=torch.preserve_format, requires_grad=False)
        return {"step": _make_scalar(0.0, parameter, group), self.second_moment: own}

    def find_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State | None:
        """Return the state if a step was made or the sum is not what it started with."""
        state = super().find_state(optimizer, parameter, group)
        if state is None or state["step"] > 0:
            return state
        own = get_local_part(state[self.second_moment])
        return state if bool((own != optimizer.defaults["initial_accumulator_value"]).any()) else None


@dataclass(frozen=True)
class GrokAdamWLayout(PlainLayout):
    """GrokAdamW, which keeps its state in `group["state"]`, on the CPU."""

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Create the state as GrokAdamW does at its first step."""
        keys = ("exp_avg", "exp_avg_sq", "grok_ema")
        return {"step": 0} | {key: torch.zeros_like(parameter, device="cpu", requires_grad=False) for key in keys}

    def find_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State | None:
        """Return the state that the group holds for this very parameter."""
        return group.get("state", {}).get(parameter) or None

    def put_state(self, optimizer, parameter: nn.Parameter, group: dict, state: State) -> None:
        """Make a finished state part of the group."""
        group.setdefault("state", {})[parameter] = state


@dataclass(frozen=True)
class BitsAndBytesLayout(PlainLayout):
    """bitsandbytes' optimizers: fp32 state, or 8-bit codes with a map of values and a scale for each 256 elements.

    Small tensors, and those that `GlobalOptimManager` names, stay fp32; the optimizer's own `init_state` decides.
    """

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Let the optimizer create its state, as in its first step, and take it out again.

        Raises:
            InputError: the parameter is sharded (a DTensor), which bitsandbytes cannot step.
        """
        if is_dtensor(parameter):
            raise InputError(
                f"bitsandbytes' {type(optimizer).__name__} cannot step sharded parameters (FSDP2, tensor parallel); use "
                "optim=adamw_torch_8bit (torchao), which can"
            )
        optimizer.check_overrides()
        if not parameter.is_contiguous():  # its kernels read memory in order, and so must v0 be written
            parameter.data = parameter.data.contiguous()
        group_index = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
        index = next(i for i, other in enumerate(group["params"]) if other is parameter)
        present = optimizer.state.pop(parameter, None)
        try:
            optimizer.init_state(group, parameter, group_index, index)
            return optimizer.state[parameter]
        finally:
            optimizer.state.pop(parameter, None)
            if present is not None:
                optimizer.state[parameter] = present

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write v0, quantised as the optimizer quantises its second moment after each step."""
        own = state[self.second_moment]
        if own.dtype != torch.uint8:
            own.copy_(v0)
            return
        from bitsandbytes.functional import quantize_blockwise

        code, absmax = self._find_code(state)
        quantize_blockwise(v0.float().contiguous(), code=code, absmax=absmax, out=own, blocksize=BNB_BLOCK_SIZE)

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment in fp32; the live tensor where it is not quantised."""
        own = state[self.second_moment]
        if own.dtype != torch.uint8:
            return own
        from bitsandbytes.functional import dequantize_blockwise

        code, absmax = self._find_code(state)
        return dequantize_blockwise(own, absmax=absmax, code=code, blocksize=BNB_BLOCK_SIZE)

    def _find_code(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        number = self.second_moment.removeprefix("state")
        return state[f"qmap{number}"], state[f"absmax{number}"]


@dataclass(frozen=True)
class TorchAOLayout(PlainLayout):
    """torchao's low-bit Adam: `exp_avg_sq` is a tensor class with codes and scales, also inside a DTensor."""

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Create the state with the optimizer's own buffers."""
        state: State = {"step": torch.tensor(0.0)}
        state["exp_avg"] = optimizer._new_buffer(parameter, True)
        state["exp_avg_sq"] = optimizer._new_buffer(parameter, False)
        if group["amsgrad"]:
            state["max_exp_avg_sq"] = optimizer._new_buffer(parameter, False)
        return state

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write v0, quantised as the optimizer quantises its second moment after each step."""
        get_local_part(state[self.second_moment]).copy_(get_local_part(v0).float())

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment in fp32 (a DTensor where the state is one); the live tensor where it is plain."""
        from torch.distributed.tensor import DTensor

        own = state[self.second_moment]
        local = get_local_part(own)
        if type(local) is torch.Tensor:
            return own
        values = local.dequantize(torch.float32)
        if not isinstance(own, DTensor):
            return values
        return DTensor.from_local(
            values, own.device_mesh, own.placements, run_check=False, shape=own.shape, stride=own.stride()
        )


def _make_scalar(value: float, parameter: nn.Parameter, group: dict) -> torch.Tensor:
    """Make a scalar as torch makes `step`: on the parameter's device for fused and capturable groups, else on the CPU;
    fp32, or fp64 where that is the default dtype and the kernel is not fused.
    """
    wide = torch.get_default_dtype() == torch.float64 and not group.get("fused")
    device = parameter.device if group.get("fused") or group.get("capturable") else "cpu"
    return torch.full((), value, dtype=torch.float64 if wide else torch.float32, device=device)


_STEP = {"step": 0.0}

# By the name that a row of `optimizer_table` gives.
LAYOUTS: dict[str, PlainLayout] = {
    "adam": PlainLayout(scalars=_STEP, conditional=(("amsgrad", "max_exp_avg_sq"),)),
    "nadam": PlainLayout(scalars=_STEP | {"mu_product": 1.0}),
    "radam": PlainLayout(scalars=_STEP, no_linear_decay="its rectification is a warmup by beta2 already"),
    "adamax": PlainLayout("exp_inf", scalars=_STEP, square_root=True, find_decay=_no_beta),
    "rmsprop": PlainLayout(
        "square_avg",
        scratch=None,
        scalars=_STEP,
        conditional=(("momentum", "momentum_buffer"), ("centered", "grad_avg")),
        find_decay=_alpha,
    ),
    "adadelta": PlainLayout("square_avg", scratch="acc_delta", scalars=_STEP, find_decay=_no_beta),
    "adagrad": AdagradLayout("sum", scratch=None, find_decay=_no_beta),
    "schedule_free": PlainLayout(scratch=None, parameter_copy="z"),
    "grokadamw": GrokAdamWLayout(),
    "adabelief": PlainLayout(
        "exp_avg_var", conditional=(("ams_bound", "max_exp_avg_var"),), unknown_options=("adanorm",)
    ),
    "adabound": PlainLayout(conditional=(("ams_bound", "max_exp_avg_sq"),)),
    "adopt": PlainLayout(find_decay=_no_beta),
    "yogi": PlainLayout(fill="initial_accumulator", find_decay=_no_beta),
    "bitsandbytes": BitsAndBytesLayout("state2"),
    "bitsandbytes_rmsprop": BitsAndBytesLayout("state1", find_decay=_first_beta),
    "bitsandbytes_adagrad": BitsAndBytesLayout("state1", find_decay=_no_beta),
    "torchao": TorchAOLayout(no_linear_decay="its second moment is kept in few bits, in which g^2 is lost beside v0"),
}
