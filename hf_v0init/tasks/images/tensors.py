"""Images as one tensor in memory, for image generation, where all of them are wanted at once; and tensors as a picture."""

from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from .format import ImageFormat

GRID_PADDING = 2
SMALLEST_TILE = 32  # pixels a side; smaller images are enlarged, their pixels kept


def read_pixels(rows: datasets.Dataset, image_format: ImageFormat) -> torch.Tensor:
    """Decode all images: uint8, shape (n, channels, height, width).

    Raises:
        InputError: naming the image that cannot be decoded.
    """
    pixels = np.empty((len(rows), image_format.num_channels, *image_format.size), dtype=np.uint8)
    for position, row in enumerate(rows):
        pixels[position] = image_format.prepare(image_format.decode(row["image"]))
    return torch.from_numpy(pixels)


def scale_pixels(pixels: torch.Tensor) -> torch.Tensor:
    """Turn uint8 pixels into fp32 in [-1, 1]."""
    return pixels.float() / 127.5 - 1.0


def round_to_pixels(images: torch.Tensor) -> torch.Tensor:
    """Turn images in [-1, 1] into uint8 pixels on the CPU, the inverse of `scale_pixels`."""
    return ((images.float() + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).cpu()


def write_image_grid(pixels: torch.Tensor, path, num_columns: int = 8) -> None:
    """Write uint8 images of shape (n, 1 or 3, height, width) as one PNG, row by row, white between them."""
    factor = max(1, -(-SMALLEST_TILE // max(pixels.shape[2:])))
    tiles = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    num_columns = min(num_columns, len(tiles))
    num_missing = -len(tiles) % num_columns
    tiles = functional.pad(tiles, (0, GRID_PADDING, 0, GRID_PADDING, 0, 0, 0, num_missing), value=255)
    rows = tiles.unflatten(0, (-1, num_columns)).permute(0, 3, 1, 4, 2)  # (rows, height, columns, width, channels)
    grid = rows.flatten(2, 3).flatten(0, 1).squeeze(-1).numpy()
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
