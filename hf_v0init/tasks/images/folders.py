"""Labelled images of a local folder (one subfolder per class) or of a loaded data set: rows of `image`, not decoded, and `label`.

The folder is listed here and not by the `imagefolder` loader of `datasets`, which takes split names out of paths (a class called
"test") and drops the labels of folders of unequal depth in silence.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import datasets
import numpy as np

from hf_v0init import InputError

from ..data import DatasetArguments
from ..script_support import flag
from .format import IMAGE_MODES

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABEL_COLUMNS = ("label", "labels")
FIXED_CHOICE_SEED = 0  # of the samples that a limit or a split leaves: the same in runs of any seed


@dataclass
class ImageDataArguments(DatasetArguments):
    """data: what it is trained and measured on"""

    local_flags: ClassVar[tuple[str, ...]] = ("train_dir",)

    train_dir: str | None = flag(
        None, "Local training images: a folder with one subfolder per class; of dcgan also a folder of images."
    )
    image_column: str | None = flag(None, "Column with images. Default: found by itself.")
    label_column: str | None = flag(None, "Column with classes. Default: found by itself.")
    image_size: int | None = flag(
        None,
        "Height and width in pixels to which images are resized, after what is too long on one side is cut off evenly (of dcgan "
        "8, 16, 32, 64 or 128). Default: a pretrained model's; else as they are, if all have one size.",
    )
    image_mode: str | None = flag(
        None,
        "Colour mode to which images are converted, RGB or L (grayscale). Default: a pretrained model's; else as they are, if "
        "all have one.",
        choices=list(IMAGE_MODES),
    )


def load_image_folder(path, *, role: str, needs_classes: bool = True) -> datasets.Dataset:
    """List `path/CLASS/IMAGE`. Classes are the subfolders with images, in alphabetical order; hidden and other files are passed over.

    Args:
        needs_classes: if not, the images may lie directly in `path`; there is then no column "label".

    Raises:
        InputError: there are no such images.
    """
    files = _list_images(path, "*/*")
    names = sorted({file.parent.name for file in files})
    if not files and not needs_classes:
        files = _list_images(path, "*")
    if not files:
        what = "has no images" if Path(path).is_dir() else "no such folder"
        raise InputError(
            f"--{role}_dir={path}: {what}; give a folder with one subfolder per class, with images in it ({', '.join(IMAGE_SUFFIXES)})"
        )
    columns, features = {"image": list(map(str, files))}, {"image": datasets.Image(decode=False)}
    if names:
        columns["label"] = [names.index(file.parent.name) for file in files]
        features["label"] = datasets.ClassLabel(names=names)
    return datasets.Dataset.from_dict(columns, datasets.Features(features))


def _list_images(path, pattern: str) -> list[Path]:
    return sorted(
        file
        for file in Path(path).glob(pattern)
        if file.suffix.lower() in IMAGE_SUFFIXES and not any(part.startswith(".") for part in file.parts[-2:])
    )


def select_images(
    rows: datasets.Dataset, *, role: str, image_column: str | None = None, label_column: str | None = None
) -> datasets.Dataset:
    """Take images and labels out of a loaded data set.

    Args:
        image_column: default, the only column of images.
        label_column: default, the only column of class labels, else "label" or "labels", else none. Without class names, the
            values that occur are the classes.

    Raises:
        InputError: no or several such columns, no rows, a sample without a label.
    """
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    classes = classes or [name for name in LABEL_COLUMNS if name in rows.features][:1]
    columns = {}
    for name, given, found, usable in (
        ("image", image_column, images, images),
        ("label", label_column, classes, list(rows.features)),
    ):
        candidates = found if given is None else [column for column in usable if column == given]
        if len(candidates) > 1 or (not candidates and (given is not None or name == "image")):
            raise InputError(
                f"--{name}_column={given}: of the {role} data's columns {', '.join(rows.features)} give the one of {name}s"
            )
        columns |= {candidate: name for candidate in candidates}
    if len(rows) == 0:
        raise InputError(f"the {role} data has no rows; give a split with at least one image per class")
    rows = rows.select_columns(list(columns)).rename_columns({old: new for old, new in columns.items() if old != new})
    if "label" in rows.features:
        values = np.array(rows["label"][:])
        if not isinstance(rows.features["label"], datasets.ClassLabel):
            names, numbers = np.unique(values, return_inverse=True)
            feature = datasets.ClassLabel(names=[str(name) for name in names])
            rows = rows.remove_columns("label").add_column("label", numbers, feature=feature)
        elif values.min() < 0:
            raise InputError(
                f"the {role} data has images without a label (-1); give a split whose labels are published"
            )
    return rows.cast_column("image", datasets.Image(decode=False))


def choose_some(rows: datasets.Dataset, limit: int | None) -> datasets.Dataset:
    """Choose `limit` of the images at random, the same ones in every run; all, if there are no more or it is None."""
    if limit is None or limit >= len(rows):
        return rows
    return rows.select(np.sort(np.random.default_rng(FIXED_CHOICE_SEED).permutation(len(rows))[:limit]))


def split_off_validation(train: datasets.Dataset, percentage: float) -> tuple[datasets.Dataset, datasets.Dataset]:
    """Split a share of each class off the training images, at random but the same ones in every run.

    Returns:
        What remains for training, and the validation images.

    Raises:
        InputError: too few images for that.
    """
    try:
        split = train.train_test_split(percentage / 100, stratify_by_column="label", seed=FIXED_CHOICE_SEED)
    except ValueError as error:
        raise InputError(
            f"--validation_split_percentage={percentage}: {error}; change it, or give --validation_dir"
        ) from error
    return split["train"], split["test"]


def number_labels(rows: datasets.Dataset, class_names: list[str], role: str) -> np.ndarray:
    """Return each image's class as its position in `class_names`, int64.

    Raises:
        InputError: a class of the images is not among them.
    """
    names = rows.features["label"].names
    unknown = [name for name in names if name not in class_names]
    if unknown:
        raise InputError(
            f"class {unknown[0]!r} of the {role} data is none that the model knows ({', '.join(class_names[:5])}, ...); give data of "
            "the same classes as in training"
        )
    return np.array([class_names.index(name) for name in names], dtype=np.int64)[rows["label"][:]]
