"""`attach_v0` in loops of every kind, with a v0 that decays by beta2: it is made of the gradients that the optimizer sees."""

import copy

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from trainers import is_untouched

from hf_v0init import InputError, attach_v0, compute_multiplier, compute_scale_for_warmup, read_second_moment
from hf_v0init.method.strategies import DEFAULT_SCALE


def make_network(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 3)).to(dtype)


def make_batches(num: int, dtype=torch.float32) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 6, generator=generator).to(dtype) for _ in range(num)]


def compute_loss(model, batch) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def make_adam(model, **options) -> torch.optim.AdamW:
    return torch.optim.AdamW(model.parameters(), lr=1e-2, betas=(0.9, 0.98), **options)


def train(model, optimizer, batches) -> None:
    for batch in batches:
        optimizer.zero_grad()
        compute_loss(model, batch).backward()
        optimizer.step()


def compute_gradients(batches, model=None) -> dict[str, list[torch.Tensor]]:
    """By name, the gradient of each batch at the weights as they are."""
    model = copy.deepcopy(make_network() if model is None else model)
    gradients: dict[str, list[torch.Tensor]] = {name: [] for name, _ in model.named_parameters()}
    for batch in batches:
        model.zero_grad()
        compute_loss(model, batch).backward()
        for name, p in model.named_parameters():
            gradients[name].append(torch.zeros_like(p) if p.grad is None else p.grad.clone())
    return gradients


def mean_square(gradients: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack(gradients).double().square().mean(0)


def catch_v0(steps, optimizer, model) -> dict[str, torch.Tensor]:
    """Filled, when v0 has been written and before the step is made, with the second moments by name."""
    caught: dict[str, torch.Tensor] = {}

    def look(_):
        for name, p in model.named_parameters():
            moment = read_second_moment(optimizer, p)
            if moment is not None and moment.any():  # a fused step that overflowed has made the others' states
                caught[name] = moment.clone()

    steps.on_written = look
    return caught


def assert_v0_is_mean_square(caught, gradients, scale: float = 1.0) -> None:
    assert sorted(caught) == sorted(name for name, g in gradients.items() if g[0].dim() >= 2)
    for name, v0 in caught.items():
        torch.testing.assert_close(v0.double(), scale * mean_square(gradients[name]), rtol=1e-5, atol=1e-15)


# ---- loops -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("num", [1, 3])
def test_the_first_steps_are_adam_from_the_mean_square_so_far(num):
    """At step t <= K as from a start at scale * v_hat_t, no step lost; then Adam's own. Vectors start at zero."""
    start, batches, scale, history = make_network(), make_batches(7), 2.0, []
    model = copy.deepcopy(start)
    optimizer = make_adam(model, weight_decay=0.0)
    steps = attach_v0(optimizer, model, v0_estimation_steps=num, v0_scale=scale)
    caught = catch_v0(steps, optimizer, model)
    for number, batch in enumerate(batches, 1):
        history.append({name: g[0].double() for name, g in compute_gradients([batch], model).items()})
        train(model, optimizer, [batch])
        assert (steps.report is None) == (number < num + (num > 1))
    for name, p in start.named_parameters():
        w, m, u, v0 = p.detach().double(), 0.0, 0.0, 0.0
        for t, gradients in enumerate(history, 1):
            g = gradients[name]
            m, u = 0.9 * m + 0.1 * g, 0.98 * u + 0.02 * g.square()
            if t <= num and p.dim() >= 2:
                v0 = scale * u / (1 - 0.98**t)
            w = w - 1e-2 * m / (1 - 0.9**t) / (((u + 0.98**t * v0) / (1 - 0.98**t)).sqrt() + 1e-8)
        torch.testing.assert_close(model.get_parameter(name).double(), w, rtol=0.0, atol=2e-6)
    assert sorted(caught) == ["0.bias", "0.weight", "2.bias", "2.weight"] if num > 1 else ["0.weight", "2.weight"]
    report = steps.report
    assert (report.strategy, report.decay, report.scale, report.estimation_steps) == ("data_driven", "beta2", 2.0, num)
    assert (report.num_parameters_with_v0, report.num_parameters_without_v0) == (2, 2)
    of_all = torch.cat([scale * mean_of(history[:num], name).flatten() for name in ("0.weight", "2.weight")])
    assert report.v0_mean == pytest.approx(float(of_all.mean()), rel=1e-5)
    assert not steps.is_attached and optimizer.state[model[0].weight]["step"] == 7


def mean_of(history, name) -> torch.Tensor:
    """v_hat: the mean of g^2, weighted as Adam weights it."""
    weights = [0.98 ** (len(history) - 1 - i) for i in range(len(history))]
    return sum(w * g[name].square() for w, g in zip(weights, history, strict=True)) / sum(weights)


def test_zeros_attaches_nothing_and_takes_any_optimizer_and_swapped_arguments_are_named():
    model = make_network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert attach_v0(optimizer, None, "zeros") is None
    assert not optimizer._optimizer_step_pre_hooks
    with pytest.raises(InputError, match=r"a Sequential as its optimizer.*attach_v0\(optimizer, model\)"):
        attach_v0(model, optimizer)


def test_under_accelerate_the_gradient_is_accumulated_and_clipped(make_accelerator):
    accelerator = make_accelerator(gradient_accumulation_steps=2)
    model, batches = make_network(), make_batches(4)
    optimizer = make_adam(model)
    model, prepared = accelerator.prepare(model, optimizer)
    steps = attach_v0(prepared, model, v0_decay="beta2")
    caught = catch_v0(steps, optimizer, model)
    for batch in batches:
        with accelerator.accumulate(model):
            accelerator.backward(compute_loss(model, batch))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.05)
            prepared.step()
            prepared.zero_grad()
    gradients = compute_gradients(batches)
    pair = {name: (g[0] + g[1]) / 2 for name, g in gradients.items()}
    norm = torch.stack([g.norm() for g in pair.values()]).norm()
    assert norm > 0.1
    seen = {name: [g * (0.05 / norm)] for name, g in pair.items()}
    assert_v0_is_mean_square(caught, seen)
    assert steps.report is not None and not steps.is_attached


@pytest.mark.parametrize(
    ("strategy", "fused"), [("data_driven", True), ("data_driven", False), ("first_gradient", True), ("random", True)]
)
def test_a_step_that_a_grad_scaler_skips_for_an_overflow_does_not_lose_v0(strategy, fused):
    """Fused Adam is left the unscaling: the hook sees scaled gradients there, and the overflow, in whose step it waits."""
    model, batches = make_network(), make_batches(3)
    optimizer = make_adam(model, fused=fused)
    steps = attach_v0(optimizer, model, strategy, v0_scale=1.0)
    caught = catch_v0(steps, optimizer, model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(batches):
        optimizer.zero_grad()
        scaler.scale(compute_loss(model, batch)).backward()
        if number == 0:
            model[0].weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert steps.is_waiting == (number == 0)
        if number == 0:
            moment = read_second_moment(optimizer, model[0].weight)
            assert scaler.get_scale() == 512.0 and (moment is None or not moment.any())
            assert torch.equal(model[0].weight, make_network()[0].weight)
    assert optimizer.state[model[0].weight]["step"] == 2
    gradients = compute_gradients(batches[1:2])
    if strategy != "random":
        assert_v0_is_mean_square(caught, gradients)
    else:
        ratios = torch.cat([(v0 / gradients[name][0].square()).flatten() for name, v0 in caught.items()])
        assert steps.report.measured_ratio == pytest.approx(float(ratios.median()), rel=1e-5)


# ---- what is waited for, and refused ---------------------------------------------------------------------------------


def test_steps_without_a_gradient_are_not_counted():
    """Loading a distributed checkpoint makes a step with zero gradients, so that there is state to load into."""
    model, batches = make_network(), make_batches(2)
    optimizer = make_adam(model)
    steps = attach_v0(optimizer, model, "first_gradient", v0_decay="beta2")
    caught = catch_v0(steps, optimizer, model)
    optimizer.step()
    assert steps.is_waiting and steps.num_steps is None
    get_optimizer_state_dict(model, optimizer)
    assert steps.is_waiting and steps.num_steps is None and steps.report is None
    optimizer.state.clear()
    train(model, optimizer, batches)
    assert_v0_is_mean_square(caught, compute_gradients(batches[:1]))


@pytest.mark.parametrize(
    ("bad", "options"), [(float("nan"), {"v0_decay": "beta2"}), (float("inf"), {"v0_decay_steps": 5})]
)
def test_a_gradient_that_is_not_finite_is_refused_by_name(bad, options):
    model, (batch,) = make_network(), make_batches(1)
    optimizer = make_adam(model)
    attach_v0(optimizer, model, **options)
    compute_loss(model, batch).backward()
    model[2].weight.grad[1, 1] = bad
    start = copy.deepcopy(model.state_dict())
    with pytest.raises(InputError, match=r"'2\.weight' is not finite"):
        optimizer.step()
    assert is_untouched(optimizer)
    assert all(torch.equal(value, start[name]) for name, value in model.state_dict().items())


def test_parameters_outside_of_the_model_get_a_v0_too():
    model, head, (batch,) = make_network(), nn.Linear(3, 2), make_batches(1)
    groups = [{"params": model.parameters()}, {"params": head.parameters(), "lr": 1e-3}]
    for given, names in (
        (model, {"0.weight", "2.weight", "group 1, parameter 0"}),
        (None, {"group 0, parameter 0", "group 0, parameter 2", "group 1, parameter 0"}),
    ):
        groups = [{"params": list(model.parameters())}, {"params": list(head.parameters()), "lr": 1e-3}]
        optimizer = torch.optim.AdamW(groups)
        steps = attach_v0(optimizer, given, v0_decay="beta2")
        head.zero_grad(), model.zero_grad()
        head(model(batch)).square().mean().backward()
        squares = head.weight.grad.square()
        seen = []
        steps.on_written = lambda _, o=optimizer, seen=seen: seen.append(read_second_moment(o, head.weight).clone())
        optimizer.step()
        assert set(steps.report.parameters) == names
        assert torch.equal(seen[0], squares)


def test_a_random_v0_is_drawn_by_name_and_so_is_the_same_whatever_else_there_is():
    (batch,) = make_batches(1)
    drawn = []
    for options in ({}, {"foreach": False}):
        model = make_network()
        optimizer = make_adam(model, **options)
        caught = catch_v0(attach_v0(optimizer, model, "random", v0_decay="beta2", v0_seed=5), optimizer, model)
        torch.manual_seed(len(drawn))
        state = torch.get_rng_state()
        train(model, optimizer, [batch])
        assert torch.equal(state, torch.get_rng_state())
        drawn.append(caught)
    assert all(torch.equal(v0, drawn[1][name]) for name, v0 in drawn[0].items())
    mean = DEFAULT_SCALE["random"] / (6 + 16)
    assert drawn[0]["0.weight"].mean().item() == pytest.approx(mean, rel=4 * (2 / 96) ** 0.5)


def test_attaching_twice_is_refused_and_after_remove_it_is_not():
    model, batches = make_network(), make_batches(2)
    optimizer = make_adam(model)
    steps = attach_v0(optimizer, model, v0_decay_steps=5)
    with pytest.raises(InputError, match="attach_v0 was called twice"):
        attach_v0(optimizer, model, "random", v0_decay="beta2")
    steps.remove()
    assert not steps.is_attached and not optimizer._optimizer_step_pre_hooks
    stock = make_network()
    stock_optimizer = make_adam(stock)
    train(stock, stock_optimizer, batches[:1])
    train(model, optimizer, batches[:1])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    fresh = make_adam(model)
    attach_v0(fresh, model, "random", v0_decay_steps=5).remove()
    attach_v0(fresh, model, v0_decay="beta2")
    train(model, fresh, batches[1:])
    assert not is_untouched(fresh) and steps.report is None


def test_hooks_of_others_are_called_and_ours_goes():
    model, batches = make_network(), make_batches(4)
    optimizer, calls = make_adam(model), []
    optimizer.register_step_pre_hook(lambda *_: calls.append("before"))
    steps = attach_v0(optimizer, model, v0_decay_steps=3)
    optimizer.register_step_pre_hook(lambda *_: calls.append("after"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, batches)
    assert calls == ["before", "after", "post"] * 4
    assert not steps.is_attached and len(optimizer._optimizer_step_pre_hooks) == 2


@pytest.mark.parametrize("options", [{"v0_decay": "beta2"}, {"v0_decay_steps": 4}], ids=str)
def test_gradients_that_a_later_hook_changes_are_those_that_v0_is_of(options):
    """A hook that scales gradients may be registered before attach_v0 or after it."""
    weights = []
    for is_first in (True, False):
        model = make_network()
        optimizer = make_adam(model)
        if not is_first:
            attach_v0(optimizer, model, **options)
        optimizer.register_step_pre_hook(lambda *_, m=model: [p.grad.mul_(100.0) for p in m.parameters()] and None)
        if is_first:
            attach_v0(optimizer, model, **options)
        train(model, optimizer, make_batches(8))
        weights.append([p.detach() for p in model.parameters()])
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))


def test_an_optimizer_that_has_made_steps_keeps_its_state():
    model, batches = make_network(), make_batches(4)
    stock = make_network()
    optimizer, stock_optimizer = make_adam(model), make_adam(stock)
    train(model, optimizer, batches[:2])
    train(stock, stock_optimizer, batches[:2])
    steps = attach_v0(optimizer, model, v0_decay_steps=5)
    train(model, optimizer, batches[2:])
    train(stock, stock_optimizer, batches[2:])
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), stock.parameters(), strict=True))
    assert steps.report is None and not steps.is_attached


def test_a_model_without_matrices_is_refused_and_nothing_stays_attached():
    model = nn.BatchNorm1d(4)
    optimizer = make_adam(model)
    with pytest.raises(InputError, match="no trainable parameter of two or more dimensions"):
        attach_v0(optimizer, model, v0_decay="beta2")
    assert not optimizer._optimizer_step_pre_hooks
    assert attach_v0(optimizer, model, v0_decay="beta2", v0_include_bias_and_norm=True).is_waiting


# ---- parameters whose first gradient comes later ---------------------------------------------------------------------


@pytest.mark.parametrize(("num", "scale"), [(1, 1.0), (2, 0.25)])
def test_a_weight_that_is_unfrozen_later_gets_v0_from_its_own_first_gradient(num, scale, our_log):
    model, batches = make_network(), make_batches(6)
    model[0].weight.requires_grad_(False)
    optimizer = make_adam(model, weight_decay=0.0)
    steps = attach_v0(optimizer, model, v0_estimation_steps=num, v0_scale=scale)
    train(model, optimizer, batches[:3])
    assert steps.report.without_gradient == ["0.weight"] and steps.is_attached
    assert read_second_moment(optimizer, model[0].weight) is None
    model[0].weight.requires_grad_(True)
    g, start = compute_gradients(batches[3:4], model)["0.weight"][0], model[0].weight.detach().clone()
    train(model, optimizer, batches[3:4])
    assert not steps.is_attached and steps.report.without_gradient == []
    assert "v0 written at the first gradient of 1 further tensors: 0.weight" in our_log.text
    v1 = 0.98 * scale * g.square() + 0.02 * g.square()
    torch.testing.assert_close(read_second_moment(optimizer, model[0].weight), v1, rtol=1e-5, atol=1e-20)
    expected = -1e-2 * g / ((v1 / 0.02).sqrt() + 1e-8)
    torch.testing.assert_close(model[0].weight.detach() - start, expected, rtol=1e-4, atol=1e-7)


def test_what_stays_frozen_is_waited_for_for_a_hundred_steps():
    model = make_network()
    model[0].weight.requires_grad_(False)
    optimizer = make_adam(model)
    hook = attach_v0(optimizer, model, v0_decay="beta2")
    train(model, optimizer, make_batches(99))
    assert hook.is_attached
    train(model, optimizer, make_batches(1))
    assert not hook.is_attached and hook.report.without_gradient == ["0.weight"]


class LowRank(nn.Module):
    """As LoRA starts: B = 0, so A's gradient is exactly zero at step 1."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(2, 6)), nn.Parameter(torch.zeros(3, 2))

    def forward(self, x):
        return self.base(x) + x @ self.a.T @ self.b.T


def test_a_weight_whose_gradient_is_zero_at_first_gets_v0_at_the_first_that_is_not():
    model, batches = LowRank(), make_batches(3)
    optimizer = torch.optim.AdamW([model.a, model.b], lr=1e-2, betas=(0.9, 0.98))
    steps = attach_v0(optimizer, model, v0_scale=0.5)
    train(model, optimizer, batches[:1])
    assert steps.report.without_gradient == ["a"] and set(steps.report.parameters) == {"b"}
    g = compute_gradients(batches[1:2], model)["a"][0]
    assert g.abs().min() > 0
    train(model, optimizer, batches[1:2])
    moment = read_second_moment(optimizer, model.a)
    torch.testing.assert_close(moment, 0.98 * 0.5 * g.square() + 0.02 * g.square(), rtol=1e-5, atol=1e-20)
    assert not steps.is_attached


# ---- sizes -----------------------------------------------------------------------------------------------------------


def make_two_groups(model):
    groups = [
        {"params": list(model[0].parameters()), "betas": (0.9, 0.9)},
        {"params": list(model[2].parameters()), "betas": (0.9, 0.99)},
    ]
    return torch.optim.AdamW(groups, lr=1e-2)


def test_each_group_gets_the_scale_of_its_own_beta2():
    model, batches = make_network(), make_batches(1)
    optimizer = make_two_groups(model)
    caught = catch_v0(attach_v0(optimizer, model, v0_decay="beta2", v0_decay_steps=4), optimizer, model)
    train(model, optimizer, batches)
    gradients = compute_gradients(batches)
    for name, beta2 in (("0.weight", 0.9), ("2.weight", 0.99)):
        scale = compute_scale_for_warmup(4, beta2)
        assert compute_multiplier(4, scale, beta2) == pytest.approx(0.9)
        torch.testing.assert_close(caught[name].double(), scale * mean_square(gradients[name]), rtol=1e-5, atol=1e-20)


@pytest.mark.parametrize("groups", [1, 2])
def test_random_with_decay_steps_is_as_large_beside_g2_as_its_length_asks_for(groups):
    model, batches = make_network(), make_batches(1)
    optimizer = make_adam(model) if groups == 1 else make_two_groups(model)
    steps = attach_v0(optimizer, model, "random", v0_decay="beta2", v0_decay_steps=6)
    caught = catch_v0(steps, optimizer, model)
    train(model, optimizer, batches)
    gradients = compute_gradients(batches)
    if groups == 1:
        ratios = torch.cat([(v0 / gradients[name][0].square()).flatten() for name, v0 in caught.items()])
        ratio = float(ratios.median())
        assert steps.report.measured_ratio == pytest.approx(ratio, rel=0.02)
        assert compute_multiplier(6, ratio, 0.98) == pytest.approx(0.9, rel=0.05)
        return
    for name, beta2 in (("0.weight", 0.9), ("2.weight", 0.99)):
        ratio = float((caught[name] / gradients[name][0].square()).median())
        assert compute_multiplier(6, ratio, beta2) == pytest.approx(0.9, rel=0.05), name


@pytest.mark.parametrize(("max_steps", "expected"), [(None, 1), (50, 1), (100, 1), (250, 2), (3200, 32), (10**6, 32)])
def test_by_default_one_per_cent_of_the_run_is_estimated_over(max_steps, expected):
    model = make_network()
    assert attach_v0(make_adam(model), model, v0_decay="beta2", max_steps=max_steps).estimation_steps == expected
