"""How E[g^2] is spread over a tensor, kept for as long as v0 decays: as rows x columns, or element by element.

    s ~ r c^T / mean(s),    r: means over each row, c: means over each column            (Adafactor's factoring, Shazeer & Stern 2018)

A tensor of more than two dimensions is a matrix of its first dimension by the rest; one of fewer is its own rows. Over processes that
hold shards the means are of the whole tensor, and every process keeps both vectors whole, which is next to no memory.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist

from ..sharding.parts import ParamShard, Piece
from ..sharding.processes import get_rank_and_world_size


@dataclass
class RowsAndColumns:
    """s as the product of two vectors.

    Attributes:
        shard: of which parameter.
        rows: r / mean(s), fp32, shape (size of the first dimension,); 1 for a scalar.
        columns: c, fp32, shape (elements per row,); in units of gradient squared.
    """

    shard: ParamShard
    rows: torch.Tensor
    columns: torch.Tensor
    _moment: torch.Tensor | None = field(default=None, repr=False, compare=False)  # the tensor that `_parts` belong to
    _parts: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = field(
        default_factory=list, repr=False, compare=False
    )

    def state_dict(self) -> dict:
        """Return both vectors."""
        return {"rows": self.rows, "columns": self.columns}

    def find_parts(self, moment: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]]:
        """Find what lies here of a tensor: (a matrix, its rows, its columns), or (a tensor, s of the same shape, None)."""
        if moment is not self._moment:  # the optimizer's own tensor stays the same one from step to step
            self._moment, self._parts = moment, [self._cut(piece) for piece in self.shard.find_pieces(moment)]
        return self._parts

    def _cut(self, piece: Piece) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """View a piece as a matrix, unless it is a vector or its memory does not allow that, and cut what it needs of both vectors."""
        matrix = _view_as_matrix(piece.local)
        local = piece.local if matrix is None else matrix
        vectors = (_cut_rows(self.rows, piece), _slice_columns(self.columns, piece).reshape(-1))
        rows, columns = (vector.to(local.dtype) for vector in vectors)
        if matrix is None or len(piece.full_shape) < 2:
            return local, torch.outer(rows, columns).view(local.shape), None
        return local, rows, columns


@dataclass
class Elements:
    """s element by element, in bf16: two bytes each.

    Attributes:
        shard: of which parameter.
        pieces: as `ParamShard.find_pieces` lists them.
        mean: of the draws that they are, in units of gradient squared.
    """

    shard: ParamShard
    pieces: list[torch.Tensor]
    mean: float

    def state_dict(self) -> dict:
        """Return what the draws are made again of."""
        return {"mean": self.mean}

    def find_parts(self, moment: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor, None]]:
        """Find what lies here of a tensor: (a tensor, s of the same shape, None)."""
        pieces = self.shard.find_pieces(moment)
        return [(piece.local, own, None) for piece, own in zip(pieces, self.pieces, strict=True)]


def add_spreads_(spreads: Sequence[RowsAndColumns | Elements], moments: Sequence[torch.Tensor], factor: float) -> None:
    """Add factor * s to tensors that lie as those which the spreads were made of, in place; what would become negative becomes zero."""
    changed, vectors, additions = [], [], []
    for spread, moment in zip(spreads, moments, strict=True):
        for local, rows, columns in spread.find_parts(moment):
            changed.append(local)
            if columns is not None:
                local.addr_(rows, columns, alpha=factor)
            else:
                vectors.append(local)
                additions.append(rows)
    if vectors:  # most tensors of a network are small ones, whose calls would cost more than their sums
        torch._foreach_add_(vectors, additions, alpha=factor)
    if factor < 0.0 and changed:
        torch._foreach_clamp_min_(changed, 0.0)


def factor_into_rows_and_columns(
    shards: list[ParamShard], moments: list[torch.Tensor], over_processes: bool
) -> list[RowsAndColumns]:
    """Factor tensors into the means of their rows and columns.

    Args:
        shards, moments: tensors of squares, and what each is of.
        over_processes: whether any is sharded; then all processes must call this, and it is one reduction in all.

    Returns:
        One `RowsAndColumns` for each; their product's mean over the tensor is the tensor's.
    """
    sums = []
    for shard, moment in zip(shards, moments, strict=True):
        num_rows, num_columns = _shape_as_matrix(shard.full_shape)
        # sums, numbers of elements
        total = torch.zeros(2, num_rows + num_columns, dtype=torch.float32, device=moment.device)
        for piece in shard.find_pieces(moment):
            for place, values in enumerate((piece.local, torch.ones_like(piece.local))):
                matrix = values.reshape(values.shape[0] if values.dim() else 1, -1).float()
                _cut_rows(total[place, :num_rows], piece).add_(matrix.sum(1))
                columns = _slice_columns(total[place, num_rows:], piece)
                columns.add_(matrix.sum(0).view(columns.shape))
        sums.append(total)
    if over_processes and sums and get_rank_and_world_size()[1] > 1:
        joined = torch.cat([total.flatten() for total in sums])
        dist.all_reduce(joined)
        parts = joined.split([total.numel() for total in sums])
        sums = [part.view(2, -1) for part in parts]
    factored = []
    for shard, total in zip(shards, sums, strict=True):
        num_rows, _ = _shape_as_matrix(shard.full_shape)
        means = total[0] / total[1].clamp_min(1.0)
        rows, columns = means[:num_rows], means[num_rows:]
        mean = rows.mean()
        factored.append(RowsAndColumns(shard, torch.where(mean > 0, rows / mean, rows), columns.clone()))
    return factored


def _shape_as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    num_rows = shape[0] if shape else 1
    return num_rows, max(1, int(torch.Size(shape[1:]).numel()))


def _cut_rows(rows: torch.Tensor, piece: Piece) -> torch.Tensor:
    first = piece.offset[0] if piece.offset else 0
    return rows.narrow(0, first, piece.local.shape[0] if piece.local.dim() else 1)


def _slice_columns(columns: torch.Tensor, piece: Piece) -> torch.Tensor:
    """View the columns in the dimensions after the first, and cut what the piece has of them."""
    whole = columns.view(piece.full_shape[1:]) if len(piece.full_shape) > 1 else columns
    for dim, (start, length) in enumerate(zip(piece.offset[1:], piece.local.shape[1:], strict=True)):
        whole = whole.narrow(dim, start, length)
    return whole


def _view_as_matrix(local: torch.Tensor) -> torch.Tensor | None:
    """View a tensor as first dimension by the rest, without a copy; None if its memory does not allow it."""
    try:
        return local.view(local.shape[0] if local.dim() else 1, -1)
    except RuntimeError:
        return None
