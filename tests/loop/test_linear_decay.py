"""The linear decay in loops: the weights are the fp64 oracle's, whatever optimizer, loop and network there are."""

import copy
import io

import pytest
import torch
from linear_decay import assert_close_to_oracle, compute_nadam_numerator, factor, train_by_oracle
from torch import nn

from hf_v0init import InputError, attach_v0, read_second_moment
from hf_v0init.sharding.draws import draw_standard_normal_


class Network(nn.Module):
    """A matrix used twice, a convolution, vectors and a scalar."""

    def __init__(self, channels_last: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(2, 4, 3, padding=1)
        self.tied, self.last = nn.Linear(16, 16), nn.Linear(16, 3)
        self.scale = nn.Parameter(torch.tensor(1.5))
        if channels_last:
            self.conv = self.conv.to(memory_format=torch.channels_last)

    def forward(self, x):
        hidden = torch.tanh(self.conv(x)).mean(1).flatten(1)
        return self.scale * self.last(torch.tanh(self.tied(torch.tanh(self.tied(hidden)))))


def make_batches(num: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 2, 4, 4, generator=generator) for _ in range(num)]


def compute_loss(model, batch) -> torch.Tensor:
    return (model(batch) - 1).square().mean()


def make_adam(model, cls=torch.optim.AdamW, **options) -> torch.optim.Optimizer:
    return cls(model.parameters(), **{"lr": 3e-3, "betas": (0.9, 0.98), "weight_decay": 0.0} | options)


def name_options(model, **options) -> dict[str, dict]:
    return {name: {"lr": 3e-3, "betas": (0.9, 0.98)} | options for name, _ in model.named_parameters()}


def step(model, optimizer, batch) -> None:
    optimizer.zero_grad()
    compute_loss(model, batch).backward()
    optimizer.step()


NUM = 32


def train_by_both(start=None, make=make_adam, on_step=None, oracle=None, tolerance: float = 2e-5, **attached):
    """Train 32 steps with `attach_v0`, and by the oracle, to which the weights must be close; (model, optimizer, hook)."""
    start, batches = Network() if start is None else start, make_batches(NUM)
    model = copy.deepcopy(start)
    optimizer = make(model)
    attached = {"v0_decay_steps": 20} | attached
    hook = attach_v0(optimizer, model, **attached)
    for t, batch in enumerate(batches, 1):
        if on_step is not None:
            on_step(model, t)
        step(model, optimizer, batch)
    options = {"length": attached["v0_decay_steps"], "options": name_options(start)} | (oracle or {})
    assert_close_to_oracle(
        model, train_by_oracle(start, batches, compute_loss, on_step=on_step, **options), start, tolerance
    )
    return model, optimizer, hook


KINDS = {
    "foreach": lambda m: make_adam(m, foreach=True),
    "single": lambda m: make_adam(m, foreach=False),
    "fused": lambda m: make_adam(m, fused=True),
    "Adam": lambda m: make_adam(m, cls=torch.optim.Adam),
    "tensor lr": lambda m: make_adam(m, lr=torch.tensor(3e-3), foreach=False),
}


@pytest.mark.parametrize(
    ("kind", "length"),
    [*(("foreach", length) for length in (1, 2, 5, 7, 200)), *((kind, length) for kind in KINDS for length in (6, 30))],
)
def test_every_step_is_the_oracles(kind, length):
    first = max(1, min(6, length - 1))
    _, optimizer, hook = train_by_both(make=KINDS[kind], v0_decay_steps=length, max_steps=NUM, oracle={"first": first})
    assert hook.is_attached == (length > NUM) and float(optimizer.param_groups[0]["lr"]) == pytest.approx(3e-3)
    if length > 1:
        assert (hook.report.decay, hook.report.decay_steps, hook.report.scale) == ("linear", length, None)
        assert hook.report.num_parameters_with_v0 == 7 and hook.report.estimation_steps == first


def test_nadam_channels_last_first_gradient_and_matrices_alone():
    train_by_both(make=lambda m: make_adam(m, cls=torch.optim.NAdam), oracle={"numerator": compute_nadam_numerator})
    model, _, _ = train_by_both(Network(channels_last=True))
    assert model.conv.weight.is_contiguous(memory_format=torch.channels_last)
    train_by_both(v0_init="first_gradient", oracle={"first": 1})

    def spread(
        square,
    ):  # biases get no v0: in the first K steps they follow t / L like all, then they step as Adam does
        return factor(square) if square.dim() > 1 else torch.zeros_like(square)

    _, _, hook = train_by_both(v0_include_bias_and_norm=False, oracle={"spread": spread})
    assert hook.report.num_parameters_with_v0 == 3


def test_random_is_drawn_by_name_and_sized_tensor_by_tensor():
    draws = {}
    for name, p in Network().named_parameters():
        draws[name] = torch.empty_like(p.detach())
        place = {"full_shape": tuple(p.shape), "offset": (0,) * p.dim()}
        draw_standard_normal_(draws[name], name=name, seed=5, transform=lambda z: z.square_(), **place)
    oracle = {"first": 1, "draws": {name: z.double() for name, z in draws.items()}}
    _, _, hook = train_by_both(v0_init="random", v0_seed=5, oracle=oracle, tolerance=2e-2)  # kept in bf16
    assert hook.report.strategy == "random" and hook.report.scale is None


def test_from_step_L_on_the_second_moment_is_adams_own():
    """The same gradients into Adam without a v0 give the same second moment, to fp32 rounding of what was taken out."""
    model, plain = Network(), Network()
    optimizer, other = make_adam(model), make_adam(plain)
    attach_v0(optimizer, model, v0_decay_steps=10)
    for number, batch in enumerate(make_batches(14), 1):
        step(model, optimizer, batch)
        for p, q in zip(model.parameters(), plain.parameters(), strict=True):
            q.grad = p.grad.clone()
        other.step()
        if number >= 10:
            for p, q in zip(model.parameters(), plain.parameters(), strict=True):
                v, expected = read_second_moment(optimizer, p), read_second_moment(other, q)
                assert (v - expected).abs().max() <= 1e-4 * expected.max() and v.min() >= 0.0


@pytest.mark.parametrize("beta2", [0.9, 0.98])
def test_a_second_moment_in_bf16_is_the_oracles_within_its_rounding(beta2):
    """The same gradients for both; each element within 8%, some twenty roundings of 2^-8, and their mean within one."""
    generator = torch.Generator().manual_seed(0)
    model, u, s = nn.Linear(8, 6, bias=False).to(torch.bfloat16), torch.zeros(6, 8, dtype=torch.float64), 0.0
    spread = torch.rand(6, 1, generator=generator) * torch.rand(1, 8, generator=generator) + 0.05
    optimizer = make_adam(model, betas=(0.9, beta2))
    attach_v0(optimizer, model, v0_decay_steps=20)
    for t in range(1, 26):
        model.weight.grad = (torch.randn(6, 8, generator=generator) * spread).bfloat16()
        optimizer.step()
        u = beta2 * u + (1 - beta2) * model.weight.grad.double().square()
        v = u + (1 - beta2**t) * max(0.0, (20 / t) ** 2 - 1) * s
        if t == 6:
            s = factor(u / (1 - beta2**t))
        difference = read_second_moment(optimizer, model.weight).double() / v - 1
        assert difference.abs().max() <= 0.08 and difference.mean().abs() <= 2**-8


def test_accumulation_clipping_and_decoupled_weight_decay():
    start, batches = Network(), make_batches(2 * NUM)
    model = copy.deepcopy(start)
    optimizer = make_adam(model, weight_decay=0.1)
    attach_v0(optimizer, model, v0_decay_steps=20)
    for pair in zip(batches[::2], batches[1::2], strict=True):
        optimizer.zero_grad()
        for batch in pair:
            (compute_loss(model, batch) / 2).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
    options = name_options(start, weight_decay=0.1)
    oracle = train_by_oracle(start, batches, compute_loss, length=20, options=options, max_norm=0.05, accumulation=2)
    assert_close_to_oracle(model, oracle, start)


@pytest.mark.parametrize("overflows", [{1}, {2, 7, 8, 25}])
def test_a_fused_step_that_overflows_is_no_step(overflows):
    start, batches = Network(), make_batches(NUM)
    model = copy.deepcopy(start)
    optimizer = make_adam(model, fused=True)
    attach_v0(optimizer, model, v0_decay_steps=20)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for number, batch in enumerate(batches, 1):
        optimizer.zero_grad()
        scaler.scale(compute_loss(model, batch)).backward()
        if number in overflows:
            model.last.weight.grad[0, 0] = float("inf")
        scaler.step(optimizer)
        scaler.update()
        assert optimizer.param_groups[0]["lr"] == 3e-3
    made = [batch for number, batch in enumerate(batches, 1) if number not in overflows]
    oracle = train_by_oracle(start, made, compute_loss, length=20, options=name_options(start))
    assert_close_to_oracle(model, oracle, start)


@pytest.mark.parametrize("options", [{"v0_decay_steps": 20}, {"v0_decay": "beta2", "v0_estimation_steps": 2}], ids=str)
@pytest.mark.parametrize("kind", ["compiled", "closure", "closure as keyword"])
def test_a_compiled_step_and_gradients_made_inside_the_step_as_lightning_calls_it(kind, options):
    models, calls = [Network(), Network()], []
    for model in models:
        optimizer = make_adam(model, foreach=True)
        attach_v0(optimizer, model, **options)
        call = optimizer.step
        if kind == "compiled" and model is models[1]:
            torch._dynamo.reset()
            call = torch.compile(optimizer.step, backend="eager")
        for batch in make_batches(24):

            def closure(model=model, optimizer=optimizer, batch=batch):
                calls.append(1)
                optimizer.zero_grad()
                loss = compute_loss(model, batch)
                loss.backward()
                return loss

            if kind == "compiled" or model is models[0]:
                closure()
                call()
            else:
                loss = optimizer.step(closure) if kind == "closure" else optimizer.step(closure=closure)
                assert loss.requires_grad
    assert len(calls) == 48
    for expected, p in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(p, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("unfrozen_at", [3, 6, 7, 19, 20, 25])
def test_parameters_that_are_frozen_at_first(unfrozen_at):
    """Within the first K steps it is estimated with the others; later its v0 is of its first gradient; after L it is Adam's."""
    start = Network()
    start.tied.weight.requires_grad_(False)
    start.last.bias.requires_grad_(False)  # for ever

    def unfreeze(model, t) -> None:
        if t == unfrozen_at:
            model.tied.weight.requires_grad_(True)

    _, _, hook = train_by_both(start, on_step=unfreeze, tolerance=4e-5)
    late = ["tied.weight"] if unfrozen_at > 20 else []
    assert hook.report.without_gradient == [*late, "last.bias"] and not hook.is_attached


@pytest.mark.parametrize("added_at", [1, 4, 12])
def test_groups_of_different_betas_and_rates_and_one_that_is_added_later(added_at):
    start, batches = Network(), make_batches(NUM)
    model = copy.deepcopy(start)
    groups = {
        "conv": {"lr": 1e-3, "betas": (0.8, 0.9), "weight_decay": 0.0},
        "tied": {"lr": 4e-3, "betas": (0.9, 0.99), "weight_decay": 0.01},
        "last": {"lr": 2e-3, "betas": (0.95, 0.999), "weight_decay": 0.0},
    }
    optimizer = torch.optim.AdamW(
        [{"params": list(getattr(model, name).parameters()), **groups[name]} for name in ("conv", "tied")]
    )
    attach_v0(optimizer, model, v0_decay_steps=20)
    for t, batch in enumerate(batches, 1):
        if t == added_at:
            optimizer.add_param_group({"params": list(model.last.parameters()), **groups["last"]})
        model.zero_grad()
        compute_loss(model, batch).backward()
        optimizer.step()
    options = {name: groups[name.split(".")[0]] for name, _ in start.named_parameters() if name != "scale"}

    def leave_out(oracle, t) -> None:  # until it is added there is no such parameter
        for name in ("last.weight", "last.bias"):
            oracle.get_parameter(name).requires_grad_(t >= added_at)

    oracle = train_by_oracle(start, batches, compute_loss, length=20, options=options, on_step=leave_out)
    assert_close_to_oracle(model, oracle, start)


@pytest.mark.parametrize("zeros", [3, 6, 9])
def test_a_weight_whose_gradient_is_zero_at_first_gets_its_v0_from_the_first_that_is_not(zeros):
    """A rare expert: there is a gradient from step 1 on, but it is zero."""

    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.own, self.rare, self.gate = nn.Linear(6, 3), nn.Linear(6, 3), 0.0

        def forward(self, x):
            return self.own(x) + self.gate * self.rare(x)

    model = Gated()
    optimizer = make_adam(model)
    attach_v0(optimizer, model, v0_decay_steps=30)
    generator = torch.Generator().manual_seed(1)
    for t in range(1, zeros + 2):
        model.gate = 1.0 if t > zeros else 0.0
        before = model.rare.weight.detach().clone()
        step(model, optimizer, torch.randn(8, 6, generator=generator))
    t = zeros + 1
    n_correction = (0.1 / (1 - 0.9**t)) / (0.02 / (1 - 0.98**t)) ** 0.5  # of m_hat / sqrt(v_hat) after zeros
    moved = (model.rare.weight - before).abs().mean().item() / 3e-3
    assert moved <= 1.05 * max(n_correction, 1.0) * t / 30 and moved > 0


# ---- stopping and going on -------------------------------------------------------------------------------------------


RESUMED = {
    "data_driven": {"v0_decay_steps": 13, "max_steps": 18},
    "random": {"v0_init": "random", "v0_decay_steps": 13, "max_steps": 18},
    "first_gradient": {"v0_init": "first_gradient", "v0_decay_steps": 13, "max_steps": 18},
    "beta2": {"v0_decay": "beta2", "v0_estimation_steps": 6},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", RESUMED)
@pytest.mark.parametrize("stop", [1, 5, 6, 7, 8, 12, 13, 14, 16])
def test_stop_and_go_on_is_the_straight_run_bit_for_bit(kind, stop, dtype):
    """L = 13, K = 6; a parameter is unfrozen at step 8, another never."""
    batches = [batch.to(dtype) for batch in make_batches(18)]

    def make():
        model = Network().to(dtype)
        for p in (model.tied.weight, model.last.bias):
            p.requires_grad_(False)
        optimizer = make_adam(model)
        return model, optimizer, attach_v0(optimizer, model, **RESUMED[kind])

    def run(model, optimizer, first, last):
        for t in range(first, last + 1):
            model.tied.weight.requires_grad_(t >= 8)
            step(model, optimizer, batches[t - 1])

    straight, straight_optimizer, straight_hook = make()
    run(straight, straight_optimizer, 1, 18)
    stopped = make()
    run(*stopped[:2], 1, stop)
    file = io.BytesIO()
    torch.save([one.state_dict() for one in stopped], file)
    resumed = make()
    for one, state in zip(resumed, torch.load(io.BytesIO(file.getvalue())), strict=True):
        one.load_state_dict(state)
    run(*resumed[:2], stop + 1, 18)
    for p, q in zip(straight.parameters(), resumed[0].parameters(), strict=True):
        assert torch.equal(p, q)
        a, b = straight_optimizer.state.get(p, {}), resumed[1].state.get(q, {})
        assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert not resumed[2].is_attached and not straight_hook.is_attached


def test_the_state_is_two_vectors_a_matrix():
    model = Network()
    optimizer = make_adam(model)
    hook = attach_v0(optimizer, model, v0_decay_steps=20)
    for batch in make_batches(8):
        step(model, optimizer, batch)
    state = hook.state_dict()
    assert (state["num_steps"], state["decay_steps"], state["estimation_steps"]) == (8, 20, 6)
    held = state["held"]
    assert sorted(held) == sorted(name for name, _ in model.named_parameters())
    assert held["conv.weight"]["rows"].shape == (4,) and held["conv.weight"]["columns"].shape == (18,)
    assert held["scale"]["rows"].shape == (1,) and all(entry["num_updates"] == 8 for entry in held.values())


# ---- refused ---------------------------------------------------------------------------------------------------------


def test_what_cannot_decay_linearly_is_refused_by_name_before_any_step():
    for cls, options in ((torch.optim.AdamW, {"amsgrad": True}), (torch.optim.Adagrad, {}), (torch.optim.RMSprop, {})):
        model = Network()
        optimizer = cls(model.parameters(), lr=1e-3, **options)
        with pytest.raises(InputError, match=f"v0_decay=linear with {cls.__name__}.*v0_decay=beta2"):
            attach_v0(optimizer, model, v0_decay_steps=5)
        assert not optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v0_decay_steps": "auto"}, "v0_decay_steps=auto needs loss_fn"),
        ({"v0_decay_steps": "auto", "loss_fn": lambda: 0.0}, "v0_decay_steps=auto needs max_steps"),
        ({"max_steps": 9, "loss_fn": lambda: 0.0}, "loss_fn is what v0_decay_steps='auto'"),
        ({}, "v0_decay_steps: two thirds of training"),
        ({"v0_decay_steps": 0.3}, "v0_decay_steps: 0.3 of training"),
        ({"v0_decay_steps": 5, "v0_estimation_steps": 5}, "v0_estimation_steps=5 with v0_decay_steps=5"),
        ({"v0_estimation_steps": 5, "max_steps": 5, "v0_scale": 1.0}, "v0_estimation_steps=5 with max_steps=5"),
        ({"v0_init": "xavier"}, "v0_init='xavier'"),
    ],
)
def test_settings_without_a_meaning_are_refused(options, words):
    model = Network()
    optimizer = make_adam(model)
    with pytest.raises(InputError, match=words):
        attach_v0(optimizer, model, **options)
    assert not optimizer._optimizer_step_pre_hooks
