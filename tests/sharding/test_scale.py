"""What a process allocates for a layer of Llama 3 8B: its own shard and one block, by torch's own allocator.

One process of many is simulated by a process group that sends nothing.
"""

import pytest
import torch
import torch.distributed as dist
from benchmarks.measuring import measure_memory
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_v0init import V0InitArguments
from hf_v0init.hook import beta2_decay
from hf_v0init.hook.beta2_decay import Beta2Decay
from hf_v0init.second_moment.state import SecondMoment
from hf_v0init.sharding.draws import BLOCK_NUMEL

SMALL = 1 << 18  # bytes of scalars, elements looked at and row numbers


def list_shapes() -> list[tuple[int, ...]]:
    """The matrices of one layer."""
    config = LlamaConfig(
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=1, num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return [tuple(p.shape) for name, p in model.named_parameters() if "layers." in name and p.dim() > 1]


@pytest.fixture
def join():
    """Makes this process one of many; what they would send each other goes nowhere."""

    def join(world_size: int, rank: int):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        return init_device_mesh("cpu", (world_size,))

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


def shard(mesh, shape) -> DTensor:
    """Sharded by rows, as FSDP2 does."""
    size = -(-shape[0] // mesh.size())
    rows = max(0, min(size, shape[0] - mesh.get_rank() * size))
    stride = torch.empty(shape, device="meta").stride()
    local = torch.zeros(rows, *shape[1:])
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


# 1,000 do not divide the rows, and some process has none of the smaller matrices
@pytest.mark.parametrize(("world_size", "rank"), [(64, 5), (1000, 501)])
def test_drawing_takes_the_shard_and_one_block(join, monkeypatch, world_size, rank):
    monkeypatch.setattr(beta2_decay, "gather_objects", lambda mine: [mine])
    mesh, shapes = join(world_size, rank), list_shapes()
    assert len(shapes) == 7
    parameters = [nn.Parameter(shard(mesh, shape)) for shape in shapes]
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_(generator=torch.Generator().manual_seed(number))
    optimizer = torch.optim.AdamW(parameters)

    def draw() -> None:
        """Write a random v0 as the first step does, into the states of parameters that have gradients."""
        plan = V0InitArguments(v0_init="random", v0_decay="beta2").resolve()
        decay = Beta2Decay(SecondMoment(optimizer), None, plan)
        decay._write(decay.list_all(), 1.0)

    used = measure_memory(draw)
    state = 8 * sum(parameter.to_local().numel() for parameter in parameters)  # exp_avg and exp_avg_sq in fp32
    assert 0 <= used.left - state <= SMALL
    assert used.peak <= state + 4 * BLOCK_NUMEL + SMALL
    moments = [optimizer.state[parameter]["exp_avg_sq"].to_local() for parameter in parameters]
    assert all(bool((moment >= 0).all()) and (moment.numel() == 0 or bool(moment.any())) for moment in moments)
