"""How good generated images are: torchmetrics' Frechet distance to real ones, in the features of a network.

    |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))      Heusel et al., NeurIPS 2017; 0 is best

It is called FID in the features of one network only, the Inception v3 of 2015-12-05 with torch-fidelity's weights. In those of
any other the numbers are of another size, and they are called after it: "Frechet distance (classifier)".

A feature extractor is a module that maps uint8 images (n, channels, height, width) to features (n, num_features), with
attributes `name`, `num_features`, and `metric`: what the distance is called in files.
"""

import logging
import math

import torch
from torch import nn

from hf_v0init import InputError

from ...extras import describe_missing

logger = logging.getLogger("hf_v0init")

MEASURED_BATCH = 256
CLASSIFIER_SEED = 0  # its own, so that runs of all seeds are measured by one network
CLASSIFIER_FEATURES = 64
CLASSIFIER_BATCH = 64
CLASSIFIER_EPOCHS, CLASSIFIER_STEPS = 10, 3000  # whichever is less
HELD_OUT_SHARE = 0.2


class InceptionFeatures(nn.Module):
    """The network of FID: torch-fidelity's Inception v3, 2,048 features of the last pooling layer.

    Args:
        weights_path: torch-fidelity's file of weights. None: its own cache, filled from the network if need be.

    Raises:
        InputError: torch-fidelity cannot be imported, or there are no weights.
    """

    name, num_features, metric = "Inception v3", 2048, "fid"

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        remedy = "or use --feature_extractor classifier"
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # a torchvision that does not fit the installed torch raises RuntimeError
            problem = f"FID needs torch-fidelity with a torchvision that fits this torch ({error})"
            raise InputError(f"{describe_missing('fid', problem)}, {remedy}") from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048"], weights_path)
        except Exception as error:  # of many kinds: no network, no file, not those weights
            raise InputError(
                f"--inception_weights={weights_path}: the weights of Inception v3 cannot be loaded ({error}); give torch-fidelity's "
                f"file weights-inception-2015-12-05-6726825d.pth, {remedy}"
            ) from error

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (n, 2048) of uint8 images; grayscale is taken as colour."""
        return self.network(images.expand(-1, 3, -1, -1))[0]


class ClassifierFeatures(nn.Module):
    """A small convolutional classifier: its features are the 64 activations before its last layer.

    Args:
        shape: channels, height and width of the images; height and width powers of two, 8 or more.
        num_classes: two or more.
    """

    name, num_features, metric = "classifier", CLASSIFIER_FEATURES, "frechet_distance_classifier"

    def __init__(self, shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = shape
        layers, wide = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()], 16
        while min(height, width) > 4:
            layers += [nn.Conv2d(wide, 32, 3, stride=2, padding=1), nn.ReLU()]
            wide, height, width = 32, math.ceil(height / 2), math.ceil(width / 2)
        layers += [nn.Flatten(), nn.Linear(wide * height * width, CLASSIFIER_FEATURES), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(CLASSIFIER_FEATURES, num_classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return features (n, 64) of uint8 images, in float64, in which the distance is computed."""
        return self.body(images.float() / 127.5 - 1.0).double()

    def classify(self, images: torch.Tensor) -> torch.Tensor:
        """Return logits (n, num_classes) of uint8 images."""
        return self.head(self.body(images.float() / 127.5 - 1.0))


def train_classifier(images: torch.Tensor, labels: torch.Tensor, device="cpu") -> ClassifierFeatures:
    """Train a `ClassifierFeatures` on labelled images, the same one in every run on the same machine.

    Random states are as before afterwards. A fifth of the images is held out, and the share of it that is right is logged.

    Args:
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,), classes from 0 on.

    Raises:
        InputError: fewer than two classes.
    """
    if len(labels.unique()) < 2:
        raise InputError(
            "a classifier as feature extractor needs images of two classes or more, one subfolder each; give such images, or use "
            "--feature_extractor inception"
        )
    num_epochs = min(CLASSIFIER_EPOCHS, max(1, CLASSIFIER_STEPS * CLASSIFIER_BATCH // len(images)))
    num_held_out = int(HELD_OUT_SHARE * len(images))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(CLASSIFIER_SEED)
        network = ClassifierFeatures(tuple(images.shape[1:]), int(labels.max()) + 1).to(device)
        order = torch.randperm(len(images))
        held_out, kept = order[:num_held_out], order[num_held_out:]
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(num_epochs):
            for batch in kept[torch.randperm(len(kept))].split(CLASSIFIER_BATCH):
                optimizer.zero_grad()
                logits = network.classify(images[batch].to(device))
                nn.functional.cross_entropy(logits, labels[batch].to(device)).backward()
                optimizer.step()
    network.eval().requires_grad_(False)
    predicted = [network.classify(images[batch].to(device)).argmax(1).cpu() for batch in held_out.split(1024)]
    num_right = int((torch.cat([torch.empty(0, dtype=torch.long), *predicted]) == labels[held_out]).sum())
    logger.info(f"classifier trained on {len(kept):,} images: {num_right:,} of {num_held_out:,} others are right")
    return network


class ImageQuality:
    """Measures generated images against real ones.

    Args:
        extractor: see the top of the file.
        real: uint8, shape (n, channels, height, width), n >= 2; looked at once.
        device: where it works.

    Raises:
        InputError: torchmetrics cannot be imported.
    """

    def __init__(self, extractor: nn.Module, real: torch.Tensor, device="cpu") -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except Exception as error:  # it imports torchvision, which may not fit this torch
            problem = f"measuring images needs torchmetrics, which cannot be imported ({error})"
            raise InputError(describe_missing("images", problem)) from error
        # Sums are fp64, which Apple's GPUs do not have.
        self.device = "cpu" if torch.device(device).type == "mps" else device
        self.extractor = extractor.eval()
        self.distance = FrechetInceptionDistance(extractor, reset_real_features=False, sync_on_compute=False)
        self.distance.to(self.device)
        self._update(real, is_real=True)

    def measure(self, generated: torch.Tensor) -> float:
        """Return the distance of two images or more, uint8, from the real ones, in units of features squared."""
        self.distance.reset()
        self._update(generated, is_real=False)
        return max(0.0, float(self.distance.compute()))  # rounding may leave -1e-9

    @torch.no_grad()
    def _update(self, images: torch.Tensor, is_real: bool) -> None:
        for batch in images.split(MEASURED_BATCH):
            self.distance.update(batch.to(self.device), real=is_real)
