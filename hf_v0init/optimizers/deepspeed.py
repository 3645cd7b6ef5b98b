"""DeepSpeed ZeRO: v0 in the fp32 partitions of stages 1, 2 and 3. Knows no Trainer; imports DeepSpeed only where it runs.

ZeRO steps an inner optimizer over flat fp32 tensors, one or more a parameter group, of which each process holds a partition:

| stage | flat tensor | a parameter's part of it |
| --- | --- | --- |
| 1, 2 | `single_partition_of_fp32_groups[i]` | the fragment that `parameter._hp_mapping` links, if any lies on this process |
| 3 | `fp32_partitioned_groups_flat[i]` | elements rank * n to (rank + 1) * n of the flattened parameter, n = its partition |

Contract. `PartitionedOptimizer` shows that as an optimizer over the model's own parameters: the functions of
`optimizer_state` take it, and give `Fragment`s where they give tensors otherwise. The state that is written is the one that the
inner optimizer would create for its flat tensors at its first step, with v0 in place; flat tensors without any v0 get none.

Gradients. `visit_partitioned_gradients` takes ZeRO's own gradient hooks off the parameters for the length of the pass, so
the engine sees no backward: no bucket, averaged gradient, norm or micro-step of it changes. Each gradient is averaged over
the processes in fp32 and cut to the fragment. All processes run each batch together, as in `sharded_pass`.
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from ..distributed.parts import DataShare, Fragment, get_full_shape
from ..errors import InputError
from ..gradients.statistics import CAST_BLOCK_NUMEL, PassCounts
from ..gradients.together import visit_gradients_together
from .layouts import PlainLayout, State

STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"

# The inner optimizers whose flat state is known to be the moments and a step: torch's step is a tensor, DeepSpeed's a number.
TORCH_ADAMS = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam")
DEEPSPEED_ADAMS = ("deepspeed.ops.adam.fused_adam.FusedAdam", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam")

_REMEDY = "use ZeRO stage 1, 2 or 3 with optim=adamw_torch, or v0_init=zeros"


def adapt_optimizer(optimizer):
    """Return a `PartitionedOptimizer` for ZeRO's optimizer (also inside accelerate's wrapper), else `optimizer` itself.

    Raises:
        InputError: an optimizer of DeepSpeed's that is not one of ZeRO 1 to 3, or whose state is not known here.
    """
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        name = _name_of(candidate)
        if name in (STAGE_1_AND_2, STAGE_3):
            return PartitionedOptimizer(candidate)
        if name.startswith("deepspeed.runtime."):
            raise InputError(f"v0_init under DeepSpeed's {type(candidate).__name__} is not supported; {_REMEDY}")
    return optimizer


def require_supported_config(config: dict) -> None:
    """Raise `InputError` if a v0 cannot be written under this ds_config, naming the key to change or remove."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise InputError(f"v0_init under DeepSpeed with zero_optimization.stage={stage} is not supported; {_REMEDY}")
    if (config.get("fp16") or {}).get("enabled") is True:
        raise InputError(
            'v0_init under DeepSpeed with fp16 is not supported (v0 of 1e-9 is zero in fp16): use "bf16" instead of the '
            'ds_config key "fp16", or v0_init=zeros'
        )
    if (config.get("torch_autocast") or {}).get("enabled") is True:
        raise InputError(
            'v0_init under DeepSpeed with torch_autocast is not supported: use "bf16" instead of the ds_config key '
            '"torch_autocast", or v0_init=zeros'
        )
    for key in ("offload_optimizer", "offload_param"):
        device = (zero.get(key) or {}).get("device") or "none"
        if device != "none":
            raise InputError(
                f"v0_init under DeepSpeed with zero_optimization.{key}.device={device} is not supported: remove the ds_config key "
                f'"{key}", or use v0_init=zeros'
            )
    optimizer = config.get("optimizer")
    if optimizer and str(optimizer.get("type", "")).lower() not in ("adam", "adamw"):
        raise InputError(
            f"v0_init with the ds_config's own optimizer {optimizer.get('type')!r} is not supported: remove the ds_config key "
            '"optimizer" (then optim=adamw_torch is used) or give it the type AdamW, or use v0_init=zeros'
        )


class PartitionedOptimizer:
    """ZeRO's optimizer, seen as one over the model's parameters; see the contract at the head of this file.

    Attributes:
        param_groups: the inner optimizer's groups with the model's own parameters in them.
        share: this process's part of each batch.
    """

    is_partitioned = True

    def __init__(self, zero) -> None:
        self.zero, self.inner = zero, zero.optimizer
        self.stage = 3 if _name_of(zero) == STAGE_3 else 2
        name = _name_of(self.inner)
        if name in TORCH_ADAMS:
            self.inner_layout = PlainLayout(scalars={"step": 0.0}, conditional=(("amsgrad", "max_exp_avg_sq"),))
        elif name in DEEPSPEED_ADAMS:
            self.inner_layout = _DeepSpeedAdamLayout()
        else:
            raise InputError(f"v0_init under DeepSpeed with the optimizer {name} is not supported; {_REMEDY}")
        if getattr(zero, "_leaf_module_hooks", None):
            raise InputError(
                "v0_init under ZeRO-3 with leaf modules (mixture of experts) is not supported; use v0_init=zeros"
            )
        self.v0_layout = PartitionLayout(self)
        self._slots = self._find_slots()
        self.param_groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": parameters}
            for group, parameters in zip(self.inner.param_groups, self._list_parameters(), strict=True)
        ]
        group = zero.dp_process_group
        self.share = DataShare(dist.get_rank(group), dist.get_world_size(group))
        if self.share.num_parts != dist.get_world_size():
            raise InputError("v0_init under DeepSpeed with model, sequence or expert parallelism is not supported")

    def find_slot(self, parameter: nn.Parameter) -> "_Slot":
        """Find where this process's part of `parameter` lies; its length may be 0."""
        return self._slots[parameter]

    def find_inner_group(self, flat: torch.Tensor) -> dict:
        """Return the inner optimizer's group of a flat tensor (stage 3 takes the tensors out of it between steps)."""
        return self.inner.param_groups[self._group_numbers[flat]]

    def place_gradient(self, gradient: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
        """Return this process's part of the gradient's mean over the processes: 1-D, fp32, where the state lies.

        The whole is reduced block by block, so that no second whole gradient is made.
        """
        flat, slot = gradient.detach().reshape(-1), self.find_slot(parameter)
        part = torch.empty(slot.numel, dtype=torch.float32, device=slot.flat.device)
        for first in range(0, flat.numel(), CAST_BLOCK_NUMEL):
            block = flat[first : first + CAST_BLOCK_NUMEL].to(torch.float32, copy=True)
            if self.share.num_parts > 1:
                dist.all_reduce(block, group=self.zero.dp_process_group)
                block /= self.share.num_parts
            low, high = max(first, slot.start), min(first + block.numel(), slot.start + slot.numel)
            if low < high:
                part[low - slot.start : high - slot.start] = block[low - first : high - first]
        return part

    @contextlib.contextmanager
    def take_off_gradient_hooks(self) -> Iterator[None]:
        """Take all hooks off the parameters' gradients and put them back as they were."""
        saved = []
        counters = [
            (module, module.__dict__["applied_pre_backward_ref_cnt"])
            for module in getattr(self.zero, "module", nn.Module()).modules()
            if "applied_pre_backward_ref_cnt" in module.__dict__
        ]
        try:
            for parameter in self._slots:
                hooks = parameter._post_accumulate_grad_hooks
                if hooks:
                    saved.append((hooks, list(hooks.items())))
                    hooks.clear()
            yield
        finally:
            for hooks, items in saved:
                hooks.clear()
                hooks.update(items)
            for module, count in counters:  # a forward without a backward counts up
                module.applied_pre_backward_ref_cnt = count

    def _list_parameters(self) -> list[list[nn.Parameter]]:
        """List the model's parameters of each group."""
        if self.stage == 3:
            groups: list[list[nn.Parameter]] = [[] for _ in self.inner.param_groups]
            for number, sub_group in enumerate(self.zero.fp16_groups):
                groups[self.zero.sub_group_to_group_id[number]].extend(sub_group)
            return groups
        return [list(group) for group in self.zero.bit16_groups]

    def _find_slots(self) -> dict[nn.Parameter, "_Slot"]:
        slots = {}
        self._group_numbers: dict[torch.Tensor, int] = {}
        if self.stage == 3:
            for number, (sub_group, flat) in enumerate(
                zip(self.zero.fp16_groups, self.zero.fp32_partitioned_groups_flat, strict=True)
            ):
                self._group_numbers[flat] = self.zero.sub_group_to_group_id[number]
                for parameter in sub_group:
                    _, place, length = self.zero.grad_position[self.zero.get_param_id(parameter)]
                    start = min(dist.get_rank(self.zero.dp_process_group) * length, parameter.ds_numel)
                    slots[parameter] = _Slot(flat, place, min(length, parameter.ds_numel - start), start)
            return slots
        for number, (group, flat) in enumerate(
            zip(self.zero.bit16_groups, self.zero.single_partition_of_fp32_groups, strict=True)
        ):
            self._group_numbers[flat] = number
            for parameter in group:
                mapping = getattr(parameter, "_hp_mapping", None)
                if mapping is None:
                    slots[parameter] = _Slot(flat, 0, 0, 0)
                else:
                    there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
                    slots[parameter] = _Slot(flat, here.start, here.numel, there.start)
        return slots


@dataclass(frozen=True)
class _Slot:
    """Where a parameter's part lies: `numel` elements from `place` on in `flat`, from `start` on in the parameter."""

    flat: torch.Tensor
    place: int
    numel: int
    start: int

    def cut(self, flat_values: torch.Tensor, parameter: nn.Parameter) -> Fragment:
        """Cut the parameter's fragment out of a tensor that lies like `flat`."""
        return Fragment(flat_values.narrow(0, self.place, self.numel), get_full_shape(parameter), self.start)


@dataclass
class _FlatDraft:
    """The state of one flat tensor while the v0 of the parameters in it is being computed."""

    state: State
    tensors: list[torch.Tensor]


@dataclass
class PartitionDraft:
    """As `optimizer_state.StateDraft`, for a parameter of a `PartitionedOptimizer`; `tensors` are fragments."""

    flat_draft: _FlatDraft
    slot: _Slot
    tensors: tuple[Fragment, ...]

    def finish(self, v0: Fragment) -> State:
        """Take v0, the last of `tensors`, as final."""
        self.tensors = ()
        return {"v0": v0, "flat_draft": self.flat_draft, "slot": self.slot}


@dataclass
class PartitionLayout:
    """Creates, finds and writes states for `optimizer_state`, one parameter at a time; the flat states are shared."""

    optimizer: PartitionedOptimizer
    drafts: dict[torch.Tensor, _FlatDraft] = field(default_factory=dict)

    def draft_state(self, parameter: nn.Parameter, num_tensors: int, for_sums: bool) -> PartitionDraft:
        """Begin the state of a parameter, with `num_tensors` zero-filled fragments of the flat state to compute in."""
        slot = self.optimizer.find_slot(parameter)
        draft = self.drafts.get(slot.flat)
        if draft is None:
            draft = self.drafts[slot.flat] = self._draft_flat(slot.flat, num_tensors, for_sums)
        return PartitionDraft(
            draft, slot, tuple(slot.cut(tensor, parameter) for tensor in draft.tensors[-num_tensors:])
        )

    def _draft_flat(self, flat: torch.Tensor, num_tensors: int, for_sums: bool) -> _FlatDraft:
        layout, group = self.optimizer.inner_layout, self.optimizer.find_inner_group(flat)
        with torch.no_grad():
            state = layout.create_state(self.optimizer.inner, flat, group)
            tensors = [state[layout.scratch], state[layout.second_moment]]
            if for_sums and flat.dtype not in (torch.float32, torch.float64):
                tensors = [torch.zeros_like(flat, dtype=torch.float32, requires_grad=False) for _ in range(num_tensors)]
        return _FlatDraft(state, tensors)

    def read(self, state: State) -> Fragment:
        """Return the second moment of a parameter's state, of the draft or of the optimizer's."""
        return state["v0"]

    def read_beta2(self, group: dict) -> float | None:
        """Read the decay of the second moment."""
        return self.optimizer.inner_layout.read_beta2(group)

    def find_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State | None:
        """Return the parameter's part of the flat state that steps, a checkpoint or a v0 have left, or None."""
        slot = self.optimizer.find_slot(parameter)
        inner = self.optimizer.inner
        state = inner.state.get(slot.flat)
        if not state or self.optimizer.inner_layout.second_moment not in state:
            return None
        return {"v0": slot.cut(state[self.optimizer.inner_layout.second_moment], parameter)}

    def put_states(self, states: dict[nn.Parameter, State]) -> None:
        """Make the finished flat states part of the inner optimizer."""
        layout, inner = self.optimizer.inner_layout, self.optimizer.inner
        flat_drafts = {state["slot"].flat: state["flat_draft"] for state in states.values()}
        for flat, draft in flat_drafts.items():
            with torch.no_grad():
                for lent in draft.tensors[:-1]:
                    lent.zero_()
                layout.write_(draft.state, draft.tensors[-1])
            inner.state[flat] = draft.state
        self.drafts.clear()


class _DeepSpeedAdamLayout(PlainLayout):
    """DeepSpeed's FusedAdam and DeepSpeedCPUAdam, whose `step` is a Python number."""

    def create_state(self, optimizer, parameter: torch.Tensor, group: dict) -> State:
        """Create the state as the optimizer does at its first step."""
        dtype = parameter.dtype
        if getattr(optimizer, "fp32_optimizer_states", False):
            dtype = torch.float32
        moments = ("exp_avg", "exp_avg_sq")
        return {"step": 0} | {key: torch.zeros_like(parameter, dtype=dtype, requires_grad=False) for key in moments}


def visit_partitioned_gradients(optimizer: PartitionedOptimizer, *args, **options) -> PassCounts:
    """Run `sharded_pass.visit_gradients_together` past the engine: visitors get this process's fragment of each gradient."""
    with optimizer.take_off_gradient_hooks():
        return visit_gradients_together(
            *args, share=optimizer.share, place_gradient=optimizer.place_gradient, **options
        )


def _name_of(instance) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
