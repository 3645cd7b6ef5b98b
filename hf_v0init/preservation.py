"""Leaves the user's run as it was: whatever a look at the gradients switches for a moment is put back."""

import contextlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn


def read_rng_states() -> dict:
    """Read the states of Python's, NumPy's, torch's CPU and every accelerator's random number generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if hasattr(torch, "mps") and torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def write_rng_states(states: dict) -> None:
    """Put back what `read_rng_states` read."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) with one number in [0, 2^63)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore all random number generator states on leaving, also when an exception passes."""
    states = read_rng_states()
    try:
        yield
    finally:
        write_rng_states(states)


@contextlib.contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Restore train/eval modes, buffers (BatchNorm statistics and the like) and gradients on leaving.

    Inside, every `grad` is None. Buffers are copied, in place where the module kept the tensor, so aliases stay
    valid; gradients are set aside, not copied. Weights are not touched by a backward pass and are not copied.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer.detach().clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        yield
    finally:
        for module, training in modes:
            module.training = training
        with torch.no_grad():
            for module, name, buffer, saved in buffers:
                buffer.copy_(saved)
                module._buffers[name] = buffer
        for parameter, gradient in gradients:
            parameter.grad = gradient
