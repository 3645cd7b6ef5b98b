"""Started by `processes.launch`: writes v0 into sharded models without a Trainer, and saves what a test compares.

Arguments: OUTPUT_DIR MODEL_DIR
"""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from conftest import make_sequences
from processes import leave
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from trainers import call_before_update
from transformers import LlamaForCausalLM

from hf_v0init import attach_v0, read_second_moment

BATCH_SIZE = 4


def compute_token_loss(model, inputs) -> torch.Tensor:
    """The mean of the next-token losses."""
    logits = model(input_ids=inputs["input_ids"]).logits
    labels = inputs["labels"][:, 1:].flatten()
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels)


def make_batches() -> list[dict]:
    rows = make_sequences(22)
    for index, row in enumerate(rows):
        row["labels"][10 - index % 6 :] = -100
    cut = [rows[start : start + BATCH_SIZE] for start in range(0, len(rows), BATCH_SIZE)]
    return [{key: torch.stack([row[key] for row in batch]) for key in batch[0]} for batch in cut]


def gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def gather_second_moments(model, optimizer) -> dict[str, torch.Tensor]:
    moments = {name: read_second_moment(optimizer, parameter) for name, parameter in model.named_parameters()}
    return {name: gather(v) for name, v in moments.items() if v is not None}


def make_optimizer(model, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, foreach=False, **options)


def step_once(model, optimizer, **settings) -> dict:
    """One step with a v0 of `attach_v0`: v0 as the step sees it, the gradients, and the second moments after it, all whole."""
    seen: dict = {}
    attach_v0(optimizer, model, **settings)
    optimizer.register_step_pre_hook(
        call_before_update(lambda _: seen.update(v0=gather_second_moments(model, optimizer)))
    )
    model.train()
    compute_token_loss(model, make_batches()[0]).backward()
    seen["gradients"] = {name: gather(p.grad) for name, p in model.named_parameters() if p.grad is not None}
    optimizer.step()
    return seen | {"after": gather_second_moments(model, optimizer)}


def write_both(model) -> dict:
    """The random and the data-driven v0 of a model, whole, and a step from each; the weights after a linear decay."""
    before = [p.detach().clone() for p in model.parameters()]
    steps = {}
    for v0_init in ("random", "data_driven"):
        optimizer = make_optimizer(model)
        steps[v0_init] = step_once(model, optimizer, v0_init=v0_init, v0_decay="beta2", v0_seed=5)
        model.zero_grad()
        with torch.no_grad():
            for parameter, saved in zip(model.parameters(), before, strict=True):
                parameter.copy_(saved)
    moments = [(p, read_second_moment(optimizer, p)) for p in model.parameters()]
    optimizer = make_optimizer(model)
    attach_v0(optimizer, model, v0_decay_steps=5, v0_estimation_steps=2)
    run_steps(model, optimizer, range(6))
    return {
        "linear": {name: gather(p) for name, p in model.named_parameters()},
        "random": steps["random"]["v0"],
        "steps": steps,
        "placed_as_parameters": all(
            getattr(v, "placements", None) == getattr(p, "placements", None) for p, v in moments if v is not None
        ),
        "placements": {name: str(getattr(p, "placements", "")) for name, p in model.named_parameters()},
    }


def load_sharded(kind: str, model_dir: str) -> LlamaForCausalLM:
    from transformers.distributed import DistributedConfig

    world_size = dist.get_world_size()
    if kind == "fully_shard":
        model = LlamaForCausalLM.from_pretrained(model_dir)
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    sizes = {"tensor_parallel": {"tp_size": world_size}, "both": {"tp_size": 2, "fsdp_size": world_size // 2}}[kind]
    return LlamaForCausalLM.from_pretrained(model_dir, distributed_config=DistributedConfig(**sizes))


def save_and_load(model_dir: str, folder: Path) -> dict:
    """Save with torch.distributed.checkpoint after, and in the middle of, the first steps; load; go on with both."""
    results = {}
    beta2 = {"v0_decay": "beta2", "v0_estimation_steps": 3}
    linear = {"v0_decay_steps": 5, "v0_estimation_steps": 2}
    for num_before, name, options in ((4, "written", beta2), (1, "estimating", beta2), (3, "decaying", linear)):
        model = load_sharded("fully_shard", model_dir)
        optimizer = make_optimizer(model)
        handle = attach_v0(optimizer, model, v0_init="data_driven", **options)
        run_steps(model, optimizer, range(num_before))
        place = folder / name
        weights = {key: gather(p) for key, p in model.named_parameters()}
        dcp.save({"optimizer": get_optimizer_state_dict(model, optimizer)}, checkpoint_id=place)
        other = load_sharded("fully_shard", model_dir)
        with torch.no_grad():
            for mine, theirs in zip(other.parameters(), model.parameters(), strict=True):
                mine.copy_(theirs)
        other_optimizer = make_optimizer(other)
        # Loading makes zero states by a step of its own, which is how torch's distributed checkpoints work.
        other_handle = attach_v0(other_optimizer, other, v0_init="data_driven", **options)
        state = {"optimizer": get_optimizer_state_dict(other, other_optimizer)}
        dcp.load(state, checkpoint_id=place)
        set_optimizer_state_dict(other, other_optimizer, state["optimizer"])
        if name != "written":
            other_handle.load_state_dict(handle.state_dict())
        loaded = gather_second_moments(other, other_optimizer)
        saved = gather_second_moments(model, optimizer)
        steps = []
        for each, its_optimizer in ((model, optimizer), (other, other_optimizer)):
            run_steps(each, its_optimizer, range(num_before, 6))
            steps.append({key: gather(p) for key, p in each.named_parameters()})
        moved = any(not torch.equal(w, weights[key]) for key, w in steps[0].items())
        results[name] = {
            "saved": saved,
            "loaded": loaded,
            "steps": steps,
            "moved": moved,
            "report": other_handle.report is not None,
        }
    return results


def run_steps(model, optimizer, numbers) -> None:
    """Optimizer steps on these batches."""
    batches = make_batches()
    model.train()
    for number in numbers:
        compute_token_loss(model, batches[number]).backward()
        optimizer.step()
        optimizer.zero_grad()


def main(output_dir: str, model_dir: str) -> None:
    dist.init_process_group("gloo")
    folder = Path(output_dir)
    kinds = ["tensor_parallel"] + (["both"] if dist.get_world_size() == 4 else [])
    saved = {kind: write_both(load_sharded(kind, model_dir)) for kind in kinds}
    saved["checkpoint"] = save_and_load(model_dir, folder / "checkpoint")
    torch.save(saved, folder / f"rank{os.environ['RANK']}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
