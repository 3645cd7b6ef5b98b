"""What is done to an image before the network sees it: pixels in, pixels out, every random number from the generator given.

Pixels are uint8 arrays of shape (channels, height, width). Pillow does the resampling.
"""

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from .format import ImageFormat

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

    @property
    def changes_nothing(self) -> bool:
        """Whether every image stays as it is."""
        return self.random_crop == "none" and not self.random_flip

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
