"""Mean, extremes and zeros of tensors, of the whole where they are spread over processes."""

import math

import torch
import torch.distributed as dist

from .parts import ParamShard, get_local_part
from .processes import get_rank_and_world_size


def get_wide_dtype(device: torch.device) -> torch.dtype:
    """Return the dtype in which to sum on a device: fp64, and fp32 on Apple's GPUs, which have no other."""
    return torch.float32 if device.type == "mps" else torch.float64


def compute_figures(
    shards: list[ParamShard], tensors: list[torch.Tensor], over_processes: bool
) -> list[tuple[float, float, float, float]]:
    """Compute (mean, smallest, largest, number of zeros) of each tensor, of the whole where it is sharded.

    An accelerator is waited for once.

    Args:
        shards, tensors: what each tensor is of, and what `ParamShard.cut` returns of it.
        over_processes: whether any tensor is sharded; all processes must then call this, and it is one reduction in all.
    """
    parts = [get_local_part(tensor) for tensor in tensors]
    if not parts:
        return []
    device = parts[0].device
    measured = [_measure(part).to(device) for part in parts]
    found = torch.stack(measured)
    counts = torch.tensor([float(part.numel()) for part in parts], dtype=found.dtype, device=device)
    sums, extremes = torch.cat([counts[:, None], found[:, :2]], dim=1), found[:, 2:].contiguous()
    if over_processes and get_rank_and_world_size()[1] > 1:
        # Replicas count alike in sums and counts, so means are right whatever the mesh.
        dist.all_reduce(sums)
        dist.all_reduce(extremes, dist.ReduceOp.MAX)
    figures = []
    for shard, numbers in zip(shards, torch.cat([sums, extremes], dim=1).tolist(), strict=True):
        count, total, nonzero, minus_low, high = numbers
        num_zeros = round((count - nonzero) / max(count, 1) * shard.numel)
        figures.append((total / count, -minus_low, high, num_zeros) if count else (0.0, 0.0, 0.0, 0))
    return figures


def _measure(part: torch.Tensor) -> torch.Tensor:
    """Return (sum, number of elements that are not zero, minus the smallest, the largest), on the part's device."""
    dtype = get_wide_dtype(part.device)
    if part.numel() == 0:
        return torch.tensor([0.0, 0.0, -math.inf, -math.inf], dtype=dtype, device=part.device)
    low, high = torch.aminmax(part)
    total = part.sum(dtype=torch.promote_types(part.dtype, torch.float32))
    return torch.stack([value.to(dtype) for value in (total, torch.count_nonzero(part), -low, high)])
