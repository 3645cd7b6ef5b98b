"""What part of a tensor this process holds: a shard of a DTensor, a run of elements of ZeRO's, or all of it."""

import itertools
import math
import re
from dataclasses import dataclass

import torch
from torch import nn

_WRAPPER_PREFIXES = re.compile(r"(?:^|(?<=\.))(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def clean_parameter_name(name: str) -> str:
    """Return the parameter name without the prefixes of DDP, torch.compile, FSDP and activation checkpointing."""
    return _WRAPPER_PREFIXES.sub("", name)


def name_parameters(model: nn.Module | None) -> dict[int, str]:
    """Return id of a parameter -> its name without the prefixes of wrappers; of a shared one the first name."""
    return {} if model is None else {id(p): clean_parameter_name(name) for name, p in model.named_parameters()}


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


@dataclass(frozen=True, eq=False)
class ParamShard:
    """What an optimizer steps of one parameter on this process.

    Attributes:
        name: the parameter's name in the model, or its group and place in the optimizer.
        full_shape: the shape of the whole parameter.
        param: the tensor that is stepped, whose `grad` the optimizer sees: the parameter itself, whole or a DTensor, or under ZeRO a
            flat partition in which shards of many parameters lie.
        group: the parameter group that it is in.
        offset: in a flat partition: which element of the flattened parameter the shard begins with; None elsewhere.
        place: in a flat partition: (its first element, number of elements), which may be none.
    """

    name: str
    full_shape: tuple[int, ...]
    param: torch.Tensor
    group: dict
    offset: int | None = None
    place: tuple[int, int] = (0, 0)

    @property
    def numel(self) -> int:
        """The number of elements of the whole parameter."""
        return math.prod(self.full_shape)

    def cut(self, tensor: torch.Tensor) -> torch.Tensor:
        """Cut the shard out of a tensor that lies like `param`, such as a state or a gradient: a 1-D view, or the tensor itself."""
        return tensor if self.offset is None else tensor.narrow(0, *self.place)

    def find_pieces(self, tensor: torch.Tensor) -> list[Piece]:
        """Find the pieces of what `cut` returned: one, unless it is packed or flat (or none of it lies here)."""
        if self.offset is not None:
            return _find_flat_pieces(tensor, self.full_shape, self.offset)
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


def get_full_shape(parameter: torch.Tensor) -> tuple[int, ...]:
    """Return the shape of the whole parameter, also where ZeRO-3 left an empty tensor in its place."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def get_local_part(tensor: torch.Tensor) -> torch.Tensor:
    """Return what this process holds of a tensor, as a view: the tensor itself if it is no DTensor."""
    return tensor.to_local() if is_dtensor(tensor) else tensor


def read_gradient(parameter: torch.Tensor) -> torch.Tensor:
    """Return a parameter's gradient, detached, and placed as the parameter itself where it is a DTensor."""
    gradient = parameter.grad.detach()
    if is_dtensor(gradient) and gradient.placements != parameter.placements:
        gradient = gradient.redistribute(placements=parameter.placements)
    return gradient


def with_local_part(tensor: torch.Tensor, local: torch.Tensor) -> torch.Tensor:
    """Return other values that lie as `tensor` does: as they are, or a DTensor."""
    if not is_dtensor(tensor):
        return local
    return type(tensor).from_local(
        local, tensor.device_mesh, tensor.placements, run_check=False, shape=tensor.shape, stride=tensor.stride()
    )


def _find_flat_pieces(flat: torch.Tensor, full_shape: tuple[int, ...], start: int) -> list[Piece]:
    """Find the pieces that a 1-D tensor is, which holds elements `start`, `start + 1`, ... of a flattened parameter.

    At most three: the end of a row, whole rows, the beginning of a row. They are of shape (rows, elements per row), which is
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


def is_sharded(model: nn.Module) -> bool:
    """Whether any parameter of `model` is spread over processes (a DTensor), so that its passes are collective."""
    return any(is_dtensor(parameter) for parameter in model.parameters())
