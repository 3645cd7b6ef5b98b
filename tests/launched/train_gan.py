"""Started by torchrun: one step of a GAN on two processes, held against gradients that each computes by itself.

torchrun --nproc_per_node 2 tests/launched/train_gan.py OUTPUT_DIR
"""

import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "references"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tasks"))

import torch
import torch.distributed as dist
from processes import leave
from test_dcgan import make_trainer

from hf_v0init.tasks.gan.dcgan import compute_discriminator_loss, compute_generator_loss
from hf_v0init.tasks.gan.training import choose_images
from hf_v0init.tasks.images.format import scale_pixels


def keep_gradients(trainer, seen: dict) -> None:
    """Record what each optimizer's first step is made of, and the discriminator right after its own."""
    for name, optimizer in trainer.optimizers.items():

        def before(*_, name=name):
            seen[name] = [p.grad.clone() for p in trainer.networks[name].parameters()]

        def after(*_):
            seen["later"] = copy.deepcopy(trainer.networks["discriminator"])

        optimizer.register_step_pre_hook(before)
        if name == "discriminator":
            optimizer.register_step_post_hook(after)


def average(gradients) -> list[torch.Tensor]:
    averaged = [gradient.clone() for gradient in gradients]
    for gradient in averaged:
        dist.all_reduce(gradient)
        gradient /= dist.get_world_size()
    return averaged


def main(output_dir: str) -> None:
    trainer = make_trainer(
        output_dir, v0_init="data_driven", v0_decay="beta2", per_device_train_batch_size=4, max_steps=1
    )
    rank, seen = dist.get_rank(), {}
    keep_gradients(trainer, seen)
    generator, discriminator = (copy.deepcopy(trainer.networks[name]) for name in ("generator", "discriminator"))
    trainer.train()
    torch.manual_seed(trainer.args.seed + rank)  # this process's noise
    generated = generator(torch.randn(4, 6))
    real = scale_pixels(trainer.pixels[choose_images(40, 8, 5, step=0).chunk(2)[rank]])
    losses = {
        "discriminator": compute_discriminator_loss(discriminator, real, generated.detach())[0],
        "generator": compute_generator_loss(seen["later"], generated),
    }
    expected = {
        "discriminator": average(torch.autograd.grad(losses["discriminator"], list(discriminator.parameters()))),
        "generator": average(torch.autograd.grad(losses["generator"], list(generator.parameters()))),
    }
    weights = {name: list(network.parameters()) for name, network in trainer.networks.items()}
    saved = {"seen": {name: seen[name] for name in expected}, "expected": expected, "weights": weights, "real": real}
    torch.save(saved, Path(output_dir, f"rank{rank}.pt"))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
    leave()
