"""s as rows x columns: the means of the whole tensor, from whatever pieces of it, and added where it lies."""

import itertools

import pytest
import torch
from linear_decay import factor

from hf_v0init.estimation import spread
from hf_v0init.estimation.spread import Elements, RowsAndColumns, add_spreads_, factor_into_rows_and_columns
from hf_v0init.sharding.parts import ParamShard

SHAPES = [(), (1,), (7,), (3, 5), (4, 2, 3, 3), (1, 6), (6, 1)]


def make_moment(shape) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(1)) ** 4 + 1e-6


def make_shard(moment, shape=None, start=None) -> ParamShard:
    return ParamShard("w", tuple(moment.shape) if shape is None else shape, moment, {}, start)


def factor_one(moment) -> RowsAndColumns:
    (own,) = factor_into_rows_and_columns([make_shard(moment)], [moment], False)
    return own


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("alpha", [1.0, 2.5])
def test_what_is_added_is_the_product_of_both_means(shape, alpha):
    moment = make_moment(shape)
    own = factor_one(moment)
    target = torch.zeros_like(moment)
    add_spreads_([own], [target], alpha)
    torch.testing.assert_close(target, alpha * factor(moment), rtol=2e-6, atol=0.0)
    torch.testing.assert_close(target.mean(), alpha * moment.mean(), rtol=1e-5, atol=0.0)
    assert own.rows.numel() + own.columns.numel() <= (shape[0] if shape else 1) + max(1, moment.numel())


def test_memory_formats_are_kept():
    moment = make_moment((4, 2, 3, 3))
    for place in (
        torch.zeros(4, 2, 3, 3).to(memory_format=torch.channels_last),
        torch.zeros(3, 3, 2, 4).permute(3, 2, 0, 1),
        torch.zeros(8, 2, 3, 3)[::2],
    ):
        layout = place.stride()
        add_spreads_([factor_one(moment.clone(memory_format=torch.preserve_format))], [place], 1.0)
        assert place.stride() == layout
        torch.testing.assert_close(place.contiguous(), factor(moment), rtol=2e-6, atol=0.0)
        own = factor_one(place.copy_(moment))
        torch.testing.assert_close(own.columns, factor_one(moment).columns, rtol=1e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (4, 2, 3, 3)])
@pytest.mark.parametrize(("start", "length"), [(0, 7), (1, 4), (2, 5)])
def test_a_flat_shard_of_zero_takes_its_own_part_of_both(shape, start, length):
    """A run of elements that begins and ends within rows."""
    moment = make_moment(shape)
    local, own = torch.zeros(length), factor_one(moment)
    add_spreads_([RowsAndColumns(make_shard(local, shape, start), own.rows, own.columns)], [local], 1.0)
    torch.testing.assert_close(local, factor(moment).flatten()[start : start + length], rtol=2e-6, atol=0.0)


@pytest.mark.parametrize("shape", [(7,), (5, 3), (4, 2, 3, 3)])
def test_processes_that_hold_pieces_get_the_means_of_the_whole(shape, monkeypatch):
    """Three processes, one after the other: what each gives to the reduction, and what becomes of the sum."""
    moment, given = make_moment(shape), []
    cuts = [0, moment.numel() // 3 + 1, moment.numel() - 2, moment.numel()]
    pieces = [(moment.flatten()[a:b].clone(), a) for a, b in itertools.pairwise(cuts)]
    monkeypatch.setattr(spread, "get_rank_and_world_size", lambda: (0, 3))
    monkeypatch.setattr(spread.dist, "all_reduce", lambda sums: given.append(sums.clone()))
    for piece, begin in pieces:
        factor_into_rows_and_columns([make_shard(piece, shape, begin)], [piece], True)
    monkeypatch.setattr(spread.dist, "all_reduce", lambda sums: sums.copy_(sum(given)))
    (own,) = factor_into_rows_and_columns([make_shard(pieces[0][0], shape, 0)], [pieces[0][0]], True)
    target = torch.zeros(moment.numel())
    add_spreads_([own], [target], 1.0)
    torch.testing.assert_close(target.view(shape), factor(moment), rtol=2e-6, atol=0.0)


def test_taking_more_out_than_there_is_leaves_zero():
    moment = make_moment((3, 5))
    target = 0.5 * factor(moment)
    add_spreads_([factor_one(moment)], [target], -1.0)
    assert torch.equal(target, torch.zeros(3, 5))
    drawn = Elements(make_shard(moment), [moment.to(torch.bfloat16)], 1.0)
    target = 0.5 * moment
    add_spreads_([drawn], [target], -1.0)
    assert torch.equal(target, torch.zeros(3, 5))


def test_rows_and_columns_without_a_gradient_stay_zero():
    moment = make_moment((4, 6))
    moment[1], moment[:, 2] = 0.0, 0.0
    target = torch.zeros(4, 6)
    add_spreads_([factor_one(moment)], [target], 3.0)
    assert not target[1].any() and not target[:, 2].any() and target.isfinite().all()
    target = torch.zeros(4, 6)
    add_spreads_([factor_one(torch.zeros(4, 6))], [target], 3.0)
    assert torch.equal(target, torch.zeros(4, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_dtypes_keep_fp32_vectors(dtype):
    moment = make_moment((3, 5)).to(dtype)
    own = factor_one(moment)
    assert own.rows.dtype == own.columns.dtype == torch.float32
    target = torch.zeros(3, 5, dtype=dtype)
    add_spreads_([own], [target], 1.0)
    torch.testing.assert_close(
        target.float(), factor(moment.float()), rtol=2e-2 if dtype == torch.bfloat16 else 1e-6, atol=0.0
    )
