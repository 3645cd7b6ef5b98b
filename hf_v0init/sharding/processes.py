"""How the processes of a run agree: what each of them has, sums and figures of tensors over all, and that all fail if one does."""

import contextlib
import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError
from .parts import ParamShard, get_local_part


def get_rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gather_objects(mine: Any) -> list:
    """Return what every process has, by rank."""
    world_size = get_rank_and_world_size()[1]
    if world_size == 1:
        return [mine]
    everyone: list = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return everyone


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raise on every process an exception that leaves this context on any, so that none waits for ever for the others. All must enter it.

    The failing process raises its own exception, the others the same message as `InputError` (or a `RuntimeError` where
    it was no input error).
    """
    error = None
    try:
        yield
    except Exception as exception:
        error = exception
    if getattr(error, "raised_alone", False):  # the others wait elsewhere, see `estimation.trust_radius`
        raise error
    everyone = gather_objects(
        None if error is None else (isinstance(error, InputError), f"{error}" or type(error).__name__)
    )
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            is_input_error, message = theirs
            raise (InputError if is_input_error else RuntimeError)(f"process {rank}: {message}")


def add_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; all processes must call this with tensors of the same shapes."""
    if get_rank_and_world_size()[1] > 1:
        for reduction in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            reduction.wait()


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
