"""States of sharded parameters (DTensors), on one process: created, written, read and stepped as those of plain tensors."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

CODE = """
import sys, warnings
import torch, torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from optimizer_cases import load, make_gradients, make_parameter, make_v0, quiet_and_eager, step, write
from hf_v0init import InputError, read_second_moment

dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
mesh = init_device_mesh("cpu", (1,))
for path in sys.argv[1:]:
    plain, module = make_parameter(), torch.nn.Linear(128, 64, bias=False)
    with torch.no_grad():
        module.weight.copy_(plain)
    fully_shard(module, mesh=mesh)
    sharded = module.weight
    a, b = (load(path)([p], lr=0.01) for p in (sharded, plain))
    with quiet_and_eager():
        try:
            write(a, sharded, make_v0())
        except InputError as error:
            print("refused", error)
            continue
        write(b, plain, make_v0())
        assert torch.equal(read_second_moment(a, sharded).to_local(), read_second_moment(b, plain))
        for gradient in make_gradients(2):
            step(a, sharded, DTensor.from_local(gradient.clone(), mesh, sharded.placements))
            step(b, plain, gradient)
            assert torch.equal(sharded.to_local(), plain)
    print("equal", path)
"""


@pytest.mark.slow
def test_sharded_states_are_those_of_plain_tensors_and_bitsandbytes_refuses_them():
    paths = [f"torch.optim:{name}" for name in ("AdamW", "NAdam", "RAdam", "Adamax", "RMSprop", "Adagrad", "Adadelta")]
    for package, theirs in [
        ("torchao", ["torchao.optim:AdamW8bit", "torchao.optim:AdamW4bit"]),
        ("schedulefree", ["schedulefree:AdamWScheduleFree"]),
        ("pytorch_optimizer", ["pytorch_optimizer:AdaBelief", "pytorch_optimizer:Yogi", "pytorch_optimizer:LaProp"]),
        ("bitsandbytes", ["bitsandbytes.optim:AdamW8bit"]),
    ]:
        paths += theirs if importlib.util.find_spec(package) else []
    tests = Path(__file__).parents[1]
    path = f"{tests}:{tests / 'references'}:{tests.parent}"
    done = subprocess.run(
        [sys.executable, "-c", CODE, *paths],
        capture_output=True,
        text=True,
        timeout=300,
        env={"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PATH": "/usr/bin:/bin", "HOME": str(Path.home())},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    equal = [line.split()[1] for line in done.stdout.splitlines() if line.startswith("equal")]
    assert equal == [path for path in paths if "bitsandbytes" not in path]
    assert "bitsandbytes.optim:AdamW8bit" not in paths or "cannot step sharded parameters" in done.stdout
