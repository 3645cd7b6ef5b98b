"""Frechet distance against its definition; which network's numbers bear which name; what is refused."""

import sys
import types

import numpy as np
import pytest
import torch
from torch import nn

from hf_v0init.errors import InputError

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

from hf_v0init.tasks.gan.image_quality import ClassifierFeatures, ImageQuality, InceptionFeatures, train_classifier


class PixelFeatures(nn.Module):
    """The first pixels are the features."""

    name, num_features, metric = "pixel reader", 3, "pixels"

    def forward(self, images):
        return images.flatten(1)[:, :3].double() / 10


def frechet(real: np.ndarray, generated: np.ndarray) -> float:
    """As its paper writes it, with the root of the product of covariances by its eigenvectors."""
    mean_r, mean_g = real.mean(0), generated.mean(0)
    cov_r, cov_g = np.cov(real, rowvar=False), np.cov(generated, rowvar=False)
    values, vectors = np.linalg.eig(cov_r @ cov_g)
    root = vectors @ np.diag(np.sqrt(values)) @ np.linalg.inv(vectors)
    return float(((mean_r - mean_g) ** 2).sum() + np.trace(cov_r + cov_g - 2 * root.real))


def make_pixels(num: int, seed: int, low: int = 0, high: int = 256) -> torch.Tensor:
    return torch.randint(
        low, high, (num, 1, 3, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed)
    )  # fmt: skip


def test_the_distance_is_that_of_its_paper_and_nothing_is_left_of_earlier_calls():
    real, generated = make_pixels(200, 0), make_pixels(157, 1, low=40)
    features = [images.flatten(1)[:, :3].double().numpy() / 10 for images in (real, generated)]
    quality = ImageQuality(PixelFeatures(), real)
    found = [quality.measure(images) for images in (generated, real, generated)]
    assert found == pytest.approx([frechet(*features), 0.0, frechet(*features)], rel=1e-6, abs=1e-6)


def make_labelled(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes told apart by which half is bright."""
    pixels, labels = make_pixels(num, 3, high=100).repeat(1, 1, 3, 3)[:, :, :8, :8].clone(), torch.arange(num) % 2
    pixels[labels == 0, :, :4] += 150
    pixels[labels == 1, :, 4:] += 150
    return pixels, labels


def test_the_classifier_learns_and_its_distance_is_called_after_it_and_never_fid():
    pixels, labels = make_labelled()
    assert torch.equal(train_classifier(pixels, labels).classify(pixels).argmax(1), labels)
    assert ImageQuality(ClassifierFeatures((1, 8, 8), 10), pixels).extractor.metric == "frechet_distance_classifier"


# ---- Inception -------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """What torch-fidelity's class does with its arguments and its input, at 2,048 features."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert name == "inception-v3-compat" and features_list == ["2048"]
        if feature_extractor_weights_path is None:
            raise OSError("no route to host")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        return (images.float().mean((1, 2, 3))[:, None].expand(-1, 2048),)


@pytest.fixture
def fake_torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inceptions_distance_is_called_fid_and_takes_grayscale(tmp_path, fake_torch_fidelity):
    torch.save({}, tmp_path / "weights.pth")
    extractor = InceptionFeatures(str(tmp_path / "weights.pth"))
    assert extractor(make_pixels(4, 0)).shape == (4, 2048)
    assert ImageQuality(extractor, make_pixels(4, 0)).extractor.metric == "fid"


@pytest.mark.parametrize("path", ["none.pth", "broken.pth", None])
def test_missing_or_wrong_inception_weights_are_one_line(tmp_path, fake_torch_fidelity, path):
    (tmp_path / "broken.pth").write_bytes(b"no weights")
    path = path and str(tmp_path / path)
    with pytest.raises(InputError, match=f"--inception_weights={path}: .*--feature_extractor classifier"):
        InceptionFeatures(path)


@pytest.mark.parametrize("module", ["torch_fidelity", "torchmetrics.image.fid"])
def test_an_absent_package_is_one_line(monkeypatch, module):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=r"pip install 'hf_v0init\[(fid|images)\]'"):
        InceptionFeatures() if module == "torch_fidelity" else ImageQuality(PixelFeatures(), make_pixels(5, 0))


@pytest.mark.slow
def test_the_real_inception_loads_weights_from_a_file(tmp_path, monkeypatch):
    """Where torch-fidelity can be imported: its own network at random, saved, and loaded by path."""
    try:
        from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
    except Exception as error:
        pytest.skip(f"torch-fidelity cannot be imported: {error}")
    path = tmp_path / "random.pth"
    torch.save({}, path)
    with monkeypatch.context() as patch:
        patch.setattr(FeatureExtractorInceptionV3, "load_state_dict", lambda self, state: None)
        network = FeatureExtractorInceptionV3("inception-v3-compat", ["2048", "logits_unbiased"], str(path))
    torch.save(network.state_dict(), path)
    extractor, images = InceptionFeatures(str(path)), make_pixels(3, 0).repeat(1, 1, 11, 11)[:, :, :32, :32]
    assert torch.equal(extractor(images), network(images.expand(-1, 3, -1, -1))[0])
    assert ImageQuality(extractor, images).measure(images) == pytest.approx(0.0, abs=1e-3)
