"""What part of a tensor this process holds, and random draws that do not depend on how it is spread over processes.

A parameter of full shape (R, ...) is drawn in fixed blocks of rows. Each block has its own generator, seeded from
sha256 of (seed, parameter name, block number), so a process that owns some rows draws the blocks they touch and no
other, and every number is the same whatever the number of processes. `randn` is not prefix-stable, so blocks are
always drawn whole; a block that a shard covers only in part costs one block of temporary memory.
"""

import hashlib
import itertools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

BLOCK_NUMEL = 1 << 18  # elements a block, 1 MiB of fp32; a block is at least one row
READ_NUMEL = 1 << 17  # elements read at a time on a CPU, 512 KiB of fp32
ACCELERATOR_READ_NUMEL = 1 << 23  # where a kernel's launch costs more than the memory it touches, 32 MiB of fp32

_WRAPPER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_parameter_name(name: str) -> str:
    """Return the parameter name without the prefixes of DDP, torch.compile, FSDP and activation checkpointing."""
    return _WRAPPER_PREFIXES.sub("", name)


def compute_block_seed(seed: int, name: str, block: int) -> int:
    """Compute the seed of one block: the first 63 bits of sha256("seed:name:block"). Python's `hash` is salted."""
    digest = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


@dataclass(frozen=True)
class Fragment:
    """What this process holds of a tensor that is partitioned flat: elements `start` and on of the flattened whole.

    Attributes:
        local: 1-D view of them; may be empty.
        full_shape: the shape of the whole.
    """

    local: torch.Tensor
    full_shape: tuple[int, ...]
    start: int

    def numel(self) -> int:
        """The number of elements of the whole."""
        return math.prod(self.full_shape)


def get_full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also where ZeRO-3 left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def get_local_part(tensor: torch.Tensor | Fragment) -> torch.Tensor:
    """Return what this process holds of a tensor, as a view: the tensor itself if it is whole, 1-D of a `Fragment`."""
    if isinstance(tensor, Fragment):
        return tensor.local
    return tensor.to_local() if is_dtensor(tensor) else tensor


@dataclass(frozen=True)
class Piece:
    """A rectangular piece of a parameter that this process holds.

    Attributes:
        local: a view of the local tensor; what is written into it is written into the parameter or state.
        full_shape: the shape of the whole, in as many dimensions as `local` has.
        offset: where `local` begins in it, one number a dimension.
    """

    local: torch.Tensor
    full_shape: tuple[int, ...]
    offset: tuple[int, ...]


def find_pieces(tensor: torch.Tensor) -> list[Piece]:
    """Find the pieces of a tensor that this process holds: one, unless it is packed or flat (or none of it lies here)."""
    if isinstance(tensor, Fragment):
        return find_flat_pieces(tensor.local, tensor.full_shape, tensor.start)
    if not is_dtensor(tensor):
        return [Piece(tensor, tuple(tensor.shape), (0,) * tensor.dim())]
    local = tensor.to_local()
    if local.numel() == 0:
        return []
    runs = [_find_runs(tensor, dim) for dim in range(tensor.dim())]
    pieces = []
    for corner in itertools.product(*runs):  # each (start here, start in the whole, length), one a dimension
        view = local[tuple(slice(here, here + length) for here, _, length in corner)]
        pieces.append(Piece(view, tuple(tensor.shape), tuple(there for _, there, _ in corner)))
    return pieces


def find_flat_pieces(flat: torch.Tensor, full_shape: tuple[int, ...], start: int) -> list[Piece]:
    """Find the pieces that a 1-D tensor is, which holds elements `start`, `start + 1`, ... of a flattened parameter.

    At most three: the end of a row, whole rows, the beginning of a row. They are of shape (rows, elements a row), which is
    what the blocks of `draw_standard_normal_` depend on.
    """
    if flat.numel() == 0:
        return []
    if len(full_shape) <= 1:
        return [Piece(flat.view(full_shape) if not full_shape else flat, full_shape, (start,) * len(full_shape))]
    width = math.prod(full_shape[1:])
    shape, stop = (full_shape[0], width), start + flat.numel()
    first_whole, end_whole = -(-start // width), stop // width
    if first_whole > end_whole:  # within one row
        return [Piece(flat.view(1, -1), shape, (start // width, start % width))]
    head, tail = first_whole * width - start, stop - end_whole * width
    pieces = []
    if head:
        pieces.append(Piece(flat[:head].view(1, -1), shape, (first_whole - 1, width - head)))
    if end_whole > first_whole:
        pieces.append(Piece(flat[head : flat.numel() - tail].view(-1, width), shape, (first_whole, 0)))
    if tail:
        pieces.append(Piece(flat[flat.numel() - tail :].view(1, -1), shape, (end_whole, 0)))
    return pieces


def _find_runs(tensor, dim: int) -> list[tuple[int, int, int]]:
    """Find which indices of `dim` the local part of a DTensor holds, as runs (start here, start in the whole, length)."""
    indices = None
    coordinate = tensor.device_mesh.get_coordinate()
    for mesh_dim, placement in enumerate(tensor.placements):
        if getattr(placement, "dim", None) != dim:
            continue
        if indices is None:
            indices = torch.arange(tensor.shape[dim])
        # The placement itself says how it splits: a strided shard (FSDP over tensor parallelism) is not one chunk.
        chunks, _ = placement._split_tensor(
            indices.view([1] * dim + [-1]), tensor.device_mesh.size(mesh_dim), with_padding=False
        )
        indices = chunks[coordinate[mesh_dim]].flatten()
    if indices is None:
        return [(0, 0, tensor.shape[dim])]
    breaks = (torch.diff(indices) != 1).nonzero().flatten() + 1
    bounds = [0, *breaks.tolist(), len(indices)]
    return [(here, int(indices[here]), after - here) for here, after in itertools.pairwise(bounds)]


def is_dtensor(tensor: torch.Tensor) -> bool:
    """Whether `tensor` is (or may be) spread over processes."""
    from torch.distributed.tensor import DTensor

    return isinstance(tensor, DTensor)


def compute_mean(tensor: torch.Tensor) -> torch.Tensor:
    """Compute the mean of a whole tensor in fp32, over all processes that hold a part of it."""
    local = get_local_part(tensor)
    if local is tensor:
        return tensor.mean(dtype=torch.float32)
    numbers = torch.stack([local.sum(dtype=torch.float32), torch.tensor(float(local.numel()), device=local.device)])
    _all_reduce(numbers)
    return numbers[0] / numbers[1]


def view_flat(tensor: torch.Tensor) -> torch.Tensor | None:
    """View a tensor as one dimension, in the order of its memory; None if it is not dense."""
    try:
        return tensor.detach().permute(order_of_memory(tensor)).view(-1)
    except RuntimeError:
        return None


def order_of_memory(tensor: torch.Tensor) -> list[int]:
    """Return the dimensions from the farthest apart in memory to the closest."""
    return sorted(range(tensor.dim()), key=lambda dim: -tensor.stride(dim))


def split_rows(tensor: torch.Tensor, max_numel: int) -> tuple[torch.Tensor, ...]:
    """Cut a tensor into views of whole rows (indices of its first dimension), each of at most `max_numel` elements or one row."""
    if tensor.dim() == 0 or tensor.numel() <= max_numel:
        return (tensor,)
    return tensor.split(max(1, max_numel // max(1, math.prod(tensor.shape[1:]))))


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
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return values.cpu()
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values.cpu())
    return torch.cat(gathered)


def _all_reduce(tensor: torch.Tensor, op=dist.ReduceOp.SUM) -> None:
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(tensor, op=op)


@dataclass(frozen=True)
class DataShare:
    """Which part of each batch this process computes, where all processes run every batch together.

    Attributes:
        part, num_parts: this process has part `part` of `num_parts`; processes of one tensor-parallel group have the same.
    """

    part: int
    num_parts: int


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of `model` is spread over processes (a DTensor), so that its passes are collective."""
    return any(is_dtensor(parameter) for parameter in model.parameters())


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


def draw_standard_normal_(
    out: torch.Tensor,
    *,
    name: str,
    seed: int,
    full_shape: tuple[int, ...] | None = None,
    offset: tuple[int, ...] | None = None,
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> torch.Tensor:
    """Fill `out` with the part of a parameter's standard normal draws that it holds.

    Args:
        out: the local part, floating point, any device; drawn in fp32 on the CPU and cast.
        name: the parameter's clean name, see `clean_parameter_name`.
        seed: the run's v0 seed.
        full_shape, offset: the whole parameter's shape and where `out` lies in it; by default `out` is the whole.
        transform: applied in place to each piece of fp32 draws before it is cast, element by element.

    Returns:
        `out`. The same numbers for any split of the parameter; global RNG states are not touched.
    """
    full_shape = tuple(out.shape) if full_shape is None else full_shape
    offset = (0,) * len(full_shape) if offset is None else offset
    if out.numel() == 0:
        return out
    if len(full_shape) == 0:
        full_shape, offset, out_rows = (1,), (0,), out.view(1)
    else:
        out_rows = out
    row_shape = full_shape[1:]
    rows_per_block = max(1, BLOCK_NUMEL // max(1, math.prod(row_shape)))
    first_row, end_row = offset[0], offset[0] + out_rows.shape[0]
    inner = tuple(slice(o, o + n) for o, n in zip(offset[1:], out_rows.shape[1:], strict=True))
    whole_rows = tuple(out_rows.shape[1:]) == row_shape
    generator = torch.Generator()
    for block in range(first_row // rows_per_block, (end_row - 1) // rows_per_block + 1):
        start = block * rows_per_block
        stop = min(start + rows_per_block, full_shape[0])
        generator.manual_seed(compute_block_seed(seed, name, block))
        target = out_rows[max(start, first_row) - first_row : min(stop, end_row) - first_row]
        covered = whole_rows and target.shape[0] == stop - start
        if covered and target.is_contiguous() and target.dtype == torch.float32 and target.device.type == "cpu":
            target.normal_(generator=generator)  # in place: no temporary at all
            if transform is not None:
                transform(target)
            continue
        draws = torch.empty((stop - start, *row_shape)).normal_(generator=generator)
        lower = max(first_row - start, 0)
        part = draws[(slice(lower, lower + target.shape[0]), *inner)]
        target.copy_(part if transform is None else transform(part))
        del draws, part  # before the next block is made
    return out
