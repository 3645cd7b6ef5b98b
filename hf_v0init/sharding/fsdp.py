"""Gradients and weights of a model that FSDP2 or tensor parallelism shards."""

import torch
import torch.distributed as dist
from torch import nn


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
