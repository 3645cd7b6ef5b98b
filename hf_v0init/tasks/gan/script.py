"""Trains a DCGAN on images, with a v0 for both optimizers if asked, and measures what it generates.

    hf-v0init dcgan FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 -m hf_v0init.tasks.gan.script FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all. Of the Trainer's flags those
that a GAN has no use for are refused.

--do_eval measures at the end, --eval_strategy on the way: `eval_loss` is the Frechet distance between generated images and
the training images. Only in the features of Inception v3 is it called FID.
"""

import json
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch
from transformers import set_seed

from hf_v0init import InputError, V0InitArguments, V0InitTrainingArguments

from ..data import DatasetArguments
from ..images.folders import NO_CLASSES, LabelledImages, choose_some, load_image_folder, select_images
from ..images.format import IMAGE_MODES, choose_format
from ..images.tensors import read_pixels
from ..models import HubArguments
from ..output_folder import find_place_to_start, remove_what_is_stale
from ..run_identity import describe_run
from ..script_support import exit_with_line, flag, parse_arguments, run_script, say, start_logging
from .dcgan import Discriminator, Generator, count_doublings
from .image_quality import ImageQuality, InceptionFeatures, train_classifier
from .training import DivergedError, GanRun

logger = logging.getLogger("hf_v0init")

EXAMPLES = """
# a DCGAN on a folder of images, with a random v0 for both optimizers
{} --train_dir data/train --image_size 64 --do_train --v0_init random --output_dir out
# flags from a file, the distance to the training images measured every 1,000 steps
{} FILE.yaml --do_eval --eval_strategy steps --eval_steps 1000
# measure the generator of a finished run
{} FILE.yaml --do_train False --do_eval --output_dir out
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.gan.script FILE.yaml --output_dir out
"""
EXIT_DIVERGED = 1
SMALLEST_EVAL = 2  # images that have a covariance
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
class DataArguments(DatasetArguments, HubArguments):
    """data: what it is trained on"""

    local_flags: ClassVar[tuple[str, ...]] = ("train_dir",)

    train_dir: str | None = flag(None, "Local images: a folder of images, or of one subfolder per class.")
    dataset_split: str = flag("train", "Split of --dataset_name.")
    image_column: str | None = flag(None, "Column with images. Default: found by itself.")
    label_column: str | None = flag(
        None, "Column with classes, for --feature_extractor classifier. Default: found by itself."
    )
    image_size: int | None = flag(
        None,
        "Height and width to which images are resized, after what is too long on one side is cut off evenly: 8, 16, 32, 64 or "
        "128. Default: as they are, if all have one size.",
    )
    image_mode: str | None = flag(
        None,
        "Colour mode to which images are converted, RGB or L (grayscale). Default: as they are, if all have one.",
        choices=list(IMAGE_MODES),
    )
    max_train_samples: int | None = flag(
        None, "Train on so many of the images, chosen at random, the same in every run."
    )


@dataclass
class QualityArguments:
    """evaluation: how generated images are measured"""

    feature_extractor: str = flag(
        "inception",
        "Network in whose features images are measured: 'inception' (FID and Inception score; needs torch-fidelity), or "
        "'classifier', a small one trained on the images' own classes at the start, the same in every run.",
        choices=["inception", "classifier"],
    )
    inception_weights: str | None = flag(
        None, "torch-fidelity's file of Inception weights. Default: its cache, filled from the network if need be."
    )
    num_eval_images: int = flag(
        10_000, "Images generated for a measurement, and training images they are measured against."
    )
    overwrite_output_dir: bool = flag(
        False, "Start afresh in an output folder that has files; checkpoints of the earlier run are deleted."
    )

    def __post_init__(self):
        if self.num_eval_images < SMALLEST_EVAL:
            raise InputError(f"--num_eval_images={self.num_eval_images}: one image has no covariance; give 2 or more")
        if self.inception_weights is not None and self.feature_extractor != "inception":
            raise InputError(
                f"--inception_weights={self.inception_weights}: is for --feature_extractor inception; drop one of the two"
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
    """Refuse flags of the Trainer that would do nothing here, and what is measured on one network and one loss."""
    default = type(training)(output_dir=training.output_dir, use_cpu=training.use_cpu)
    for name in training.__dataclass_fields__:
        value = getattr(training, name)
        if name not in TAKEN | IGNORED and value != getattr(default, name):
            raise InputError(f"--{name}={value}: has no effect on a GAN here; drop it")
    if training.save_strategy == "best":
        raise InputError("--save_strategy=best: a GAN keeps no best model here; use steps or epoch")
    if getattr(training, "wants_length", False) or training.untuned_warmup not in (None, "linear", "exponential"):
        raise InputError(
            "how long to warm up is measured on one network and its loss, and a GAN has two: give --v0_decay_steps or --warmup_steps "
            "as a number, or --v0_decay beta2"
        )
    if not (training.do_train or training.do_eval):
        raise InputError("nothing to do: give --do_train or --do_eval")
    if not training.do_train and not Path(training.output_dir, "generator", "config.json").is_file():
        raise InputError(
            f"--do_eval without --do_train measures the generator in --output_dir, and {training.output_dir} has none; give "
            "--do_train, or the output folder of a finished run"
        )


def load_images(data: DataArguments) -> LabelledImages:
    """Load the images to learn from."""
    if data.train_dir is not None:
        images = load_image_folder(data.train_dir, role="train", needs_classes=False)
    else:
        splits = data.load_dataset(data)
        if data.dataset_split not in splits:
            raise InputError(f"--dataset_split={data.dataset_split}: {data.dataset_name} has only {', '.join(splits)}")
        columns = {"image_column": data.image_column, "label_column": data.label_column}
        images = select_images(splits[data.dataset_split], role="train", needs_classes=False, **columns)
    return choose_some(images, data.max_train_samples)


def name_data(data: DataArguments) -> str:
    """A word for the data, after which its classifier is called: 'digits' of data/digits/train."""
    parts = [part for part in Path(data.train_dir or data.dataset_name).parts if part not in ("train", "/", "..", ".")]
    return parts[-1] if parts else "image"


def make_quality(
    images: LabelledImages, pixels: torch.Tensor, data: DataArguments, quality: QualityArguments, device
) -> ImageQuality:
    """Make what measures generated images, if anything does."""
    if quality.feature_extractor == "inception":
        extractor = InceptionFeatures(quality.inception_weights)
    else:
        labels = torch.from_numpy(images.labels)
        if images.class_names == NO_CLASSES:
            raise InputError(
                "--feature_extractor classifier needs classes, and the images have none; put them into one subfolder per class, or "
                "use --feature_extractor inception"
            )
        extractor = train_classifier(pixels, labels, f"{name_data(data)} classifier", device)
    order = torch.randperm(len(pixels), generator=torch.Generator().manual_seed(0))
    return ImageQuality(extractor, pixels[order[: quality.num_eval_images]], device=device)


def load_generator(folder: Path, sizes: dict) -> Generator:
    """Load a generator that was trained before."""
    try:
        generator = Generator.from_pretrained(folder)
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise InputError(f"{folder}: cannot be loaded as a generator ({error})") from error
    for name, size in sizes.items():
        if getattr(generator, name) != size:
            raise InputError(
                f"{folder} makes images of {name} {getattr(generator, name)}, and those to measure against have {size}; give "
                "--image_size and --image_mode, or the images it was trained on"
            )
    return generator


def save_results(run: GanRun, role: str, metrics: dict) -> None:
    """Print one stage's metrics, and write them to its JSON file and to all_results.json."""
    if not run.accelerator.is_main_process:
        return
    folder = Path(run.training.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    combined = folder / "all_results.json"
    earlier = json.loads(combined.read_text(encoding="utf-8")) if combined.is_file() else {}
    for path, content in ((folder / f"{role}_results.json", metrics), (combined, earlier | metrics)):
        path.write_text(json.dumps(content, indent=4, sort_keys=True) + "\n", encoding="utf-8")
    if role == "eval":
        words = [f"{words} {metrics[f'eval_{name}']:.4g}" for name, words in run.quality.names.items()]
        say(f"eval: {', '.join(words)}, of {metrics.get('eval_samples', 0):,} generated images")
    else:
        say(f"train: {run.state.global_step:,} steps, {metrics['train_runtime']:.1f} s of them in this call")


def train_and_measure(argv: list[str]) -> None:
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

    images = load_images(data_args)
    image_format = choose_format({"train": images}, image_size=data_args.image_size, image_mode=data_args.image_mode)
    if image_format.height != image_format.width:
        raise InputError(
            f"the images are {image_format.width}x{image_format.height}; a DCGAN makes square ones: give --image_size"
        )
    count_doublings(image_format.height)
    pixels = read_pixels(images, image_format)
    set_seed(training.seed)
    sizes = {"image_size": image_format.height, "num_channels": image_format.num_channels}
    generator = Generator(**sizes, latent_size=model_args.latent_size, base_channels=model_args.base_channels)
    discriminator = Discriminator(**sizes, base_channels=model_args.base_channels)
    if not training.do_train:
        generator = load_generator(Path(training.output_dir, "generator"), sizes)
    counts = [sum(p.numel() for p in network.parameters()) for network in (generator, discriminator)]
    logger.info(f"DCGAN: {counts[0]:,} parameters of the generator, {counts[1]:,} of the discriminator")
    run = GanRun(generator, discriminator, pixels, training, None, quality_args.num_eval_images, identity)
    if evaluates and run.accelerator.is_main_process:
        run.quality = make_quality(images, pixels, data_args, quality_args, run.accelerator.device)

    if training.do_train:

        def clear() -> None:
            if run.accelerator.is_main_process:
                remove_what_is_stale(training.output_dir, with_checkpoints=overwrite and checkpoint is None)

        metrics = run.train(checkpoint, clear)
        run.save_networks()
        save_results(run, "train", metrics)
        run.save_state()
    if training.do_eval:
        save_results(run, "eval", run.evaluate())
    run.accelerator.end_training()


ARGUMENTS = (ModelArguments, DataArguments, QualityArguments, GanTrainingArguments)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say; a training that diverges ends with one line."""
    try:
        train_and_measure(argv)
    except DivergedError as error:
        exit_with_line(f"error: {error}", EXIT_DIVERGED)


if __name__ == "__main__":
    run_script(main)
