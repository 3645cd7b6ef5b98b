"""What a process allocates on an 8B and a 70B decoder, by counts: its own shard and one block.

The decoders have the real shapes and no weights. One process of many is simulated by a process group that sends nothing; tensors
on the meta device have sizes and no memory, so their bytes are counted exactly. One layer of a shard is run for real.
"""

import math
import re
import weakref

import pytest
import torch
import torch.distributed as dist
from benchmarks.measuring import measure_memory
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForCausalLM, LlamaConfig

from hf_v0init import V0InitArguments
from hf_v0init.hook import beta2_decay
from hf_v0init.hook.beta2_decay import Beta2Decay
from hf_v0init.hook.shards import SteppedShards
from hf_v0init.initialization import summary
from hf_v0init.second_moment.state import SecondMoment
from hf_v0init.sharding.draws import BLOCK_NUMEL

# As published: Llama 3 of 8 and of 70 billion parameters.
DECODERS = {
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32},
    "70B": {"hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80, "num_attention_heads": 64},
}
NUM_PARAMETERS = {"8B": 8_030_261_248, "70B": 70_553_706_496}
PLACES = [  # (decoder, processes, which one); 1,000 do not divide the rows, and some process has none of the smaller matrices
    ("8B", 1000, 501),
    ("70B", 1024, 512),
    pytest.param("70B", 64, 63, marks=pytest.mark.slow),
]
DRAW_BLOCK = 4 * BLOCK_NUMEL
SMALL = 1 << 18  # bytes of scalars, elements looked at and row numbers


def list_shapes(size: str) -> dict[str, tuple[int, ...]]:
    config = LlamaConfig(vocab_size=128_256, num_key_value_heads=8, tie_word_embeddings=False, **DECODERS[size])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return {name: tuple(parameter.shape) for name, parameter in model.named_parameters()}


@pytest.fixture(scope="module")
def shapes():
    return {size: list_shapes(size) for size in DECODERS}


@pytest.fixture
def join():
    """Makes this process one of many; what they would send each other goes nowhere."""

    def join(world_size: int, rank: int):
        dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
        return init_device_mesh("cpu", (world_size,))

    yield join
    if dist.is_initialized():
        dist.destroy_process_group()


IN_PLACE = {torch.ops.aten.normal_.default, torch.ops.aten.square_.default, torch.ops.aten.mul_.Tensor}


class ByteCounter(TorchDispatchMode):
    """Counts the bytes of every tensor that is made while it is on, until it is gone. Draws no random numbers."""

    def __init__(self):
        super().__init__()
        self.alive = self.peak = 0
        self.sizes = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it comes back with the local tensors
        for tensor in tree_leaves((args, kwargs)):
            self.note(tensor, is_new=False)
        if function in IN_PLACE:
            return args[0]
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            self.note(tensor, is_new=True)
        return result

    def note(self, tensor, is_new: bool) -> None:
        if not isinstance(tensor, torch.Tensor) or isinstance(tensor, FakeTensor):
            return  # DTensor asks fake tensors what sharding a result will have
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self.sizes:
            return
        self.sizes[key] = storage.nbytes() if is_new else 0
        self.alive += self.sizes[key]
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self.forget, key)

    def forget(self, key) -> None:
        self.alive -= self.sizes.pop(key, 0)


def shard(mesh, shape, device="meta", dtype=torch.float32) -> DTensor:
    rank, world_size = mesh.get_rank(), mesh.size()
    size = -(-shape[0] // world_size)
    rows = max(0, min(size, shape[0] - rank * size))
    local = torch.zeros((rows, *shape[1:]), device=device, dtype=dtype)
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(local, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride)


def shard_parameters(mesh, shapes, device="meta"):
    """The matrices, sharded by rows as FSDP2 does, and their optimizer."""
    parameters = [nn.Parameter(shard(mesh, shape, device)) for shape in shapes.values() if len(shape) > 1]
    return parameters, torch.optim.AdamW(parameters)


def draw(optimizer) -> None:
    """Write a random v0 as the first step does, into the states of parameters that have gradients."""
    shards = SteppedShards(SecondMoment(optimizer), None, False, 0)
    plan = V0InitArguments(v0_init="random", v0_decay="beta2").resolve()
    Beta2Decay(shards, plan, 1, lambda _: None)._write(shards.list_all(), 1.0)


def count_local(parameters) -> int:
    return sum(parameter.to_local().numel() for parameter in parameters)


@pytest.fixture
def without_values(monkeypatch):
    """Leaves out what reads values, which meta tensors do not have; the run of one layer has it."""
    monkeypatch.setattr(beta2_decay, "compute_median", lambda *_: 1.0)
    monkeypatch.setattr(beta2_decay, "sample_ratio", lambda *_: torch.zeros(1))


@pytest.mark.parametrize(("size", "world_size", "rank"), PLACES)
def test_drawing_takes_the_shard_and_one_block(shapes, join, without_values, size, world_size, rank):
    assert sum(map(math.prod, shapes[size].values())) == NUM_PARAMETERS[size]
    parameters, optimizer = shard_parameters(join(world_size, rank), shapes[size])
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    with ByteCounter() as counter:
        draw(optimizer)
    state = 8 * count_local(parameters)  # exp_avg and exp_avg_sq in fp32
    assert state <= counter.alive <= state + SMALL
    assert counter.peak <= counter.alive + DRAW_BLOCK + SMALL
    assert len(optimizer.state) == len(parameters)


def test_one_layer_of_a_shard_for_real(shapes, join, monkeypatch):
    """Every allocation of torch's allocator, inside kernels too, with figures and report; 8B on 64 processes."""
    monkeypatch.setattr(summary, "gather_values", lambda values: values)
    layer = {name: shape for name, shape in shapes["8B"].items() if re.search(r"layers\.7\.", name)}
    parameters, optimizer = shard_parameters(join(64, 5), layer, device="cpu")
    for number, parameter in enumerate(parameters):
        parameter.grad = torch.zeros_like(parameter)
        parameter.grad.to_local().normal_(generator=torch.Generator().manual_seed(number))
    used = measure_memory(lambda: draw(optimizer))
    state = 8 * count_local(parameters)
    assert 0 <= used.left - state <= SMALL
    assert used.peak <= state + DRAW_BLOCK + SMALL
    moments = [optimizer.state[parameter]["exp_avg_sq"].to_local() for parameter in parameters]
    assert all(bool((moment >= 0).all()) and bool((moment > 0).any()) for moment in moments)
