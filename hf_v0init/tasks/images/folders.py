"""Labelled images of a local folder (one subfolder per class) or of a loaded data set, in one form.

Nothing is decoded here. The folder is listed by the rules below and not by the `imagefolder` loader of `datasets`, which
takes split names out of paths (a class called "test"), drops the labels of folders of unequal depth in silence, and gives
every split its own numbering of the classes.
"""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np

from ...errors import InputError

IMAGE_SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
LABEL_COLUMNS = ("label", "labels")
NO_CLASSES = ["images"]  # of images without labels
FIXED_CHOICE_SEED = 0  # of the samples that a limit or a split leaves: the same in runs of any seed


@dataclass
class LabelledImages:
    """One split: encoded images and their classes.

    Args:
        rows: a data set whose column "image" holds `{"bytes": ..., "path": ...}`, one of the two not None.
        labels: shape (len(rows),), int64: positions in `class_names`.
        class_names: the classes, as text.
        role: "train", "validation" or "test"; errors mention it.
    """

    rows: datasets.Dataset
    labels: np.ndarray
    class_names: list[str]
    role: str

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, positions) -> "LabelledImages":
        """Return the images at these positions, in their order."""
        return LabelledImages(self.rows.select(positions), self.labels[positions], self.class_names, self.role)

    def describe(self, position: int) -> str:
        """Return how to name one image to a user: its path, or its row."""
        path = self.rows[position]["image"]["path"]
        return str(path) if path else f"row {position} of the {self.role} data"


def load_image_folder(path, *, role: str, needs_classes: bool = True) -> LabelledImages:
    """List `path/CLASS/IMAGE`. Classes are the subfolders in alphabetical order; hidden and other files are passed over.

    Args:
        needs_classes: if not, the images may lie directly in `path`, and are then all of one class.

    Raises:
        InputError: there is no such folder, it has no subfolders, one of these has no image directly in it, or there are images
            beside subfolders.
    """
    path = Path(path)
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise InputError(f"--{role}_dir={path}: {what}; give a folder with one subfolder per class")
    folders = sorted(folder for folder in path.iterdir() if folder.is_dir() and not folder.name.startswith("."))
    loose = [] if needs_classes else _list_images(path)
    if loose and folders:
        raise InputError(
            f"--{role}_dir={path}: holds images ({loose[0].name}) beside folders ({folders[0].name}); give a folder of images, or of "
            "one subfolder per class"
        )
    if not loose and not folders:
        raise InputError(f"--{role}_dir={path}: has no subfolders; put the images into one subfolder per class")
    classes = {folder.name: _list_images(folder) for folder in folders} or {NO_CLASSES[0]: loose}
    for name, files in classes.items():
        if not files:
            raise InputError(
                f"--{role}_dir={path}: the class folder {path / name} has no image directly in it "
                f"({', '.join(IMAGE_SUFFIXES)}); add images, or remove the folder"
            )
    paths = [str(file) for files in classes.values() for file in files]
    labels = np.repeat(np.arange(len(classes)), [len(files) for files in classes.values()])
    rows = datasets.Dataset.from_dict({"image": paths}).cast_column("image", datasets.Image(decode=False))
    return LabelledImages(rows, labels, list(classes), role)


def _list_images(folder: Path) -> list[Path]:
    return sorted(
        file
        for file in folder.iterdir()
        if file.suffix.lower() in IMAGE_SUFFIXES and not file.name.startswith(".") and file.is_file()
    )


def select_images(
    rows: datasets.Dataset,
    *,
    role: str,
    image_column: str | None = None,
    label_column: str | None = None,
    needs_classes: bool = True,
) -> LabelledImages:
    """Take images and labels out of a loaded data set.

    Args:
        image_column: default, the only column of images.
        label_column: default, the only column of class labels, else "label" or "labels". Without class names, the
            values that occur are the classes, sorted.
        needs_classes: if not, and no column of labels is named or found, the images are all of one class.

    Raises:
        InputError: no or several such columns, a column of another kind, no rows, a sample without a label.
    """
    images = [name for name, feature in rows.features.items() if isinstance(feature, datasets.Image)]
    classes = [name for name, feature in rows.features.items() if isinstance(feature, datasets.ClassLabel)]
    classes = classes or [name for name in LABEL_COLUMNS if name in rows.features][:1]
    image_column = _choose_column(rows, role, "image_column", image_column, images)
    if image_column not in images:
        raise InputError(f"--image_column={image_column}: that column of the {role} data holds no images")
    if len(rows) == 0:
        raise InputError(f"the {role} data has no rows; give a split with at least one image per class")
    if label_column is None and not classes and not needs_classes:
        names, labels = list(NO_CLASSES), np.zeros(len(rows))
    else:
        label_column = _choose_column(rows, role, "label_column", label_column, classes)
        names, labels = _read_labels(rows, label_column, role)
    rows = rows.select_columns(image_column).cast_column(image_column, datasets.Image(decode=False))
    if image_column != "image":
        rows = rows.rename_column(image_column, "image")
    return LabelledImages(rows, labels.astype(np.int64), names, role)


def _read_labels(rows: datasets.Dataset, column: str, role: str) -> tuple[list[str], np.ndarray]:
    """Read the names of the classes and each image's number among them."""
    values, feature = np.array(rows[column]), rows.features[column]
    if isinstance(feature, datasets.ClassLabel):
        is_unknown = (values < 0) | (values >= len(feature.names))
        if is_unknown.any():
            where = int(np.argmax(is_unknown))
            raise InputError(
                f"row {where} of the {role} data has no label ({values[where]}); give a split whose labels are published"
            )
        return list(feature.names), values
    if values.dtype.kind not in "biuU":
        raise InputError(f"--label_column={column}: that column of the {role} data holds no classes")
    found, labels = np.unique(values, return_inverse=True)
    return [str(value) for value in found], labels


def _choose_column(rows, role: str, flag: str, given: str | None, candidates: list[str]) -> str:
    names = ", ".join(rows.column_names)
    if given is not None:
        if given not in rows.column_names:
            raise InputError(f"--{flag}={given}: the {role} data has no such column, only {names}")
        return given
    if len(candidates) != 1:
        found = f"several could be it ({', '.join(candidates)})" if candidates else f"none of {names} is of that kind"
        raise InputError(f"--{flag} is missing: of the columns of the {role} data {found}; give it")
    return candidates[0]


def choose_some(images: LabelledImages, limit: int | None) -> LabelledImages:
    """Choose `limit` of the images at random, the same ones in every run; all, if there are no more or it is None."""
    if limit is None or limit >= len(images):
        return images
    return images.take(np.sort(np.random.default_rng(FIXED_CHOICE_SEED).permutation(len(images))[:limit]))


def split_off_validation(train: LabelledImages, percentage: float) -> tuple[LabelledImages, LabelledImages]:
    """Split a share of each class off the training images, at random but the same ones in every run.

    Returns:
        What remains for training, and the validation images.

    Raises:
        InputError: some class would have no image left for training or none for validation.
    """
    rng, taken = np.random.default_rng(FIXED_CHOICE_SEED), []
    for label, name in enumerate(train.class_names):
        members = rng.permutation(np.flatnonzero(train.labels == label))
        number = round(len(members) * percentage / 100)
        if not 0 < number < len(members):
            raise InputError(
                f"--validation_split_percentage={percentage}: of the {len(members)} images of class {name!r} that leaves "
                f"{number} for validation and {len(members) - number} for training; give --validation_dir"
            )
        taken.append(members[:number])
    is_validation = np.zeros(len(train), dtype=bool)
    is_validation[np.concatenate(taken)] = True
    validation = train.take(np.flatnonzero(is_validation))
    validation.role = "validation"
    return train.take(np.flatnonzero(~is_validation)), validation


def require_usable_classes(splits: dict[str, LabelledImages]) -> list[str]:
    """Return the classes that all splits share, in the order of the first.

    Raises:
        InputError: there is one class only, by name or in the training images, or the classes differ between splits.
    """
    first, *others = splits.values()
    names = first.class_names
    if len(names) < 2:
        raise InputError(
            f"the {first.role} data has one class only ({names[0]}); there is nothing to tell apart, give two or more"
        )
    if first.role == "train" and len(np.unique(first.labels)) < 2:
        only = names[first.labels[0]]
        raise InputError(
            f"the {len(first)} training images are all of class {only!r}; give images of two classes or more"
        )
    for other in others:
        for one, two in ((first, other), (other, first)):
            missing = sorted(set(one.class_names) - set(two.class_names))
            if missing:
                more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
                raise InputError(
                    f"the classes differ: {missing[0]!r}{more} of the {one.role} data is no class of the {two.role} data; "
                    "give both the same classes"
                )
    return names


def number_classes(images: LabelledImages, class_names: list[str]) -> LabelledImages:
    """Return the images with their labels as positions in `class_names`, of which the images' classes are a part.

    Raises:
        InputError: an image's class is not among them.
    """
    unknown = next((name for name in images.class_names if name not in class_names), None)
    if unknown is not None:
        more = f" and {len(class_names) - 5} more" if len(class_names) > 5 else ""
        raise InputError(
            f"the model does not know class {unknown!r} of the {images.role} data, only {', '.join(class_names[:5])}{more}; give data "
            "of its classes, or train it on yours with --do_train"
        )
    numbers = np.array([class_names.index(name) for name in images.class_names], dtype=np.int64)
    return LabelledImages(images.rows, numbers[images.labels], list(class_names), images.role)
