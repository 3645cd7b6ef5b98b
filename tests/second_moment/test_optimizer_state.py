import torch
from optimizer_cases import has_state, prime
from torch import nn
from trainers import is_untouched

from hf_v0init.second_moment.state import (
    SecondMoment,
    unwrap_optimizer,
)


def make() -> tuple[nn.Parameter, torch.optim.AdamW]:
    p = nn.Parameter(torch.ones(4, 3))
    return p, torch.optim.AdamW([p])


def test_accelerate_wrapper_is_looked_through():
    from accelerate import Accelerator

    p, optimizer = make()
    wrapped = Accelerator(cpu=True).prepare(optimizer)
    assert type(wrapped) is not torch.optim.AdamW and unwrap_optimizer(wrapped) is optimizer
    prime(wrapped, p)
    assert has_state(optimizer, p)


def test_refused_optimizers_still_tell_whether_they_have_made_steps():
    p = nn.Parameter(torch.ones(4, 3))
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
