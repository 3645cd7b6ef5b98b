"""v0 of an image classifier with BatchNorm and augmentation: the oracle's numbers, and training none the wiser."""

import copy

import numpy as np
import pytest
import torch
from image_sets import write_image_folder
from torch.nn import functional
from trainers import Recorder, make_arguments, second_moments_of
from transformers import Trainer, TrainerCallback

from hf_v0init import V0InitTrainer
from hf_v0init.estimation.batches import choose_samples
from hf_v0init.tasks.images.cifar_resnet import CifarResNetConfig, CifarResNetForImageClassification
from hf_v0init.tasks.images.folders import load_image_folder
from hf_v0init.tasks.images.format import choose_format
from hf_v0init.tasks.images.samples import Augmentation, ImageSamples, stack_samples
from hf_v0init.tasks.script_trainer import AnnounceEpoch
from hf_v0init.tasks.token_loss import TokenCrossEntropy

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
        data_collator=stack_samples,
        compute_loss_func=TokenCrossEntropy(SMOOTHING),
        callbacks=[AnnounceEpoch(samples.begin_epoch), *callbacks],
    )


def state_of(trainer) -> dict:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


class KeepStart(TrainerCallback):
    """Keeps the weights, buffers and second moments with which the first step begins."""

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        if state.global_step == 0:
            self.state = {name: value.clone() for name, value in model.state_dict().items()}
            self.v0 = second_moments_of(self.trainer)


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


def test_the_pass_leaves_batchnorm_as_it_was(tmp_path, images):
    keep = KeepStart()
    trainer = make_trainer(tmp_path, images, [keep], **PASS, max_steps=1)
    keep.trainer = trainer
    before = state_of(trainer)
    trainer.train()
    for name, value in before.items():
        assert torch.equal(keep.state[name], value), name
    assert not torch.equal(state_of(trainer)["resnet.embedder.embedder.normalization.running_mean"], torch.zeros(4))


def compute_gradients(network, batch) -> dict[str, torch.Tensor]:
    network.zero_grad()
    logits = network(pixel_values=batch["pixel_values"]).logits
    functional.cross_entropy(logits, batch["labels"], label_smoothing=SMOOTHING).backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.dim() > 1}


def test_v0_of_the_pass_is_the_oracles(tmp_path, images):
    """Gradients of the smoothed loss in training mode, over images augmented as in the first epoch, batch by batch."""
    keep = KeepStart()
    trainer = make_trainer(
        tmp_path, images, [keep], v0_init="data_driven", v0_num_samples=20, v0_stats_batch_size=BATCH,
        v0_estimator="per_sample", v0_seed=5, max_steps=1,
    )  # fmt: skip
    keep.trainer = trainer
    trainer.train()

    samples, network = make_samples(images), make_network().double().train()
    chosen = choose_samples(21, 20, 5)
    total, total_sq, num, num_batches = {}, {}, 0, 0
    for start in range(0, 20, BATCH):
        positions = chosen[start : start + BATCH]
        batch = stack_samples([samples[position] for position in positions])
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


@pytest.mark.parametrize(
    ("options", "num"), [({"v0_init": name, "v0_decay": "beta2"}, 1) for name in ("first_gradient", "data_driven")]
)
def test_v0_is_of_the_first_augmented_batches_as_adam_sees_them(tmp_path, images, options, num):
    """Clipped, that is, at weights that stay as they are while they are measured."""
    recorder = Recorder()
    trainer = make_trainer(tmp_path, images, [recorder], max_steps=num + 1, max_grad_norm=0.1, **options)
    recorder.trainer = trainer
    trainer.train()
    norm = torch.stack([gradient.norm() for gradient in recorder.gradients[0].values()]).norm()
    assert norm.item() == pytest.approx(0.1, rel=1e-3)
    for name, v0 in recorder.v0.items():
        seen = torch.stack([gradients[name].double() for gradients in recorder.gradients[:num]])
        if v0.dim() > 1:
            torch.testing.assert_close(v0.double(), seen.square().mean(0), rtol=1e-5, atol=1e-20)
    assert any(v0.dim() > 1 for v0 in recorder.v0.values())


def test_runs_of_other_v0_and_other_workers_see_the_same_batches(tmp_path, images):
    seen = {}
    for name, options in {
        "zeros": {},
        "data_driven": {"v0_init": "data_driven"},
        "pass": PASS,
        "workers": {"dataloader_num_workers": 2, "dataloader_persistent_workers": True},
    }.items():
        trainer = make_trainer(tmp_path / name, images, **options)
        batches = seen[name] = []
        original = trainer.training_step

        def record(model, inputs, *args, batches=batches, original=original, **kwargs):
            batches.append(inputs["pixel_values"].clone())
            return original(model, inputs, *args, **kwargs)

        trainer.training_step = record
        trainer.train()
    assert len(seen["zeros"]) == 8
    for name in ("data_driven", "pass", "workers"):
        assert all(torch.equal(a, b) for a, b in zip(seen["zeros"], seen[name], strict=True))
    first, second = (np.sort(torch.cat(seen["zeros"][i : i + 4]).sum(dim=(1, 2, 3)).numpy()) for i in (0, 4))
    assert not np.allclose(first, second)  # the second epoch's draws are others
