"""Slow and obvious: what the library must equal. fp64, one sample at a time."""

import torch


def per_sample_gradients(model, samples, loss_of_sample):
    """{name: tensor (num_samples, *shape), fp64}: the gradient of each sample alone."""
    gradients = {name: [] for name, p in model.named_parameters() if p.requires_grad}
    for sample in samples:
        model.zero_grad()
        loss_of_sample(model, sample).backward()
        for name, p in model.named_parameters():
            if p.requires_grad:
                gradients[name].append(torch.zeros_like(p) if p.grad is None else p.grad.detach().clone())
    model.zero_grad()
    return {name: torch.stack(g).double() for name, g in gradients.items()}
