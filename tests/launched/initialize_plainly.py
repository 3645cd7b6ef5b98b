"""Started by `processes.launch`: gives v0 in loops without a Trainer and saves it: under DDP by accelerate, and from the first steps under FSDP2.

Arguments: OUTPUT_DIR
"""

import sys
from dataclasses import asdict
from pathlib import Path

import torch
from accelerate import Accelerator
from processes import leave
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from hf_v0init import attach_v0, initialize_v0, measure_trust_radius, read_second_moment

LEARNING_RATE = 1e-2
CASES = {"data_driven": {}, "uneven": {"v0_num_samples": 12}}
ATTACHED = {
    "data_driven": {"v0_decay": "beta2", "v0_estimation_steps": 2},
    "first_gradient": {"v0_init": "first_gradient", "v0_decay": "beta2"},
    "random": {"v0_init": "random", "v0_decay": "beta2", "v0_seed": 3},
    "linear": {"v0_decay_steps": 6, "v0_estimation_steps": 2},
    "linear random": {"v0_init": "random", "v0_decay_steps": 6, "v0_seed": 3},
    "linear measured": {"max_steps": 12, "measures": True},
}


def make_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 7), nn.Tanh(), nn.Linear(7, 3))


def loss_fn(model, batch):
    return (model(batch["x"]).square().sum(1) * batch["weight"]).mean()


def make_batches(rank: int, world_size: int) -> list[dict]:
    """Eight batches of four, dealt out in turn."""
    generator = torch.Generator().manual_seed(1)
    x, weight = torch.randn(32, 6, generator=generator), torch.rand(32, generator=generator)
    cut = [{"x": a, "weight": b} for a, b in zip(x.split(4), weight.split(4), strict=True)]
    return cut[rank::world_size]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def prepare(accelerator: Accelerator, kind: str) -> tuple:
    model = make_network()
    if kind == "fully_shard":
        fully_shard(model)
        return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    if kind == "tensor_parallel":
        mesh = init_device_mesh("cpu", (accelerator.num_processes,))
        parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
        return model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, foreach=False)
    return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE))


def run_attached(accelerator: Accelerator, kind: str, options: dict) -> dict:
    """The loop as it is, of twelve steps of two batches over all processes; the second moments when v0 stands."""
    model, optimizer = prepare(accelerator, kind)
    options, found, current = dict(options), {}, []
    if options.pop("measures", False):
        for group in optimizer.param_groups:
            group["lr"] = 0.3  # large enough beside the trust radius for a warmup to be needed
        options["v0_decay_steps"] = "auto"
        options["loss_fn"] = lambda: sum(loss_fn(model, batch) for batch in current) / len(current)
    steps = attach_v0(optimizer, model, **options)

    def look(_) -> None:
        for name, p in model.named_parameters():
            moment = read_second_moment(optimizer, p)
            if moment is not None and p.dim() >= 2:
                found[name.removeprefix("module.")] = moment.clone()

    steps.on_written = look
    batches = make_batches(accelerator.process_index, accelerator.num_processes) * 3
    at_once = 2 // accelerator.num_processes
    for start in range(0, len(batches), at_once):
        optimizer.zero_grad()
        current[:] = batches[start : start + at_once]
        for batch in current:
            (loss_fn(model, batch) / at_once).backward()
        optimizer.step()
    weights = {name.removeprefix("module."): whole(p) for name, p in model.named_parameters()}
    length = None if steps.length is None else steps.length.to_dict()
    return {
        "v0": {name: whole(v) for name, v in found.items()},
        "weights": weights,
        "report": steps.report.to_dict(),
        "length": length,
    }


def run(accelerator: Accelerator, kind: str, options: dict) -> dict:
    model, optimizer = prepare(accelerator, kind)
    batches = make_batches(accelerator.process_index, accelerator.num_processes)
    report = initialize_v0(
        optimizer,
        model=model,
        batches=batches,
        loss_fn=loss_fn,
        accelerator=accelerator,
        v0_seed=3,
        effective_batch_size=16,
        **options,
    )
    moments = {name.removeprefix("module."): read_second_moment(optimizer, p) for name, p in model.named_parameters()}
    return {"v0": {name: whole(v) for name, v in moments.items() if v is not None}, "report": report.to_dict()}


def measure(accelerator: Accelerator, kind: str, fails_at: int | None = None) -> dict:
    """The trust radius under DDP or FSDP2; with `fails_at` the last process raises in that forward."""
    (model, optimizer), num_calls = prepare(accelerator, kind), 0
    batches = make_batches(accelerator.process_index, accelerator.num_processes)

    def compute() -> torch.Tensor:
        nonlocal num_calls
        num_calls += 1
        if num_calls == fails_at and accelerator.is_last_process:
            raise RuntimeError("bad batch here")
        return sum(loss_fn(model, batch) for batch in batches)

    compute().backward()
    before, found = [whole(p) for p in model.parameters()], {}
    try:
        found = asdict(measure_trust_radius(optimizer, model, compute))
    except RuntimeError as error:
        found["error"] = str(error)
    unchanged = all(torch.equal(whole(p), q) for p, q in zip(model.parameters(), before, strict=True))
    return found | {"unchanged": unchanged}


def catch(act, *args, **options) -> str | None:
    """What a call raises, in words."""
    try:
        act(*args, **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def collect_errors(accelerator: Accelerator) -> dict:
    rank, batches = accelerator.process_index, make_batches(accelerator.process_index, accelerator.num_processes)

    def fail_to_read():
        yield from batches[:2]
        if rank == 1:
            raise OSError("cannot read batch 2")
        yield from batches[2:]

    def failing(model, batch):
        failing.calls += 1
        if failing.calls == 3 and rank == 1:
            raise RuntimeError("disk full on this one")
        return loss_fn(model, batch)

    failing.calls = 0
    model, optimizer = prepare(accelerator, "ddp")
    options = {"model": model, "accelerator": accelerator}
    errors = {
        "fails": catch(initialize_v0, optimizer, batches=batches, loss_fn=failing, **options),
        "wrapped": catch(initialize_v0, optimizer, batches=batches, loss_fn=lambda _, b: loss_fn(model, b), **options),
        "data": catch(initialize_v0, optimizer, batches=fail_to_read(), loss_fn=loss_fn, **options),
        "num_states": len(optimizer.optimizer.state),
    }
    for kind in ("fully_shard", "tensor_parallel"):
        sharded, its_optimizer = prepare(accelerator, kind)
        given = {"model": sharded, "batches": make_batches(0, 1), "loss_fn": loss_fn}
        errors[kind] = catch(initialize_v0, its_optimizer, **given)
        assert len(its_optimizer.state) == 0
    weights, failing.calls = [p.detach().clone() for p in model.parameters()], 0
    attach_v0(optimizer, model, v0_decay_steps="auto", loss_fn=lambda: failing(model, batches[0]), max_steps=10)
    loss_fn(model, batches[0]).backward()
    errors["measures"] = catch(optimizer.step)
    errors["unchanged"] = all(torch.equal(p, q) for p, q in zip(model.parameters(), weights, strict=True))
    return errors


def main(output_dir: str) -> None:
    accelerator = Accelerator(cpu=True)
    kinds = ["ddp"] + (["fully_shard"] if accelerator.num_processes > 1 else [])
    saved = {kind: {} for kind in kinds}
    saved["ddp"] = {name: run(accelerator, "ddp", options) for name, options in CASES.items()}
    for kind in kinds:
        saved[kind]["radius"] = measure(accelerator, kind)
        saved[kind]["attached"] = {name: run_attached(accelerator, kind, options) for name, options in ATTACHED.items()}
    if accelerator.num_processes > 1:
        saved["errors"] = collect_errors(accelerator) | {"radius": measure(accelerator, "ddp", fails_at=4)}
    torch.save(saved, Path(output_dir) / f"rank{accelerator.process_index}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
