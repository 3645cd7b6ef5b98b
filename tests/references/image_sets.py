"""Small labelled image folders: each class a brightness of its own, each image some noise."""

from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("ant", "bee", "cat")


def write_image(path: Path, pixels: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write_image_folder(
    folder: Path, per_class: int, size: tuple[int, int] = (8, 8), classes=CLASSES, channels: int = 1, seed: int = 0
) -> Path:
    """`folder/CLASS/NUMBER.png`, `size` is (height, width)."""
    rng = np.random.default_rng(seed)
    for label, name in enumerate(classes):
        for number in range(per_class):
            shape = size if channels == 1 else (*size, channels)
            base = 40 + 170 * label / max(1, len(classes) - 1)
            pixels = np.clip(base + rng.normal(0, 40, shape), 0, 255).astype(np.uint8)
            write_image(folder / name / f"{number:02d}.png", pixels)
    return folder
