"""DeepSpeed ZeRO: v0 in the fp32 partitions of stages 1, 2 and 3. Knows no Trainer; imports DeepSpeed only where it runs.

ZeRO steps an inner optimizer over flat fp32 tensors, one or more a parameter group, of which each process holds a partition:

| stage | flat tensor | a parameter's part of it |
| --- | --- | --- |
| 1, 2 | `single_partition_of_fp32_groups[i]` | the fragment that `parameter._hp_mapping` links, if any lies on this process |
| 3 | `fp32_partitioned_groups_flat[i]` | elements rank * n to (rank + 1) * n of the flattened parameter, n = its partition |

Contract. `ZeroPartitions` says which shard of which parameter lies where in which flat tensor. The state that is written is the
one that the inner optimizer would create for its flat tensors at its first step.

At the inner optimizer's step the flat tensors' own gradients are those that its Adam sees.
"""

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..sharding.parts import ParamShard, get_full_shape
from .formats import StateFormat
from .table import find_row

STAGE_1_AND_2 = "deepspeed.runtime.zero.stage_1_and_2.DeepSpeedZeroOptimizer"
STAGE_3 = "deepspeed.runtime.zero.stage3.DeepSpeedZeroOptimizer_Stage3"

# The inner optimizers whose flat state is known to be the moments and a step: torch's step is a tensor, DeepSpeed's a number.
TORCH_ADAMS = ("torch.optim.adamw.AdamW", "torch.optim.adam.Adam")
DEEPSPEED_ADAMS = ("deepspeed.ops.adam.fused_adam.FusedAdam", "deepspeed.ops.adam.cpu_adam.DeepSpeedCPUAdam")

_REMEDY = "use ZeRO stage 1, 2 or 3 with optim=adamw_torch, or v0_init=zeros"


def find_partitions(optimizer) -> "ZeroPartitions | None":
    """Return where parameters lie in the flat tensors of ZeRO's optimizer (also inside accelerate's wrapper); None for others.

    Raises:
        InputError: an optimizer of DeepSpeed's that is not one of ZeRO 1 to 3, or whose state is not known here.
    """
    for candidate in (optimizer, getattr(optimizer, "optimizer", None)):
        name = _name_of(candidate)
        if name in (STAGE_1_AND_2, STAGE_3):
            return ZeroPartitions(candidate)
        if name.startswith("deepspeed.runtime."):
            raise InputError(f"v0_init under DeepSpeed's {type(candidate).__name__} is not supported; {_REMEDY}")
    return None


def require_supported_config(config: dict) -> None:
    """Raise `InputError` if a v0 cannot be written under this ds_config, naming the key to change or remove."""
    zero = config.get("zero_optimization") or {}
    stage = zero.get("stage", 0)
    if stage not in (1, 2, 3):
        raise InputError(f"v0_init under DeepSpeed with zero_optimization.stage={stage} is not supported; {_REMEDY}")
    for key, place in (
        ("fp16", config),
        ("torch_autocast", config),
        ("offload_optimizer", zero),
        ("offload_param", zero),
    ):
        settings = place.get(key) or {}
        if settings.get("enabled") is True or settings.get("device") not in (None, "none"):
            raise InputError(
                f'v0_init under DeepSpeed with the ds_config key "{key}" is not supported: remove it ("bf16" is), or use v0_init=zeros'
            )
    optimizer = config.get("optimizer")
    if optimizer and str(optimizer.get("type", "")).lower() not in ("adam", "adamw"):
        raise InputError(
            f"v0_init with the ds_config's own optimizer {optimizer.get('type')!r} is not supported: remove the ds_config key "
            '"optimizer" (then optim=adamw_torch is used) or give it the type AdamW, or use v0_init=zeros'
        )


class ZeroPartitions:
    """Where the parameters of a model lie in the flat tensors that ZeRO's inner optimizer steps.

    Attributes:
        inner: that optimizer.
        format: how it keeps the state of a flat tensor.
        shards: of each parameter what lies in a flat tensor of this process, which may be nothing.
        param_groups: its groups with the model's own parameters in them.
    """

    def __init__(self, zero) -> None:
        self.zero, self.inner = zero, zero.optimizer
        self.stage = 3 if _name_of(zero) == STAGE_3 else 2
        name = _name_of(self.inner)
        if name in TORCH_ADAMS:
            self.format = StateFormat(find_row(name))
        elif name in DEEPSPEED_ADAMS:
            self.format = _DeepSpeedAdamFormat(find_row(TORCH_ADAMS[0]))
        else:
            raise InputError(f"v0_init under DeepSpeed with the optimizer {name} is not supported; {_REMEDY}")
        if getattr(zero, "_leaf_module_hooks", None):
            raise InputError(
                "v0_init under ZeRO-3 with leaf modules (mixture of experts) is not supported; use v0_init=zeros"
            )
        self.shards = self._find_shards()
        self.param_groups = [
            {key: value for key, value in group.items() if key != "params"} | {"params": parameters}
            for group, parameters in zip(self.inner.param_groups, self._list_parameters(), strict=True)
        ]
        if dist.get_world_size(zero.dp_process_group) != dist.get_world_size():
            raise InputError("v0_init under DeepSpeed with model, sequence or expert parallelism is not supported")

    def list_shards(self, names: dict[int, str]) -> list[ParamShard]:
        """List the shards under the names of their parameters, by id.

        Between steps stage 3 takes the flat tensors out of the inner optimizer's groups, so these are not asked.
        """
        return [replace(shard, name=names.get(id(parameter), "?")) for parameter, shard in self.shards.items()]

    def _list_parameters(self) -> list[list[nn.Parameter]]:
        """List the model's parameters of each group."""
        if self.stage == 3:
            groups: list[list[nn.Parameter]] = [[] for _ in self.inner.param_groups]
            for number, sub_group in enumerate(self.zero.fp16_groups):
                groups[self.zero.sub_group_to_group_id[number]].extend(sub_group)
            return groups
        return [list(group) for group in self.zero.bit16_groups]

    def _find_shards(self) -> dict[nn.Parameter, ParamShard]:
        zero, groups, shards = self.zero, list(self.inner.param_groups), {}
        if self.stage == 3:
            for number, (sub_group, flat) in enumerate(
                zip(zero.fp16_groups, zero.fp32_partitioned_groups_flat, strict=True)
            ):
                group = groups[zero.sub_group_to_group_id[number]]
                for parameter in sub_group:
                    _, first, length = zero.grad_position[zero.get_param_id(parameter)]
                    offset = min(dist.get_rank(zero.dp_process_group) * length, parameter.ds_numel)
                    place = (first, min(length, parameter.ds_numel - offset))
                    shards[parameter] = ParamShard("?", get_full_shape(parameter), flat, group, offset, place)
            return shards
        for group, parameters, flat in zip(
            groups, zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
        ):
            for parameter in parameters:
                offset, place, mapping = 0, (0, 0), getattr(parameter, "_hp_mapping", None)
                if mapping is not None:
                    offset, here = mapping.lp_fragment_address.start, mapping.hp_fragment_address
                    place = (here.start, here.numel)
                shards[parameter] = ParamShard("?", get_full_shape(parameter), flat, group, offset, place)
        return shards


class _DeepSpeedAdamFormat(StateFormat):
    """DeepSpeed's FusedAdam and DeepSpeedCPUAdam, of whose kernels no copy may be made; their `step` is a Python number."""

    def prime(self, optimizer, tensors: list[torch.Tensor], group: dict) -> None:
        """Create the state as the optimizer does at its first step."""
        for flat in tensors:
            dtype = torch.float32 if getattr(optimizer, "fp32_optimizer_states", False) else flat.dtype
            moments = {key: torch.zeros_like(flat, dtype=dtype) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[flat] = {"step": 0} | {key: moment.detach() for key, moment in moments.items()}


def _name_of(instance) -> str:
    return f"{type(instance).__module__}.{type(instance).__qualname__}"
