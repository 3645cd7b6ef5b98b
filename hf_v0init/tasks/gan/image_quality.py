"""How good generated images are: Frechet distance and score in the features of a network, by torchmetrics.

    FID   |mu_r - mu_g|^2 + tr(S_r + S_g - 2 (S_r S_g)^(1/2))      Heusel et al., NeurIPS 2017; 0 is best
    IS    exp(E_x KL(p(y|x) || p(y)))                               Salimans et al., NeurIPS 2016; 1 is worst

These names belong to one network, the Inception v3 of 2015-12-05 with torch-fidelity's weights. In the features of any other
network the numbers are of another size, and they are called after it: "Frechet distance (digits classifier)".

A feature extractor is a module that maps uint8 images (n, channels, height, width) to (features (n, d), logits (n, classes)),
with attributes `name`, `num_features` and `is_inception`. Needs torchmetrics; Inception also torch-fidelity with torchvision.
"""

import logging
import math
import warnings
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import nn

from hf_v0init import InputError

from ...extras import describe_missing

logger = logging.getLogger("hf_v0init")

NUM_SPLITS = 10  # of the images for the score's standard deviation, as in its paper
SMALLEST_SET = 2  # images of a kind that have a covariance
CLASSIFIER_SEED = 0  # its own, so that runs of all seeds are measured by one network
CLASSIFIER_FEATURES = 64
CLASSIFIER_BATCH = 64
CLASSIFIER_EPOCHS, CLASSIFIER_STEPS = 10, 3000  # whichever is less
HELD_OUT_SHARE = 0.2
LITTLE_TRUST = 0.8  # accuracy below which the user is told


class InceptionFeatures(nn.Module):
    """The network of FID and IS: torch-fidelity's Inception v3, 2,048 features of the last pooling layer.

    Args:
        weights_path: torch-fidelity's file of weights. None: its own cache, filled from the network if need be.

    Raises:
        InputError: torch-fidelity cannot be imported, or there are no weights.
    """

    name, num_features, is_inception = "Inception v3", 2048, True

    def __init__(self, weights_path: str | None = None) -> None:
        super().__init__()
        remedy = "or use --feature_extractor classifier"
        if weights_path is not None and not Path(weights_path).is_file():
            raise InputError(
                f"--inception_weights={weights_path}: no such file; give torch-fidelity's weights-inception-2015-12-05-6726825d.pth, "
                + remedy
            )
        try:
            from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
        except Exception as error:  # a torchvision that does not fit the installed torch raises RuntimeError
            problem = f"FID needs torch-fidelity with a torchvision that fits this torch ({error})"
            raise InputError(f"{describe_missing('fid', problem)}, {remedy}") from error
        try:
            self.network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], weights_path)
        except Exception as error:  # of many kinds: no network, not those weights, not a file of weights
            what = f"--inception_weights={weights_path}: cannot be loaded"
            if weights_path is None:
                what = "the weights of Inception v3 cannot be downloaded"
            raise InputError(
                f"{what} ({error}); give torch-fidelity's file by --inception_weights, {remedy}"
            ) from error

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (n, 2048) and logits (n, 1008) of uint8 images; grayscale is taken as colour."""
        return self.network(images.expand(-1, 3, -1, -1) if images.shape[1] == 1 else images)


class ClassifierFeatures(nn.Module):
    """A small convolutional classifier: its features are the 64 activations before its last layer.

    Args:
        shape: channels, height and width of the images; height and width powers of two, 8 or more.
        num_classes: two or more.
        name: of what is classified, for people: "digits classifier".
    """

    is_inception = False
    num_features = CLASSIFIER_FEATURES

    def __init__(self, shape: tuple[int, int, int], num_classes: int, name: str) -> None:
        super().__init__()
        self.name = name
        channels, height, width = shape
        layers, wide = [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()], 16
        while min(height, width) > 4:
            layers += [nn.Conv2d(wide, 32, 3, stride=2, padding=1), nn.ReLU()]
            wide, height, width = 32, math.ceil(height / 2), math.ceil(width / 2)
        layers += [nn.Flatten(), nn.Linear(wide * height * width, CLASSIFIER_FEATURES), nn.ReLU()]
        self.body, self.head = nn.Sequential(*layers), nn.Linear(CLASSIFIER_FEATURES, num_classes)
        self.accuracy = math.nan

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return features (n, 64) and logits (n, num_classes) of uint8 images."""
        features = self.body(images.float() / 127.5 - 1.0)
        return features, self.head(features)


def train_classifier(images: torch.Tensor, labels: torch.Tensor, name: str, device="cpu") -> ClassifierFeatures:
    """Train a `ClassifierFeatures` on labelled images, the same one in every run on the same machine.

    Random states are as before afterwards. A fifth of the images is held out; `accuracy` is the share of it that is right.

    Args:
        images: uint8, shape (n, channels, height, width).
        labels: int64, shape (n,), classes from 0 on.

    Raises:
        InputError: fewer than two classes, or no image to hold out.
    """
    if len(labels.unique()) < 2:
        raise InputError(
            "a classifier as feature extractor needs images of two classes or more, one subfolder each; give such images, or use "
            "--feature_extractor inception"
        )
    num_held_out = int(HELD_OUT_SHARE * len(images))
    if num_held_out == 0:
        raise InputError(f"a classifier as feature extractor cannot be trained on {len(images)} images; give 5 or more")
    num_epochs = min(CLASSIFIER_EPOCHS, max(1, CLASSIFIER_STEPS * CLASSIFIER_BATCH // len(images)))
    with torch.random.fork_rng(), torch.enable_grad():
        torch.manual_seed(CLASSIFIER_SEED)
        network = ClassifierFeatures(tuple(images.shape[1:]), int(labels.max()) + 1, name).to(device)
        order = torch.randperm(len(images))
        held_out, kept = order[:num_held_out], order[num_held_out:]
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(num_epochs):
            for batch in kept[torch.randperm(len(kept))].split(CLASSIFIER_BATCH):
                optimizer.zero_grad()
                logits = network(images[batch].to(device))[1]
                nn.functional.cross_entropy(logits, labels[batch].to(device)).backward()
                optimizer.step()
    network.eval().requires_grad_(False)
    predicted = [network(images[batch].to(device))[1].argmax(1).cpu() for batch in held_out.split(1024)]
    network.accuracy = float((torch.cat(predicted) == labels[held_out]).float().mean())
    logger.info(f"{name} trained on {len(kept):,} images: {network.accuracy:.1%} of {num_held_out:,} others are right")
    if network.accuracy < LITTLE_TRUST:
        logger.warning(f"the {name} is right on {network.accuracy:.1%} only: distances in its features say little")
    return network


class ImageQuality:
    """Measures generated images against real ones.

    Args:
        extractor: see the top of the file.
        real: uint8, shape (n, channels, height, width), n >= 2; looked at once.
        batch_size: images the extractor gets at a time.
        device: where it works.

    Raises:
        InputError: torchmetrics is not installed, or there are fewer than two real images.
    """

    def __init__(self, extractor: nn.Module, real: torch.Tensor, batch_size: int = 256, device="cpu") -> None:
        if len(real) < SMALLEST_SET:
            raise InputError(f"{len(real)} real images have no covariance; a Frechet distance needs two or more")
        self.extractor = extractor.to(device).eval()
        self.batch_size, self.device = batch_size, device
        distance, self._score = import_metrics()
        features = _Given(extractor.num_features)
        self.frechet = distance(features, reset_real_features=False, sync_on_compute=False)
        # Sums are fp64, which Apple's GPUs do not have.
        self.metric_device = "cpu" if torch.device(device).type == "mps" else device
        self.frechet.to(self.metric_device)
        for batch in real.split(batch_size):
            self.frechet.update(self._extract(batch)[0], real=True)

    @property
    def names(self) -> dict[str, str]:
        """Names of the figures: key in files -> words for people."""
        if self.extractor.is_inception:
            return {"fid": "FID", "inception_score": "Inception score"}
        name = self.extractor.name
        return {"frechet_distance_classifier": f"Frechet distance ({name})", "score_classifier": f"score ({name})"}

    def measure(self, generated: Iterable[torch.Tensor]) -> dict[str, float]:
        """Measure images.

        Args:
            generated: uint8 batches, two images or more in all.

        Returns:
            The figures under the keys of `names`: a distance >= 0 in units of features squared, and a score from 1 to the
            number of classes with, under `..._std`, its standard deviation over ten parts of the images. Random states are as before.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that the score keeps its inputs
            score = self._score(_Given(self.extractor.num_features), splits=NUM_SPLITS, sync_on_compute=False)
        self.frechet.reset()
        num = 0
        for images in generated:
            for batch in images.split(self.batch_size):
                features, logits = self._extract(batch)
                self.frechet.update(features, real=False)
                score.update(logits)
                num += len(batch)
        if num < SMALLEST_SET:
            raise InputError(f"{num} generated images have no covariance; a Frechet distance needs two or more")
        with torch.random.fork_rng():
            torch.manual_seed(0)  # of the score's parts
            mean, std = score.compute()
        distance_key, score_key = self.names
        return {
            distance_key: max(0.0, float(self.frechet.compute())),  # rounding may leave -1e-9
            score_key: float(mean),
            f"{score_key}_std": float(std) if num >= 2 * NUM_SPLITS else 0.0,
        }

    @torch.no_grad()
    def _extract(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        features, logits = self.extractor(images.to(self.device))
        return features.to(self.metric_device).double(), logits.to(self.metric_device).double()


def import_metrics() -> tuple[type, type]:
    """Import torchmetrics' Frechet distance and score.

    Raises:
        InputError: they cannot be imported.
    """
    try:
        from torchmetrics.image.fid import FrechetInceptionDistance
        from torchmetrics.image.inception import InceptionScore
    except Exception as error:  # beside torch-fidelity it imports torchvision, which may not fit this torch
        problem = f"measuring images needs torchmetrics, which cannot be imported ({error})"
        raise InputError(describe_missing("images", problem)) from error
    return FrechetInceptionDistance, InceptionScore


class _Given(nn.Identity):
    """For torchmetrics: what it is given are features already, computed once for both figures."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features
