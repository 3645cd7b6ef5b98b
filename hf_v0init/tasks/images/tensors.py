"""Images as one tensor in memory, for image generation, where all of them are wanted at once; and tensors as a picture."""

from pathlib import Path

import torch
from PIL import Image

from .augmentation import to_image
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
    size = width * factor, height * factor
    step_x, step_y = size[0] + GRID_PADDING, size[1] + GRID_PADDING
    num_columns = min(num_columns, num)
    whole = num_columns * step_x + GRID_PADDING, -(-num // num_columns) * step_y + GRID_PADDING
    canvas = Image.new("L" if channels == 1 else "RGB", whole, "white")
    for number, image in enumerate(pixels.permute(0, 2, 3, 1).numpy()):
        row, column = divmod(number, num_columns)
        tile = to_image(image).resize(size, Image.Resampling.NEAREST)
        canvas.paste(tile, (GRID_PADDING + column * step_x, GRID_PADDING + row * step_y))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.partial")
    canvas.save(aside, format="PNG")
    aside.replace(path)
