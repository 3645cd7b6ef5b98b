"""Started by `processes.launch`: measures the trust radius of one small network, and saves what a test compares.

Arguments: FOLDER plain fsdp failing
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from processes import leave
from torch import nn

from hf_v0init import measure_trust_radius

NUM_ROWS = 64  # of a batch, over all processes


def make_network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(10, 16), nn.Tanh(), nn.Dropout(0.5).eval(), nn.Linear(16, 7), nn.Tanh(), nn.Linear(7, 3)
    )


def make_batches(rank: int, num_processes: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """This process's rows of four batches whose labels follow from the inputs."""
    torch.manual_seed(1)
    rule = torch.randn(10, 3)
    rows = slice(rank * NUM_ROWS // num_processes, (rank + 1) * NUM_ROWS // num_processes)
    inputs = [torch.randn(NUM_ROWS, 10) for _ in range(4)]
    return [(x[rows], (x @ rule).argmax(1)[rows]) for x in inputs]


def compute_loss(model, batch) -> torch.Tensor:
    return nn.functional.cross_entropy(model(batch[0]), batch[1])


def copy_weights(model) -> list[torch.Tensor]:
    return [p.detach().full_tensor() if hasattr(p, "full_tensor") else p.detach().clone() for p in model.parameters()]


def measure(kind: str, rank: int, num_processes: int) -> dict:
    model, batches, loss_fn, num_calls = make_network(), make_batches(rank, num_processes), compute_loss, 0
    if kind == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for layer in (model[0], model[3], model):
            fully_shard(layer)

    def fail_here(module, batch) -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == 12 and rank == 0:
            raise RuntimeError("bad batch here")
        return compute_loss(module, batch)

    before, result = copy_weights(model), {}
    try:
        result = measure_trust_radius(model, batches, fail_here if kind == "failing" else loss_fn).to_dict()
    except RuntimeError as error:
        result["error"] = str(error)
    pairs = zip(before, copy_weights(model), strict=True)
    result["unchanged"] = all(torch.equal(then, now) for then, now in pairs)
    return result


def main(folder: str, *kinds: str) -> None:
    num_processes, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    if num_processes > 1:
        dist.init_process_group("gloo")
    results = {kind: measure(kind, rank, num_processes) for kind in kinds}
    Path(folder, f"{num_processes}_{rank}.json").write_text(json.dumps(results))


if __name__ == "__main__":
    main(*sys.argv[1:])
    leave()
