"""Started by `processes.launch`: trains each run of a JSON list and saves what a test compares.

Arguments: RUNS.json OUTPUT_DIR
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from conftest import make_gpt2, make_sequences
from processes import leave
from trainers import Recorder, make_trainer, weights_of

from hf_v0init import V0InitTrainer


class FailsOnOneRank(V0InitTrainer):
    """Raises in the seventh batch of the statistics pass, on the last process only: the 14th of both."""

    calls = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training and self.calls == 7 and self.args.process_index == self.args.world_size - 1:
            if self.args.run_name == "nan":
                return loss * float("nan")
            if self.args.run_name == "nan_gradient":
                next(self.model.parameters()).register_hook(lambda g: g * float("nan"))
                return loss
            raise RuntimeError("disk full on this one")
        return loss


class Gathers(V0InitTrainer):
    """Its loss communicates, as losses over all processes' rows do."""

    num_losses = 0

    def compute_loss(self, model, inputs, *args, **kwargs):
        self.num_losses += 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        self.accelerator.gather(loss.detach().reshape(1))
        return loss


class NanStep(V0InitTrainer):
    """The gradient of its first step is not finite."""

    def compute_loss(self, model, *args, **kwargs):
        return super().compute_loss(model, *args, **kwargs) * float("nan")


TRAINERS = {"fails": FailsOnOneRank, "gathers": Gathers, "nan_step": NanStep}


class CountCollectives:
    """Counts all-reduces of parameter-sized sums and their bytes while the pass runs."""

    def __init__(self):
        self.calls, self.bytes, self.original = 0, 0, dist.all_reduce

    def __enter__(self):
        def counted(tensor, *args, **kwargs):
            self.calls, self.bytes = self.calls + 1, self.bytes + tensor.numel() * tensor.element_size()
            return self.original(tensor, *args, **kwargs)

        dist.all_reduce = counted
        return self

    def __exit__(self, *_):
        dist.all_reduce = self.original


def main(runs_file: str, output_dir: str) -> None:
    for name, run in json.loads(Path(runs_file).read_text()).items():
        run = dict(run)
        recorder = Recorder()
        trainer = make_trainer(
            Path(output_dir) / name / "out",
            stock=run.pop("stock", False),
            model=make_gpt2(dropout=run.pop("dropout", 0.1)),
            data=make_sequences(run.pop("num_samples", 48)),
            trainer_class=TRAINERS.get(run.pop("trainer", None)),
            callbacks=[recorder],
            **run,
        )
        recorder.trainer = trainer
        error = None
        with CountCollectives() as collectives:
            try:
                trainer.train()
            except Exception as exception:
                error = f"{type(exception).__name__}: {exception}"
        rank = trainer.args.process_index
        torch.save(
            {
                "weights": weights_of(trainer),
                "v0": recorder.v0,
                "report": trainer.get_v0_report() if hasattr(trainer, "get_v0_report") else None,
                "error": error,
                "num_losses": getattr(trainer, "num_losses", None),
                "all_reduces": (collectives.calls, collectives.bytes),
                "world_size": trainer.args.world_size,
                "num_states": len(getattr(trainer.optimizer, "optimizer", trainer.optimizer).state) if error else None,
            },
            Path(output_dir) / f"{name}.rank{rank}.pt",
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
