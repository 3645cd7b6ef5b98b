"""Frechet distance and score against their definitions; which network's numbers bear which name; what is refused."""

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
    """The first pixels are the features, the next ones the logits."""

    name, num_features, is_inception = "pixel reader", 3, False

    def forward(self, images):
        flat = images.flatten(1).float()
        return flat[:, :3] / 10, flat[:, 3:7] - 128.0


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


def test_frechet_distance_and_score_are_those_of_their_papers():
    real, generated = make_pixels(200, 0), make_pixels(157, 1, low=40)
    quality = ImageQuality(PixelFeatures(), real, batch_size=33)
    measured = quality.measure(generated.split(50))
    features = [images.flatten(1)[:, :3].double().numpy() / 10 for images in (real, generated)]
    assert measured["frechet_distance_classifier"] == pytest.approx(frechet(*features), rel=1e-6)
    # The score of ten parts in the order that is drawn for them.
    logits = generated.flatten(1)[:, 3:7].double() - 128
    torch.manual_seed(0)
    p = logits[torch.randperm(157)].softmax(1)
    scores = [(part * (part / part.mean(0)).log()).nan_to_num().sum(1).mean().exp() for part in p.chunk(10)]
    assert measured["score_classifier"] == pytest.approx(float(torch.stack(scores).mean()), rel=1e-6)
    assert measured["score_classifier_std"] == pytest.approx(float(torch.stack(scores).std()), rel=1e-6)


def test_real_images_are_at_distance_zero_and_far_ones_further():
    real = make_pixels(300, 0)
    quality = ImageQuality(PixelFeatures(), real)
    distances = [
        quality.measure([images])["frechet_distance_classifier"] for images in (real, make_pixels(300, 1), real // 4)
    ]
    assert distances[0] == pytest.approx(0.0, abs=1e-6)
    assert distances[0] < distances[1] < distances[2]
    again = quality.measure(real.split(7))["frechet_distance_classifier"]  # nothing is left of earlier calls
    assert again == pytest.approx(distances[0], abs=1e-6)


def test_the_scores_ends_are_one_and_the_number_of_classes():
    quality = ImageQuality(PixelFeatures(), make_pixels(10, 0))
    sure = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    sure.view(400, 9)[torch.arange(400), 3 + torch.arange(400) % 4] = 255
    same = torch.zeros(400, 1, 3, 3, dtype=torch.uint8)
    same.view(400, 9)[:, 3] = 255
    assert quality.measure([sure])["score_classifier"] == pytest.approx(4.0, rel=0.05)
    assert quality.measure([same])["score_classifier"] == pytest.approx(1.0, rel=1e-6)


def test_measuring_leaves_random_states():
    quality = ImageQuality(PixelFeatures(), make_pixels(30, 0))
    before = torch.get_rng_state()
    quality.measure([make_pixels(30, 1)])
    assert torch.equal(before, torch.get_rng_state())


def make_labelled(num: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    """Two classes told apart by which half is bright."""
    pixels, labels = make_pixels(num, 3, high=100).repeat(1, 1, 3, 3)[:, :, :8, :8].clone(), torch.arange(num) % 2
    pixels[labels == 0, :, :4] += 150
    pixels[labels == 1, :, 4:] += 150
    return pixels, labels


def test_the_classifier_learns_is_the_same_in_every_run_and_leaves_random_states():
    pixels, labels = make_labelled()
    before = torch.get_rng_state()
    first = train_classifier(pixels, labels, "halves classifier")
    assert torch.equal(before, torch.get_rng_state())
    torch.manual_seed(99)
    second = train_classifier(pixels, labels, "halves classifier")
    assert first.accuracy == second.accuracy == 1.0
    for mine, theirs in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(mine, theirs) and not mine.requires_grad
    features, logits = first(pixels[:5])
    assert features.shape == (5, 64) and logits.shape == (5, 2)
    torch.testing.assert_close(logits, first.head(features))


def test_a_classifiers_figures_are_called_after_it_and_never_fid():
    quality = ImageQuality(ClassifierFeatures((1, 8, 8), 10, "digits classifier"), make_labelled()[0])
    assert quality.names == {
        "frechet_distance_classifier": "Frechet distance (digits classifier)",
        "score_classifier": "score (digits classifier)",
    }
    measured = quality.measure([make_labelled()[0]])
    assert measured.keys() == {*quality.names, "score_classifier_std"}
    assert not any(
        "fid" in name.lower() or "inception" in name.lower() for name in [*measured, *quality.names.values()]
    )


def test_what_cannot_be_measured_is_refused():
    pixels, labels = make_labelled(8)
    with pytest.raises(InputError, match="two classes or more"):
        train_classifier(pixels, labels * 0, "x")
    with pytest.raises(InputError, match="on 4 images; give 5"):
        train_classifier(pixels[:4], labels[:4], "x")
    with pytest.raises(InputError, match="1 real images have no covariance"):
        ImageQuality(PixelFeatures(), pixels[:1])
    with pytest.raises(InputError, match="1 generated images have no covariance"):
        ImageQuality(PixelFeatures(), pixels).measure([pixels[:1]])


def test_torchmetrics_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchmetrics.image.fid", None)
    with pytest.raises(InputError, match=r"pip install 'hf_v0init\[images\]'"):
        ImageQuality(PixelFeatures(), make_pixels(5, 0))


# ---- Inception -------------------------------------------------------------------------------------------------------


class FakeInception(nn.Module):
    """What torch-fidelity's class does with its arguments and its input, at 2,048 features and 1,008 logits."""

    def __init__(self, name, features_list, feature_extractor_weights_path=None):
        super().__init__()
        assert name == "inception-v3-compat" and features_list == ["2048", "logits_unbiased"]
        if feature_extractor_weights_path is None:
            raise OSError("no route to host")
        self.load_state_dict(torch.load(feature_extractor_weights_path, weights_only=False))

    def forward(self, images):
        assert images.dtype == torch.uint8 and images.shape[1] == 3
        means = images.float().mean((1, 2, 3))[:, None]
        return means.expand(-1, 2048), means.expand(-1, 1008)


@pytest.fixture
def fake_torch_fidelity(monkeypatch):
    module = types.ModuleType("torch_fidelity.feature_extractor_inceptionv3")
    module.FeatureExtractorInceptionV3 = FakeInception
    monkeypatch.setitem(sys.modules, "torch_fidelity", types.ModuleType("torch_fidelity"))
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", module)


def test_inceptions_figures_are_called_fid_and_take_grayscale(tmp_path, fake_torch_fidelity):
    path = tmp_path / "weights.pth"
    torch.save({}, path)
    extractor = InceptionFeatures(str(path))
    features, logits = extractor(make_pixels(4, 0))
    assert features.shape == (4, 2048) and logits.shape == (4, 1008)
    names = ImageQuality.names.fget(types.SimpleNamespace(extractor=extractor))
    assert names == {"fid": "FID", "inception_score": "Inception score"}


def test_missing_or_wrong_inception_weights_are_one_line_with_the_remedy(tmp_path, fake_torch_fidelity):
    broken = tmp_path / "broken.pth"
    broken.write_bytes(b"no weights")
    for path, words in (
        (str(tmp_path / "none.pth"), "none.pth: no such file"),
        (str(broken), "broken.pth: cannot be loaded"),
        (None, "cannot be downloaded (no route to host); give torch-fidelity's file by --inception_weights"),
    ):
        with pytest.raises(InputError) as caught:
            InceptionFeatures(path)
        assert words in str(caught.value) and "--feature_extractor classifier" in str(caught.value)


def test_torch_fidelity_missing_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    with pytest.raises(InputError, match=r"pip install 'hf_v0init\[fid\]', or use --feature_extractor classifier"):
        InceptionFeatures()


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
    features, logits = extractor(images)
    assert features.shape == (3, 2048) and logits.shape == (3, 1008)
    for mine, theirs in zip((features, logits), network(images.expand(-1, 3, -1, -1)), strict=True):
        assert torch.equal(mine, theirs)
    figures = ImageQuality(extractor, images).measure([images])
    assert figures["fid"] == pytest.approx(0.0, abs=1e-3)
