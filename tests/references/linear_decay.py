"""The linear decay of v0, slow and obvious: fp64, one step at a time, as the head of `hf_v0init/method/decay.py` writes it."""

import copy

import torch
from torch import nn


def factor(square: torch.Tensor) -> torch.Tensor:
    """Rows x columns of a matrix (its first dimension by the rest); a scalar or a vector as it is."""
    if square.dim() < 2:
        return square
    matrix = square.flatten(1)
    return (torch.outer(matrix.mean(1), matrix.mean(0)) / matrix.mean()).view(square.shape)


def compute_nadam_numerator(history: list[torch.Tensor], b1: float, psi: float = 4e-3) -> torch.Tensor:
    """Dozat's, of all gradients so far."""
    product, m = 1.0, torch.zeros_like(history[0])
    for t, g in enumerate(history, 1):
        mu, mu_next = (b1 * (1 - 0.5 * 0.96 ** (s * psi)) for s in (t, t + 1))
        product *= mu
        m = b1 * m + (1 - b1) * g
    return mu_next * m / (1 - product * mu_next) + (1 - mu) * history[-1] / (1 - product)


def compute_adam_numerator(history: list[torch.Tensor], b1: float) -> torch.Tensor:
    m = torch.zeros_like(history[0])
    for g in history:
        m = b1 * m + (1 - b1) * g
    return m / (1 - b1 ** len(history))


def train_by_oracle(
    model: nn.Module, batches, compute_loss, *, length: int, first: int = 6, spread=factor, options: dict, max_norm=None,
    accumulation: int = 1, on_step=None, numerator=compute_adam_numerator, l2: float = 0.0, draws: dict | None = None,
) -> nn.Module:  # fmt: skip
    """Train a copy of `model` in fp64 and return it.

    Args:
        length: L; first: K.
        spread: what is kept of s.
        options: by parameter name: "lr", "betas" and "weight_decay" (decoupled).
        on_step: called with (model, t) before step t, as the run's own hook is.
        draws: by parameter name, draws of mean 1 in place of rows and columns.
    """
    model = copy.deepcopy(model).double()
    gradients: dict[str, list[torch.Tensor]] = {}
    kept: dict[str, torch.Tensor] = {}  # s
    for t in range(1, len(batches) // accumulation + 1):
        if on_step is not None:
            on_step(model, t)
        model.zero_grad()
        for batch in batches[(t - 1) * accumulation : t * accumulation]:
            (compute_loss(model, batch.double()) / accumulation).backward()
        if max_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), max_norm)
        for name, p in model.named_parameters():
            if name not in options or p.grad is None:
                continue
            own = options[name]
            (b1, b2), rate = own.get("betas", (0.9, 0.98)), own["lr"] * (t / length if t <= first else 1.0)
            history = gradients.setdefault(name, [])
            history.append(p.grad.clone() + l2 * p.detach())
            v_hat = sum((1 - b2) * b2 ** (len(history) - 1 - i) * g**2 for i, g in enumerate(history))
            v_hat = v_hat / (1 - b2 ** len(history))
            if t > first and name not in kept:  # its first gradient
                kept[name] = _keep(v_hat, name, spread, draws)
            extra = ((length / t) ** 2 - 1) * kept[name] if first < t < length else 0.0
            with torch.no_grad():
                p *= 1 - rate * own.get("weight_decay", 0.0)
                p -= rate * numerator(history, b1) / ((v_hat + extra).sqrt() + 1e-8)
            if t == first:
                kept[name] = _keep(v_hat, name, spread, draws)
            elif t < first:
                kept.pop(name, None)
        if t == first:  # those without a gradient in this step, but in an earlier one
            for name, history in gradients.items():
                b2 = options[name].get("betas", (0.9, 0.98))[1]
                v = sum((1 - b2) * b2 ** (len(history) - 1 - i) * g**2 for i, g in enumerate(history))
                kept.setdefault(name, _keep(v / (1 - b2 ** len(history)), name, spread, draws))
    return model


def _keep(v_hat, name, spread, draws) -> torch.Tensor:
    return spread(v_hat) if draws is None else draws[name] * v_hat.mean()


def assert_close_to_oracle(model, oracle, start, tolerance: float = 2e-5) -> None:
    """The largest difference of any weight is at most `tolerance` of the largest movement of that tensor, and its own rounding."""
    references, starts = dict(oracle.named_parameters()), dict(start.named_parameters())
    for name, p in model.named_parameters():
        moved = (references[name] - starts[name].double()).abs().max().item()
        difference = (p.double() - references[name]).abs().max().item()
        rounding = 4 * torch.finfo(p.dtype).eps * p.detach().abs().max().item()
        assert difference <= tolerance * moved + rounding, (name, difference, moved)
