"""Image generation by a GAN whose two optimizers each get a v0."""
