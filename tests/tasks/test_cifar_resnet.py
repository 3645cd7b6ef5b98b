"""The ResNet for small images: its sizes, its weights, and that others can load it without this package."""

import json
from pathlib import Path

import pytest
import torch
from processes import start
from transformers import AutoConfig, AutoModelForImageClassification

from hf_v0init.tasks.images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification

CONFIGS = Path(__file__).parents[2] / "configs" / "image_classification"
SMALL = {"layer_type": "basic", "embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3}


@pytest.mark.parametrize(
    ("name", "classes", "known"),
    [("cifar_resnet34", 10, 21_282_122), ("resnet18", 1000, 11_689_512)],  # as the usual implementations have
)
def test_the_papers_networks_have_their_known_sizes(name, classes, known):
    settings = json.loads((CONFIGS / f"{name}.json").read_text())
    config = AutoConfig.for_model(**settings, num_labels=classes)
    with torch.device("meta"):
        network = AutoModelForImageClassification.from_config(config)
    assert network.num_parameters() == known


def test_the_stem_keeps_the_images_size_and_is_drawn_as_other_convolutions():
    torch.manual_seed(0)
    network = CifarResNetForImageClassification(CifarResNetConfig(**{**SMALL, "embedding_size": 512}))
    weight = network.resnet.embedder.embedder.convolution.weight
    assert weight.shape == (512, 3, 3, 3)
    assert weight.std().item() == pytest.approx((2 / (9 * 512)) ** 0.5, rel=0.03)  # He, fan out; 13,824 draws
    assert network.resnet.embedder(torch.zeros(1, 3, 32, 32)).shape == (1, 512, 32, 32)
    states = network(pixel_values=torch.zeros(1, 3, 32, 32), output_hidden_states=True).hidden_states
    assert [tuple(state.shape[2:]) for state in states] == [(32, 32), (32, 32), (16, 16)]


@pytest.fixture
def saved(tmp_path):
    """A folder with a model, images, and what the model makes of them."""
    network = CifarResNetForImageClassification(CifarResNetConfig(**SMALL)).eval()
    network.save_pretrained(tmp_path / "model")
    images = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    return tmp_path / "model", images, network(pixel_values=images).logits


def test_it_is_saved_and_loaded(saved):
    folder, images, expected = saved
    again = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(again) is CifarResNetForImageClassification
    assert torch.equal(again(pixel_values=images).logits, expected)


@pytest.mark.slow
def test_it_is_loaded_without_this_package(saved, tmp_path):
    folder, _, expected = saved
    code = (
        "import sys, torch; from transformers import AutoModelForImageClassification as M\n"
        f"m = M.from_pretrained({str(folder)!r}, trust_remote_code=True).eval()\n"
        "x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))\n"
        "assert 'hf_v0init' not in sys.modules\n"
        "print(m(pixel_values=x).logits.tolist())"
    )
    done = start("-c", code, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.allclose(torch.tensor(json.loads(done.stdout)), expected, atol=1e-6)
