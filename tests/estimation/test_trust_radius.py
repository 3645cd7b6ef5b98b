"""d50 against closed forms and an obvious reference, and the model left bit for bit as it was."""

import copy
import math
import signal

import pytest
import torch
from snapshots import assert_same, take_snapshot
from torch import nn

from hf_v0init import TrustRadius, measure_trust_radius
from hf_v0init.estimation.trust_radius import GRID_FACTOR, find_crossing


class Quadratic(nn.Module):
    """0.5 * sum h_i (w_i - b_i)^2, with b from the batch."""

    def __init__(self, curvatures: torch.Tensor, weights: torch.Tensor) -> None:
        super().__init__()
        self.weights = nn.Parameter(weights)
        self.register_buffer("curvatures", curvatures)

    def forward(self, target: torch.Tensor) -> torch.Tensor:
        return 0.5 * (self.curvatures * (self.weights - target) ** 2).sum()


def compute_quadratic_loss(model: nn.Module, target: torch.Tensor) -> torch.Tensor:
    return model(target)


def make_quadratic() -> tuple[Quadratic, list[torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    model = Quadratic(torch.rand(50, generator=generator) + 0.1, torch.randn(50, generator=generator))
    return model, [0.3 * torch.randn(50, generator=generator) for _ in range(4)]


class Network(nn.Module):
    """A tied embedding with dropout and, if asked, BatchNorm and a frozen layer; it draws random numbers in eval mode too."""

    def __init__(self, *, batch_norm: bool = False, dropout: float = 0.3, jitter: float = 0.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(20, 12)
        self.frozen = nn.Linear(12, 12).requires_grad_(False)
        self.hidden = nn.Linear(12, 12)
        self.norm = nn.BatchNorm1d(12) if batch_norm else nn.LayerNorm(12)
        self.dropout = nn.Dropout(dropout)
        self.output = nn.Linear(12, 20, bias=False)
        self.output.weight = self.embedding.weight
        self.jitter = jitter

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        hidden = self.frozen(self.embedding(ids))
        hidden = hidden + self.jitter * torch.randn_like(hidden)
        return self.output(self.dropout(self.norm(torch.tanh(self.hidden(hidden)))))


def compute_loss(model: nn.Module, ids: torch.Tensor) -> torch.Tensor:
    return nn.functional.cross_entropy(model(ids[:-1]).float(), ids[1:])


def make_batches(num: int = 2, length: int = 200) -> list[torch.Tensor]:
    """Walks on 20 tokens where the next one is mostly the last plus 3, so that batches agree on something."""
    generator = torch.Generator().manual_seed(1)
    batches = []
    for _ in range(num):
        steps = torch.where(torch.rand(length, generator=generator) < 0.9, 3, 7)
        batches.append(steps.cumsum(0) % 20)
    return batches


def measure(model: nn.Module, batches: list[torch.Tensor], loss_fn=compute_loss) -> TrustRadius:
    """As a loop does it: the gradients of the summed loss, and then d50 with their masks."""

    def compute() -> torch.Tensor:
        return sum(loss_fn(model, batch) for batch in batches)

    states = torch.get_rng_state()
    model.zero_grad()
    compute().backward()
    torch.set_rng_state(states)
    return measure_trust_radius(torch.optim.SGD(model.parameters(), lr=0.1), model, compute)


def compute_reference(model: nn.Module, batches: list[torch.Tensor], displacement: float) -> tuple[float, float]:
    """The decrease and the predicted decrease of the summed loss, the obvious way, on a copy in the model's own mode."""
    states = torch.get_rng_state()

    def compute(network) -> torch.Tensor:
        torch.set_rng_state(states)
        return sum(compute_loss(network, batch) for batch in batches)

    model = copy.deepcopy(model)
    parameters = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(compute(model), parameters)
    predicted = displacement * sum(float((gradient.sign() * gradient).sum()) for gradient in gradients)
    with torch.no_grad():
        before = float(compute(model))
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter -= displacement * gradient.sign()
        return before - float(compute(model)), predicted


# ------------------------------------------------------------------------------------------------------ closed forms


def test_a_quadratic_loss_has_its_closed_form():
    """rho(d) = 1 - d * sum(h) / (2 |g|_1), so d50 = |g|_1 / sum(h), g and h those of the summed loss."""
    model, batches = make_quadratic()
    slope = float(sum(model.curvatures * (model.weights.detach() - target) for target in batches).abs().sum())
    curvature = len(batches) * float(model.curvatures.sum())
    measured = measure(model, batches, compute_quadratic_loss)
    assert measured.d50 == pytest.approx(slope / curvature, rel=1e-3)
    assert measured.slope == pytest.approx(slope, rel=1e-3)
    expected = [1 - d * curvature / (2 * slope) for d in measured.displacements]
    assert measured.rho == pytest.approx(expected, abs=2e-3)
    assert measured.reason is None


@pytest.mark.parametrize("factor", [1e-5, 1.0, 10.0])
def test_the_grid_reaches_any_trust_radius(factor):
    """A loss of the same shape, stretched in the weights: d50 stretches with it, whichever way the grid must grow."""
    model, batches = make_quadratic()
    usual = measure(model, batches[:2], compute_quadratic_loss).d50
    stretched = Quadratic(model.curvatures / factor**2, model.weights.detach() * factor)
    measured = measure(stretched, [factor * b for b in batches[:2]], compute_quadratic_loss)
    assert measured.d50 == pytest.approx(factor * usual, rel=2e-3)
    ratios = [high / low for low, high in zip(measured.displacements, measured.displacements[1:], strict=False)]
    assert ratios == pytest.approx([GRID_FACTOR] * len(ratios))


@pytest.mark.parametrize("batch_norm", [False, True], ids=["layer_norm", "batch_norm"])
def test_a_network_gives_what_the_obvious_reference_gives(batch_norm):
    """Dropout draws the same masks, BatchNorm normalises by the batch, frozen weights stay, tied ones move once."""
    model, (a, b) = Network(batch_norm=batch_norm).train(), make_batches()
    measured = measure(model, [a, b])
    for displacement, rho in zip(measured.displacements, measured.rho, strict=True):
        decrease, predicted = compute_reference(model, [a, b], displacement)
        assert rho == pytest.approx(decrease / predicted, abs=0.03)  # the slope is extrapolated from two losses
    assert find_crossing(dict(zip(measured.displacements, measured.rho, strict=True)))[0] == measured.d50


def test_random_numbers_of_the_loss_are_the_same_at_every_displacement():
    """Else their noise, and not the step, would be what is measured."""
    model, batches = Network(jitter=0.2), make_batches()
    measured = measure(model, batches)
    assert measured.rho[:2] == pytest.approx([1.0, 1.0], abs=0.1)
    assert measure(model, batches).rho == measured.rho


# ---------------------------------------------------------------------------------------------------------- precision


def test_bfloat16_weights_are_measured_or_said_not_to_be():
    """Coarse weights give the d50 of fine ones where it is above their rounding, and else none at all."""
    model, batches = make_quadratic()
    fine = measure(model, batches[:2], compute_quadratic_loss).d50
    coarse = Quadratic(model.curvatures.bfloat16(), model.weights.detach().bfloat16())

    def compute_in_fp32(module, target):
        return 0.5 * (module.curvatures.float() * (module.weights.float() - target) ** 2).sum()

    assert measure(coarse, batches[:2], compute_in_fp32).d50 == pytest.approx(fine, rel=0.03)
    far = Quadratic(model.curvatures.bfloat16(), (model.weights.detach() + 1000.0).bfloat16())
    near_optimum = [far.weights.detach().float() + 1e-3 * b for b in batches[:2]]
    measured = measure(far, near_optimum, compute_in_fp32)
    assert measured.d50 is None and "rounding" in measured.reason


# ------------------------------------------------------------------------------------------- what cannot be measured


def test_what_cannot_be_measured_has_a_reason():
    model, batches = make_quadratic()
    linear = measure(model, batches[:2], lambda m, b: (m.weights * model.curvatures).sum())
    assert linear.d50 is None and "stays above half" in linear.reason
    nan = measure(model, batches[:2], lambda m, b: m(b) * math.nan)
    assert nan.d50 is None and "nan" in nan.reason
    frozen = Quadratic(model.curvatures, model.weights.detach()).requires_grad_(False)
    frozen.other = nn.Parameter(torch.zeros(1))
    without = measure(frozen, batches[:2], lambda m, b: m(b) + 0.0 * m.other.sum())
    assert without.reason == "no parameter got a gradient"


def test_a_loss_that_overflows_is_a_step_too_far():
    """exp(w) with a wall: rho is -inf beyond it, and d50 lies before it."""
    model = Quadratic(torch.ones(4), torch.ones(4))

    def compute_walled_loss(module, target):
        loss = module(target)
        return torch.where((module.weights < 0.9).any(), math.inf, loss)

    measured = measure(model, [torch.zeros(4)] * 2, compute_walled_loss)
    assert measured.d50 is not None and measured.d50 <= 0.1
    assert measured.rho[-1] == -math.inf


def test_the_crossing_needs_two_points_near_one_before_it():
    assert find_crossing({1.0: 1.0, 2.0: 0.9, 4.0: 0.1})[0] == pytest.approx(2.0 + 2.0 * 0.4 / 0.8)
    assert find_crossing({0.5: 1.0, 1.0: 0.6, 2.0: 0.4})[0] is None  # near one only once
    noise = {0.25: 3.0, 0.5: -1.0, 1.0: 0.4, 2.0: 0.9, 4.0: 1.1, 8.0: 0.4}  # rounding first, then the curve
    assert find_crossing(noise)[0] == pytest.approx(4.0 + 4.0 * 0.6 / 0.7)


# ------------------------------------------------------------------------------------------------ nothing is changed


@pytest.mark.parametrize("how", [None, KeyboardInterrupt, RuntimeError, "signal"])
@pytest.mark.parametrize("at", [0, 1, 2, 5])
def test_everything_is_as_before_bit_for_bit_also_after_an_interruption_at_any_forward(at, how):
    model, (batch, _), forwards = Network(batch_norm=True, jitter=0.1).train(), make_batches(), 0
    model.hidden.eval()
    compute_loss(model, batch).backward()

    def compute_until():
        nonlocal forwards
        forwards += 1
        if forwards == at + 1 and how == "signal":
            signal.raise_signal(signal.SIGINT)
        loss = compute_loss(model, batch)
        if forwards == at + 1 and how in (KeyboardInterrupt, RuntimeError):
            raise how("stop")
        return loss

    optimizer, before = torch.optim.SGD(model.parameters(), lr=0.1), take_snapshot(model)
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        if how is None:
            assert measure_trust_radius(optimizer, model, compute_until).num_forwards == forwards > 5
        else:
            with pytest.raises(KeyboardInterrupt if how == "signal" else how):
                measure_trust_radius(optimizer, model, compute_until)
            assert forwards == at + 1  # it acts within one forward
    finally:
        signal.signal(signal.SIGINT, handler)
    assert_same(take_snapshot(model), before)
