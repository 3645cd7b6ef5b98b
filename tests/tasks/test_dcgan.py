"""The DCGAN, its losses, and v0 for both networks: the oracle's numbers, and nothing but second moments touched."""

import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from trainers import call_before_update

from hf_v0init import read_second_moment
from hf_v0init.errors import InputError
from hf_v0init.estimation.batches import choose_samples, compute_batch_seed
from hf_v0init.tasks.gan.dcgan import (
    IMAGE_SIZES,
    Discriminator,
    Generator,
    compute_discriminator_loss,
    compute_generator_loss,
    draw_noise,
)
from hf_v0init.tasks.gan.optimizers import join_reports
from hf_v0init.tasks.gan.training import GanRun, ImageOrder
from hf_v0init.tasks.images.format import round_to_pixels, scale_pixels

# ---- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_sizes_range_and_parameters(image_size):
    generator = Generator(image_size, num_channels=2, latent_size=5, base_channels=3)
    discriminator = Discriminator(image_size, num_channels=2, base_channels=3)
    images = generator(draw_noise(2, 5))
    assert images.shape == (2, 2, image_size, image_size)
    assert images.abs().max() <= 1.0
    assert discriminator(images).shape == (2,)
    widths = [3 * 2**k for k in range(IMAGE_SIZES.index(image_size) + 1)]  # from the image inwards
    pairs = list(itertools.pairwise(widths))
    expected = 5 * widths[-1] * 16 + sum(16 * a * b for a, b in pairs) + 3 * 2 * 16 + 2 + 2 * sum(widths)
    assert sum(p.numel() for p in generator.parameters()) == expected
    expected = 2 * 3 * 16 + 3 + sum(16 * a * b for a, b in pairs) + 2 * sum(widths[1:]) + widths[-1] * 16 + 1
    assert sum(p.numel() for p in discriminator.parameters()) == expected


def test_the_papers_generator_has_its_sizes():
    """64x64 with 128 channels at half size: 100 -> 1024x4x4 -> 512 -> 256 -> 128 -> 3x64x64."""
    generator = Generator(64, 3, 100, 128)
    shapes = [tuple(m.weight.shape[:2]) for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert shapes == [(100, 1024), (1024, 512), (512, 256), (256, 128), (128, 3)]


def test_initial_weights_are_the_papers():
    torch.manual_seed(0)
    for network in (Generator(32), Discriminator(32)):
        for module in network.modules():
            if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
                tolerance = 4 * 0.02 / module.weight.numel() ** 0.5
                assert abs(float(module.weight.mean())) < tolerance
                assert float(module.weight.std()) == pytest.approx(0.02, abs=tolerance)
            if isinstance(module, nn.BatchNorm2d):
                assert float(module.weight.mean()) == pytest.approx(1.0, abs=4 * 0.02 / module.weight.numel() ** 0.5)
            if getattr(module, "bias", None) is not None:
                assert not module.bias.any()


@pytest.mark.parametrize("image_size", [4, 28, 33, 256])
def test_other_sizes_are_refused(image_size):
    for network in (Generator, Discriminator):
        with pytest.raises(InputError, match=f"image_size={image_size}: .* 8, 16, 32, 64, 128"):
            network(image_size)


def test_losses_are_binary_cross_entropies():
    torch.manual_seed(0)
    discriminator, real, generated = Discriminator(8, 1, 4), torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    loss, on_real, on_generated = compute_discriminator_loss(discriminator, real, generated)
    entropy = nn.functional.binary_cross_entropy_with_logits
    expected = entropy(on_real, torch.ones(6)) + entropy(on_generated, torch.zeros(6))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(on_real, discriminator(real))
    torch.testing.assert_close(
        compute_generator_loss(discriminator, generated), entropy(on_generated, torch.ones(6))
    )  # fmt: skip


def test_saved_and_loaded_it_is_the_same(tmp_path):
    generator = Generator(16, 1, 7, 4).eval()
    generator(draw_noise(3, 7))
    generator.save_pretrained(tmp_path)
    loaded = Generator.from_pretrained(tmp_path).eval()
    noise = draw_noise(3, 7)
    assert torch.equal(loaded(noise), generator(noise))
    assert (loaded.image_size, loaded.num_channels, loaded.latent_size) == (16, 1, 7)
    card = (tmp_path / "README.md").read_text()
    assert "library_name: hf_v0init" in card and "arXiv 1511.06434" in card and "pushed" not in card


def test_pixels_survive_the_way_to_the_network_and_back():
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 1, 16, 16)
    scaled = scale_pixels(pixels)
    assert (scaled.min(), scaled.max()) == (-1.0, 1.0)
    assert torch.equal(round_to_pixels(scaled), pixels)


# ---- the order of images ---------------------------------------------------------------------------------------------


def test_each_epoch_holds_each_image_once_over_all_processes():
    one = ImageOrder(26, 8, seed=3)
    two = [ImageOrder(26, 4, seed=3, rank=rank, world_size=2) for rank in range(2)]
    assert one.steps_per_epoch == two[0].steps_per_epoch == 3
    epochs = []
    for epoch in range(2):
        steps = range(3 * epoch, 3 * epoch + 3)
        numbers = torch.cat([one.get(step) for step in steps])
        assert len(numbers.unique()) == 24
        for step in steps:
            assert torch.equal(one.get(step), torch.cat([each.get(step) for each in two]))
        epochs.append(numbers)
    assert not torch.equal(*epochs)
    assert torch.equal(ImageOrder(26, 8, seed=3).get(4), one.get(4))  # a resumed run begins anywhere
    assert not torch.equal(ImageOrder(26, 8, seed=4).get(0), one.get(0))
    with pytest.raises(InputError, match="26 training images are too few for 4 process"):
        ImageOrder(26, 8, seed=3, world_size=4)


# ---- v0 --------------------------------------------------------------------------------------------------------------


def make_training(output_dir, **options):
    from hf_v0init import V0InitTrainingArguments

    defaults = {"per_device_train_batch_size": 8, "max_steps": 3, "learning_rate": 2e-3, "adam_beta1": 0.5, "seed": 5}
    defaults |= {"max_grad_norm": 0.0, "lr_scheduler_type": "constant", "optim": "adamw_torch", "save_strategy": "no"}
    defaults |= {"logging_steps": 1, "use_cpu": True, "disable_tqdm": True, "report_to": "none"}
    return V0InitTrainingArguments(output_dir=str(output_dir), **(defaults | options))


def make_trainer(output_dir, **options) -> GanRun:
    torch.manual_seed(0)
    networks = Generator(16, 1, latent_size=6, base_channels=4), Discriminator(16, 1, base_channels=4)
    pixels = torch.randint(0, 256, (40, 1, 16, 16), dtype=torch.uint8)
    return GanRun(*networks, pixels, make_training(output_dir, **options))


class StopHere(Exception):
    pass


def write_v0(trainer) -> dict:
    """What is before and after the passes, which end before the first step."""
    snapshots = []

    def snapshot():
        everything = {f"{n}.{k}": v.clone() for n, net in trainer.networks.items() for k, v in net.state_dict().items()}
        everything |= {"rng": torch.get_rng_state()}
        modes = [m.training for net in trainer.networks.values() for m in net.modules()]
        flags = [p.requires_grad for net in trainer.networks.values() for p in net.parameters()]
        gradients = [p.grad for net in trainer.networks.values() for p in net.parameters()]
        snapshots.append((everything, modes, flags, gradients))

    def stop():
        snapshot()
        raise StopHere

    snapshot()
    with pytest.raises(StopHere):
        trainer.train(on_ready=stop)
    return snapshots


def test_both_passes_leave_both_networks_and_batch_norm_untouched(tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", v0_estimator="per_sample")
    (before, *rest), (after, *rest_after) = write_v0(trainer)
    assert any("running_var" in name for name in before)
    for name, value in before.items():
        assert torch.equal(value, after[name]), name
    assert rest == rest_after
    assert not any(gradient is not None for gradient in rest[2])
    for name, network in trainer.networks.items():
        moments = [read_second_moment(trainer.optimizers[name], p) for p in network.parameters() if p.dim() >= 2]
        assert all(v.sum() > 0 for v in moments)


def test_the_passes_v0_is_the_oracles_for_each_networks_own_loss(tmp_path):
    trainer = make_trainer(
        tmp_path,
        v0_init="data_driven",
        v0_num_samples=30,
        v0_stats_batch_size=6,
        v0_estimator="per_sample",
        v0_scale=2.0,
    )
    write_v0(trainer)
    generator, discriminator = trainer.networks["generator"], trainer.networks["discriminator"]
    entropy = nn.functional.binary_cross_entropy_with_logits
    samples = torch.tensor(choose_samples(40, 30, 5))
    for name, network in trainer.networks.items():
        gradients = []
        for number, batch in enumerate(samples.split(6)):
            torch.manual_seed(compute_batch_seed(5, number))
            noise = torch.randn(6, 6)
            on_generated = discriminator(generator(noise))
            if name == "generator":
                loss = entropy(on_generated, torch.ones(6))
            else:
                on_real = discriminator(trainer.pixels[batch].float() / 127.5 - 1)
                loss = entropy(on_real, torch.ones(6)) + entropy(on_generated, torch.zeros(6))
            gradients.append(torch.autograd.grad(loss, [p for p in network.parameters() if p.dim() >= 2]))
        for position, parameter in enumerate(p for p in network.parameters() if p.dim() >= 2):
            g = torch.stack([batch[position].double() for batch in gradients])
            spread = 6 * g.var(0, unbiased=True)  # of single samples
            expected = 2.0 * (g.mean(0).square() + spread * (1 - 1 / 30))
            v0 = read_second_moment(trainer.optimizers[name], parameter).double()
            torch.testing.assert_close(v0, expected, rtol=2e-4, atol=1e-6 * float(expected.max()))
    report = trainer.v0_record
    assert report["num_samples"] == 60 and report["networks"]["generator"]["num_samples"] == 30
    assert report["effective_batch_size"] == 8.0


@pytest.mark.parametrize(
    ("options", "num"),
    [({"v0_init": "first_gradient", "v0_decay": "beta2"}, 1), ({"v0_init": "data_driven", "v0_decay": "beta2"}, 1)],
)
def test_v0_of_both_networks_is_the_mean_square_of_their_first_gradients(tmp_path, options, num):
    """As each optimizer sees them; the networks stand still while they are measured."""
    trainer = make_trainer(tmp_path, **options)
    gradients, found = {}, {}
    start = {n: [p.detach().clone() for p in net.parameters()] for n, net in trainer.networks.items()}

    def watch(name, optimizer):
        parameters = list(trainer.networks[name].parameters())

        def keep_gradients(*_):
            gradients.setdefault(name, []).append([p.grad.double() for p in parameters])
            if len(gradients[name]) <= num:
                assert all(torch.equal(*pair) for pair in zip(parameters, start[name], strict=True))

        def keep_v0(*_):
            if name not in found and len(gradients[name]) == num:
                found[name] = [read_second_moment(optimizer, p) for p in parameters]
                found[name] = [None if v is None else v.double() for v in found[name]]

        optimizer.register_step_pre_hook(keep_gradients)
        return lambda: optimizer.register_step_pre_hook(call_before_update(keep_v0))  # once ours is there

    later = [watch(name, optimizer) for name, optimizer in trainer.optimizers.items()]
    trainer.train(on_ready=lambda: [register() for register in later])
    assert gradients.keys() == found.keys() == {"generator", "discriminator"}
    for name, moments in found.items():
        for v0, *first in zip(moments, *gradients[name][:num], strict=True):
            assert (v0 is None) == (first[0].dim() < 2)
            if v0 is not None:
                torch.testing.assert_close(v0, torch.stack(first).square().mean(0), rtol=1e-5, atol=1e-20)
    assert trainer.v0_record["networks"]["generator"]["num_parameters_with_v0"] > 0


def test_v0_apart_the_run_is_the_same_run(tmp_path):
    """Same weights, images and noise at every step, whatever the passes did."""
    weights = []
    for strategy in ("zeros", "data_driven"):
        trainer = make_trainer(tmp_path / strategy, v0_init=strategy, v0_estimator="per_sample")
        if strategy == "data_driven":

            def forget(trainer=trainer):
                for optimizer in trainer.optimizers.values():
                    optimizer.state.clear()
        else:

            def forget():
                pass

        trainer.train(on_ready=forget)
        weights.append({k: v for net in trainer.networks.values() for k, v in net.state_dict().items()})
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_make_the_step_of_their_mean_gradients(tmp_path):
    script = Path(__file__).parents[1] / "launched" / "train_gan.py"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(script)]
    done = subprocess.run(
        [*command, str(tmp_path)],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert not torch.equal(one["real"], two["real"])
    for name in ("generator", "discriminator"):
        for seen, expected in zip(one["seen"][name], one["expected"][name], strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(*pair) for pair in zip(one["weights"][name], two["weights"][name], strict=True))


def test_records_are_joined_by_sums():
    def report(mean):
        return {"strategy": "data_driven", "v0_mean": mean, "num_samples": 5, "num_batches": 1, "seconds": 2.0}

    reports = {"generator": report(1.0), "discriminator": report(4.0)}
    assert join_reports(reports) == {
        "strategy": "data_driven", "num_samples": 10, "num_batches": 2, "num_skipped": 0, "seconds": 4.0, "networks": reports,
    }  # fmt: skip
