"""Writes scikit-learn's digits, real 8x8 scans that come with that package, as image folders. Needs no network.

    python scripts/write_digits_folder.py data/digits

makes data/digits/train, validation and test with one folder per digit, as the configs/image_classification/digits_*.yaml
expect them. Needs scikit-learn: pip install 'hf_v0init[images]'

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998, UCI Machine Learning
Repository): 1,797 images of 17 grey levels.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from transformers import HfArgumentParser

from hf_v0init import InputError
from hf_v0init.extras import require_extra
from hf_v0init.tasks.script_support import run_script

PIXELS, BRIGHTEST = 8, 16
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


@dataclass
class DigitsArguments:
    size: int = field(default=PIXELS, metadata={"help": "Height and width in pixels; more than 8 are interpolated."})
    seed: int = field(default=0, metadata={"help": "Which images become training, validation and test images."})


def write_digits_folder(path, seed: int = 0, size: int = PIXELS) -> dict[str, int]:
    """Write `path/SPLIT/DIGIT/NUMBER.png` for train, validation and test: grayscale, `size` x `size` pixels.

    NUMBER is the image's place in the package. The splits are drawn by `seed`, with an equal share of each digit.

    Returns:
        The images of each split: {"train": 1078, "validation": 359, "test": 360}.

    Raises:
        InputError: scikit-learn, with which they come, is not installed; `path` holds something.
    """
    require_extra("images", "sklearn")
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    path = Path(path)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise InputError(f"{path} exists and is not an empty folder; give another, or remove it")
    digits = load_digits()
    numbers = np.arange(len(digits.target))
    train, rest = train_test_split(
        numbers, train_size=SHARES["train"], stratify=digits.target[numbers], random_state=seed
    )
    validation, test = train_test_split(rest, train_size=0.5, stratify=digits.target[rest], random_state=seed)
    splits = {"train": train, "validation": validation, "test": test}
    levels = np.rint(digits.images * (255 / BRIGHTEST)).astype(np.uint8)
    for split, members in splits.items():
        for number in members:
            folder = path / split / str(digits.target[number])
            folder.mkdir(parents=True, exist_ok=True)
            image = Image.fromarray(levels[number])
            if size != PIXELS:
                image = image.resize((size, size), Image.Resampling.BILINEAR)
            image.save(folder / f"{number:04d}.png")
    return {split: len(members) for split, members in splits.items()}


def main(argv: list[str]) -> None:
    parser = HfArgumentParser(DigitsArguments, allow_abbrev=False, description=__doc__.splitlines()[0])
    parser.add_argument("folder", help="Folder to write; must not hold anything.")
    arguments = parser.parse_args(argv)
    counts = write_digits_folder(arguments.folder, arguments.seed, arguments.size)
    print(f"{arguments.folder}: " + ", ".join(f"{number} images for {split}" for split, number in counts.items()))


if __name__ == "__main__":
    run_script(main)
