"""Started by torchrun (or plain python): trains each run of a JSON list, sharded as it says, and saves what a test compares.

    torchrun --nproc_per_node 2 tests/distributed/train_sharded.py RUNS.json OUTPUT_DIR MODEL_DIR

Whole tensors are gathered from the live optimizer state just before the first step, so what is compared is what the step sees.
"""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
import torch.distributed as dist
from conftest import make_sequences
from torch.distributed.tensor import DTensor
from trainers import make_trainer
from transformers import LlamaForCausalLM, TrainerCallback

from hf_v0init import V0InitTrainer, read_second_moment

WORLD_SIZE_MODES = {
    "whole": None,
    "fsdp2": {"fsdp_size": -1},
    "hybrid": {"dp_replicate_size": 2, "fsdp_size": -2},
}


def gather(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


class GatheringRecorder(TrainerCallback):
    """Whole second moments before the first step and after it, and the whole gradients between."""

    def __init__(self):
        self.trainer, self.v0, self.gradients, self.moments = None, None, None, None
        self.weights_after = None

    def gather_moments(self):
        moments = {n: read_second_moment(self.trainer.optimizer, p) for n, p in self.trainer.model.named_parameters()}
        return {name: gather(v) for name, v in moments.items() if v is not None}

    def on_step_begin(self, args, state, control, **kwargs):
        if self.v0 is None:
            self.v0 = self.gather_moments()

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        if self.gradients is None:
            self.gradients = {n: gather(p.grad) for n, p in self.trainer.model.named_parameters() if p.grad is not None}

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.moments is None:
            self.moments = self.gather_moments()


def make_labelled_sequences(num: int) -> list[dict]:
    """Sequences whose last labels are ignored, another number in each, so that rows have different weights."""
    rows = make_sequences(num)
    for index, row in enumerate(rows):
        row["labels"][10 - index % 6 :] = -100
    return rows


class FailsOnOneRank(V0InitTrainer):
    """Fails in the statistics pass on the last process only; `run_name` says where."""

    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        mine = self.args.process_index == self.args.world_size - 1
        self.calls += mine and model.training
        failing = mine and self.calls == 3
        if failing and self.args.run_name == "before_forward":
            raise RuntimeError("bad sample on this one")
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if failing and self.args.run_name == "after_forward":
            raise RuntimeError("disk full on this one")
        return loss * float("nan") if failing and self.args.run_name == "nan" else loss


class RowsMeanTrainer(V0InitTrainer):
    """Its loss ignores the number of items: a mean over each batch as it is given, whatever the processes."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        return super().compute_loss(model, inputs, return_outputs)


class SampleMeanTrainer(RowsMeanTrainer):
    """As the Trainer where the model takes no `num_items_in_batch`."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = False


TRAINERS = {
    "fails": FailsOnOneRank, "rows_mean": RowsMeanTrainer, "sample_mean": SampleMeanTrainer, None: V0InitTrainer,
}  # fmt: skip


class FailingData(list):
    """A data set that cannot be read on the last process."""

    def __getitem__(self, item):
        if dist.is_initialized() and dist.get_rank() == dist.get_world_size() - 1:
            raise OSError("cannot read sample on this one")
        return super().__getitem__(item)


def load_model(mode: str, model_dir: str):
    world_size = int(__import__("os").environ.get("WORLD_SIZE", 1))
    sizes = WORLD_SIZE_MODES.get(mode)
    if sizes is None:
        return LlamaForCausalLM.from_pretrained(model_dir)
    from transformers.distributed import DistributedConfig

    sizes = {name: world_size // -size if size < 0 else size for name, size in sizes.items()}
    return LlamaForCausalLM.from_pretrained(model_dir, distributed_config=DistributedConfig(**sizes))


def train(run: dict, folder: Path, model_dir: str) -> dict:
    run = dict(run)
    recorder = GatheringRecorder()
    data = make_labelled_sequences(run.pop("num_samples", 48))
    trainer = make_trainer(
        folder / "out",
        model=load_model(run.pop("mode"), model_dir),
        data=FailingData(data) if run.pop("failing_data", False) else data,
        trainer_class=TRAINERS[run.pop("trainer", None)],
        callbacks=[recorder],
        **run,
    )
    recorder.trainer = trainer
    error = None
    try:
        trainer.train()
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    return {
        "v0": recorder.v0, "gradients": recorder.gradients, "moments": recorder.moments, "report": trainer.get_v0_report(),
        "error": error, "world_size": trainer.args.world_size, "loss": trainer.state.log_history,
        "num_sharded": sum(isinstance(p, DTensor) for p in trainer.model.parameters()),
        "num_states": len(getattr(trainer.optimizer, "optimizer", trainer.optimizer).state) if error else None,
    }  # fmt: skip


def main(runs_file: str, output_dir: str, model_dir: str) -> None:
    rank = int(__import__("os").environ.get("RANK", 0))
    for name, run in json.loads(Path(runs_file).read_text()).items():
        torch.save(train(run, Path(output_dir) / name, model_dir), Path(output_dir) / f"{name}.rank{rank}.pt")
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
