"""Images as a Trainer reads them, with an augmentation whose draws depend on seed, epoch and image and on nothing else.

So they are the same for any number of processes and loader workers and after any resume, they take nothing from the random
states of the run, and the run takes nothing from them. The paper's pass before training sees the images as the first epoch does,
and training sees what it would have seen without it.
"""

import datasets
import numpy as np
import torch

from .augmentation import Augmentation, to_pixels
from .format import ImageFormat

LARGEST_KEPT_BYTES = 1 << 30  # decoded images of a split that are kept in memory, per process
FIRST_DRAW = 1  # that of epoch 0


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
        self.augmentation = None if augmentation is None or augmentation.changes_nothing else augmentation
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


def stack_samples(samples: list[dict]) -> dict[str, torch.Tensor]:
    """Collate samples: "pixel_values", float32, shape (batch, channels, height, width), and "labels", int64, (batch,)."""
    return {
        "pixel_values": torch.stack([sample["pixel_values"] for sample in samples]),
        "labels": torch.tensor([sample["labels"] for sample in samples]),
    }
