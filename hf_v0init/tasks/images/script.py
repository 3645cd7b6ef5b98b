"""Trains, evaluates and uses an image classifier, with a v0 for Adam if asked.

    python scripts/run_image_classification.py FILE.yaml --v0_init data_driven --output_dir out
    torchrun --nproc_per_node 2 scripts/run_image_classification.py FILE.yaml --output_dir out

FILE.yaml or FILE.json holds flags; flags on the command line override it; --help lists them all.

Images come from the Hub, or from folders with one subfolder per class. Losses and accuracies are exact: each image of the
set counts once.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForImageClassification, set_seed
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES
from transformers.utils import logging

from hf_v0init import V0InitTrainer, V0InitTrainingArguments

from ...errors import InputError
from ...state_guard import preserve_model, preserve_rng
from ..probing import ProbeArguments, probe_and_print, turn_into_probe
from ..run_identity import describe_run, require_same_model
from ..script_stages import (
    DatasetArguments,
    HubArguments,
    describe_for_card,
    find_needed_roles,
    flag,
    load_config,
    publish_card,
    require_buildable,
    require_positive_counts,
    require_possible_run,
    require_sole_model_source,
    train_and_save,
)
from ..script_support import explain_hub_errors, parse_arguments, run_script, start_logging
from ..script_trainer import ScriptTrainerMixin
from ..step_decay import StepDecayArguments, StepDecayMixin
from ..token_loss import TokenCrossEntropy
from ..value_checks import require_available_metric
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
from .format import (
    IMAGE_MODES,
    ImageFormat,
    build_processor,
    choose_format,
    load_format,
    measure_mean_and_std,
)
from .samples import ImageDrawsMixin, ImageSamples, stack_samples
from .top_k_accuracy import ExactAccuracyMixin

logger = logging.get_logger("run_image_classification")

MODEL_TYPES = [*MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES, CifarResNetConfig.model_type]
METRICS = ("loss", "accuracy", "top5_accuracy", "num_images")
EXAMPLES = """
# a ResNet for small images, on folders with one subfolder a class, with its data-driven v0
run_image_classification.py --model_type cifar_resnet --train_dir data/train --do_train --v0_init data_driven \\
  --output_dir out
# flags from a file, a Vision Transformer from scratch
run_image_classification.py FILE.yaml --model_type vit --config_overrides hidden_size=192,num_attention_heads=3
# fine-tune a pretrained model, a tenth of the training images for validation
run_image_classification.py FILE.yaml --model_name_or_path microsoft/resnet-18 --validation_split_percentage 10
# two processes
torchrun --nproc_per_node 2 run_image_classification.py FILE.yaml --output_dir out
"""
BATCH_NORMS = nn.modules.batchnorm._BatchNorm


@dataclass
class ModelArguments(HubArguments):
    """The classifier."""

    model_name_or_path: str | None = flag(
        None, "Pretrained model, by Hub name or folder. Without it a model is trained from scratch."
    )
    config_name: str | None = flag(None, "From scratch: a configuration, by Hub name, folder or JSON file.")
    model_type: str | None = flag(
        None,
        "From scratch: a transformers model type with its default configuration, such as resnet or vit, or cifar_resnet (a "
        "ResNet with a 3x3 stem of stride 1 and no pooling, for small images).",
    )
    config_overrides: str | None = flag(
        None, "From scratch: changes to the configuration, for example layer_type=basic,embedding_size=16."
    )

    def __post_init__(self):
        require_sole_model_source(self)
        if not (self.model_name_or_path or self.config_name or self.model_type):
            raise InputError(
                "no model: give --model_name_or_path (pretrained), or --config_name or --model_type (from scratch)"
            )
        if self.model_name_or_path and self.config_overrides:
            raise InputError(
                f"--config_overrides={self.config_overrides}: is for training from scratch; drop it, or "
                f"--model_name_or_path={self.model_name_or_path}"
            )
        if self.model_type is not None and self.model_type not in MODEL_TYPES:
            (closest,) = difflib.get_close_matches(self.model_type, MODEL_TYPES, n=1, cutoff=0)
            raise InputError(f"--model_type={self.model_type}: is no image classifier; for example {closest}")


@dataclass
class DataArguments(DatasetArguments):
    """The images and their classes."""

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
    crop_padding: int = flag(4, "With --random_crop pad: black pixels on each side. Default: 4.")
    random_flip: bool = flag(False, "Mirror half of the training images left to right. Default: False.")
    max_train_samples: int | None = flag(None, "Use only so many training samples, the same random ones in every run.")
    max_eval_samples: int | None = flag(None, "The same for validation.")
    max_predict_samples: int | None = flag(None, "The same for test.")
    overwrite_output_dir: bool = flag(False, "Start afresh in an output folder that has checkpoints or files.")

    def __post_init__(self):
        require_positive_counts(self)
        folders = [name for name in ("train_dir", "validation_dir", "test_dir") if getattr(self, name)]
        if self.dataset_name and folders:
            raise InputError(f"--dataset_name and --{folders[0]}: give one source of data, not both")
        if not self.dataset_name and not folders:
            raise InputError("no data: give --dataset_name, or --train_dir and --validation_dir")
        percentage = self.validation_split_percentage
        if percentage is not None and not 0 < percentage < 100:
            raise InputError(f"--validation_split_percentage={percentage}: must lie between 0 and 100")
        if percentage is not None and self.validation_dir:
            raise InputError("--validation_split_percentage and --validation_dir: give one of them")
        if self.crop_fraction is not None and not 0 < self.crop_fraction <= 1:
            raise InputError(f"--crop_fraction={self.crop_fraction}: must be above 0 and at most 1")


class ImageTrainer(ScriptTrainerMixin, ExactAccuracyMixin, StepDecayMixin, ImageDrawsMixin, V0InitTrainer):
    """With exact evaluation, steps of the learning rate and reproducible augmentation."""


# ------------------------------------------------------------------------------------------------------ data


def load_images(data: DataArguments, model: ModelArguments, training) -> dict[str, LabelledImages]:
    """The labelled images of each role that the run needs, not decoded."""
    roles = find_needed_roles(training)
    splits = data.load_dataset(model) if data.dataset_name else {}
    images = {}
    for role in roles:
        folder = getattr(data, f"{role}_dir")
        if role in splits:
            images[role] = select_images(
                splits[role], role=role, image_column=data.image_column, label_column=data.label_column
            )
        elif folder is not None:
            images[role] = load_image_folder(folder, role=role)
    if "validation" in roles and data.validation_split_percentage is not None:
        if "validation" in images:
            raise InputError(
                f"--validation_split_percentage={data.validation_split_percentage}: {data.dataset_name} has validation data"
            )
        if "train" in images:
            images["train"], images["validation"] = split_off_validation(
                images["train"], data.validation_split_percentage
            )
    for role in roles:
        if role not in images:
            instead = ", or --validation_split_percentage" if role == "validation" and training.do_train else ""
            has = f" (it has {', '.join(splits)})" if splits else ""
            raise InputError(
                f"there is no {role} data; give --{role}_dir, or a --dataset_name that has this split{has}{instead}"
            )
    limits = {"train": data.max_train_samples, "validation": data.max_eval_samples, "test": data.max_predict_samples}
    return {role: choose_some(images[role], limits[role]) for role in roles}


def choose_image_format(images, data: DataArguments, model: ModelArguments, config) -> ImageFormat:
    """The pretrained model's format, or one found from the images, changed as the flags ask."""
    of_model = None
    if model.model_name_or_path is not None:
        of_model = load_format(model.model_name_or_path, getattr(config, "num_channels", 3), **model.get_hub_options())
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
    logger.info(f"Images: {width}x{height}, {image_format.mode}, mean {image_format.mean}, std {image_format.std}")
    return image_format


# ----------------------------------------------------------------------------------------------------- model


def choose_classes(images: dict[str, LabelledImages], config, model: ModelArguments, do_train: bool):
    """Number the classes of all roles as the model does, if it knows them, else alphabetically; tell the configuration."""
    names = require_usable_classes(images)
    known = [config.id2label[number] for number in range(config.num_labels)] if model.model_name_or_path else []
    if known and (not do_train or sorted(known) == sorted(names)):
        names = known
    else:
        config.id2label = dict(enumerate(names))
        config.label2id = {name: number for number, name in enumerate(names)}
    return {role: number_classes(part, names) for role, part in images.items()}


def load_model(model: ModelArguments, config, image_format: ImageFormat):
    """The pretrained model named, with a new head if its classes are others, or one from scratch that fits the images."""
    try:
        if model.model_name_or_path is not None:
            return AutoModelForImageClassification.from_pretrained(
                model.model_name_or_path, config=config, ignore_mismatched_sizes=True, **model.get_hub_options()
            )
        if hasattr(config, "num_channels"):
            config.num_channels = image_format.num_channels
        if hasattr(config, "image_size"):
            height, width = image_format.size
            config.image_size = height if height == width else [height, width]
        config.name_or_path = ""  # it is a new model
        network = AutoModelForImageClassification.from_config(config, trust_remote_code=model.trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        raise InputError(f"the model cannot be made: {error}") from error
    logger.info(f"From scratch: {type(network).__name__}, {network.num_parameters():,} parameters")
    return network


def require_trainable(network, samples: ImageSamples, training) -> None:
    """Refuses training images that are too few, that the model cannot take, or that leave a batch it cannot take."""
    batch_size = training.per_device_train_batch_size
    if len(samples) < batch_size * training.world_size:
        raise InputError(
            f"{len(samples)} training images are too few for a batch of {batch_size} on each of {training.world_size} "
            "process(es); lower --per_device_train_batch_size, or give more images"
        )
    reason = find_defect(network, samples, 2)
    if reason is not None:
        shape = "x".join(map(str, samples[0]["pixel_values"].shape))
        raise InputError(f"the model cannot take images of {shape} (channels, height, width): {reason}")
    reason = find_defect(network, samples, 1)
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


def find_defect(network, samples: ImageSamples, batch_size: int) -> str | None:
    """What the model says to a batch of this size, in training; None if it takes it. Everything is as before."""
    batch = stack_samples([samples[position] for position in range(batch_size)])
    with preserve_rng(), preserve_model(network), torch.no_grad():
        network.train()
        try:
            network(pixel_values=batch["pixel_values"].to(network.device, network.dtype))
        except (ValueError, RuntimeError, TypeError) as error:
            return str(error) or type(error).__name__
    return None


# ------------------------------------------------------------------------------------------------------ main


def save_results(trainer: ImageTrainer, role: str, metrics: dict) -> None:
    """Prints one stage's metrics, and writes them to its JSON file and to all_results.json."""
    trainer.log_metrics(role, metrics)
    trainer.save_metrics(role, metrics)
    if f"{role}_accuracy" in metrics and trainer.is_world_process_zero():
        top5 = f", top-5 {metrics[f'{role}_top5_accuracy']:.2%}" if f"{role}_top5_accuracy" in metrics else ""
        print(f"{role}: accuracy {metrics[f'{role}_accuracy']:.2%}{top5} over {metrics[f'{role}_num_images']:,} images")


def list_local_data(data: DataArguments) -> list[Path]:
    """The folder to name in the model card; one called by its role says nothing."""
    folders = [Path(folder) for folder in (data.train_dir, data.validation_dir, data.test_dir) if folder][:1]
    return [
        folder.absolute().parent if folder.name in ("train", "validation", "test") else folder for folder in folders
    ]


ARGUMENTS = (ModelArguments, DataArguments, StepDecayArguments, ProbeArguments, V0InitTrainingArguments)


def main(argv: list[str]) -> None:
    """Do what the flags in `argv` say."""
    model_args, data_args, decay_args, probe_args, training_args = parse_arguments(ARGUMENTS, argv, EXAMPLES)
    if probe_args.probe_only:
        turn_into_probe(training_args)
    start_logging(training_args)
    require_available_metric(training_args, METRICS)
    run = describe_run(training_args, model_args, data_args)
    overwrite = data_args.overwrite_output_dir
    checkpoint = require_possible_run(training_args, model_args.model_name_or_path, overwrite, run)
    config = load_config(
        model_args.model_type,
        model_args.model_name_or_path or model_args.config_name,
        model_args.config_overrides,
        model_args,
    )
    if model_args.model_name_or_path is None:
        overrides = f"--config_overrides={model_args.config_overrides}" if model_args.config_overrides else None
        source = overrides or f"--model_type={model_args.model_type or model_args.config_name}"
        require_buildable(config, AutoModelForImageClassification, source)
    require_same_model(checkpoint, config)
    set_seed(training_args.seed)

    images = load_images(data_args, model_args, training_args)
    images = choose_classes(images, config, model_args, training_args.do_train)
    image_format = choose_image_format(images, data_args, model_args, config)
    augmentation = Augmentation(data_args.random_crop, data_args.crop_padding, data_args.random_flip)
    seed = training_args.seed if training_args.data_seed is None else training_args.data_seed
    samples = {
        role: ImageSamples(part, image_format, augmentation if role == "train" else None, seed)
        for role, part in images.items()
    }
    network = load_model(model_args, config, image_format)
    if training_args.do_train:
        require_trainable(network, samples["train"], training_args)

    with explain_hub_errors(training_args):
        trainer = ImageTrainer(
            model=network,
            args=training_args,
            train_dataset=samples.get("train"),
            eval_dataset=samples.get("validation"),
            processing_class=build_processor(image_format),
            data_collator=stack_samples,
            # transformers' classifiers divide by a batch's images also where the Trainer expects the whole step's
            compute_loss_func=TokenCrossEntropy(training_args.label_smoothing_factor),
            step_decay=decay_args,
            run_identity=run,
        )
    if probe_args.probe_only:
        probe_and_print(trainer, probe_args)
        return
    if training_args.do_train:
        metrics = train_and_save(trainer, checkpoint, overwrite)
        save_results(trainer, "train", metrics)
        trainer.save_state()
    if training_args.do_eval:
        save_results(trainer, "eval", trainer.evaluate(metric_key_prefix="eval"))
    if training_args.do_predict:
        save_results(trainer, "predict", trainer.predict(samples["test"], metric_key_prefix="predict").metrics)
    card = describe_for_card(
        "image-classification", model_args.model_name_or_path, data_args, list_local_data(data_args)
    )
    publish_card(trainer, card)


if __name__ == "__main__":
    run_script(main)
