"""A training script of the package with one change that no flag makes, for two questions of results/measured_length/README.md.

python variant.py --task=translate --rate_multiplier_steps=330 FLAGS
    the learning rate times m(t), the multiplier of a v0 that washes out in so many steps; below 1 a share of the run
python variant.py --task=clm --correction_run_out=true FLAGS
    a v0 whose bias corrections have run out: Adam's count of steps is a million after its first update
"""

import sys

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import Trainer

from hf_v0init.cli.scripts import run_named
from hf_v0init.method.multiplier import compute_multiplier, compute_scale_for_warmup, resolve_warmup_steps
from hf_v0init.second_moment.schedules import multiply_schedule

RUN_OUT = 1_000_000  # optimizer steps after which 1 - beta2^t is 1 in float64, also for beta2 .9999


def multiply_rate(steps: float) -> None:
    """Let every Trainer of this process multiply its learning rate by m(t)."""
    create_scheduler = Trainer.create_scheduler

    def create_with_multiplier(self, num_training_steps, *args, **kwargs):
        scheduler = create_scheduler(self, num_training_steps, *args, **kwargs)
        beta2 = self.args.adam_beta2
        scale = compute_scale_for_warmup(resolve_warmup_steps(steps, num_training_steps), beta2)
        multiply_schedule(scheduler, lambda made: compute_multiplier(made + 1, scale, beta2), "rate_multiplier_steps")
        return scheduler

    Trainer.create_scheduler = create_with_multiplier


def run_out_corrections(optimizer: torch.optim.Optimizer, args: tuple, kwargs: dict) -> None:
    """Set the count of every parameter that has made its first update, so that neither moment is corrected from then on."""
    for state in optimizer.state.values():
        if 1 <= state.get("step", 0) < RUN_OUT:
            state["step"].fill_(RUN_OUT)


def main() -> None:
    """Take this file's own flags out of the command line, and run the script with the rest."""
    own = {"task": None, "rate_multiplier_steps": None, "correction_run_out": "false"}
    rest = []
    for word in sys.argv[1:]:
        name, _, value = word.removeprefix("--").partition("=")
        if name in own:
            own[name] = value
        else:
            rest.append(word)
    sys.argv[1:] = rest
    if own["rate_multiplier_steps"] is not None:
        multiply_rate(float(own["rate_multiplier_steps"]))
    if own["correction_run_out"] == "true":
        register_optimizer_step_post_hook(run_out_corrections)
    run_named(own["task"])


if __name__ == "__main__":
    main()
