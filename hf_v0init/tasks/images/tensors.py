"""Images as one tensor in memory, for image generation, where all of them are wanted at once; and tensors as a picture."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from .folders import LabelledImages
from .format import ImageFormat, decode_image

GRID_PADDING = 2
SMALLEST_TILE = 32  # pixels a side; smaller images are enlarged, their pixels kept


def read_pixels(images: LabelledImages, image_format: ImageFormat) -> torch.Tensor:
    """Decode all images: uint8, shape (n, channels, height, width).

    Raises:
        InputError: naming the image that cannot be decoded.
    """
    shape = (len(images), image_format.num_channels, *image_format.size)
    pixels = torch.empty(shape, dtype=torch.uint8)
    for position in range(len(images)):
        prepared = image_format.prepare(decode_image(images, position))
        pixels[position] = torch.from_numpy(prepared.transpose(2, 0, 1).copy())
    return pixels


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels into fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def round_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn images in [-1, 1] into uint8 pixels on the CPU, the inverse of `scale_pixels`."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def write_image_grid(pixels: torch.Tensor, path, num_columns: int = 8) -> None:
    """Write uint8 images of shape (n, 1 or 3, height, width) as one PNG, row by row, whole or not at all."""
    num, channels, height, width = pixels.shape
    factor = max(1, -(-SMALLEST_TILE // max(height, width)))
    tiles = pixels.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
    tiles = tiles.permute(0, 2, 3, 1).numpy()
    step_y, step_x = height * factor + GRID_PADDING, width * factor + GRID_PADDING
    num_columns = min(num_columns, num)
    num_rows = -(-num // num_columns)
    canvas = np.full((num_rows * step_y + GRID_PADDING, num_columns * step_x + GRID_PADDING, channels), 255, np.uint8)
    for number, tile in enumerate(tiles):
        y, x = GRID_PADDING + number // num_columns * step_y, GRID_PADDING + number % num_columns * step_x
        canvas[y : y + tile.shape[0], x : x + tile.shape[1]] = tile
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    Image.fromarray(canvas[:, :, 0] if channels == 1 else canvas).save(aside, format="PNG")
    aside.replace(path)
