"""The loss landscape: filter normalisation, exact values of a quadratic loss, and a model that is left as it was."""

import math
import random

import numpy as np
import pytest
import torch
from conftest import make_gpt2, make_sequences
from torch import nn
from translation_models import make_marian

from hf_v0init.analysis.checkpoint_loss import make_batch_loss
from hf_v0init.analysis.loss_landscape import LossLandscape, compute_loss_landscape, draw_filter_normalised_direction
from hf_v0init.analysis.plots import draw_landscape
from hf_v0init.errors import InputError


class WithEverything(nn.Module):
    """A convolution, a norm with running statistics, dropout, a zero filter, a bias."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.convolution = nn.Conv2d(2, 5, 3)
        self.norm = nn.BatchNorm2d(5)
        self.dropout = nn.Dropout(0.5)
        self.output = nn.Linear(5, 3)
        with torch.no_grad():
            self.output.weight[1] = 0.0
        self.to(dtype)

    def forward(self, x):
        return self.output(self.dropout(self.norm(self.convolution(x)).mean(dim=(2, 3))))


def take_snapshot(model: nn.Module) -> dict:
    return {
        "weights": {name: (p, p.detach().clone()) for name, p in model.named_parameters()},
        "buffers": {name: b.clone() for name, b in model.named_buffers()},
        "modes": [module.training for module in model.modules()],
        "gradients": [p.grad for p in model.parameters()],
        "rng": (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()),
    }


def assert_as_before(model: nn.Module, before: dict) -> None:
    for name, p in model.named_parameters():
        same, values = before["weights"][name]
        assert p is same and torch.equal(p, values), name
        assert p.requires_grad
    assert all(torch.equal(b, before["buffers"][name]) for name, b in model.named_buffers())
    assert [module.training for module in model.modules()] == before["modes"]
    assert all(p.grad is g for p, g in zip(model.parameters(), before["gradients"], strict=True))
    python, numpy, torchs = before["rng"]
    assert random.getstate() == python and np.array_equal(np.random.get_state()[1], numpy)
    assert torch.equal(torch.get_rng_state(), torchs)


def test_each_filter_is_as_long_as_the_weights():
    model = WithEverything()
    direction = draw_filter_normalised_direction(model, seed=3)
    assert sorted(direction) == ["convolution.weight", "output.weight"]  # no biases, no norm weights
    for name, drawn in direction.items():
        weight = dict(model.named_parameters())[name]
        assert drawn.shape == weight.shape
        lengths = drawn.flatten(1).norm(dim=1)
        assert lengths.tolist() == pytest.approx(weight.detach().flatten(1).norm(dim=1).tolist())
    assert not direction["output.weight"][1].any()
    again, other = (draw_filter_normalised_direction(model, seed=seed) for seed in (3, 4))
    assert all(torch.equal(again[name], direction[name]) for name in direction)
    assert not torch.equal(other["output.weight"], direction["output.weight"])


def test_losses_are_those_at_the_moved_weights():
    model = WithEverything()
    target = torch.randn(5, 2, 3, 3, dtype=torch.float64)
    start = model.convolution.weight.detach().clone()

    def measure(model):
        return float((model.convolution.weight - target).square().sum())

    found = compute_loss_landscape(model, measure, num_points=5, extent=0.8, seed=2)
    assert found.coordinates.tolist() == pytest.approx([-0.8, -0.4, 0.0, 0.4, 0.8])
    one, two = (draw_filter_normalised_direction(model, seed)["convolution.weight"] for seed in (4, 5))
    for i, a in enumerate(found.coordinates):
        for j, b in enumerate(found.coordinates):
            assert found.losses[i, j] == pytest.approx(float((start + a * one + b * two - target).square().sum()))
    assert found.centre_loss == measure(model)


def test_sharpness_of_a_quadratic_is_its_closed_form():
    # 0.5 a^2 + 1.5 b^2 + 1 within |a|, |b| <= 0.5: 100 * (0.125 + 0.375) / (1 + 1)
    x = np.linspace(-1.0, 1.0, 21)
    losses = 0.5 * x[:, None] ** 2 + 1.5 * x[None, :] ** 2 + 1.0
    landscape = LossLandscape(x, losses)
    assert landscape.centre_loss == 1.0
    assert landscape.compute_sharpness() == pytest.approx(25.0)
    assert landscape.compute_sharpness(0.1) == pytest.approx(1.0)
    assert landscape.compute_sharpness(1.0) == pytest.approx(100.0)
    assert LossLandscape(x, 1.0 - losses).compute_sharpness() == 0.0
    losses[10, 12] = math.nan
    assert landscape.compute_sharpness() == math.inf and landscape.compute_sharpness(0.1) == pytest.approx(1.0)
    with pytest.raises(InputError, match=r"radius=0\.05"):
        landscape.compute_sharpness(0.05)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("fails", [False, True])
def test_everything_is_as_before(dtype, fails):
    model = WithEverything(dtype).train()
    model.dropout.eval()
    model(torch.randn(2, 2, 6, 6, dtype=dtype)).sum().backward()
    before = take_snapshot(model)
    draws, calls = [], 0

    def measure(model):
        nonlocal calls
        calls += 1
        assert not any(module.training for module in model.modules()) and not torch.is_grad_enabled()
        model.norm.running_mean.add_(1.0)
        random.random(), np.random.rand()
        draws.append(torch.rand(1).item())
        if fails and calls == 5:
            raise RuntimeError("out of memory")
        return 0.0

    if fails:
        with pytest.raises(RuntimeError, match="out of memory"):
            compute_loss_landscape(model, measure, num_points=3)
    else:
        compute_loss_landscape(model, measure, num_points=3)
        assert calls == 9
    assert len(set(draws)) == 1  # every point sees the same draws
    assert_as_before(model, before)


def test_a_transformers_model_on_batches():
    model = make_gpt2()
    rows = make_sequences(num=7)
    rows[0]["labels"][4:] = -100
    stack = {name: [row[name] for row in rows] for name in rows[0]}
    batches = [{n: torch.stack(v[i : i + 4]) for n, v in stack.items()} for i in (0, 4)]
    measure = make_batch_loss(batches, shifts_labels=True)
    whole = {n: torch.stack(v) for n, v in stack.items()}
    model.eval()
    with torch.no_grad():
        expected = float(model(**whole).loss)  # one batch: the mean over all targets
    assert measure(model) == pytest.approx(expected, rel=1e-6)
    model.train()
    before = take_snapshot(model)
    found = compute_loss_landscape(model, measure, num_points=3)
    assert found.centre_loss == pytest.approx(expected, rel=1e-6)
    assert found.losses[0, 0] != found.losses[2, 2]
    assert_as_before(model, before)
    assert model.transformer.wte.weight is model.lm_head.weight


def test_bad_input_is_refused():
    with pytest.raises(InputError, match="num_points=4"):
        compute_loss_landscape(nn.Linear(2, 2), lambda model: 0.0, num_points=4)
    empty = {"input_ids": torch.ones(1, 4, dtype=torch.long), "labels": torch.full((1, 4), -100)}
    for batches in ([], [empty]):
        with pytest.raises(InputError, match="no target"):
            make_batch_loss(batches, shifts_labels=True)


@pytest.mark.parametrize("flat", [True, False])
def test_figure_is_drawn_also_of_a_flat_or_broken_landscape(tmp_path, flat):
    x = np.linspace(-1.0, 1.0, 5)
    losses = np.ones((5, 5)) if flat else x[:, None] ** 2 + x[None, :] ** 2
    if not flat:
        losses[0, 0] = math.nan
    path = tmp_path / "landscape.png"
    draw_landscape(path, LossLandscape(x, losses), title="test")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_untrained_weights_are_left_alone():
    model = make_marian()
    drawn = draw_filter_normalised_direction(model, 0)
    assert "model.shared.weight" in drawn and not any("positions" in name for name in drawn)
    model.requires_grad_(True)  # as `from_pretrained` leaves it
    assert draw_filter_normalised_direction(model, 0).keys() == drawn.keys()
    model.model.encoder.layers[0].fc1.weight.requires_grad_(False)
    assert drawn.keys() - draw_filter_normalised_direction(model, 0).keys() == {"model.encoder.layers.0.fc1.weight"}
