"""Started by `processes.launch`: trains each run of a JSON list, sharded as it says, and saves what a test compares.

Whole tensors are gathered from the live optimizer state just before the first step, so what is compared is what the step sees.

Arguments: RUNS.json OUTPUT_DIR MODEL_DIR
"""

import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_sequences
from processes import leave
from torch.distributed.tensor import DTensor
from trainers import call_before_update, make_arguments, make_trainer
from transformers import LlamaForCausalLM, TrainerCallback

from hf_v0init import V0InitTrainer
from hf_v0init.hook import find_hook
from hf_v0init.second_moment.state import SecondMoment, unwrap_optimizer
from hf_v0init.sharding.parts import ParamShard, name_parameters

# `DistributedConfig` of a mode; -n stands for the number of processes / n.
FSDP2_MODES = {"fsdp2": {"fsdp_size": -1}, "hybrid": {"dp_replicate_size": 2, "fsdp_size": -2}}


def gather(tensor: torch.Tensor, shard: ParamShard | None = None) -> torch.Tensor:
    """The whole of a tensor that may be spread over the processes."""
    if shard is not None and shard.offset is not None:
        whole = torch.zeros(shard.numel, dtype=tensor.dtype)
        whole[shard.offset : shard.offset + tensor.numel()] = tensor
        dist.all_reduce(whole)
        return whole.view(shard.full_shape)
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class GatheringRecorder(TrainerCallback):
    """Whole second moments before the first real step and after it, and the whole gradients of the steps up to it."""

    def __init__(self):
        self.trainer, self.v0, self.moments, self.hooked = None, None, None, None
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.local: dict = {}

    def gather_moments(self):
        reader = SecondMoment(self.trainer.optimizer)
        moments = [(shard, reader.read(shard)) for shard in reader.list_shards(name_parameters(self.trainer.model))]
        return {shard.name: gather(v, shard) for shard, v in moments if v is not None}

    def on_step_begin(self, args, state, control, **kwargs):
        inner = unwrap_optimizer(self.trainer.optimizer)
        if self.hooked is not inner:
            self.hooked = inner
            self.reader = SecondMoment(
                self.trainer.optimizer
            )  # in the middle of its step ZeRO shows only some of the groups
            inner.register_step_pre_hook(call_before_update(self.look))
            if self.trainer.is_deepspeed_enabled:  # its step is part of `accelerator.backward`
                zero = self.trainer.optimizer.optimizer
                zero.step = self.watch_step(zero.step)

    def look(self, inner):
        """Before a step of the innermost optimizer, after ours: ZeRO makes one for each of its flat tensors."""
        steps = find_hook(inner)
        if self.v0 is not None or (steps is not None and steps.is_waiting):
            return
        for shard in self.reader.list_shards(name_parameters(self.trainer.model)):
            moment = self.reader.read(shard)
            if moment is not None and shard.name not in self.local:
                self.local[shard.name] = shard, gather(moment)

    def watch_step(self, step):
        from deepspeed.utils import safe_get_full_grad

        def watched(*args, **kwargs):
            if self.moments is None:
                named = self.trainer.model.named_parameters()
                self.gradients.append({name: safe_get_full_grad(p).detach().clone() for name, p in named})
            return step(*args, **kwargs)

        return watched

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.moments is None and not self.trainer.is_deepspeed_enabled:  # there `watch_step` has them
            named = self.trainer.model.named_parameters()
            self.gradients.append({n: gather(p.grad) for n, p in named if p.grad is not None})

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.moments is None and self.local:
            self.v0 = {name: gather(v, shard) for name, (shard, v) in self.local.items()}
            self.moments = self.gather_moments()


def make_labelled_sequences(num: int) -> list[dict]:
    """Sequences whose last labels are ignored, another number in each, so that rows have different weights."""
    rows = make_sequences(num)
    for index, row in enumerate(rows):
        row["labels"][10 - index % 6 :] = -100
    return rows


class ShardedByAccelerateTrainer(V0InitTrainer):
    """Takes accelerate's FSDP2 way on CPU processes, which accelerate itself takes on accelerators only."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

        state = self.accelerator.state
        state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        )
        state.distributed_type = DistributedType.FSDP
        self.is_fsdp_enabled = True


TRAINERS = {"accelerate": ShardedByAccelerateTrainer, None: V0InitTrainer}


def load_model(mode: str, model_dir: str, **options):
    sizes = FSDP2_MODES.get(mode)
    if sizes is None:
        return LlamaForCausalLM.from_pretrained(model_dir, **options)
    from transformers.distributed import DistributedConfig

    world_size = int(os.environ.get("WORLD_SIZE", 1))
    sizes = {name: world_size // -size if size < 0 else size for name, size in sizes.items()}
    return LlamaForCausalLM.from_pretrained(model_dir, distributed_config=DistributedConfig(**sizes), **options)


def make_deepspeed_options(mode: str, extra: dict) -> dict:
    """The Trainer options of the modes zero1, zero2 and zero3."""
    if not mode.startswith("zero"):
        return {}
    import deepspeed

    # Its shared-memory collectives for CPUs would first be compiled; gloo's give the same.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    deepspeed.init_distributed("gloo")
    config = {"zero_optimization": {"stage": int(mode[-1]), "stage3_param_persistence_threshold": 0}, **extra}
    automatic = (
        "train_micro_batch_size_per_gpu",
        "gradient_accumulation_steps",
        "train_batch_size",
        "gradient_clipping",
    )
    return {"deepspeed": config | dict.fromkeys(automatic, "auto")}


def gather_weights(trainer) -> dict[str, torch.Tensor]:
    if not trainer.is_deepspeed_enabled:
        return {name: gather(p) for name, p in trainer.model.named_parameters()}
    from deepspeed.utils import safe_get_full_fp32_param

    return {name: safe_get_full_fp32_param(p).detach().clone() for name, p in trainer.model.named_parameters()}


def count_states(trainer) -> int:
    """The tensors for which the innermost optimizer holds any state."""
    optimizer = trainer.optimizer
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return sum(len(state) > 0 for state in getattr(optimizer, "state", {}).values())


def train(run: dict, folder: Path, model_dir: str) -> dict:
    run = dict(run)
    recorder = GatheringRecorder()
    data = make_labelled_sequences(run.pop("num_samples", 48))
    mode = run.pop("mode")
    run |= make_deepspeed_options(mode, run.pop("ds_config", {}))
    # Where arguments are there first, ZeRO-3 splits the model while it loads.
    run_before = str(folder.parent / run.pop("resume_from")) if "resume_from" in run else None
    arguments = make_arguments(folder, deepspeed=run["deepspeed"]) if run.pop("split_while_loading", False) else None
    model = load_model(mode, model_dir, attention_dropout=run.pop("dropout", 0.0))
    del arguments
    trainer = make_trainer(
        folder / "out",
        model=model,
        data=data,
        trainer_class=TRAINERS[run.pop("trainer", None)],
        callbacks=[recorder],
        **run,
    )
    recorder.trainer = trainer
    error = None
    try:
        trainer.train(resume_from_checkpoint=run_before)
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    return {
        "v0": recorder.v0, "gradients": recorder.gradients, "moments": recorder.moments, "report": trainer.get_v0_report(),
        "error": error, "world_size": trainer.args.world_size, "loss": trainer.state.log_history,
        "weights": None if error else gather_weights(trainer), "num_sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "num_states": count_states(trainer) if error else None,
    }  # fmt: skip


def main(runs_file: str, output_dir: str, model_dir: str) -> None:
    rank = int(os.environ.get("RANK", 0))
    for name, run in json.loads(Path(runs_file).read_text()).items():
        torch.save(train(run, Path(output_dir) / name, model_dir), Path(output_dir) / f"{name}.rank{rank}.pt")


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
