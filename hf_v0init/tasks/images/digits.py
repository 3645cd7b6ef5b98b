"""scikit-learn's digits as an image folder: 1,797 scans of handwritten digits that come with that package.

They are the test part of "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak, 1998, UCI Machine Learning
Repository): 8x8 pixels of 17 grey levels. Real images for runs of seconds, without a download.
"""

from pathlib import Path

import numpy as np
from PIL import Image

from ...errors import InputError
from ...extras import require_extra

PIXELS, BRIGHTEST = 8, 16
SHARES = {"train": 0.6, "validation": 0.2, "test": 0.2}


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
