"""The DCGAN, its losses, and v0 for both networks: the oracle's numbers, and nothing but second moments touched."""

import pytest
import torch
from processes import ROOT, TORCHRUN, start
from torch import nn

from hf_v0init import V0InitTrainingArguments, read_second_moment
from hf_v0init.estimation.per_sample import compute_batch_seed
from hf_v0init.tasks.gan.dcgan import (
    IMAGE_SIZES,
    Discriminator,
    Generator,
    compute_discriminator_loss,
    compute_generator_loss,
    draw_noise,
)
from hf_v0init.tasks.gan.training import GanRun, choose_images
from hf_v0init.trainer.per_sample import choose_samples

# ---- the networks ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("image_size", IMAGE_SIZES)
def test_sizes_and_range(image_size):
    generator = Generator(image_size, num_channels=2, latent_size=5, base_channels=3)
    discriminator = Discriminator(image_size, num_channels=2, base_channels=3)
    images = generator(draw_noise(2, 5))
    assert images.shape == (2, 2, image_size, image_size)
    assert images.abs().max() <= 1.0
    assert discriminator(images).shape == (2,)


def test_the_papers_generator_has_its_sizes():
    """64x64 with 128 channels at half size: 100 -> 1024x4x4 -> 512 -> 256 -> 128 -> 3x64x64."""
    generator = Generator(64, 3, 100, 128)
    shapes = [tuple(m.weight.shape[:2]) for m in generator.modules() if isinstance(m, nn.ConvTranspose2d)]
    assert shapes == [(100, 1024), (1024, 512), (512, 256), (256, 128), (128, 3)]


def test_losses_are_binary_cross_entropies():
    torch.manual_seed(0)
    discriminator, real, generated = Discriminator(8, 1, 4), torch.randn(6, 1, 8, 8), torch.randn(6, 1, 8, 8)
    loss, on_real, on_generated = compute_discriminator_loss(discriminator, real, generated)
    entropy = nn.functional.binary_cross_entropy_with_logits
    expected = entropy(on_real, torch.ones(6)) + entropy(on_generated, torch.zeros(6))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(on_real, discriminator(real))
    of_generator = compute_generator_loss(discriminator, generated)
    torch.testing.assert_close(of_generator, entropy(on_generated, torch.ones(6)))


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


# ---- the order of images ---------------------------------------------------------------------------------------------


def test_each_epoch_holds_each_image_once():
    steps = [choose_images(26, 8, seed=3, step=step) for step in range(6)]
    epochs = [torch.cat(steps[:3]), torch.cat(steps[3:])]
    assert [len(numbers.unique()) for numbers in epochs] == [24, 24] and not torch.equal(*epochs)
    assert torch.equal(choose_images(26, 8, seed=3, step=4), steps[4])  # a resumed run begins anywhere
    assert not torch.equal(choose_images(26, 8, seed=4, step=0), steps[0])


# ---- v0 --------------------------------------------------------------------------------------------------------------


def make_training(output_dir, **options):
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


def write_v0(trainer) -> None:
    """Go up to the first step."""

    def stop():
        raise StopHere

    with pytest.raises(StopHere):
        trainer.train(on_ready=stop)


def test_the_passes_v0_is_the_oracles_for_each_networks_own_loss(tmp_path):
    options = {"v0_num_samples": 30, "v0_stats_batch_size": 6, "v0_estimator": "per_sample", "v0_scale": 2.0}
    trainer = make_trainer(tmp_path, v0_init="data_driven", **options)
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
    report = trainer.get_v0_report()
    assert report["num_samples"] == 60 and report["networks"]["generator"]["num_samples"] == 30
    assert report["effective_batch_size"] == 8.0


def test_v0_apart_the_run_is_the_same_run(tmp_path):
    """Same weights, statistics of batch norms, images and noise at every step, whatever the passes did."""
    weights = []
    for strategy in ("zeros", "data_driven"):
        trainer = make_trainer(tmp_path / strategy, v0_init=strategy, v0_estimator="per_sample")
        states = [optimizer.state for optimizer in trainer.optimizers.values()]
        trainer.train(on_ready=lambda states=states: [state.clear() for state in states])
        weights.append({f"{n}.{k}": v for n, net in trainer.networks.items() for k, v in net.state_dict().items()})
    assert any("running_var" in name for name in weights[0])
    assert all(torch.equal(value, weights[1][name]) for name, value in weights[0].items())


@pytest.mark.slow
def test_two_processes_make_the_step_of_their_mean_gradients(tmp_path):
    done = start(*TORCHRUN, ROOT / "tests" / "launched" / "train_gan.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = (torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(2))
    assert not torch.equal(one["real"], two["real"])
    for name in ("generator", "discriminator"):
        for seen, expected in zip(one["seen"][name], one["expected"][name], strict=True):
            torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-6)
        assert all(torch.equal(*pair) for pair in zip(one["weights"][name], two["weights"][name], strict=True))
