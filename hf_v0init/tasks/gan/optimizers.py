"""The optimizers of a GAN's two networks, by the Trainer's flags, with their schedules and their v0; and one record of the two."""

from __future__ import annotations

import copy
import functools
import logging
import random
import tempfile

import torch
from torch import nn
from transformers import Trainer
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from hf_v0init import InputError, V0InitArguments, V0InitTrainer, attach_v0, initialize_v0

from ...method.length import choose_length
from ...settings import AUTO
from ...trainer.schedule import find_what_warms_up, keep_plateau, require_no_warmup
from .dcgan import compute_discriminator_loss, compute_generator_loss

logger = logging.getLogger("hf_v0init")

V0_OPTIONS = ("scale", "estimation_steps", "include_bias_and_norm", "decay")  # of a plan, which has the preset's
SUMMED = ("num_samples", "num_batches", "num_skipped", "seconds")


def make_optimizer(network: nn.Module, training, max_steps: int, decay_steps: int | None = None):
    """Make the optimizer and the schedule of one network: those of a Trainer with these flags, and nothing decays but matrices.

    Args:
        decay_steps: for how long the schedule stays at its peak, since v0 stands for a warmup of that length; None: as it is.

    Raises:
        InputError: a warmup that the schedule has not, one beside a v0 that stands for it, or an optimizer that the loop here cannot use.
    """
    schedule = getattr(training.lr_scheduler_type, "value", training.lr_scheduler_type)
    if training.get_warmup_steps(max_steps) and schedule == "constant":
        raise InputError(
            f"warmup_steps={training.warmup_steps} with lr_scheduler_type=constant does nothing; use constant_with_warmup"
        )
    options = copy.copy(training)
    for setting, field in V0InitArguments.__dataclass_fields__.items():
        if setting not in ("v0_optimizer", "untuned_warmup"):  # which choose optimizer and schedule
            setattr(options, setting, field.default)
    options.report_to = []
    options.eval_strategy, options.save_strategy, options.eval_on_start = IntervalStrategy.NO, SaveStrategy.NO, False
    options.output_dir = tempfile.gettempdir()  # a Trainer makes its folder; this one writes nothing
    parameters = list(network.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": training.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    trainer = V0InitTrainer(model=network, args=options)
    chosen = trainer.optimizer_cls_and_kwargs or Trainer.get_optimizer_cls_and_kwargs(options, network)
    trainer.optimizer = chosen[0](groups, **chosen[1])
    if callable(getattr(trainer.optimizer, "train", None)):
        raise InputError(
            f"optimizer {type(trainer.optimizer).__name__} keeps two sets of weights, for training and evaluation, which this loop "
            "does not switch; use another, such as adamw_torch"
        )
    trainer.state.max_steps = max_steps
    scheduler = trainer.create_scheduler(max_steps, trainer.optimizer)
    what = find_what_warms_up(training, training.resolve(max_steps))
    if what is not None and training.untuned_warmup is None:  # which the Trainer has looked at
        require_no_warmup(what, trainer, scheduler)
    if decay_steps is not None:
        keep_plateau(trainer, scheduler, decay_steps)
    return trainer.optimizer, scheduler


def choose_decay_steps(training, max_steps: int) -> int | None:
    """Return for how many steps v0 decays, None if beta2 alone says so; a third of training where it would be measured.

    What is measured elsewhere is how far one network may go by one loss.
    """
    steps = training.resolve(max_steps).decay_steps
    if steps != AUTO:
        return steps
    reason = "a GAN has two networks, each with a loss of its own"
    length = choose_length(None, training.learning_rate, max_steps, reason=reason)
    length.log("v0 decays over")
    return length.steps


def attach_to_both(run) -> dict:
    """Attach v0 to both optimizers, in whose first steps it is written; return the hooks, none for "zeros"."""
    training, hooks = run.training, {}
    plan = training.resolve(run.max_steps)
    if plan.init == "zeros":
        return hooks
    options = {f"v0_{name}": getattr(plan, name) for name in V0_OPTIONS}
    options |= {"v0_seed": choose_seed(training), "max_steps": run.max_steps, "v0_decay_steps": run.decay_steps}
    for name, network in run.networks.items():
        hooks[name] = attach_v0(run.optimizers[name], network, plan.init, **options)
        hooks[name].on_written = functools.partial(_log_report, name)
    return hooks


def choose_seed(training) -> int:
    """Return the seed of v0: its own, else the run's."""
    return training.seed if training.v0_seed is None else training.v0_seed


def _log_report(name: str, report) -> None:
    logger.info(f"of the {name}:")
    report.log()


def estimate_v0(run) -> dict[str, dict]:
    """Give both second moments the paper's data-driven v0, each from its own network's loss as it is before any step (eq. 10).

    The discriminator's loss is that of pairs of a real and a generated image; the generator's goes through the discriminator,
    whose gradients are not kept.

    Returns:
        The report of each network.
    """
    training, accelerator, networks = run.training, run.accelerator, run.networks
    plan, seed = training.resolve(run.max_steps), choose_seed(training)
    num_samples, step_size = min(plan.num_samples, len(run.pixels)), run.order.batch_size
    # With batch norms the gradient of an image depends on its batch: by default they are training's size.
    size = training.v0_stats_batch_size or max(1, min(step_size, num_samples // max(2, accelerator.num_processes)))
    samples = torch.tensor(random.Random(seed).sample(range(len(run.pixels)), num_samples))
    batches = list(samples.split(size))[accelerator.process_index :: accelerator.num_processes]

    def compute_generators(_: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        return compute_generator_loss(networks["discriminator"], networks["generator"](run.draw(len(numbers))))

    def compute_discriminators(discriminator: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        real = run.take_images(numbers)
        with torch.no_grad():
            generated = networks["generator"](run.draw(len(numbers)))
        return compute_discriminator_loss(discriminator, real, generated)[0]

    reports = {}
    for name, loss_fn in (("generator", compute_generators), ("discriminator", compute_discriminators)):
        report = initialize_v0(
            run.optimizers[name],
            model=run.wrapped[name],
            batches=batches,
            loss_fn=loss_fn,
            accelerator=accelerator,
            v0_scale=plan.scale,
            v0_decay_steps=plan.decay_steps,
            v0_include_bias_and_norm=plan.include_bias_and_norm,
            v0_seed=seed,
            effective_batch_size=float(step_size * accelerator.num_processes),
            other_modules=[network for other, network in networks.items() if other != name],
            max_steps=run.max_steps,
        )
        report.num_samples_requested = plan.num_samples
        reports[name] = report.to_dict()
    return reports


def join_reports(reports: dict[str, dict]) -> dict:
    """Join the networks' reports: what is the same in both, samples and seconds summed up, and each whole one under `networks`."""
    first, *others = reports.values()
    joined = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    sums = {key: sum(report.get(key) or 0 for report in reports.values()) for key in SUMMED}
    return joined | sums | {"networks": reports}
