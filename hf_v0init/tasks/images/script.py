"""Trains, evaluates and uses an image classifier, with a v0 for Adam if asked.

Images come from the Hub, or from folders with one subfolder per class. Losses and accuracies are exact: each image of the
set counts once.
"""

import functools
import logging
from dataclasses import dataclass
from typing import Any, ClassVar

import datasets
import torch
from torch.nn import functional
from transformers import AutoModelForImageClassification, PreTrainedConfig

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..data import SplitDataArguments
from ..models import ModelArguments as AnyModelArguments
from ..run import RunArguments, Task, run
from ..script_support import flag, run_script
from ..script_trainer import ScriptTrainerMixin
from ..token_loss import ExactSumsMixin
from . import cifar_resnet  # noqa: F401 - known to AutoConfig by this
from .folders import (
    ImageDataArguments,
    choose_some,
    load_image_folder,
    number_labels,
    select_images,
    split_off_validation,
)
from .format import ImageFormat, choose_format, load_processor
from .samples import RANDOM_CROPS, Augmentation, ImageSamples

logger = logging.getLogger("hf_v0init")

CROP_PADDING, TOP = 4, 5
EXAMPLES = """
# a ResNet for small images, on folders with one subfolder per class, with its data-driven v0
{} --model_type cifar_resnet --train_dir data/train --do_train --v0_init data_driven --output_dir out
# flags from a file, a Vision Transformer from scratch
{} FILE.yaml --model_type vit --config_overrides hidden_size=192,num_attention_heads=3
# fine-tune a pretrained model, a tenth of the training images for validation
{} --model_name_or_path microsoft/resnet-18 --train_dir data/train --do_train --do_eval \\
  --validation_split_percentage 10 --output_dir out
# two processes
torchrun --nproc_per_node 2 -m hf_v0init.tasks.images.script FILE.yaml --output_dir out
"""


@dataclass
class ModelArguments(AnyModelArguments):
    """model: which model"""

    auto_class: ClassVar[type] = AutoModelForImageClassification
    kind: ClassVar[str] = "image classifier"

    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type with its default configuration, such as resnet or vit, or cifar_resnet (a "
        "ResNet with a 3x3 stem of stride 1 and no pooling, for small images).",
    )


@dataclass
class DataArguments(ImageDataArguments, SplitDataArguments):
    """data: what it is trained and measured on"""

    local_flags: ClassVar[tuple[str, ...]] = ("train_dir", "validation_dir", "test_dir")

    validation_dir: str | None = flag(None, "The same for validation.")
    test_dir: str | None = flag(None, "The same for test.")
    validation_split_percentage: float | None = flag(
        None,
        "Without validation data: take this percentage of each class from the training data, the same images in every run.",
    )
    crop_fraction: float = flag(
        1.0,
        "With --image_size: share of the shorter side that is kept, from the centre; 0.875 is the usual 224 of 256 for ImageNet.",
    )
    random_crop: str = flag(
        "none",
        "How training images are cut at random: 'pad' (black pixels around the image, then its own size out of that; usual "
        "for CIFAR), 'resize' (8 to 100 percent of the area at an aspect ratio of 3/4 to 4/3; usual for ImageNet), 'none'.",
        choices=list(RANDOM_CROPS),
    )
    crop_padding: int | None = flag(
        None, f"With --random_crop pad: black pixels on each side. Default: {CROP_PADDING}."
    )
    random_flip: bool = flag(False, "Mirror half of the training images left to right.")

    def load_local(self, role: str, hub) -> datasets.Dataset | None:
        """List the images of a role's folder."""
        path = getattr(self, f"{role}_dir")
        return None if path is None else load_image_folder(path, role=role)

    def select(self, rows: datasets.Dataset, role: str) -> datasets.Dataset:
        """Select images, not decoded, and their classes."""
        rows = select_images(rows, role=role, image_column=self.image_column, label_column=self.label_column)
        if "label" not in rows.features:
            raise InputError(f"the {role} data has no column of classes; give --label_column")
        return rows

    def split_off_validation(self, train: datasets.Dataset | None) -> dict[str, datasets.Dataset]:
        """Split the percentage that was asked for off the training images, class by class."""
        if train is None or self.validation_split_percentage is None:
            raise InputError(
                f"{self.describe_missing('validation')}, or with training data --validation_split_percentage"
            )
        kept, split_off = split_off_validation(train, self.validation_split_percentage)
        return {"train": kept, "validation": split_off}


def score_images(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score each image.

    Args:
        logits: shape (images, classes), any floating dtype.
        labels: shape (images,), int64.

    Returns:
        Shape (images, 3), float32: the negative log-likelihood in nats, whether the class is the most likely one, whether it
        is among the five most likely (all classes, if there are fewer).
    """
    logits = logits.float()
    nll = functional.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack((nll, hits[:, 0].float(), hits.any(dim=1).float()), dim=1)


class ExactAccuracyMixin(ExactSumsMixin):
    """Put before a Trainer of an image classifier: its evaluations report exact figures.

    `eval_loss` (nats per image, without label smoothing), `eval_accuracy` (the share of images whose class is the most likely
    one), with more than five classes `eval_top5_accuracy`, and `eval_num_images`, over the whole set and all processes.
    """

    def score(self, logits, labels, inputs) -> torch.Tensor:
        """Score each image by `score_images`, and count it."""
        self._has_top5 = logits.shape[1] > TOP
        return functional.pad(score_images(logits, labels), (0, 1), value=1.0)

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute loss, accuracies and the number of images."""
        nll, top1, top5, num_images = sums
        figures = {"loss": nll, "accuracy": top1} | ({"top5_accuracy": top5} if self._has_top5 else {})
        return {name: total / num_images for name, total in figures.items()} | {"num_images": int(num_images)}


class ImageTrainer(ScriptTrainerMixin, ExactAccuracyMixin, V0InitTrainer):
    """With exact evaluation."""


class ImageTask(Task):
    """Image classification: folders or the Hub, any classifier of transformers, accuracy."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments)
    trainer_class = ImageTrainer
    examples = EXAMPLES
    metrics = ("loss", "accuracy", "top5_accuracy", "num_images")
    card_task = "image-classification"

    def prepare(self, config: PreTrainedConfig, place: str | None) -> dict[str, Any]:
        """Load the images and the model."""
        data, training = self.data, self.training
        rows = data.load_roles(self.model, training)
        rows = {role: choose_some(part, data.get_limit(role)) for role, part in rows.items()}
        first = next(iter(rows.values()))
        names = self.choose_classes(first, config)
        self.image_format = image_format = self.choose_image_format(first, config)
        augmentation = Augmentation(data.random_crop, data.crop_padding or CROP_PADDING, data.random_flip)
        samples = {}
        for role, part in rows.items():
            varied = augmentation if role == "train" else None
            samples[role] = ImageSamples(part, number_labels(part, names, role), image_format, varied, self.data_seed)
        if self.model.model_name_or_path is None:
            if hasattr(config, "num_channels"):
                config.num_channels = image_format.num_channels
            if hasattr(config, "image_size"):
                height, width = image_format.size
                config.image_size = height if height == width else [height, width]
        self.network = self.model.build(config, ignore_mismatched_sizes=True)
        return samples

    def choose_classes(self, rows: datasets.Dataset, config: PreTrainedConfig) -> list[str]:
        """Choose the classes by number: as the model has them, if it knows them, else those of the first images; tell the configuration."""
        names = rows.features["label"].names
        if self.model.model_name_or_path is not None:
            known = [config.id2label[number] for number in range(config.num_labels)]
            if not self.training.do_train or sorted(known) == sorted(names):
                return known
        if len(names) < 2:
            raise InputError(f"the images have one class only ({', '.join(names)}); give two or more")
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
        return names

    def choose_image_format(self, rows: datasets.Dataset, config: PreTrainedConfig) -> ImageFormat:
        """Choose the pretrained model's format, or one found from the images, changed as the flags ask."""
        data, model, options = self.data, self.model, {}
        if model.model_name_or_path is not None:
            processor = load_processor(model.model_name_or_path, **model.get_hub_options())
            options = {"pretrained": processor, "num_channels": getattr(config, "num_channels", 3)}
        asked = {"image_size": data.image_size, "image_mode": data.image_mode, "crop_fraction": data.crop_fraction}
        image_format = choose_format(rows, **asked, **options)
        height, width = image_format.size
        mean, std = image_format.processor.image_mean, image_format.processor.image_std
        logger.info(f"images: {width}x{height}, {image_format.mode}, mean {mean}, std {std}")
        return image_format

    def choose_trainer_options(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Choose the processor."""
        return {"processing_class": self.image_format.processor}


ARGUMENTS = ImageTask.arguments
main = functools.partial(run, ImageTask)


if __name__ == "__main__":
    run_script(main)
