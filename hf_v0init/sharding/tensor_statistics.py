"""Mean, extremes and zeros of tensors, of the whole where they are spread over processes."""

import math

import torch
import torch.distributed as dist

from .parts import get_local_part, split_rows
from .processes import gather_objects, get_rank_and_world_size

READ_NUMEL = 1 << 17  # elements read at a time on a CPU, 512 KiB of fp32
ACCELERATOR_READ_NUMEL = 1 << 23  # where a kernel's launch costs more than the memory it touches, 32 MiB of fp32


def compute_figures(tensors: list[torch.Tensor], over_processes: bool) -> list[tuple[float, float, float, float]]:
    """Compute (mean, smallest, largest, number of zeros) of each tensor, of the whole where it is sharded.

    Each is read once, block by block, and blocks that may hold zeros once more; no temporary is larger than a block, and an
    accelerator is waited for twice in all.

    Args:
        over_processes: whether any tensor is sharded; all processes must then call this, and it is one reduction in all.
    """
    parts = [get_local_part(tensor) for tensor in tensors]
    blocks = [(number, block) for number, part in enumerate(parts) for block in split_rows(part, _get_read_numel(part))]
    blocks = [(number, block) for number, block in blocks if block.numel() > 0]
    totals, lows, highs = [], [], []
    for _, block in blocks:
        totals.append(block.sum(dtype=torch.float64 if block.dtype == torch.float64 else torch.float32))
        low, high = torch.aminmax(block)
        lows.append(low)
        highs.append(high)
    totals, lows, highs = map(_read, (totals, lows, highs))
    with_zeros = ((lows <= 0.0) & (highs >= 0.0)).nonzero().flatten().tolist()
    num_nonzero = _read([torch.count_nonzero(blocks[place][1]) for place in with_zeros])

    numbers = torch.tensor([number for number, _ in blocks], dtype=torch.long)
    sums = torch.zeros(len(parts), 3, dtype=torch.float64)  # elements, sum, zeros
    sums[:, 0] = torch.tensor([part.numel() for part in parts])
    sums[:, 1].index_add_(0, numbers, totals)
    num_elements = torch.tensor([blocks[place][1].numel() for place in with_zeros], dtype=torch.float64)
    sums[:, 2].index_add_(0, numbers[with_zeros], num_elements - num_nonzero)
    extremes = torch.full((len(parts), 2), -math.inf, dtype=torch.float64)  # minus the smallest, the largest
    extremes.scatter_reduce_(0, numbers[:, None].expand(-1, 2), torch.stack([-lows, highs], dim=1), "amax")
    if over_processes:
        # Replicas count alike in sums and counts, so means are right whatever the mesh.
        device = parts[0].device
        sums, extremes = sums.to(device), extremes.to(device)
        _all_reduce(sums)
        _all_reduce(extremes, dist.ReduceOp.MAX)
    figures = []
    for tensor, (count, total, zeros), (low, high) in zip(tensors, sums.tolist(), extremes.tolist(), strict=True):
        share_of_zeros = zeros / count if count else 0.0
        mean = total / count if count else 0.0
        figures.append((mean, -low if count else 0.0, high if count else 0.0, round(share_of_zeros * tensor.numel())))
    return figures


def _read(scalars: list[torch.Tensor]) -> torch.Tensor:
    """Read scalars of any devices and dtypes, each device waited for once; fp64 on the CPU, shape (number of scalars,)."""
    by_kind: dict[tuple, list[int]] = {}
    for place, scalar in enumerate(scalars):
        by_kind.setdefault((scalar.device, scalar.dtype), []).append(place)
    values = torch.zeros(len(scalars), dtype=torch.float64)
    for places in by_kind.values():
        values[places] = torch.stack([scalars[place] for place in places]).double().cpu()
    return values


def _get_read_numel(part: torch.Tensor) -> int:
    """Elements to read at a time: on a CPU what stays in its cache for the next figure, else what keeps kernels few."""
    return READ_NUMEL if part.device.type == "cpu" else ACCELERATOR_READ_NUMEL


def gather_values(values: torch.Tensor) -> torch.Tensor:
    """Return the 1-D `values` of all processes, joined, on the CPU."""
    return torch.cat(gather_objects(values.cpu()))


def _all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    if get_rank_and_world_size()[1] > 1:
        dist.all_reduce(tensor, op=op)
