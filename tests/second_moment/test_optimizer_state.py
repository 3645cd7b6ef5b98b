import pytest
import torch
from optimizer_cases import has_state, prime
from reference import adamw_steps
from torch import nn
from trainers import is_untouched

from hf_v0init import InputError, read_second_moment
from hf_v0init.second_moment.state import (
    SecondMoment,
    find_format,
    unwrap_optimizer,
)

VARIANTS = [
    (cls, {**kind, **amsgrad})
    for cls in (torch.optim.AdamW, torch.optim.Adam)
    for kind in ({"fused": True}, {"foreach": True}, {"foreach": False, "fused": False})
    for amsgrad in ({}, {"amsgrad": True})
]


def make(cls, options, dtype=torch.float32, lr=1e-2):
    torch.manual_seed(0)
    p = nn.Parameter(torch.randn(4, 3, dtype=dtype))
    return p, cls([p], lr=lr, betas=(0.9, 0.98), weight_decay=0.0, **options)


@pytest.mark.parametrize(("cls", "options"), VARIANTS)
def test_steps_from_a_written_v0_are_adam_from_v0(cls, options):
    p, optimizer = make(cls, options)
    v0 = torch.rand(4, 3) + 0.1
    prime(optimizer, p)["exp_avg_sq"].copy_(v0)
    gradients = [torch.randn(4, 3) for _ in range(5)]
    expected = adamw_steps(p.detach(), v0, gradients, lr=1e-2, beta2=0.98, amsgrad=options.get("amsgrad", False))
    for g, (w, v) in zip(gradients, expected, strict=True):
        p.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(p.detach().double(), w, rtol=2e-6, atol=1e-7)
        torch.testing.assert_close(read_second_moment(optimizer, p).double(), v, rtol=1e-6, atol=0)


def test_first_step_is_equation_12():
    p, optimizer = make(torch.optim.AdamW, {})
    before, v0, g = p.detach().clone(), torch.rand(4, 3), torch.randn(4, 3)
    prime(optimizer, p)["exp_avg_sq"].copy_(v0)
    p.grad = g
    optimizer.step()
    expected = -1e-2 * g / (g.square() + 0.98 / 0.02 * v0).sqrt()
    torch.testing.assert_close(p.detach() - before, expected, rtol=1e-4, atol=1e-7)


def test_existing_state_is_never_overwritten():
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = torch.optim.AdamW([p, q])
    p.grad = torch.ones_like(p)
    optimizer.step()
    before = optimizer.state[p]["exp_avg_sq"].clone()
    prime(optimizer, p)
    assert torch.equal(optimizer.state[p]["exp_avg_sq"], before)
    assert not has_state(optimizer, q)


def test_looking_creates_no_state():
    p, optimizer = make(torch.optim.AdamW, {})
    assert is_untouched(optimizer) and not has_state(optimizer, p)
    assert read_second_moment(optimizer, p) is None
    assert len(optimizer.state) == 0


@pytest.mark.parametrize(
    ("optimizer", "words"),
    [
        (lambda p: torch.optim.SGD(p, lr=0.1), "no second moment"),
        (lambda p: torch.optim.ASGD(p), "dry run on a copy refused it"),
        (lambda p: type("Mine", (torch.optim.SGD,), {})(p), "Mine is not listed"),
    ],
)
def test_other_optimizers_are_refused_with_a_remedy(optimizer, words):
    with pytest.raises(InputError, match=words) as caught:
        find_format(optimizer([nn.Parameter(torch.ones(2, 2))]))
    assert "adamw_torch" in str(caught.value)


def test_accelerate_wrapper_is_looked_through():
    from accelerate import Accelerator

    p, optimizer = make(torch.optim.AdamW, {})
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert type(wrapped) is not torch.optim.AdamW and unwrap_optimizer(wrapped) is optimizer
    prime(wrapped, p)
    assert has_state(optimizer, p)


def test_refused_optimizers_still_tell_whether_they_have_made_steps():
    p, optimizer = make(torch.optim.AdamW, {})
    optimizer = torch.optim.Adafactor([p])
    assert is_untouched(optimizer)
    p.grad = torch.ones_like(p)
    optimizer.step()
    assert not is_untouched(optimizer)


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
    unnamed = SecondMoment(torch.optim.AdamW([{"params": [p]}, {"params": [q, s]}]))
    names = [shard.name for shard in unnamed.list_shards({id(q): "w"})]
    assert names == ["group 0, parameter 0", "w", "group 1, parameter 1"]
    assert unnamed.read_parameter(r) is None
