"""In which form images reach the network: colour mode, size, normalisation, as an image processor of transformers has them.

And all of them as one tensor, for image generation, and such a tensor as a picture.
"""

from dataclasses import dataclass
from pathlib import Path

import datasets
import numpy as np
import torch
from PIL import Image
from torch.nn import functional
from transformers import AutoImageProcessor
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from ...errors import InputError

IMAGE_MODES = {"L": 1, "RGB": 3}  # and their channels
IMAGES_FOR_MEAN = 2048
SMALLEST_STD = 1 / 255  # of a channel that is the same in all images
GRID_COLUMNS, GRID_PADDING = 8, 2
SMALLEST_TILE = 32  # pixels a side; smaller images are enlarged, their pixels kept


@dataclass
class ImageFormat:
    """What is made of an image.

    Args:
        mode: "RGB" or "L" (grayscale).
        size: height and width that images have in the end.
        processor: resizes and crops; it also holds the mean and standard deviation of each channel, and is saved beside the model.
        converts_mode, converts_size: whether images of another mode or size are converted; else they are refused.
    """

    mode: str
    size: tuple[int, int]
    processor: BitImageProcessorPil
    converts_mode: bool = True
    converts_size: bool = True

    @property
    def num_channels(self) -> int:
        """1 for grayscale, 3 for colour."""
        return IMAGE_MODES[self.mode]

    def decode(self, cell: dict) -> Image.Image:
        """Read one image, turned the way up that its camera noted, and convert it to the mode.

        Args:
            cell: `{"bytes": ..., "path": ...}`, one of the two not None.

        Raises:
            InputError: it cannot be read, or has a mode or a size other than the images before it.
        """
        image, name = decode_image(cell), cell["path"] or "an image of the data set"
        if image.mode != self.mode and not self.converts_mode:
            raise InputError(
                f"{name} is {image.mode}, others are {self.mode}; give --image_mode RGB or L to convert them"
            )
        if image.size != self.size[::-1] and not self.converts_size:
            sizes = f"{image.width}x{image.height}, others are {self.size[1]}x{self.size[0]}"
            raise InputError(f"{name} is {sizes}; give --image_size to resize them")
        return image.convert(self.mode)

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Resize and crop an image of this mode: uint8, shape (channels, height, width)."""
        options = {"do_rescale": False, "do_normalize": False, "do_convert_rgb": False, "return_tensors": "np"}
        return self.processor(image, **options)["pixel_values"][0]

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Return (pixels / 255 - mean) / std: float32, shape (channels, height, width)."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        if not self.processor.do_normalize:
            return scaled
        mean, std = (
            np.array(values, dtype=np.float32).reshape(-1, 1, 1)
            for values in (self.processor.image_mean, self.processor.image_std)
        )
        return (scaled - mean) / std


def decode_image(cell: dict) -> Image.Image:
    """Read one image, turned the way up that its camera noted; raise `InputError`, which names it, if that fails."""
    try:
        return datasets.Image().decode_example(cell)
    except Exception as error:  # of many kinds, from the readers of each format
        name = cell["path"] or "an image of the data set"
        raise InputError(f"{name}: cannot be read as an image ({error}); repair it or take it out") from error


def choose_format(
    rows: datasets.Dataset,
    *,
    image_size: int | None = None,
    image_mode: str | None = None,
    crop_fraction: float = 1.0,
    pretrained: BitImageProcessorPil | None = None,
    num_channels: int | None = None,
) -> ImageFormat:
    """Choose mode and size: as asked, else the pretrained model's, else the first image's, which all others must have, too.

    Without a pretrained processor, mean and standard deviation are those of up to 2,048 images, evenly spread over the rows.

    Args:
        rows: with a column "image", not decoded.
        image_size: height and width to resize to.
        crop_fraction: with `image_size`, the share of the shorter side that is kept, from the centre.
        pretrained: the image processor of a pretrained model.
        num_channels: of a pretrained model.
    """
    first = decode_image(rows[0]["image"])
    of_model = {channels: mode for mode, channels in IMAGE_MODES.items()}.get(num_channels)
    mode = image_mode or of_model or first.mode
    if mode not in IMAGE_MODES:
        raise InputError(f"the colour mode of the images is {mode}; give --image_mode RGB or L to convert them")
    if pretrained is not None and image_size is None:
        processor = pretrained
    else:
        height, width = (first.height, first.width) if image_size is None else (image_size, image_size)
        processor = BitImageProcessorPil(
            size={"shortest_edge": round(min(height, width) / crop_fraction)},
            crop_size={"height": height, "width": width},
            resample=int(Image.Resampling.BILINEAR if pretrained is None else pretrained.resample),
            do_convert_rgb=mode == "RGB",
        )
    converts_size = image_size is not None or pretrained is not None
    chosen = ImageFormat(mode, (0, 0), processor, bool(image_mode or of_model), converts_size)
    chosen.size = chosen.prepare(first.convert(mode)).shape[1:]
    if pretrained is None:
        processor.image_mean, processor.image_std = measure_mean_and_std(rows, chosen)
    else:
        processor.image_mean, processor.image_std = pretrained.image_mean, pretrained.image_std
    return chosen


def measure_mean_and_std(rows: datasets.Dataset, image_format: ImageFormat) -> tuple[list[float], list[float]]:
    """Measure each channel's mean and standard deviation, on the scale 0 to 1, over up to 2,048 evenly spread images."""
    sums, num_pixels = np.zeros((2, image_format.num_channels)), 0
    for position in range(0, len(rows), max(1, len(rows) // IMAGES_FOR_MEAN)):
        pixels = image_format.prepare(image_format.decode(rows[position]["image"])) / 255
        sums += pixels.sum(axis=(1, 2)), np.square(pixels).sum(axis=(1, 2))
        num_pixels += pixels.shape[1] * pixels.shape[2]
    mean = sums[0] / num_pixels
    std = np.sqrt(np.maximum(sums[1] / num_pixels - mean**2, SMALLEST_STD**2))
    return [round(float(value), 6) for value in mean], [round(float(value), 6) for value in std]


def load_processor(name_or_path: str, **hub_options) -> BitImageProcessorPil | None:
    """Load the image processor of a pretrained model; None if it has none."""
    try:
        return AutoImageProcessor.from_pretrained(name_or_path, **hub_options)
    except (OSError, ValueError):
        return None


# ---- tensors for image generation --------------------------------------------------------------------------------------


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


def write_image_grid(pixels: torch.Tensor, path: Path) -> None:
    """Write uint8 images of shape (n, 1 or 3, height, width) as one PNG, row by row, white between them."""
    factor = max(1, -(-SMALLEST_TILE // max(pixels.shape[2:])))
    tiles = pixels.repeat_interleave(factor, dim=2).repeat_interleave(factor, dim=3)
    num_columns = min(GRID_COLUMNS, len(tiles))
    num_missing = -len(tiles) % num_columns
    tiles = functional.pad(tiles, (0, GRID_PADDING, 0, GRID_PADDING, 0, 0, 0, num_missing), value=255)
    rows = tiles.unflatten(0, (-1, num_columns)).permute(0, 3, 1, 4, 2)  # (rows, height, columns, width, channels)
    grid = rows.flatten(2, 3).flatten(0, 1).squeeze(-1).numpy()
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(grid).save(path)
