"""A v0 for each of a GAN's two optimizers, and one record of both."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...estimation.batches import choose_samples
from ...initialization.first_steps import FirstSteps
from ...loop.initialize import initialize_v0
from ...settings import AUTO
from .dcgan import compute_discriminator_loss, compute_generator_loss

SETTINGS = (
    "init",
    "scale",
    "num_samples",
    "estimator",
    "estimation_steps",
    "stats_batch_size",
    "seed",
    "include_bias_and_norm",
    "decay_steps",
)


def get_seed(training) -> int:
    """Return the seed of v0's draws."""
    return training.seed if training.v0_seed is None else training.v0_seed


def attach_gan_v0(training, networks: dict[str, nn.Module], optimizers: dict, max_steps: int) -> dict[str, FirstSteps]:
    """Let both second moments get a v0 at their own first step; {} where the paper's pass or nothing is asked for.

    Args:
        training: `V0InitTrainingArguments`.
        networks, optimizers: "generator" and "discriminator".
        max_steps: of the whole run.
    """
    if training.v0_init == "zeros" or takes_pass(training):
        return {}
    return {
        name: FirstSteps(optimizers[name], network, training, seed=get_seed(training), max_steps=max_steps)
        for name, network in networks.items()
    }


def takes_pass(training) -> bool:
    """Whether v0 comes from the paper's pass before training."""
    return training.v0_init == "data_driven" and training.v0_estimator == "per_sample"


def write_gan_v0(
    training,
    wrapped: dict[str, nn.Module],
    networks: dict[str, nn.Module],
    optimizers: dict,
    *,
    accelerator,
    num_images: int,
    num_first: int,
    take_images: Callable[[torch.Tensor], torch.Tensor],
    generate: Callable[[int], torch.Tensor],
    max_steps: int,
) -> dict:
    """Give both second moments the paper's data-driven v0, each from its own network's loss as it is before any step.

    Args:
        training: `V0InitTrainingArguments`, see `takes_pass`.
        wrapped, networks: "generator" and "discriminator", as the loop runs them and outside DDP.
        optimizers: of the same names, prepared.
        num_images: training images to choose from.
        num_first: images of the first step.
        take_images: maps image numbers to images in [-1, 1].
        generate: draws noise and generates so many images.
        max_steps: of the whole run.

    Returns:
        The record of both, see `join_reports`.
    """
    seed = get_seed(training)
    num_samples = min(training.get_max_num_samples(), num_images)
    step_size = num_first
    # With batch norms the gradient of an image depends on its batch: by default they are training's size.
    size = training.v0_stats_batch_size or max(1, min(step_size, num_samples // max(2, accelerator.num_processes)))
    samples = torch.tensor(choose_samples(num_images, num_samples, seed))
    batches = list(samples.split(size))[accelerator.process_index :: accelerator.num_processes]

    def compute_generators(_: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        return compute_generator_loss(networks["discriminator"], generate(len(numbers)))

    def compute_discriminators(discriminator: nn.Module, numbers: torch.Tensor) -> torch.Tensor:
        real = take_images(numbers)
        with torch.no_grad():
            generated = generate(len(numbers))
        return compute_discriminator_loss(discriminator, real, generated)[0]

    reports = {}
    for name, loss_fn in (("generator", compute_generators), ("discriminator", compute_discriminators)):
        report = initialize_v0(
            optimizers[name],
            model=wrapped[name],
            batches=batches,
            loss_fn=loss_fn,
            accelerator=accelerator,
            v0_scale=training.v0_scale,
            v0_decay_steps=training.v0_decay_steps,
            v0_num_samples=AUTO if training.v0_num_samples == AUTO else None,
            v0_seed=seed,
            v0_include_bias_and_norm=training.v0_include_bias_and_norm,
            effective_batch_size=float(step_size * accelerator.num_processes),
            other_modules=[network for other, network in networks.items() if other != name],
            max_steps=max_steps,
        )
        report.num_samples_requested = training.v0_num_samples
        reports[name] = report.to_dict()
    return compose_record(training, reports)


def compose_record(training, reports: dict[str, dict]) -> dict:
    """Compose the record of both networks' v0 from their reports."""
    return join_reports(reports) | {"settings": describe_settings(training)}


def join_reports(reports: dict[str, dict]) -> dict:
    """Join the networks' reports into one of the usual form, with each whole one under `networks`.

    Counts and seconds are sums, v0 figures over the elements of both, `measured_ratio` the geometric mean.
    """
    first, *_ = reports.values()
    left_out = ("parameters", "without_gradient", "mean_loss", "multiplier")
    joined = {name: value for name, value in first.items() if name not in left_out}
    summed = ["num_samples", "num_batches", "num_skipped", "seconds", "num_zero_elements"]
    summed += [f"num_{kind}_{which}_v0" for kind in ("parameters", "elements") for which in ("with", "without")]
    for name in summed:
        joined[name] = sum(report[name] for report in reports.values())
    total = sum(report["v0_mean"] * report["num_elements_with_v0"] for report in reports.values())
    joined["v0_mean"] = total / max(1, joined["num_elements_with_v0"])
    joined["v0_min"] = min(report["v0_min"] for report in reports.values())
    joined["v0_max"] = max(report["v0_max"] for report in reports.values())
    ratios = [report["measured_ratio"] for report in reports.values()]
    joined["measured_ratio"] = None if None in ratios else math.prod(ratios) ** (1 / len(ratios))
    return joined | {"networks": reports}


def describe_settings(training) -> dict:
    """Return the v0 settings of a run, which a resumed one is compared by."""
    if training.v0_init == "zeros":
        return {"v0_init": "zeros"}
    return {f"v0_{name}": getattr(training, f"v0_{name}") for name in SETTINGS}


def find_setting_differences(training, report: dict | None) -> list[str]:
    """Name the v0 settings of this run that differ from those in the record of a checkpoint, as 'name: stored -> now'."""
    stored, now = (report or {}).get("settings", {"v0_init": "zeros"}), describe_settings(training)
    return [f"{k}: {stored.get(k)} -> {now.get(k)}" for k in stored | now if stored.get(k) != now.get(k)]
