"""Ways to let v0 leave so that the step grows linearly, for the choice that README.md tells; not part of the package.

python mechanisms.py --task=clm --mechanism=growing --length=400 FLAGS       (the flags of `hf-v0init clm`, with --v0_init zeros)

In the first `--ramp` steps (6) the learning rate is multiplied by t / L. What stands for E[g^2] from then on:

| mechanism | what is kept | what happens at each step until L |
| --- | --- | --- |
| elements | v_hat of step 6, element by element | (L/t)^2 - 1 times it is held in the second moment |
| factored | the same as rows x columns | the same |
| tensor | its mean over the tensor | the same |
| rising | as factored, every 10 steps raised to what v_hat is then | the same |
| falling, falling_elements | as factored, elements, every 10 steps lowered to what v_hat is then | the same |
| growing | nothing: v is multiplied by (L/12)^2 * .865 once | beta2 = (t/(t+1))^2; at L + 1 v is put right for torch's bias correction |

The schedule is that of `--warmup_steps L` without its ramp. `mechanisms.csv` has what they gave.
"""

import sys

import torch
from transformers import Trainer

from hf_v0init.cli.scripts import run_named

OWN = {"task": "", "mechanism": "factored", "length": "0", "ramp": "6"}
EVERY = 10  # steps after which s is raised or lowered
BIAS = 0.865  # 1 - beta2_t^t of the growing beta2


def factor(estimate: torch.Tensor) -> torch.Tensor:
    """Rows x columns, by their means."""
    matrix = estimate.reshape(estimate.shape[0], -1)
    product = torch.outer(matrix.mean(1), matrix.mean(0)) / matrix.mean().clamp_min(1e-38)
    return product.view_as(estimate)


def factor_matrix(estimate: torch.Tensor) -> torch.Tensor:
    """The same of what has two dimensions; of a vector itself."""
    return factor(estimate) if estimate.dim() > 1 else estimate.clone()


SPREAD = {
    "elements": torch.clone,
    "factored": factor_matrix,
    "rising": factor_matrix,
    "falling": factor_matrix,
    "falling_elements": torch.clone,
    "tensor": lambda estimate: estimate.mean().expand_as(estimate),
}
FOLLOW = {"rising": torch.maximum, "falling": torch.minimum, "falling_elements": torch.minimum}


def install(optimizer: torch.optim.Optimizer, mechanism: str, length: int, ramp: int) -> None:
    """Let v0 leave by a mechanism, in a hook before each step of an AdamW."""
    spread: dict[torch.Tensor, torch.Tensor] = {}
    betas = [group["betas"] for group in optimizer.param_groups]

    def extra(t: int) -> float:
        return (length / t) ** 2 - 1 if ramp < t < length else 0.0

    def before_step(optimizer, args, kwargs) -> None:
        for group, (beta1, beta2) in zip(optimizer.param_groups, betas, strict=True):
            t = 0
            for parameter in group["params"]:
                state = optimizer.state.get(parameter)
                if not state:
                    continue
                t, v = int(state["step"]) + 1, state["exp_avg_sq"]
                if mechanism == "growing":
                    if t == ramp + 1:
                        v.mul_((length / (2 * ramp)) ** 2 * BIAS / (1 - beta2**ramp))
                    if t == length + 1:
                        v.mul_((1 - beta2**length) / BIAS)
                elif t > ramp:
                    if t == ramp + 1:
                        spread[parameter] = SPREAD[mechanism](v / (1 - beta2**ramp))
                    elif mechanism in FOLLOW and t <= length and (t - ramp - 1) % EVERY == 0:
                        held = (1 - beta2 ** (t - 1)) * extra(t - 1)
                        old = spread[parameter]
                        now = SPREAD[mechanism](v.sub(old, alpha=held).clamp_min_(0) / (1 - beta2 ** (t - 1)))
                        spread[parameter] = FOLLOW[mechanism](old, now)
                        v.add_(spread[parameter] - old, alpha=held).clamp_min_(0)
                    if t <= length:
                        held = beta2 * (1 - beta2 ** (t - 1)) * extra(t - 1)
                        v.add_(spread[parameter], alpha=((1 - beta2**t) * extra(t) - held) / beta2).clamp_min_(0)
            if mechanism == "growing" and t:
                group["betas"] = (beta1, (t / (t + 1)) ** 2) if ramp < t <= length else (beta1, beta2)

    optimizer.register_step_pre_hook(before_step)


def patch_trainers(mechanism: str, length: int, ramp: int) -> None:
    """Let every Trainer of this process take the ramp out of its schedule and install the mechanism."""
    create_scheduler = Trainer.create_scheduler

    def create(self, num_training_steps, *args, **kwargs):
        self.args.warmup_steps = length
        scheduler = create_scheduler(self, num_training_steps, *args, **kwargs)
        self.args.warmup_steps = 0

        def flatten(schedule):
            return lambda made: schedule(max(made, length)) * (min(1.0, (made + 1) / length) if made < ramp else 1.0)

        scheduler.lr_lambdas = [flatten(schedule) for schedule in scheduler.lr_lambdas]
        rates = [base * schedule(0) for base, schedule in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        scheduler._last_lr = rates
        install(getattr(self.optimizer, "optimizer", self.optimizer), mechanism, length, ramp)
        return scheduler

    Trainer.create_scheduler = create


def main() -> None:
    """Take this file's own flags out of the command line, and run the script with the rest."""
    own, rest = dict(OWN), []
    for word in sys.argv[1:]:
        name, _, value = word.removeprefix("--").partition("=")
        if name in own:
            own[name] = value
        else:
            rest.append(word)
    sys.argv[1:] = rest
    patch_trainers(own["mechanism"], int(own["length"]), int(own["ramp"]))
    run_named(own["task"])


if __name__ == "__main__":
    main()
