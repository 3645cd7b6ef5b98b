"""Trains, evaluates and uses an image classifier, with a v0 for Adam if asked.

    hf-v0init images FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 -m hf_v0init.tasks.images.script FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

Images come from the Hub, or from folders with one subfolder per class. Losses and accuracies are exact: each image of the
set counts once.
"""

import copy
import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from transformers import AutoModelForImageClassification, PreTrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES

from hf_v0init import InputError, V0InitTrainer, V0InitTrainingArguments

from ..data import SplitDataArguments, find_needed_roles
from ..models import ModelArguments as AnyModelArguments
from ..run import RunArguments, Task, run
from ..script_support import flag, run_script
from ..script_trainer import ScriptTrainerMixin
from ..token_loss import TokenCrossEntropy
from .augmentation import RANDOM_CROPS, Augmentation
from .cifar_resnet import CifarResNetConfig
from .folders import (
    LabelledImages,
    choose_some,
    load_image_folder,
    number_classes,
    require_usable_classes,
    select_images,
    split_off_validation,
)
from .format import IMAGE_MODES, ImageFormat, build_processor, choose_format, load_format, measure_mean_and_std
from .samples import ImageSamples, stack_samples
from .top_k_accuracy import ExactAccuracyMixin

logger = logging.getLogger("hf_v0init")

CROP_PADDING = 4
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
    model_types: ClassVar[tuple[str, ...]] = (
        *MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES,
        CifarResNetConfig.model_type,
    )
    kind: ClassVar[str] = "image classifier"

    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type with its default configuration, such as resnet or vit, or cifar_resnet (a "
        "ResNet with a 3x3 stem of stride 1 and no pooling, for small images).",
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example layer_type=basic,embedding_size=16."
    )


@dataclass
class DataArguments(SplitDataArguments):
    """data: what it is trained and measured on"""

    local_flags: ClassVar[tuple[str, ...]] = ("train_dir", "validation_dir", "test_dir")

    train_dir: str | None = flag(None, "Local training images: a folder with one subfolder per class.")
    validation_dir: str | None = flag(None, "The same for validation.")
    test_dir: str | None = flag(None, "The same for test.")
    image_column: str | None = flag(None, "Column with images. Default: found by itself.")
    label_column: str | None = flag(None, "Column with classes. Default: found by itself.")
    validation_split_percentage: float | None = flag(
        None,
        "Without validation data: take this percentage of each class from the training data, the same images in every run.",
    )
    image_size: int | None = flag(
        None,
        "Height and width in pixels to which images are resized, after what is too long on one side is cut off evenly. "
        "Default: the pretrained model's; from scratch as they are, if all have one size.",
    )
    image_mode: str | None = flag(
        None,
        "Colour mode to which images are converted, RGB or L (grayscale). Default: the pretrained model's; from scratch as "
        "they are, if all have one.",
        choices=list(IMAGE_MODES),
    )
    crop_fraction: float | None = flag(
        None,
        "With --image_size: share of each side that is kept, from the centre, before resizing; 0.875 is the usual 224 of "
        "256 for ImageNet. Default: the pretrained model's, else 1.",
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
    random_flip: bool = flag(False, "Mirror half of the training images left to right. Default: False.")

    def __post_init__(self) -> None:
        """Check what the flags alone rule out."""
        super().__post_init__()
        if self.validation_split_percentage is not None and self.validation_dir:
            raise InputError("--validation_split_percentage and --validation_dir: give one of them")
        if self.crop_padding is not None and self.random_crop != "pad":
            raise InputError(f"--crop_padding={self.crop_padding}: has no effect without --random_crop pad; drop it")


class ImageTrainer(ScriptTrainerMixin, ExactAccuracyMixin, V0InitTrainer):
    """With exact evaluation."""


class ImageTask(Task):
    """Image classification: folders or the Hub, any classifier of transformers, accuracy."""

    arguments = (ModelArguments, DataArguments, RunArguments, V0InitTrainingArguments)
    trainer_class = ImageTrainer
    examples = EXAMPLES
    metrics = ("loss", "accuracy", "top5_accuracy", "num_images")
    card_task = "image-classification"

    def refuse(self) -> None:
        """Refuse what is for text."""
        if self.options.max_tokens_per_batch:
            raise InputError(
                f"--max_tokens_per_batch={self.options.max_tokens_per_batch}: images have no tokens; drop it"
            )

    def prepare(self, config: PreTrainedConfig, place: str | None) -> dict[str, Any]:
        """Load the images and the model, and refuse what they do not take."""
        data, training = self.data, self.training
        images = self.number_classes(load_images(data, self.model, training), config)
        self.image_format = self.choose_image_format(images, config)
        augmentation = Augmentation(data.random_crop, data.crop_padding or CROP_PADDING, data.random_flip)
        seed = training.seed if training.data_seed is None else training.data_seed
        samples = {
            role: ImageSamples(part, self.image_format, augmentation if role == "train" else None, seed)
            for role, part in images.items()
        }
        if self.model.model_name_or_path is None:
            if hasattr(config, "num_channels"):
                config.num_channels = self.image_format.num_channels
            if hasattr(config, "image_size"):
                height, width = self.image_format.size
                config.image_size = height if height == width else [height, width]
        self.network = self.model.build(config, ignore_mismatched_sizes=True)
        if training.do_train:
            require_trainable(self.network, samples["train"], training)
        return samples

    def number_classes(self, images: dict[str, LabelledImages], config: PreTrainedConfig) -> dict[str, LabelledImages]:
        """Number the classes of all roles as the model does, if it knows them, else alphabetically; tell the configuration."""
        names = require_usable_classes(images)
        pretrained = self.model.model_name_or_path is not None
        known = [config.id2label[number] for number in range(config.num_labels)] if pretrained else []
        if known and (not self.training.do_train or sorted(known) == sorted(names)):
            names = known
        else:
            config.id2label = dict(enumerate(names))
            config.label2id = {name: number for number, name in enumerate(names)}
        return {role: number_classes(part, names) for role, part in images.items()}

    def choose_image_format(self, images: dict[str, LabelledImages], config: PreTrainedConfig) -> ImageFormat:
        """Choose the pretrained model's format, or one found from the images, changed as the flags ask."""
        data, model, of_model = self.data, self.model, None
        if model.model_name_or_path is not None:
            num_channels = getattr(config, "num_channels", 3)
            of_model = load_format(model.model_name_or_path, num_channels, **model.get_hub_options())
        image_format = choose_format(
            images,
            image_size=data.image_size,
            image_mode=data.image_mode,
            crop_fraction=data.crop_fraction,
            of_model=of_model,
        )
        if not image_format.mean:
            image_format = measure_mean_and_std(next(iter(images.values())), image_format)
        height, width = image_format.size
        logger.info(f"images: {width}x{height}, {image_format.mode}, mean {image_format.mean}, std {image_format.std}")
        return image_format

    def make_collator(self):
        """Return what joins samples to a batch."""
        return stack_samples

    def choose_trainer_options(self, samples: dict[str, Any]) -> dict[str, Any]:
        """Choose processor and loss."""
        # transformers' classifiers divide by a batch's images also where the Trainer expects the whole step's
        loss = TokenCrossEntropy(self.training.label_smoothing_factor)
        return {"processing_class": build_processor(self.image_format), "compute_loss_func": loss}

    def describe_scores(self, stage: str, metrics: dict[str, Any]) -> list[str]:
        """Say the accuracy."""
        if f"{stage}_accuracy" not in metrics:
            return []
        top5 = f", top-5 {metrics[f'{stage}_top5_accuracy']:.2%}" if f"{stage}_top5_accuracy" in metrics else ""
        return [
            f"{stage}: accuracy {metrics[f'{stage}_accuracy']:.2%}{top5} over {metrics[f'{stage}_num_images']:,} images"
        ]

    def describe_for_card(self) -> dict[str, Any]:
        """Describe the run; a folder that is called by its role says nothing."""
        card = super().describe_for_card()
        if not self.data.dataset_name:
            folder = Path(self.data.list_local()[0]).absolute()
            card["dataset"] = folder.parent.name if folder.name in ("train", "validation", "test") else folder.name
        return card


def load_images(data: DataArguments, model: ModelArguments, training) -> dict[str, LabelledImages]:
    """Load the labelled images of each role that the run needs, not decoded."""
    roles = find_needed_roles(training)
    splits = data.load_dataset(model) if data.dataset_name else {}
    images = {}
    for role in roles:
        folder = getattr(data, f"{role}_dir")
        if role in splits:
            columns = {"image_column": data.image_column, "label_column": data.label_column}
            images[role] = select_images(splits[role], role=role, **columns)
        elif folder is not None:
            images[role] = load_image_folder(folder, role=role)
    percentage = data.validation_split_percentage
    if "validation" in roles and percentage is not None:
        if "validation" in images:
            raise InputError(f"--validation_split_percentage={percentage}: {data.dataset_name} has validation data")
        if "train" in images:
            images["train"], images["validation"] = split_off_validation(images["train"], percentage)
    for role in roles:
        if role not in images:
            instead = ", or --validation_split_percentage" if role == "validation" and training.do_train else ""
            has = f" (it has {', '.join(splits)})" if splits else ""
            raise InputError(
                f"there is no {role} data; give --{role}_dir, or a --dataset_name that has this split{has}{instead}"
            )
    return {role: choose_some(images[role], data.get_limit(role)) for role in roles}


def require_trainable(network, samples: ImageSamples, training) -> None:
    """Refuse training images that are too few, that the model cannot take, or that leave a batch it cannot take."""
    batch_size = training.per_device_train_batch_size
    if len(samples) < batch_size * training.world_size:
        raise InputError(
            f"{len(samples)} training images are too few for a batch of {batch_size} on each of {training.world_size} "
            "process(es); lower --per_device_train_batch_size, or give more images"
        )
    reason = find_refusal(network, samples, 2)
    if reason is not None:
        shape = "x".join(map(str, samples[0]["pixel_values"].shape))
        raise InputError(f"the model cannot take images of {shape} (channels, height, width): {reason}")
    reason = find_refusal(network, samples, 1)
    if reason is None:
        return
    if batch_size == 1 or (len(samples) % batch_size == 1 and not training.dataloader_drop_last):
        raise InputError(
            f"--per_device_train_batch_size={batch_size}: leaves a batch of one of the {len(samples)} training images, which "
            f"the model cannot take ({reason}); change it, or give --dataloader_drop_last"
        )
    if training.v0_estimator == "per_sample" and training.v0_stats_batch_size == 1:
        raise InputError(
            f"--v0_stats_batch_size=1: the model cannot take a batch of one image ({reason}); leave it out, or use "
            "--v0_estimator minibatch"
        )


def find_refusal(network, samples: ImageSamples, batch_size: int) -> str | None:
    """Find out how the model refuses a batch of this size in training; None if it accepts it. Everything is as before."""
    batch = stack_samples([samples[position] for position in range(batch_size)])
    with torch.random.fork_rng(), torch.no_grad():
        copied = copy.deepcopy(network).train()  # batch norms would keep what they see
        try:
            copied(pixel_values=batch["pixel_values"].to(network.device, network.dtype))
        except (ValueError, RuntimeError, TypeError) as error:
            return str(error) or type(error).__name__
    return None


ARGUMENTS = ImageTask.arguments


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    run(ImageTask, argv)


if __name__ == "__main__":
    run_script(main)
