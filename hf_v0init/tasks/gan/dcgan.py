"""DCGAN (Radford, Metz & Chintala, ICLR 2016, arXiv 1511.06434) for square images of 8 to 128 pixels, and its two losses.

The generator doubles the size from 4x4 on by transposed convolutions, the discriminator halves it down to 4x4 by strided
ones. Losses are those of Goodfellow et al. (2014), with the generator's non-saturating one; D are logits:

    L_D = E[softplus(-D(x))] + E[softplus(D(G(z)))],    L_G = E[softplus(-D(G(z)))]

Each batch norm sees the real and the generated images of a step apart, as in the paper. Nothing here knows how it is trained.
"""

import math

import torch
from huggingface_hub import PyTorchModelHubMixin
from torch import nn

from ...errors import InputError

IMAGE_SIZES = (8, 16, 32, 64, 128)
BASE_SIZE = 4
INITIAL_STD = 0.02
LEAK = 0.2


_CARD = """---
{{ card_data }}
---

A DCGAN ([arXiv 1511.06434](https://arxiv.org/abs/1511.06434)), to be loaded with `from_pretrained` of `hf_v0init.tasks.gan.dcgan`.
"""
_HUB = {"library_name": "hf_v0init", "tags": ["dcgan", "image-generation"], "model_card_template": _CARD}


class Generator(nn.Module, PyTorchModelHubMixin, **_HUB):
    """Maps noise of shape (n, latent_size) to images of shape (n, num_channels, image_size, image_size) in [-1, 1].

    Args:
        image_size: one of `IMAGE_SIZES`.
        num_channels: 1 for grayscale, 3 for colour.
        latent_size: elements of the noise.
        base_channels: channels at half the image's size; they double with each halving.

    Raises:
        InputError: a size that it cannot have.
    """

    def __init__(self, image_size: int = 32, num_channels: int = 3, latent_size: int = 100, base_channels: int = 64):
        super().__init__()
        num_doublings = count_doublings(image_size)
        self.image_size, self.num_channels, self.latent_size = image_size, num_channels, latent_size
        width = base_channels * 2 ** (num_doublings - 1)
        layers = [nn.ConvTranspose2d(latent_size, width, BASE_SIZE, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for _ in range(num_doublings - 1):
            layers += [
                nn.ConvTranspose2d(width, width // 2, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(width // 2),
                nn.ReLU(),
            ]
            width //= 2
        layers += [nn.ConvTranspose2d(width, num_channels, 4, stride=2, padding=1), nn.Tanh()]
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize_weights)

    def forward(self, noise: torch.Tensor) -> torch.Tensor:
        """Generate images."""
        return self.layers(noise[:, :, None, None])


class Discriminator(nn.Module, PyTorchModelHubMixin, **_HUB):
    """Maps images in [-1, 1] to one logit each, shape (n,): large for real ones. Arguments as for `Generator`."""

    def __init__(self, image_size: int = 32, num_channels: int = 3, base_channels: int = 64):
        super().__init__()
        width, layers = base_channels, [nn.Conv2d(num_channels, base_channels, 4, stride=2, padding=1)]
        layers.append(nn.LeakyReLU(LEAK))
        for _ in range(count_doublings(image_size) - 1):
            layers += [
                nn.Conv2d(width, 2 * width, 4, stride=2, padding=1, bias=False),
                nn.BatchNorm2d(2 * width),
                nn.LeakyReLU(LEAK),
            ]
            width *= 2
        layers.append(nn.Conv2d(width, 1, BASE_SIZE))
        self.layers = nn.Sequential(*layers)
        self.apply(_initialize_weights)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Judge images."""
        return self.layers(images).flatten()


def count_doublings(image_size: int) -> int:
    """Count the doublings from 4 pixels to `image_size`; raise `InputError` for a size not in `IMAGE_SIZES`."""
    if image_size not in IMAGE_SIZES:
        sizes = ", ".join(map(str, IMAGE_SIZES))
        raise InputError(
            f"image_size={image_size}: a DCGAN here makes images of {sizes} pixels a side; resize to one of them"
        )
    return round(math.log2(image_size // BASE_SIZE))


def _initialize_weights(module: nn.Module) -> None:
    """As in the paper: N(0, 0.02) for convolutions; N(1, 0.02) for the factors of batch norms; biases 0."""
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, INITIAL_STD)
    elif isinstance(module, nn.BatchNorm2d):
        nn.init.normal_(module.weight, 1.0, INITIAL_STD)
    if getattr(module, "bias", None) is not None:
        nn.init.zeros_(module.bias)


def draw_noise(num: int, latent_size: int, generator: torch.Generator | None = None) -> torch.Tensor:
    """Draw standard normal noise of shape (num, latent_size) on the CPU, so that it is the same on every device."""
    return torch.randn(num, latent_size, generator=generator)


def compute_discriminator_loss(
    discriminator: nn.Module, real: torch.Tensor, generated: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute L_D, the mean over pairs of a real and a generated image, in nats; and the logits of both kinds, detached."""
    logits_real, logits_generated = discriminator(real), discriminator(generated)
    loss = nn.functional.softplus(-logits_real).mean() + nn.functional.softplus(logits_generated).mean()
    return loss, logits_real.detach(), logits_generated.detach()


def compute_generator_loss(discriminator: nn.Module, generated: torch.Tensor) -> torch.Tensor:
    """Compute L_G, the mean over generated images, in nats."""
    return nn.functional.softplus(-discriminator(generated)).mean()
