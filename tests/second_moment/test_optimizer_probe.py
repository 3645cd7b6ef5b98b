"""Optimizers that nobody listed: found out by dry runs on a copy, or refused with a reason; the user's own stays untouched."""

import copy
import random

import numpy as np
import pytest
import torch
from optimizer_cases import load, make_gradients, make_parameter, make_v0, step, write
from torch import nn
from trainers import is_untouched

from hf_v0init import InputError, read_second_moment
from hf_v0init.second_moment.probe import probe_optimizer
from hf_v0init.second_moment.state import SecondMoment, find_format

# What the dry run finds in pytorch_optimizer 4.1 beyond the rows of the table.
FOUND_IN_PYTORCH_OPTIMIZER = [
    "Adam", "AdamW", "AdaDelta", "AdaMod", "AdaNorm", "AdamC", "AdamP", "AdamS", "AvaGrad", "DiffGrad", "EXAdam", "Grams",
    "LaProp", "Lamb", "PAdam", "RAdam", "RMSprop", "SWATS",
]  # fmt: skip
REFUSED = {
    "pytorch_optimizer:Lion": r"\(exp_avg\) is",
    "pytorch_optimizer:SGDW": "no decay of a second moment",
    "pytorch_optimizer:CAME": "raised RuntimeError",
    "pytorch_optimizer:Shampoo": "no decay of a second moment",
    "pytorch_optimizer:SOAP": r"is \(1 - beta2\) \* g\^2",
    "pytorch_optimizer:FlashAdamW": r"is \(1 - beta2\) \* g\^2",
    "pytorch_optimizer:ScheduleFreeAdamW": "makes another step 1",
    "pytorch_optimizer:ScheduleFreeRAdam": "makes another step 1",
    "pytorch_optimizer:Adai": "makes another step 1",
    "pytorch_optimizer:Prodigy": r"is \(1 - beta2\) \* g\^2",
    "pytorch_optimizer:SPAM": "already holds state",
    "pytorch_optimizer:AdaHessian": "raised RuntimeError",
    "torch.optim:ASGD": "dry run on a copy refused it",
    "torch.optim:Rprop": "dry run on a copy refused it",
    "torch.optim:LBFGS": "dry run on a copy refused it",
    "torch.optim:SparseAdam": "dry run on a copy refused it",
}


class Mine(torch.optim.Optimizer):
    """Adam by hand, with an attribute of its own, a lazy `step` in the group and a random number per step."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.0, twist="", **options):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay, "twist": twist, **options})
        self.eps = 1e-8

    @torch.no_grad()
    def step(self, closure=None):
        torch.rand(1), random.random(), np.random.rand()
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            for p in group["params"]:
                if p.grad is not None:
                    self.update(group, p, self.state[p], p.grad + group["weight_decay"] * p)

    def update(self, group, p, state, g):
        (b1, b2), twist = group["betas"], group["twist"]
        if not state:
            state["m"], state["energy"] = torch.zeros_like(p), torch.zeros_like(p)
            if twist == "ones":
                state["factor"] = torch.ones(())
            if twist == "second copy":
                state["other"] = torch.zeros_like(p)
            if twist == "quantised when large" and p.numel() > 4096:
                state["energy"] = state["energy"].to(torch.bfloat16)
        energy = state["energy"].float()
        if twist == "reset" and group["step"] == 1:
            energy = energy * 0
        if twist == "centralised":
            g = g - g.mean()
        if twist == "root":
            energy = (b2 * energy.square() + (1 - b2) * g.square()).sqrt()
        else:
            energy = b2 * energy + (1 - b2) * g.square()
        if twist == "second copy":
            state["other"].mul_(b2).addcmul_(g, g, value=1 - b2)
        if "factor" in state:
            g = g * state["factor"]
        state["energy"].copy_(energy)
        state["m"].mul_(b1).add_(g, alpha=1 - b1)
        denominator = (energy / (1 - b2 ** group["step"])).sqrt() + self.eps
        p.addcdiv_(state["m"] / (1 - b1 ** group["step"]), denominator, value=-group["lr"])


def test_state_of_any_name_is_found_and_written():
    parameter, v0 = make_parameter(), make_v0()
    optimizer = Mine([parameter], weight_decay=0.1)
    assert find_format(optimizer).row.key == "energy" and SecondMoment(optimizer).read_beta2() == 0.99
    write(optimizer, parameter, v0)
    assert set(optimizer.state[parameter]) == {"m", "energy"} and torch.equal(
        read_second_moment(optimizer, parameter), v0
    )
    gradient = make_gradients(1)[0]
    before = parameter.detach().clone()
    step(optimizer, parameter, gradient)
    g = gradient + 0.1 * before
    torch.testing.assert_close(
        read_second_moment(optimizer, parameter), 0.99 * v0 + 0.01 * g.square(), rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        parameter.detach() - before, -1e-3 * g / (g.square() + 99 * v0).sqrt(), rtol=1e-3, atol=1e-8
    )


@pytest.mark.parametrize(
    ("twist", "reason"),
    [
        ("reset", r"\(energy, m\) is \(1 - beta2\) \* g\^2"),
        ("root", r"\(energy, m\) is \(1 - beta2\) \* g\^2"),
        ("centralised", r"\(energy, m\) is \(1 - beta2\) \* g\^2"),
        ("ones", "makes another step 1 than its own"),
        ("second copy", "more than one state tensor obeys the recurrence: energy, other"),
        ("quantised when large", "makes another step 1 than its own"),
    ],
)
def test_what_does_not_obey_is_refused_with_its_reason(twist, reason):
    with pytest.raises(InputError, match=reason) as caught:
        find_format(Mine([make_parameter()], twist=twist))
    assert "v0_init=zeros" in str(caught.value) and "\n" not in str(caught.value)


def test_every_group_and_every_number_of_dimensions_is_looked_at():
    groups = [{"params": [make_parameter()]}, {"params": [make_parameter()], "twist": "reset"}]
    assert probe_optimizer(Mine(groups))[1].startswith("no tensor")
    groups = [{"params": [make_parameter()]}, {"params": [make_parameter()], "betas": (0.9, 0.9)}]
    assert "name no decay" in probe_optimizer(Mine(groups))[1]

    class VectorsOnly(Mine):
        def update(self, group, p, state, g):
            super().update(group | {"twist": "reset" if p.dim() == 1 else ""}, p, state, g)

    matrix, vector = make_parameter(), nn.Parameter(torch.zeros(7))
    assert probe_optimizer(VectorsOnly([matrix]))[0] is not None
    assert probe_optimizer(VectorsOnly([matrix, vector]))[0] is None


def test_a_subclass_of_a_listed_optimizer_is_looked_at_too():
    kept = type("Kept", (torch.optim.AdamW,), {})
    assert find_format(kept([make_parameter()])).row.key == "exp_avg_sq"

    class Discards(torch.optim.AdamW):
        def step(self, closure=None):
            for state in self.state.values():
                state["exp_avg_sq"].zero_()
            return super().step(closure)

    with pytest.raises(InputError, match=r"no tensor of the parameter.s shape"):
        find_format(Discards([make_parameter()]))


class Untouchable:
    """An attribute that tells if it was copied."""

    def __deepcopy__(self, memo):
        raise RuntimeError("copied")


def test_users_optimizer_parameters_hooks_and_random_states_stay_as_they_are():
    parameter = make_parameter()
    parameter.grad = torch.ones_like(parameter)
    optimizer = Mine([parameter])
    calls = []
    optimizer.register_step_pre_hook(lambda *a: calls.append("hook"))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda s: 1.0)  # patches `step` on the instance
    before, grad = parameter.detach().clone(), parameter.grad
    groups = copy.deepcopy([{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups])
    states = random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state()
    row, reason = probe_optimizer(optimizer)
    assert row is not None and reason == ""
    assert calls == [] and scheduler.last_epoch == 0
    assert torch.equal(parameter, before) and parameter.grad is grad and torch.equal(grad, torch.ones_like(grad))
    assert len(optimizer.state) == 0 and is_untouched(optimizer)
    assert [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups] == groups
    assert random.getstate() == states[0] and np.random.get_state()[1].tolist() == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_what_cannot_be_copied_is_refused_and_models_are_never_copied():
    optimizer = Mine([make_parameter()])
    optimizer.thing = Untouchable()
    assert probe_optimizer(optimizer) == (None, "it raised RuntimeError: copied")
    optimizer = Mine([make_parameter()])
    optimizer.model = nn.Linear(2, 2)
    assert "it holds a model" in probe_optimizer(optimizer)[1]


def test_no_copy_of_the_users_parameters_is_made(monkeypatch):
    """They may be large: what an attribute or an option holds of them is mapped to the small parameter."""
    parameter = make_parameter((64, 64))
    optimizer = Mine([parameter])
    optimizer.by_parameter = {parameter: "decayed"}
    copies = []
    monkeypatch.setattr(
        nn.Parameter, "__deepcopy__", lambda self, memo: copies.append(self.shape) or nn.Parameter(self.data)
    )
    assert probe_optimizer(optimizer)[0] is not None
    assert copies == []


@pytest.mark.parametrize("name", FOUND_IN_PYTORCH_OPTIMIZER)
def test_found_in_pytorch_optimizer_and_v0_acts(name):
    optimizer_class = load(f"pytorch_optimizer:{name}")
    parameters = [make_parameter(), make_parameter()]
    optimizers = [optimizer_class([p], lr=1e-3) for p in parameters]
    for optimizer in optimizers:
        find_format(optimizer)
    write(optimizers[0], parameters[0], make_v0())
    for number, gradient in enumerate(make_gradients(8)):
        for optimizer, parameter in zip(optimizers, parameters, strict=True):
            step(optimizer, parameter, gradient)
        moments = [read_second_moment(o, p).double() for o, p in zip(optimizers, parameters, strict=True)]
        expected = SecondMoment(optimizers[0]).read_beta2() ** (number + 1) * make_v0().double()  # what is left of v0
        if number == 0:
            torch.testing.assert_close(moments[0] - moments[1], expected, rtol=1e-4, atol=1e-6)
    assert not torch.equal(*parameters) and all(p.isfinite().all() for p in parameters)


@pytest.mark.parametrize("path", REFUSED)
def test_others_are_refused_with_their_reason(path):
    optimizer = load(path)([make_parameter()], lr=1e-3)
    with pytest.raises(InputError, match=REFUSED[path]):
        find_format(optimizer)


@pytest.mark.parametrize(("name", "key"), [("AdamW", "exp_avg_sq"), ("RAdam", "exp_avg_sq"), ("RMSprop", "square_avg")])
def test_the_dry_run_agrees_with_the_table(name, key):
    assert probe_optimizer(getattr(torch.optim, name)([make_parameter()]))[0].key == key


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_parameters_of_other_dtypes(dtype):
    parameter = make_parameter(dtype=dtype)
    optimizer = Mine([parameter])
    write(optimizer, parameter, make_v0())
    assert optimizer.state[parameter]["energy"].dtype == dtype
    torch.testing.assert_close(read_second_moment(optimizer, parameter), make_v0().to(dtype))
