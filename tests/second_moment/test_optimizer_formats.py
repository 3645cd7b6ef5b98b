"""Every supported optimizer, held to a slow reference that starts at v0 and to the state that it makes itself."""

import pytest
import torch
from optimizer_cases import (
    CASES,
    LR,
    SHAPE,
    get_state,
    has_state,
    load,
    make_gradients,
    make_parameter,
    make_v0,
    measure,
    name_of,
    prime,
    quiet_and_eager,
    row_of,
    step,
    write,
)
from torch import nn
from trainers import is_untouched

from hf_v0init import read_second_moment
from hf_v0init.second_moment.state import SecondMoment
from hf_v0init.second_moment.table import EXACT


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_steps_from_v0_are_those_of_the_reference(case):
    with quiet_and_eager():
        stored, of_moment, of_update = measure(case)
    row = row_of(case)
    assert stored <= max(row.stored_error, 2e-7), stored  # 2e-7: the root and its square, for Adamax
    assert max(of_moment, of_update) <= row.error, (of_moment, of_update)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_created_state_is_the_optimizers_own(case):
    """Same keys, dtypes, devices and shapes as it makes itself, and from v0 = 0 (or its own start) the same steps, bit for bit."""
    ours, theirs = make_parameter(), make_parameter()
    with quiet_and_eager():
        a, b = case.make([ours]), case.make([theirs])
        prime(a, ours)
        for gradient in make_gradients(2):
            step(a, ours, gradient)
            step(b, theirs, gradient)
            assert torch.equal(ours, theirs)
        mine, own = get_state(a, ours), get_state(b, theirs)
    assert set(mine) == set(own)
    for key, value in own.items():
        assert type(mine[key]) is type(value), key
        if isinstance(value, torch.Tensor):
            assert (mine[key].dtype, mine[key].device, mine[key].shape) == (value.dtype, value.device, value.shape), key
        else:
            assert mine[key] == value


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_states_that_are_there_are_never_replaced(case):
    parameter, v0 = make_parameter(), make_v0()
    with quiet_and_eager():
        optimizer = case.make([parameter])
        assert is_untouched(optimizer) and read_second_moment(optimizer, parameter) is None
        write(optimizer, parameter, v0)
        stored = read_second_moment(optimizer, parameter).clone()
        assert has_state(optimizer, parameter) and not is_untouched(optimizer)
        before = dict(get_state(optimizer, parameter))
        after = prime(optimizer, parameter)
        assert after.keys() == before.keys() and all(after[key] is value for key, value in before.items())
        assert torch.equal(read_second_moment(optimizer, parameter), stored)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_v0_survives_a_checkpoint(case, tmp_path):
    """Saved before the first step and loaded into a new optimizer, as a resumed run does, the steps are the same bit for bit."""
    parameter, other = make_parameter(), make_parameter()
    with quiet_and_eager():
        optimizer, resumed = case.make([parameter]), case.make([other])
        write(optimizer, parameter, make_v0())
        torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
        resumed.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=False))
        if case.row[0] == "GrokAdamW":  # whose states are keyed by parameters that no longer exist after loading
            assert is_untouched(resumed)
            return
        assert not is_untouched(resumed)
        assert torch.equal(read_second_moment(resumed, other), read_second_moment(optimizer, parameter))
        for gradient in make_gradients(2):
            step(optimizer, parameter, gradient)
            step(resumed, other, gradient)
    assert torch.equal(parameter, other)


@pytest.mark.parametrize("case", [c for c in CASES if row_of(c).stored_error], ids=name_of)
def test_small_tensors_of_quantised_optimizers_are_exact(case):
    with quiet_and_eager():
        stored, of_moment, of_update = measure(case, shape=(8, 16))
    assert stored == 0.0 and max(of_moment, of_update) <= EXACT


@pytest.mark.parametrize(
    ("path", "share"),
    [
        ("torchao.optim:AdamW8bit", 0.18),
        ("torchao.optim:AdamWFp8", 0.059),
        ("bitsandbytes.optim:AdamW8bit", 0.23),
        ("bitsandbytes.optim:RMSprop8bit", 0.29),
        ("torchao.optim:AdamW4bit", None),
    ],
)
def test_stored_error_of_elements_far_below_the_largest_of_their_block(path, share):
    """What the table says of elements down to 10^-4 of the largest; and nothing is stored as zero there."""
    generator = torch.Generator().manual_seed(0)
    v0 = 10 ** (-4 * torch.rand(SHAPE, generator=generator))
    stored = store(path, v0)
    assert bool((stored > 0).all())
    if share is not None:
        assert ((stored - v0).abs() / v0).max().item() <= share
    else:  # 4 bits: 1/16 of the block's largest is the least, so small elements are stored too large
        largest = v0.view(-1, 128).amax(1, keepdim=True)
        blocks, stored = v0.view(-1, 128), stored.view(-1, 128)
        assert ((stored - blocks).abs() / largest).max().item() <= 1 / 16
        small = blocks < largest / 32
        assert small.any() and torch.allclose(stored[small], (largest / 16).expand_as(blocks)[small])


def store(path, v0):
    """v0 as an optimizer gives it back."""
    with quiet_and_eager():
        parameter = make_parameter()
        optimizer = load(path)([parameter], lr=LR)
        write(optimizer, parameter, v0)
        return read_second_moment(optimizer, parameter)


# ---- details of single optimizers --------------------------------------------------------------------------------------------------


def test_beta2_of_the_closed_form():
    p = make_parameter()
    expected = [
        (torch.optim.AdamW([p], betas=(0.9, 0.97)), 0.97),
        (torch.optim.AdamW([p], amsgrad=True), None),
        (torch.optim.RMSprop([p], alpha=0.96), 0.96),
        (torch.optim.Adagrad([p]), None),
        (torch.optim.Adamax([p]), None),
        (torch.optim.Adadelta([p]), None),
    ]
    for optimizer, beta2 in expected:
        assert SecondMoment(optimizer).read_beta2() == beta2


def test_adagrad_is_untouched_until_something_was_written_or_stepped():
    parameter = make_parameter()
    optimizer = torch.optim.Adagrad([parameter], lr=LR, initial_accumulator_value=0.25)
    assert len(optimizer.state[parameter]) > 0  # from construction on
    assert is_untouched(optimizer) and read_second_moment(optimizer, parameter) is None
    step(optimizer, parameter, torch.zeros(SHAPE))
    assert not is_untouched(optimizer)  # the sum is as it was, the step is not
    other = torch.optim.Adagrad([parameter], lr=LR, initial_accumulator_value=0.25)
    write(other, parameter, make_v0())
    assert not is_untouched(other) and torch.equal(read_second_moment(other, parameter), make_v0())


def test_embeddings_of_8_bit_bitsandbytes_stay_fp32_where_the_trainer_says_so(tmp_path):
    """The Trainer tells bitsandbytes so for embeddings, and only the optimizer's first step would look at it."""
    bnb = load("bitsandbytes:optim")
    embedding, linear = nn.Embedding(64, 128), nn.Linear(128, 64, bias=False)
    optimizer = bnb.AdamW([embedding.weight, linear.weight], lr=LR, optim_bits=8)
    manager = bnb.GlobalOptimManager.get_instance()
    manager.register_module_override(embedding, "weight", {"optim_bits": 32})
    try:
        for weight in (embedding.weight, linear.weight):
            write(optimizer, weight, make_v0(tuple(weight.shape)))
    finally:
        manager.module_weight_config_triple.pop()
    assert optimizer.state[embedding.weight]["state2"].dtype == torch.float32
    assert optimizer.state[linear.weight]["state2"].dtype == torch.uint8
    assert torch.equal(read_second_moment(optimizer, embedding.weight), make_v0((64, 128)))


def test_state_that_only_an_option_adds_is_made_too():
    ours, theirs = make_parameter(), make_parameter()
    a, b = (load("pytorch_optimizer:AdaBelief")([p], lr=LR, adanorm=True) for p in (ours, theirs))
    assert set(prime(a, ours)) >= {"exp_avg_var", "exp_grad_adanorm"}
    for gradient in make_gradients(3):
        step(a, ours, gradient)
        step(b, theirs, gradient)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize(
    "case", [c for c in CASES if c.path.startswith(("torch.", "schedulefree", "pytorch_optimizer"))], ids=name_of
)
def test_state_of_other_dtypes_is_the_optimizers_own(case, dtype):
    ours, theirs = make_parameter(dtype=dtype), make_parameter(dtype=dtype)
    a, b = case.make([ours]), case.make([theirs])
    prime(a, ours)
    step(a, ours, torch.ones(SHAPE, dtype=dtype))
    step(b, theirs, torch.ones(SHAPE, dtype=dtype))
    assert torch.equal(ours, theirs)
    mine, own = get_state(a, ours), get_state(b, theirs)
    assert {k: v.dtype for k, v in mine.items()} == {k: v.dtype for k, v in own.items()}


def test_shards_are_named_by_the_model_the_group_or_their_place():
    p, q, r, s = (nn.Parameter(torch.ones(2, n)) for n in range(1, 5))
    groups = [{"params": [p, q]}, {"params": [("own.name", r)], "betas": (0.8, 0.9)}]
    optimizer = torch.optim.AdamW([{"params": [("a", p), ("b", q)]}, groups[1]])
    moments = SecondMoment(optimizer)
    shards = moments.list_shards({id(q): "layer.weight"})
    assert [(shard.name, shard.full_shape) for shard in shards] == [
        ("a", (2, 1)),
        ("layer.weight", (2, 2)),
        ("own.name", (2, 3)),
    ]
    assert [shard.param for shard in shards] == [p, q, r]
    assert [moments.read_beta2(shard.group) for shard in shards] == [0.999, 0.999, 0.9]
    unnamed = torch.optim.AdamW([{"params": [p]}, {"params": [q, s]}])
    names = [shard.name for shard in SecondMoment(unnamed).list_shards({id(q): "w"})]
    assert names == ["group 0, parameter 0", "w", "group 1, parameter 1"]
    assert read_second_moment(unnamed, r) is None
