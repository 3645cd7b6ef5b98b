"""Slow and obvious: what the library must equal. fp64, one sample, one element, one step at a time."""

import math

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


def adamw_steps(w, v0, gradients, *, lr, beta1=0.9, beta2=0.999, eps=1e-8, weight_decay=0.0, amsgrad=False):
    """The weights and second moments after each step of AdamW (Loshchilov & Hutter, algorithm 2) from v0, in fp64."""
    w, v, m = w.double().clone(), v0.double().clone(), torch.zeros_like(w, dtype=torch.float64)
    v_max = torch.zeros_like(v)
    history = []
    for t, g in enumerate(gradients, start=1):
        g = g.double()
        w = w - lr * weight_decay * w
        m = beta1 * m + (1 - beta1) * g
        v = beta2 * v + (1 - beta2) * g * g
        v_max = torch.maximum(v_max, v)
        v_hat = (v_max if amsgrad else v) / (1 - beta2**t)
        w = w - lr * (m / (1 - beta1**t)) / (v_hat.sqrt() + eps)
        history.append((w.clone(), v.clone()))
    return history


def multiplier(step, scale, beta2):
    """m(t) as PAPER writes it, without care for rounding."""
    return 1 / math.sqrt(1 + scale * beta2**step / (1 - beta2**step))
