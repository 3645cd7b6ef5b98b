"""Images as a Trainer reads them, with an augmentation whose draws depend on seed, epoch and image and on nothing else.

So they are the same for any number of processes and loader workers and after any resume, they take nothing from the random
states of the run, and the run takes nothing from them. The paper's pass before training sees the images as the first epoch does,
and training sees what it would have seen without it.
"""

import math
from dataclasses import dataclass

import datasets
import numpy as np
import torch
from PIL import Image

from .format import ImageFormat

LARGEST_KEPT_BYTES = 1 << 30  # decoded images of a split that are kept in memory, per process
FIRST_DRAW = 1  # that of epoch 0
RANDOM_CROPS = ("none", "pad", "resize")
AREA_SHARE = (0.08, 1.0)  # of a random resized crop (Szegedy et al., 2015)
ASPECT_RATIO = (3 / 4, 4 / 3)
CROP_ATTEMPTS = 10


@dataclass(frozen=True)
class Augmentation:
    """How training images are varied.

    Args:
        random_crop: "pad" puts `crop_padding` black pixels around the image and cuts the image's size out at random (usual
            for CIFAR); "resize" cuts out 8% to 100% of the area at an aspect ratio of 3/4 to 4/3 and resizes that (usual for
            ImageNet); "none".
        crop_padding: pixels on each side.
        random_flip: mirror half of the images left to right.
    """

    random_crop: str = "none"
    crop_padding: int = 4
    random_flip: bool = False

    def apply(self, pixels: np.ndarray, image_format: ImageFormat, rng: np.random.Generator) -> np.ndarray:
        """Return varied pixels of the format's size; `pixels` have that size already unless `random_crop="resize"`."""
        if self.random_crop == "pad":
            pixels = pad_and_crop(pixels, self.crop_padding, rng)
        elif self.random_crop == "resize":
            image = Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0))
            box = draw_crop_box(image.height, image.width, rng)
            resample = Image.Resampling(image_format.processor.resample)
            pixels = to_pixels(image.crop(box).resize(image_format.size[::-1], resample))
        if self.random_flip and rng.random() < 0.5:
            pixels = pixels[:, :, ::-1]
        return pixels


def pad_and_crop(pixels: np.ndarray, padding: int, rng: np.random.Generator) -> np.ndarray:
    """Shift the image by up to `padding` pixels in both directions; what moves in is black."""
    _, height, width = pixels.shape
    top, left = rng.integers(0, 2 * padding + 1, size=2)
    padded = np.pad(pixels, ((0, 0), (padding, padding), (padding, padding)))
    return padded[:, top : top + height, left : left + width]


def draw_crop_box(height: int, width: int, rng: np.random.Generator) -> tuple[int, int, int, int]:
    """Draw a box (left, upper, right, lower) within the image: see `AREA_SHARE` and `ASPECT_RATIO`.

    If ten draws do not fit, the largest centred box of an allowed aspect ratio.
    """
    for _ in range(CROP_ATTEMPTS):
        area = height * width * rng.uniform(*AREA_SHARE)
        ratio = math.exp(rng.uniform(*map(math.log, ASPECT_RATIO)))
        box_width, box_height = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
        if 0 < box_width <= width and 0 < box_height <= height:
            left, upper = int(rng.integers(width - box_width + 1)), int(rng.integers(height - box_height + 1))
            return left, upper, left + box_width, upper + box_height
    box_width = min(width, round(height * ASPECT_RATIO[1]))
    box_height = min(height, round(width / ASPECT_RATIO[0]))
    left, upper = (width - box_width) // 2, (height - box_height) // 2
    return left, upper, left + box_width, upper + box_height


def to_pixels(image: Image.Image) -> np.ndarray:
    """Return the pixels of an image of mode L or RGB: uint8, shape (1 or 3, height, width)."""
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class ImageSamples(torch.utils.data.Dataset):
    """Item i is `{"pixel_values": float32 tensor (channels, height, width), "labels": int}`.

    Up to 1 GiB of pixels is decoded now and kept; of larger splits, images are decoded when they are asked for.

    Args:
        rows: with a column "image", not decoded.
        labels: shape (len(rows),), int64.
        image_format: the form in which images are returned.
        augmentation: None for evaluation.
        seed: of the augmentation's draws.

    Raises:
        InputError: an image cannot be decoded; of larger splits, only when it is asked for.
    """

    def __init__(
        self,
        rows: datasets.Dataset,
        labels: np.ndarray,
        image_format: ImageFormat,
        augmentation: Augmentation | None = None,
        seed: int = 0,
    ) -> None:
        self.rows, self.labels, self.image_format = rows, labels, image_format
        varies = augmentation is not None and (augmentation.random_crop != "none" or augmentation.random_flip)
        self.augmentation = augmentation if varies else None
        # In shared memory, so that loader workers that outlive an epoch see the next one.
        self._draw = torch.tensor([seed, FIRST_DRAW]).share_memory_()
        self._kept = self._decode_all()

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, position: int) -> dict:
        pixels = self._decode(position) if self._kept is None else self._kept[position]
        if self.augmentation is not None:
            rng = np.random.default_rng((*self._draw.tolist(), position))
            pixels = self.augmentation.apply(pixels, self.image_format, rng)
        values = torch.from_numpy(np.ascontiguousarray(self.image_format.normalize(pixels)))
        return {"pixel_values": values, "labels": int(self.labels[position])}

    def begin_epoch(self, epoch: int) -> None:
        """Make the draws those of this epoch, counted from 0; a new data set is at epoch 0."""
        self._draw[1] = FIRST_DRAW + epoch

    def _decode(self, position: int) -> np.ndarray:
        image = self.image_format.decode(self.rows[position]["image"])
        if self.augmentation is not None and self.augmentation.random_crop == "resize":
            return to_pixels(image)
        return self.image_format.prepare(image)

    def _decode_all(self) -> list[np.ndarray] | None:
        kept, num_bytes = [], 0
        for position in range(len(self)):
            kept.append(self._decode(position))
            num_bytes += kept[-1].nbytes
            if num_bytes > LARGEST_KEPT_BYTES:
                return None
        return kept
