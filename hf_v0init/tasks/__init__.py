"""What the scripts' tasks need beside a v0: flags and stages, losses and metrics, streams, the training of a GAN."""
