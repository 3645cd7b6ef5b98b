"""The door for people with a training loop of their own: plain PyTorch or accelerate."""
