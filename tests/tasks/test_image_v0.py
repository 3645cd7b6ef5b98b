"""v0 of an image classifier with BatchNorm and augmentation: the oracle's numbers, and training none the wiser."""

import copy

import numpy as np
import pytest
import torch
from image_sets import write_image_folder
from torch.nn import functional
from trainers import Recorder, make_arguments
from transformers import Trainer, default_data_collator

from hf_v0init import V0InitTrainer
from hf_v0init.tasks.images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_v0init.tasks.images.folders import load_image_folder
from hf_v0init.tasks.images.format import choose_format
from hf_v0init.tasks.images.samples import Augmentation, ImageSamples
from hf_v0init.tasks.script_trainer import AnnounceEpoch
from hf_v0init.tasks.token_loss import TokenCrossEntropy
from hf_v0init.trainer.per_sample import choose_samples

SEED, SMOOTHING, BATCH = 11, 0.1, 6
CROP = Augmentation("pad", 1, True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return load_image_folder(write_image_folder(tmp_path_factory.mktemp("v0") / "train", per_class=7), role="train")


def make_samples(images) -> ImageSamples:
    return ImageSamples(images, np.array(images["label"]), choose_format(images), CROP, SEED)


def make_network():
    torch.manual_seed(0)
    config = CifarResNetConfig(
        num_channels=1, layer_type="basic", embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], num_labels=3
    )
    return CifarResNetForImageClassification(config)


def make_trainer(folder, images, callbacks=(), stock=False, **overrides):
    options = {"max_steps": 8, "per_device_train_batch_size": BATCH, "seed": SEED} | overrides
    samples = make_samples(images)
    return (Trainer if stock else V0InitTrainer)(
        model=make_network(),
        args=make_arguments(folder, v0=not stock, **options),
        train_dataset=samples,
        data_collator=default_data_collator,
        compute_loss_func=TokenCrossEntropy(SMOOTHING),
        callbacks=[AnnounceEpoch(samples.begin_epoch), *callbacks],
    )


def state_of(trainer) -> dict:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


PASS = {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_stats_batch_size": 5}


@pytest.mark.parametrize(
    ("options", "num_workers"),
    [
        (PASS, 0),
        (PASS, 2),
        *[({"v0_init": name, "v0_decay": "beta2"}, 0) for name in ("data_driven", "random", "first_gradient")],
    ],
)
def test_v0_computed_and_thrown_away_is_the_stock_run(tmp_path, images, options, num_workers):
    """Weights and BatchNorm statistics, bit for bit, over two epochs with augmentation."""
    workers = {"dataloader_num_workers": num_workers}
    stock = make_trainer(tmp_path / "stock", images, stock=True, **workers)
    stock.train()
    erase = Recorder(erase=True)
    ours = make_trainer(tmp_path / "v0", images, [erase], **options, **workers)
    erase.trainer = ours
    ours.train()
    assert any(v0.any() for v0 in erase.v0.values()) and ours.get_v0_report()["strategy"] == options["v0_init"]
    expected, found = state_of(stock), state_of(ours)
    assert any("running_var" in name for name in expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def compute_gradients(network, batch) -> dict[str, torch.Tensor]:
    network.zero_grad()
    logits = network(pixel_values=batch["pixel_values"]).logits
    functional.cross_entropy(logits, batch["labels"], label_smoothing=SMOOTHING).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.dim() > 1}


def test_v0_of_the_pass_is_the_oracles(tmp_path, images):
    """Gradients of the smoothed loss in training mode, over images augmented as in the first epoch, batch by batch."""
    keep, options = Recorder(), {**PASS, "v0_num_samples": 20, "v0_stats_batch_size": BATCH, "v0_seed": 5}
    keep.trainer = make_trainer(tmp_path, images, [keep], **options, max_steps=1)
    keep.trainer.train()

    samples, network = make_samples(images), make_network().double().train()
    chosen = choose_samples(21, 20, 5)
    total, total_sq, num, num_batches = {}, {}, 0, 0
    for start in range(0, 20, BATCH):
        positions = chosen[start : start + BATCH]
        batch = default_data_collator([samples[position] for position in positions])
        batch["pixel_values"] = batch["pixel_values"].double()
        for name, gradient in compute_gradients(copy.deepcopy(network), batch).items():
            total[name] = total.get(name, 0) + len(positions) * gradient
            total_sq[name] = total_sq.get(name, 0) + len(positions) * gradient**2
        num, num_batches = num + len(positions), num_batches + 1
    assert keep.v0.keys() >= total.keys()
    for name in total:
        mean = total[name] / num
        spread = ((total_sq[name] - total[name] ** 2 / num) / (num_batches - 1)).clamp(min=0)
        expected = mean**2 + spread * (1 - 1 / num)
        assert torch.allclose(keep.v0[name].double(), expected, rtol=2e-3, atol=1e-3 * expected.mean().item()), name
