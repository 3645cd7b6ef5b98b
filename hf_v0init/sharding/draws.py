"""Random draws that do not depend on how a tensor is spread over processes.

A parameter of full shape (R, ...) is drawn in fixed blocks of rows. Each block has its own generator, seeded from
sha256 of (seed, parameter name, block number), so a process that owns some rows draws the blocks they touch and no
other, and every number is the same whatever the number of processes. `randn` is not prefix-stable, so blocks are
always drawn whole; a block that a shard covers only in part costs one block of temporary memory.
"""

import hashlib
import math
from collections.abc import Callable

import torch

BLOCK_NUMEL = 1 << 18  # elements a block, 1 MiB of fp32; a block is at least one row


def compute_block_seed(seed: int, name: str, block: int) -> int:
    """Compute the seed of one block: the first 63 bits of sha256("seed:name:block"). Python's `hash` is salted."""
    digest = hashlib.sha256(f"{seed}:{name}:{block}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


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
