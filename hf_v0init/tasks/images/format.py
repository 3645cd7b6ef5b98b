"""In which form images reach the network: colour mode, size, normalisation. Found from images or a model's own settings.

What can be wrong with an image is found here, before anything is trained.
"""

import contextlib
import io
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image, ImageOps
from transformers.image_processing_base import ImageProcessingMixin
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil

from ...errors import InputError
from .augmentation import resize_and_crop, to_pixels
from .folders import LabelledImages

IMAGE_MODES = {"L": 1, "RGB": 3}  # and their channels
IMAGES_FOR_MEAN = 2048
SMALLEST_STD = 1 / 255  # of a channel that is the same in all images
SIDEWAYS = (5, 6, 7, 8)  # EXIF orientations that swap width and height


@dataclass(frozen=True)
class ImageFormat:
    """What `prepare` and `normalize` make of an image.

    Args:
        mode: "RGB" or "L" (grayscale).
        height, width: in pixels.
        crop_fraction: the share of each side that is kept when an image is resized, see `resize_and_crop`.
        resample: Pillow's number of the interpolation.
        mean, std: of each channel, on the scale 0 to 1.
    """

    mode: str
    height: int
    width: int
    crop_fraction: float = 1.0
    resample: int = int(Image.Resampling.BILINEAR)
    mean: tuple[float, ...] = ()
    std: tuple[float, ...] = ()

    @property
    def size(self) -> tuple[int, int]:
        """Height and width."""
        return self.height, self.width

    @property
    def num_channels(self) -> int:
        """1 for grayscale, 3 for colour."""
        return IMAGE_MODES[self.mode]

    def prepare(self, image: Image.Image) -> np.ndarray:
        """Return the pixels in this mode and size: uint8, shape (height, width, channels)."""
        return to_pixels(resize_and_crop(image.convert(self.mode), self.size, self.resample, self.crop_fraction))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Return (pixels / 255 - mean) / std: float32, shape (channels, height, width)."""
        scaled = pixels.transpose(2, 0, 1).astype(np.float32) / np.float32(255)
        mean, std = (np.array(values, dtype=np.float32)[:, None, None] for values in (self.mean, self.std))
        return (scaled - mean) / std


@contextlib.contextmanager
def open_image(images: LabelledImages, position: int) -> Iterator[Image.Image]:
    """Open one image; only its header is read yet.

    Raises:
        InputError: naming the image, if it is missing or no image, or if reading on inside fails.
    """
    cell = images.rows[position]["image"]
    try:
        with Image.open(io.BytesIO(cell["bytes"]) if cell["bytes"] is not None else cell["path"]) as image:
            yield image
    except Exception as error:  # of many kinds, from the readers of each format
        reason = "no format that Pillow knows" if isinstance(error, Image.UnidentifiedImageError) else error
        raise InputError(
            f"{images.describe(position)}: cannot be read as an image ({reason}); repair it or take it out"
        ) from error


def decode_image(images: LabelledImages, position: int) -> Image.Image:
    """Read one image, turned the way up that its camera noted.

    Raises:
        InputError: naming the image, if it is missing, no image or cut off.
    """
    with open_image(images, position) as image:
        image.load()
        return ImageOps.exif_transpose(image)


@dataclass
class _Seen:
    """The first image met with some size and mode."""

    where: str
    size: tuple[int, int]  # height, width
    mode: str


def look_through(images: LabelledImages) -> Iterator[_Seen]:
    """Read the header of every image; yield each new combination of size and mode, with the image that has it.

    Raises:
        InputError: an image cannot be opened.
    """
    known = set()
    for position in range(len(images)):
        with open_image(images, position) as image:
            width, height = image.size
            if image.getexif().get(0x0112) in SIDEWAYS:
                width, height = height, width
            found = (height, width), image.mode
        if found not in known:
            known.add(found)
            yield _Seen(images.describe(position), *found)


def choose_format(
    splits: dict[str, LabelledImages],
    *,
    image_size: int | None = None,
    image_mode: str | None = None,
    crop_fraction: float | None = None,
    of_model: ImageFormat | None = None,
) -> ImageFormat:
    """Choose mode and size: as asked, else the model's own, else what all images have. Looks at every image's header.

    Args:
        splits: by role; "train" comes first where there is one.
        image_size: height and width to resize to.
        crop_fraction: see `ImageFormat`; default the model's, else 1.
        of_model: the format that a pretrained model was trained on.

    Returns:
        The format; its mean and std are empty unless `of_model` has some.

    Raises:
        InputError: images that cannot be opened, that differ in size or mode with nothing to convert them to, or that have
            a mode other than L and RGB.
    """
    seen = [found for images in splits.values() for found in look_through(images)]
    mode = image_mode or (of_model and of_model.mode)
    if mode is None:
        mode = _find_common(seen, "colour mode", lambda one: one.mode, "--image_mode RGB or --image_mode L to convert")
        if mode not in IMAGE_MODES:
            raise InputError(
                f"{seen[0].where}: its colour mode is {mode}; give --image_mode RGB or L to convert the images"
            )
    size = (image_size, image_size) if image_size is not None else of_model and of_model.size
    if size is None:
        _find_common(seen, "size", lambda one: f"{one.size[1]}x{one.size[0]}", "--image_size to resize")
        size = seen[0].size
    chosen = of_model or ImageFormat(mode, *size)
    if mode != chosen.mode:
        chosen = replace(chosen, mean=(), std=())
    fraction = chosen.crop_fraction if crop_fraction is None else crop_fraction
    return replace(chosen, mode=mode, height=size[0], width=size[1], crop_fraction=fraction)


def _find_common(seen: list[_Seen], what: str, describe: Callable[[_Seen], str], remedy: str) -> str:
    """Return what all images have, in words; raise `InputError` with two that differ."""
    first = describe(seen[0])
    other = next((one for one in seen if describe(one) != first), None)
    if other is not None:
        raise InputError(
            f"the images differ in {what} ({seen[0].where} is {first}, {other.where} is {describe(other)}); give {remedy} them all"
        )
    return first


def measure_mean_and_std(images: LabelledImages, image_format: ImageFormat) -> ImageFormat:
    """Return the format with each channel's mean and standard deviation over up to 2,048 evenly spread images."""
    step = max(1, len(images) // IMAGES_FOR_MEAN)
    sums, num_pixels = np.zeros((2, image_format.num_channels)), 0
    for position in range(0, len(images), step):
        pixels = image_format.prepare(decode_image(images, position)) / 255
        sums += pixels.sum(axis=(0, 1)), np.square(pixels).sum(axis=(0, 1))
        num_pixels += pixels.shape[0] * pixels.shape[1]
    mean = sums[0] / num_pixels
    std = np.sqrt(np.maximum(sums[1] / num_pixels - mean**2, 0))
    return replace(
        image_format,
        mean=tuple(round(float(value), 6) for value in mean),
        std=tuple(round(max(float(value), SMALLEST_STD), 6) for value in std),
    )


def build_processor(image_format: ImageFormat) -> BitImageProcessorPil:
    """Build the image processor of transformers that does the same, to be saved beside the model."""
    return BitImageProcessorPil(
        size={"shortest_edge": round(min(image_format.size) / image_format.crop_fraction)},
        crop_size={"height": image_format.height, "width": image_format.width},
        resample=image_format.resample,
        image_mean=list(image_format.mean),
        image_std=list(image_format.std),
        do_convert_rgb=image_format.mode == "RGB",
    )


def load_format(name_or_path: str, num_channels: int, **hub_options) -> ImageFormat | None:
    """Read the format from the `preprocessor_config.json` of a pretrained model; None if it has none.

    Raises:
        InputError: the file gives no size, or is for another number of channels than the model's 1 or 3.
    """
    try:
        settings, _ = ImageProcessingMixin.get_image_processor_dict(name_or_path, **hub_options)
    except (OSError, ValueError):
        return None
    size, crop = settings.get("size"), settings.get("crop_size") if settings.get("do_center_crop") else None
    size = {"shortest_edge": size} if isinstance(size, int) else size or {}
    crop = {"height": crop, "width": crop} if isinstance(crop, int) else crop
    resized = size.get("shortest_edge") or size.get("height")
    if resized is None:
        raise InputError(f"the image processor of {name_or_path!r} names no size that is known here; give --image_size")
    fraction = float(settings.get("crop_pct") or 1.0)
    height, width = size.get("height", resized), size.get("width", resized)
    if crop is not None:
        height, width = crop["height"], crop["width"]
        fraction = min(1.0, min(height, width) / resized)
    mode = {channels: mode for mode, channels in IMAGE_MODES.items()}.get(num_channels)
    if mode is None:
        raise InputError(f"the model takes images of {num_channels} channels; only those of 1 or 3 can be trained here")
    normalizes = settings.get("do_normalize", True)
    mean, std = (settings.get(f"image_{name}") if normalizes else None for name in ("mean", "std"))
    resample = settings.get("resample")
    return ImageFormat(
        mode,
        height,
        width,
        fraction,
        int(Image.Resampling.BILINEAR) if resample is None else int(resample),
        tuple(mean or [0.0] * num_channels),
        tuple(std or [1.0] * num_channels),
    )
