"""How optimizers keep the state of a tensor: it is found, made, read and written here. Which optimizer has which format: `table`.

The optimizer makes its own state: a copy of it steps once, a small stand-in in the place of a tensor and its gradient zero. What
the copy then holds of the stand-in is made as large as the tensor and put back to where it started. Built otherwise is what such a
step does not tell: bitsandbytes' and torchao's quantised states, GrokAdamW's in its groups, and DeepSpeed's (`deepspeed`).
"""

import copy
import types
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from ..errors import InputError
from ..sharding.parts import get_local_part, is_dtensor, with_local_part
from ..state_guard import preserve_rng
from .table import OptimizerRow

State = dict[str, object]

BNB_BLOCK_SIZE = 256  # elements that share a scale in bitsandbytes' 8-bit state
SMALL_SIZE = 2  # of a stand-in, in each dimension


@dataclass(frozen=True)
class StateFormat:
    """State in tensors of the parameter's shape and dtype, as torch's own optimizers and most others keep it.

    Attributes:
        row: of the optimizer, with the second moment's key and what does not start at zero.
    """

    row: OptimizerRow

    def get_state(self, optimizer, tensor: torch.Tensor, group: dict) -> State | None:
        """Return the state of a tensor as it is, or None; creates nothing."""
        return optimizer.state.get(tensor) or None

    def is_touched(self, optimizer, state: State) -> bool:
        """Whether steps, a checkpoint or a v0 have left this state, and not the optimizer's construction."""
        return True

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Give tensors of one group that have no state the one that the optimizer would make before its first step.

        Tensors, gradients, groups and random states stay as they are.
        """
        small: dict[tuple, State] = {}
        for tensor in tensors:
            kind = (tensor.dim(), tensor.dtype, tensor.device)
            if kind not in small:
                small[kind] = self._make_small_state(optimizer, group, *kind)
            optimizer.state[tensor] = self._make_state(small[kind], tensor, group)

    def _make_small_state(self, optimizer, group: dict, dim: int, dtype: torch.dtype, device: torch.device) -> State:
        """Let a copy of the optimizer step once; returns the state of a stand-in of size 2 in each dimension."""
        stand_in = nn.Parameter(torch.zeros((SMALL_SIZE,) * dim, dtype=dtype, device=device))
        stand_in.grad = torch.zeros_like(stand_in)
        copied = copy_optimizer(optimizer, group, stand_in)
        if "train_mode" in group:  # schedule-free optimizers step in it alone
            copied.param_groups[0]["train_mode"] = True
        with preserve_rng():
            copied.step()
        return copied.state[stand_in]

    def _make_state(self, small: State, tensor: torch.Tensor, group: dict) -> State:
        """Make a stand-in's state as large as a tensor's, with the values that it has before the first step."""
        starts, state = dict(start.split("=") for start in self.row.starts), {}
        for key, value in small.items():
            start = starts.get(key, "0")
            number = float(group.get(start, 0.0 if start == "parameter" else start))
            if isinstance(value, torch.Tensor):
                is_like_parameter = value.shape == (SMALL_SIZE,) * tensor.dim()
                like = {"dtype": value.dtype, "device": value.device}
                state[key] = torch.full_like(
                    tensor if is_like_parameter else value, number, requires_grad=False, **like
                )
                if start == "parameter":
                    state[key].copy_(tensor)
            else:
                is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
                state[key] = type(value)(number) if is_number else value
        return state

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment in units of gradient squared: the live tensor, or a new one where it is kept in another form."""
        return state[self.row.key]

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write a second moment, in units of gradient squared, that is not the live tensor."""
        state[self.row.key].copy_(v0)


class RootFormat(StateFormat):
    """Adamax, which keeps the second moment's root."""

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment, a new tensor."""
        return state[self.row.key].square()

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write the root."""
        state[self.row.key].copy_(v0).sqrt_()


class AdagradFormat(StateFormat):
    """torch's Adagrad, whose state exists from construction on: it is untouched while it stands at its start."""

    def is_touched(self, optimizer, state: State) -> bool:
        """Whether a step was made, or the sum is not what it started with."""
        start = optimizer.defaults["initial_accumulator_value"]
        return state["step"] > 0 or bool((get_local_part(state[self.row.key]) != start).any())

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Leave the state that is there."""


class GrokAdamWFormat(StateFormat):
    """GrokAdamW, which keeps its state in `group["state"]`, on the CPU."""

    def get_state(self, optimizer, tensor: torch.Tensor, group: dict) -> State | None:
        """Return the state that the group holds for this very tensor."""
        return group.get("state", {}).get(tensor) or None

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Create the state as GrokAdamW does at its first step, in which it would call the user's signals."""
        for tensor in tensors:
            moments = {key: torch.zeros_like(tensor, device="cpu") for key in ("exp_avg", "exp_avg_sq", "grok_ema")}
            group.setdefault("state", {})[tensor] = {"step": 0} | {key: one.detach() for key, one in moments.items()}


class BitsAndBytesFormat(StateFormat):
    """bitsandbytes' optimizers: fp32 state, or 8-bit codes with a map of values and a scale for each 256 elements.

    Small tensors, and those that `GlobalOptimManager` names, stay fp32; the optimizer's own `init_state` decides.
    """

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Let the optimizer create its state, as in its first step.

        Raises:
            InputError: a parameter is sharded (a DTensor), which bitsandbytes cannot step.
        """
        optimizer.check_overrides()
        group_number = next(i for i, other in enumerate(optimizer.param_groups) if other is group)
        places = {id(parameter): place for place, parameter in enumerate(group["params"])}
        for tensor in tensors:
            if is_dtensor(tensor):
                raise InputError(
                    f"bitsandbytes' {type(optimizer).__name__} cannot step sharded parameters (FSDP2, tensor parallel); use "
                    "optim=adamw_torch_8bit (torchao), which can"
                )
            if not tensor.is_contiguous():  # its kernels read memory in order, and so must v0 be written
                tensor.data = tensor.data.contiguous()
            optimizer.init_state(group, tensor, group_number, places[id(tensor)])

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment in fp32; the live tensor where it is not quantised."""
        own = state[self.row.key]
        if own.dtype != torch.uint8:
            return own
        from bitsandbytes.functional import dequantize_blockwise

        code, absmax = self._find_code(state)
        return dequantize_blockwise(own, absmax=absmax, code=code, blocksize=BNB_BLOCK_SIZE)

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write v0, quantised as the optimizer quantises its second moment after each step."""
        from bitsandbytes.functional import quantize_blockwise

        code, absmax = self._find_code(state)
        quantize_blockwise(
            v0.float().contiguous(), code=code, absmax=absmax, out=state[self.row.key], blocksize=BNB_BLOCK_SIZE
        )

    def _find_code(self, state: State) -> tuple[torch.Tensor, torch.Tensor]:
        number = self.row.key.removeprefix("state")
        return state[f"qmap{number}"], state[f"absmax{number}"]


class TorchAOFormat(StateFormat):
    """torchao's low-bit Adam: `exp_avg_sq` is a tensor class with codes and scales, also inside a DTensor."""

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Create the state with the optimizer's own buffers; its step would be compiled once more."""
        for tensor in tensors:
            state: State = {"step": torch.tensor(0.0)}
            state["exp_avg"] = optimizer._new_buffer(tensor, True)
            state["exp_avg_sq"] = optimizer._new_buffer(tensor, False)
            if group["amsgrad"]:
                state["max_exp_avg_sq"] = optimizer._new_buffer(tensor, False)
            optimizer.state[tensor] = state

    def read(self, state: State) -> torch.Tensor:
        """Return the second moment in fp32 (a DTensor where the state is one); the live tensor where it is plain."""
        own = state[self.row.key]
        local = get_local_part(own)
        return own if type(local) is torch.Tensor else with_local_part(own, local.dequantize(torch.float32))

    def write_(self, state: State, v0: torch.Tensor) -> None:
        """Write v0, quantised as the optimizer quantises its second moment after each step."""
        get_local_part(state[self.row.key]).copy_(get_local_part(v0).float())


# By the name that a row of the table gives.
FORMATS: dict[str, type[StateFormat]] = {
    "": StateFormat,
    "root": RootFormat,
    "adagrad": AdagradFormat,
    "grokadamw": GrokAdamWFormat,
    "bitsandbytes": BitsAndBytesFormat,
    "torchao": TorchAOFormat,
}


def copy_optimizer(optimizer, group: dict, stand_in: nn.Parameter) -> torch.optim.Optimizer:
    """Copy an optimizer with one of its groups, and in that one parameter alone: without state and without hooks.

    No parameter is copied: what options or attributes hold of one becomes the stand-in.
    """
    memo = {id(parameter): stand_in for other in optimizer.param_groups for parameter in other["params"]}
    copied = type(optimizer).__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if isinstance(value, types.MethodType) or (callable(value) and hasattr(type(optimizer), name)):
            continue  # a `step` that a scheduler or accelerate patched, which would step the user's: the class's own is run
        if name == "param_groups":
            options = {key: option for key, option in group.items() if key not in ("params", "param_names")}
            copied.param_groups = [copy.deepcopy(options, memo) | {"params": [stand_in]}]
        elif name == "state":
            copied.state = defaultdict(dict)
        elif isinstance(value, OrderedDict) and "hooks" in name:
            copied.__dict__[name] = OrderedDict()  # hooks belong to the user's run
        else:
            copied.__dict__[name] = copy.deepcopy(value, memo)
    return copied
