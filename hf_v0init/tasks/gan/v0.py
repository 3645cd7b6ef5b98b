"""A v0 for each of a GAN's two optimizers, and one record of both."""

import math
from collections.abc import Callable

import torch
from torch import nn

from ...gradients.batches import choose_samples
from ...loop.initialize import initialize_v0
from ...settings import AUTO
from .dcgan import compute_discriminator_loss, compute_generator_loss

SETTINGS = ("init", "scale", "num_samples", "statistic", "stats_batch_size", "seed", "one_dimensional", "warmup_steps")
SETTINGS += ("floor", "fan_factor")


def write_gan_v0(
    training,
    wrapped: dict[str, nn.Module],
    networks: dict[str, nn.Module],
    optimizers: dict,
    *,
    accelerator,
    num_images: int,
    first_images: torch.Tensor,
    take_images: Callable[[torch.Tensor], torch.Tensor],
    generate: Callable[[int], torch.Tensor],
    max_steps: int,
) -> dict:
    """Give both second moments a v0, each from its own network's loss as it is before any step.

    Args:
        training: `V0InitTrainingArguments`, `v0_init` not zeros.
        wrapped, networks: "generator" and "discriminator", as the loop runs them and outside DDP.
        optimizers: of the same names, prepared.
        num_images: training images to choose from.
        first_images: numbers of the images of the first step.
        take_images: maps image numbers to images in [-1, 1].
        generate: draws noise and generates so many images.
        max_steps: of the whole run.

    Returns:
        The record of both, see `join_reports`.
    """
    seed = training.seed if training.v0_seed is None else training.v0_seed
    num_samples = min(training.get_max_num_samples(), num_images)
    step_size = len(first_images)
    # With batch norms the gradient of an image depends on its batch: by default they are training's size.
    size = training.v0_stats_batch_size or max(1, min(step_size, num_samples // max(2, accelerator.num_processes)))
    batches = [first_images]
    if training.v0_init == "data_driven":
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
            strategy=training.v0_init,
            batches=batches,
            loss_fn=loss_fn,
            accelerator=accelerator,
            scale=training.v0_scale,
            warmup_steps=training.v0_warmup_steps,
            num_samples=AUTO if training.v0_num_samples == AUTO else None,
            statistic=training.v0_statistic,
            seed=seed,
            one_dimensional=training.v0_one_dimensional,
            floor=training.v0_floor,
            fan_factor=training.v0_fan_factor,
            effective_batch_size=float(step_size * accelerator.num_processes),
            other_modules=[network for other, network in networks.items() if other != name],
            max_steps=max_steps,
        )
        if training.v0_init == "data_driven":
            report.num_samples_requested = training.v0_num_samples
        reports[name] = report.to_dict()
    return join_reports(reports) | {"settings": describe_settings(training)}


def join_reports(reports: dict[str, dict]) -> dict:
    """Join the networks' reports into one of the usual form, with each whole one under `networks`.

    Counts and seconds are sums, v0 figures over the elements of both, `measured_ratio` the geometric mean.
    """
    first, *_ = reports.values()
    left_out = ("parameters", "without_gradient", "mean_loss", "multiplier_measured")
    joined = {name: value for name, value in first.items() if name not in left_out}
    summed = ["num_samples", "num_batches", "seconds", "num_zero_elements"]
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
