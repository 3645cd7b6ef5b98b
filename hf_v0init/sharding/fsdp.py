"""How processes share a model that FSDP2 or tensor parallelism shards: whose part of a batch is whose, and gradients in place."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn


@dataclass(frozen=True)
class DataShare:
    """Which part of each batch this process computes, where all processes run every batch together.

    Attributes:
        part, num_parts: this process has part `part` of `num_parts`; processes of one tensor-parallel group have the same.
    """

    part: int
    num_parts: int


def find_data_share(model: nn.Module) -> DataShare:
    """Find this process's place among those over which `fully_shard` averages the gradients of `model`.

    Without FSDP2 (tensor parallelism alone) all processes compute the whole batch: part 0 of 1.
    """
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if not isinstance(module, FSDPModule):
            continue
        state = module._get_fsdp_state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for mesh_info in (group.mesh_info for group in groups if group is not None):
            part, num_parts = 0, 1
            for kind in ("replicate", "shard"):  # hybrid sharding: replicas outside, shards inside
                if hasattr(mesh_info, f"{kind}_mesh_size"):
                    part = part * getattr(mesh_info, f"{kind}_mesh_size") + getattr(mesh_info, f"{kind}_mesh_rank")
                    num_parts *= getattr(mesh_info, f"{kind}_mesh_size")
            return DataShare(part, num_parts)
    return DataShare(0, 1)


def match_placements(gradient: torch.Tensor, parameter: nn.Parameter) -> torch.Tensor:
    """Return the gradient as a sharded model's optimizer takes it: placed as its parameter, the mean over the processes.

    A parameter that is no DTensor beside sharded ones (an adapter added later) gets its gradient from this process's part
    alone; averaging one that is already the mean (transformers does so for such parameters) leaves it as it is.
    """
    from torch.distributed.tensor import DTensor

    if isinstance(parameter, DTensor):
        if isinstance(gradient, DTensor) and gradient.placements != parameter.placements:
            gradient = gradient.redistribute(placements=parameter.placements)
        return gradient
    if (
        dist.is_initialized()
        and dist.get_world_size() > 1
        and not hasattr(parameter, "_replicated_grad_hook_registered")
    ):
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return gradient


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 may hold after a pass that was cut off, so that the next starts clean."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
