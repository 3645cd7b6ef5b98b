"""Trains a DCGAN on images, with a v0 for both optimizers if asked, and measures what it generates.

--do_eval measures at the end, --eval_strategy on the way: `eval_loss` is the Frechet distance between generated images and
the training images. Only in the features of Inception v3 is it called FID.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import torch
from transformers import set_seed

from hf_v0init import InputError, V0InitArguments, V0InitTrainingArguments

from ..images.folders import ImageDataArguments, choose_some, load_image_folder, select_images
from ..images.format import choose_format, read_pixels
from ..output_folder import describe_run, find_place_to_start, remove_what_is_stale
from ..script_support import flag, parse_arguments, run_script, start_logging
from ..summary import print_summary
from .dcgan import Discriminator, Generator, count_doublings
from .image_quality import ImageQuality, InceptionFeatures, train_classifier
from .training import GanRun

logger = logging.getLogger("hf_v0init")

EXAMPLES = """
# a DCGAN on a folder of images, with a random v0 for both optimizers
{} --train_dir data/train --image_size 64 --do_train --v0_init random --output_dir out
# flags from a file, the distance to the training images measured every 1,000 steps
{} FILE.yaml --do_eval --eval_strategy steps --eval_steps 1000
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.gan.script FILE.yaml --output_dir out
"""
SPLIT = "train"  # of a data set by name
# What of the Trainer's flags has a meaning here; V0InitArguments' all do.
TAKEN = {
    "output_dir", "do_train", "do_eval", "resume_from_checkpoint", "seed", "use_cpu", "bf16", "tf32", "ddp_backend", "ddp_timeout",
    "per_device_train_batch_size", "max_steps", "num_train_epochs", "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs",
    "warmup_steps", "optim", "optim_args", "weight_decay", "adam_beta1", "adam_beta2", "adam_epsilon", "max_grad_norm",
    "logging_strategy", "logging_steps", "logging_first_step", "logging_nan_inf_filter", "log_level", "log_level_replica",
    "log_on_each_node", "disable_tqdm", "eval_strategy", "eval_steps", "eval_delay", "eval_on_start", "save_strategy", "save_steps",
    "save_total_limit", "local_rank",
} | set(V0InitArguments.__dataclass_fields__)  # fmt: skip
IGNORED = {"report_to", "dataloader_pin_memory"}  # harmless: configurations give them for all scripts


@dataclass
class ModelArguments:
    """model: the two networks"""

    latent_size: int = flag(100, "Elements of the generator's noise.")
    base_channels: int = flag(64, "Channels of both networks at half the image's size; they double with each halving.")


@dataclass
class DataArguments(ImageDataArguments):
    """data: what it is trained on"""

    cache_dir: str | None = flag(None, "Folder for what comes from the Hub.")
    max_train_samples: int | None = flag(
        None, "Train on so many of the images, chosen at random, the same in every run."
    )


@dataclass
class QualityArguments:
    """evaluation: how generated images are measured"""

    feature_extractor: str = flag(
        "inception",
        "Network in whose features images are measured: 'inception' (FID; needs torch-fidelity), or "
        "'classifier', a small one trained on the images' own classes at the start, the same in every run.",
        choices=["inception", "classifier"],
    )
    inception_weights: str | None = flag(
        None,
        "With inception: torch-fidelity's file of its weights. Default: its cache, filled from the network if need be.",
    )
    num_eval_images: int = flag(
        10_000, "Images generated for a measurement, and training images they are measured against."
    )
    overwrite_output_dir: bool = flag(
        False, "Start afresh in an output folder that has files; checkpoints of the earlier run are deleted."
    )


@dataclass
class GanTrainingArguments(V0InitTrainingArguments):
    """The Trainer's flags, with DCGAN's settings as defaults."""

    taken_flags: ClassVar[set[str]] = TAKEN
    _v0_is_taken = True

    per_device_train_batch_size: int = flag(64, "Real images, and generated ones, of a step and process.")
    learning_rate: float = flag(2e-4, "Initial learning rate of both optimizers.")
    adam_beta1: float = flag(0.5, "beta1 of Adam-like optimizers.")
    lr_scheduler_type: str = flag(
        "constant_with_warmup", "Schedule of the learning rate; constant without --warmup_steps."
    )
    max_grad_norm: float = flag(0.0, "Clip the norm of each network's gradient to this; 0 clips nothing.")


def require_possible(training: GanTrainingArguments) -> None:
    """Refuse flags of the Trainer that would do nothing here, and a warmup that is measured on one network and one loss."""
    default = type(training)(output_dir=training.output_dir, use_cpu=training.use_cpu)
    for name in training.__dataclass_fields__:
        value = getattr(training, name)
        if name not in TAKEN | IGNORED and value != getattr(default, name):
            raise InputError(f"--{name}={value}: has no effect on a GAN here; drop it")
    if training.save_strategy == "best":
        raise InputError("--save_strategy=best: a GAN keeps no best model here; use steps or epoch")
    if training.untuned_warmup not in (None, "linear", "exponential"):
        raise InputError(
            f"--untuned_warmup={training.untuned_warmup}: it is measured on one network and its loss, and a GAN has two: give "
            "--warmup_steps as a number"
        )
    if not training.do_train:
        raise InputError("nothing to do: give --do_train; with --do_eval a finished run is measured that has not been")


def load_images(data: DataArguments) -> datasets.Dataset:
    """Load the images to learn from, not decoded."""
    if data.train_dir is not None:
        rows = load_image_folder(data.train_dir, role="train", needs_classes=False)
    else:
        columns = {"image_column": data.image_column, "label_column": data.label_column}
        rows = select_images(data.load_dataset(data)[SPLIT], role="train", **columns)
    return choose_some(rows, data.max_train_samples)


def make_quality(rows: datasets.Dataset, pixels: torch.Tensor, quality: QualityArguments, device) -> ImageQuality:
    """Make what measures generated images."""
    if quality.feature_extractor == "inception":
        extractor = InceptionFeatures(quality.inception_weights).to(device)
    else:
        labels = torch.tensor(rows["label"][:] if "label" in rows.features else [0] * len(rows))
        extractor = train_classifier(pixels, labels, device)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return ImageQuality(extractor, pixels[order[: quality.num_eval_images]], device=device)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    model_args, data_args, quality_args, training = parse_arguments(ARGUMENTS, argv, EXAMPLES)
    start_logging(training)
    require_possible(training)
    identity = describe_run(training, model_args, data_args, quality_args)
    overwrite = quality_args.overwrite_output_dir
    checkpoint = find_place_to_start(training, overwrite, identity)
    # In a comparison a run is judged by its figures at the start and at the end.
    training.eval_on_start = training.eval_on_start or (training.v0_record_run and training.do_eval)
    evaluates = training.do_eval or training.eval_strategy != "no" or training.eval_on_start

    rows = load_images(data_args)
    image_format = choose_format(rows, image_size=data_args.image_size, image_mode=data_args.image_mode)
    height, width = image_format.size
    if height != width:
        raise InputError(f"the images are {width}x{height}; a DCGAN makes square ones: give --image_size")
    count_doublings(height)
    pixels = read_pixels(rows, image_format)
    set_seed(training.seed)
    sizes = {"image_size": height, "num_channels": image_format.num_channels}
    generator = Generator(**sizes, latent_size=model_args.latent_size, base_channels=model_args.base_channels)
    discriminator = Discriminator(**sizes, base_channels=model_args.base_channels)
    is_trained = checkpoint is not None and Path(checkpoint) == Path(training.output_dir)
    run = GanRun(generator, discriminator, pixels, training, quality_args.num_eval_images, identity)
    if evaluates and run.is_world_process_zero():
        run.quality = make_quality(rows, pixels, quality_args, run.accelerator.device)

    def clear() -> None:
        if run.is_world_process_zero():
            remove_what_is_stale(training.output_dir, with_checkpoints=overwrite and checkpoint is None)

    if is_trained:
        run.load_trained()
    else:
        metrics = run.train(checkpoint, clear)
        run.save()
        run.save_metrics("train", metrics)
    if training.do_eval:
        run.save_metrics("eval", run.evaluate())
    if run.is_world_process_zero():
        print_summary(run)
    run.accelerator.end_training()


ARGUMENTS = (ModelArguments, DataArguments, QualityArguments, GanTrainingArguments)


if __name__ == "__main__":
    run_script(main)
