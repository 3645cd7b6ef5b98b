"""What a look at the gradients must leave as it was, in a form that `torch.testing.assert_close` compares."""

import random

import numpy as np
import torch
from torch import nn


def take_generators() -> list[torch.Tensor]:
    """The states of torch's, Python's and NumPy's random number generators."""
    numpy = np.random.get_state()[1].astype(np.int64)
    return [torch.get_rng_state(), torch.tensor(random.getstate()[1]), torch.from_numpy(numpy)]


def take_snapshot(*models: nn.Module) -> dict:
    """Copies of weights, buffers and gradients, and of modes, trained parameters, numbers of hooks and random states."""
    modules = [module for model in models for module in model.modules()]
    parameters = [parameter for model in models for parameter in model.parameters()]
    return {
        "values": [{name: value.clone() for name, value in model.state_dict().items()} for model in models],
        "gradients": [None if p.grad is None else p.grad.clone() for p in parameters],
        "parameters": [(id(p), p.requires_grad) for p in parameters],
        "modules": [(m.training, len(m._forward_pre_hooks), len(m._forward_hooks)) for m in modules],
        "generators": take_generators(),
    }


def assert_same(a, b) -> None:
    """Bit for bit."""
    torch.testing.assert_close(a, b, rtol=0.0, atol=0.0)
