import pytest
import torch

from hf_v0init.sharding import processes
from hf_v0init.sharding.draws import BLOCK_NUMEL, compute_block_seed, draw_standard_normal_
from hf_v0init.sharding.parts import ParamShard, clean_parameter_name
from hf_v0init.sharding.processes import compute_figures

SHAPES = [(), (1,), (5,), (3, 7), (513, 1024), (700, 3, 5, 7), (2, BLOCK_NUMEL + 3)]


def draw(shape, name="w", seed=1, **kwargs):
    return draw_standard_normal_(torch.empty(shape), name=name, seed=seed, **kwargs)


@pytest.mark.parametrize("num_parts", [1, 3, 8])
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_and_columns_split_over_processes_are_the_whole_tensor_bit_for_bit(shape, num_parts):
    whole = draw(shape)
    for dim in range(min(len(shape), 2)):
        parts = []
        for numbers in torch.arange(shape[dim]).tensor_split(num_parts):
            if len(numbers):
                part = torch.empty((*shape[:dim], len(numbers), *shape[dim + 1 :]))
                offset = tuple(int(numbers[0]) if d == dim else 0 for d in range(len(shape)))
                parts.append(draw_standard_normal_(part, name="w", seed=1, full_shape=shape, offset=offset))
        assert torch.equal(torch.cat(parts, dim=dim), whole)


def correlate(x, y) -> float:
    return abs(torch.corrcoef(torch.stack([x.flatten(), y.flatten()]))[0, 1].item())


def test_draws_are_standard_normal_and_differ_by_name_seed_and_block():
    before = torch.get_rng_state()
    a, b, c = draw((600, 500)), draw((600, 500), name="v"), draw((600, 500), seed=2)
    for x in (a, b, c):
        assert x.mean().item() == pytest.approx(0.0, abs=0.01)
        assert x.std().item() == pytest.approx(1.0, abs=0.01)
    blocks = draw((2 * (BLOCK_NUMEL // 64), 64)).chunk(2)
    assert max(correlate(a, b), correlate(a, c), correlate(b, c), correlate(*blocks)) < 0.01
    assert torch.equal(torch.get_rng_state(), before)


def test_narrow_dtypes_are_cast_from_the_same_fp32_draws():
    bf16 = draw_standard_normal_(
        torch.empty(50, 60, dtype=torch.bfloat16), name="w", seed=1, transform=lambda z: z.square_()
    )
    assert torch.equal(bf16, draw((50, 60)).square().to(torch.bfloat16))


def test_block_seed_is_a_fixed_function():
    """Pinned: a change of it changes every user's random v0."""
    assert compute_block_seed(42, "transformer.wte.weight", 0) == 9028124940478335008


@pytest.mark.parametrize(
    "name",
    [
        "module.a.weight",
        "_orig_mod.a.weight",
        "module._orig_mod.a.weight",
        "_fsdp_wrapped_module.a._checkpoint_wrapped_module.weight",
    ],
)
def test_wrapper_prefixes_do_not_count(name):
    assert clean_parameter_name(name) == "a.weight"
    assert clean_parameter_name("submodule.weight") == "submodule.weight"


@pytest.mark.parametrize("shape", [(), (5,), (3, 7), (513, 1024), (70, 3, 5, 7)])
@pytest.mark.parametrize("num_parts", [1, 3, 8])
def test_a_flat_partition_is_the_whole_tensor_bit_for_bit(shape, num_parts):
    """As ZeRO cuts: in equal numbers of elements, through the middle of rows."""
    whole = draw(shape).flatten()
    size = -(-whole.numel() // num_parts)
    for start in range(0, whole.numel(), size):
        part = torch.full((min(size, whole.numel() - start),), float("nan"))
        pieces = ParamShard("w", shape, part, {}, start).find_pieces(part)
        assert 1 <= len(pieces) <= 3
        for piece in pieces:
            draw_standard_normal_(piece.local, name="w", seed=1, full_shape=piece.full_shape, offset=piece.offset)
        assert torch.equal(part, whole[start : start + len(part)])
    assert ParamShard("w", shape, part, {}, whole.numel()).find_pieces(torch.empty(0)) == []


@pytest.mark.parametrize("device", ["cpu", "mps"])
def test_figures_of_whole_tensors_and_flat_shards(device, monkeypatch):
    """In the dtype of sums on that device: Apple's GPUs have no fp64."""
    dtype = processes.get_wide_dtype(torch.device(device))
    assert dtype == (torch.float32 if device == "mps" else torch.float64)
    monkeypatch.setattr(processes, "get_wide_dtype", lambda _: dtype)
    values = torch.tensor([[0.0, 2.0], [4.0, 0.0]])
    flat = values.flatten()
    shards = [ParamShard("whole", (2, 2), values, {}), ParamShard("flat", (2, 2), flat, {}, 1, (1, 2))]
    assert compute_figures(shards, [values, shards[1].cut(flat)], over_processes=False) == [
        (1.5, 0.0, 4.0, 2),
        (3.0, 2.0, 4.0, 0),
    ]
