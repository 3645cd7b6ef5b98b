"""Finds the second moment of an optimizer that nobody listed, by dry runs on small copies of it.

A copy of the optimizer (its class, options and other attributes) gets a small parameter in the place of the user's and makes
steps with known gradients; one copy for each set of group options, number of dimensions and size. One tensor of its state must
obey v1 = beta2 * v0 + (1 - beta2) * g^2 in the first step from a written v0, and a state put back to zero must step bit for
bit like the one that the optimizer builds itself. Anything else is a refusal with its reason.
The user's optimizer, its parameters and all random states stay as they are.
"""

import weakref
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..state_guard import preserve_rng
from .formats import State, StateFormat, copy_optimizer
from .table import OptimizerRow, read_option

# Few elements, and enough that state which is quantised or factored from some size on shows itself (8-bit optimizers: 4,096).
SIZES = ((5, 3, 2), (64, 128, 3))
BETA2_OPTIONS = ("betas[1]", "beta2", "alpha", "rho")
TOLERANCE = 1e-5
KEPT, WIPED_OUT = "kept", "wiped out"  # what becomes of a written v0

_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> (row or None, reason)


class _Refusal(Exception):
    """Carries the reason."""


def probe_optimizer(optimizer: torch.optim.Optimizer) -> tuple[OptimizerRow | None, str]:
    """Find how `optimizer` keeps its second moment by dry runs, once for each optimizer.

    Returns:
        (a row like those of the table, ""), or (None, the reason why it is refused).
    """
    if optimizer not in _verdicts:
        try:
            with preserve_rng(), torch.no_grad():
                _verdicts[optimizer] = _find_row(optimizer), ""
        except _Refusal as refusal:
            _verdicts[optimizer] = None, str(refusal)
        except Exception as error:  # whatever an unknown optimizer raises is a reason not to write into it
            _verdicts[optimizer] = None, f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return _verdicts[optimizer]


def _find_row(optimizer: torch.optim.Optimizer) -> OptimizerRow:
    if any(len(state) > 0 for state in optimizer.state.values()):
        raise _Refusal(
            "it already holds state, from its construction or from steps, and what it started from cannot be seen"
        )
    if any(isinstance(value, nn.Module) for value in vars(optimizer).values()):
        raise _Refusal("it holds a model, of which no small copy can be made")
    option, beta2 = _find_beta2(optimizer)
    cases = _list_cases(optimizer)
    copied = _Copy(optimizer, cases[0], torch.zeros(cases[0].shape))
    copied.step(_make_gradient(cases[0].shape, 1))
    keys = sorted(key for key, kept in copied.state.items() if isinstance(kept, torch.Tensor))
    row = OptimizerRow(
        type(optimizer).__name__,
        beta2=option,
        no_linear="it is not listed, and how it corrects the bias of its second moment is not known",
    )
    rows = [replace(row, key=key) for key in keys if copied.state[key].shape == copied.parameter.shape]
    found = {row: {_find_effect(optimizer, row, case, beta2) for case in cases} for row in rows}
    accepted = [row for row, effects in found.items() if effects == {KEPT}]
    if len(accepted) > 1:
        raise _Refusal("more than one state tensor obeys the recurrence: " + ", ".join(row.key for row in accepted))
    if not accepted:
        wiped = next((row.key for row, effects in found.items() if effects <= {KEPT, WIPED_OUT}), None)
        if wiped is not None:
            raise _Refusal(f"{wiped}: its first step wipes a written v0 out")
        raise _Refusal(
            f"no tensor of the parameter's shape in its state ({', '.join(keys)}) is (1 - beta2) * g^2 + beta2 * v0 after one step from v0"
        )
    for case in cases:
        _require_same_steps(optimizer, accepted[0], case)
    return accepted[0]


@dataclass(frozen=True)
class _Case:
    """A group, and a shape and dtype to try its options with."""

    group: dict
    shape: tuple[int, ...]
    dtype: torch.dtype


def _list_cases(optimizer: torch.optim.Optimizer) -> list[_Case]:
    """List the distinct options, numbers of dimensions and dtypes of the optimizer's parameters, each in two sizes."""
    cases: dict[tuple, _Case] = {}
    for group in optimizer.param_groups:
        left_out = ("params", "param_names", "lr")
        options = repr(sorted((key, repr(value)) for key, value in group.items() if key not in left_out))
        for parameter in group["params"]:
            for number, size in enumerate(SIZES):
                shape = (size + (2,) * parameter.dim())[: parameter.dim()]
                cases.setdefault((options, shape, parameter.dtype, number), _Case(group, shape, parameter.dtype))
    if not cases:
        raise _Refusal("it holds no parameter")
    return list(cases.values())


def _find_beta2(optimizer: torch.optim.Optimizer) -> tuple[str, float]:
    for option in BETA2_OPTIONS:
        values = {read_option(group, option) for group in optimizer.param_groups}
        beta2 = values.pop()
        if not values and beta2 is not None and 0.0 < beta2 < 1.0:
            return option, beta2
    names = ", ".join(option.partition("[")[0] for option in BETA2_OPTIONS)
    raise _Refusal(f"its groups name no decay of a second moment (looked for {names})")


# ---- dry runs --------------------------------------------------------------------------------------------------------


class _Copy:
    """A copy of the optimizer with one small parameter."""

    def __init__(self, optimizer: torch.optim.Optimizer, case: _Case, values: torch.Tensor) -> None:
        original = next(p for group in optimizer.param_groups for p in group["params"])
        self.parameter = nn.Parameter(values.to(original.device, copy=True))
        self.optimizer = copy_optimizer(optimizer, case.group, self.parameter)
        self.group = self.optimizer.param_groups[0]
        if "lr" in self.group:
            rate = self.group["lr"]
            self.group["lr"] = torch.full_like(rate, 1e-3) if isinstance(rate, torch.Tensor) else 1e-3

    @property
    def state(self) -> State:
        return self.optimizer.state.get(self.parameter, {})

    def step(self, gradient: torch.Tensor) -> None:
        self.parameter.grad = gradient.to(self.parameter, copy=True)
        with torch.enable_grad():
            self.optimizer.step()


def _make_gradient(shape: tuple[int, ...], number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    gradient = torch.rand(shape, generator=generator) + 0.5
    return gradient * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)


def _find_effect(optimizer: torch.optim.Optimizer, row: OptimizerRow, case: _Case, beta2: float) -> str | None:
    """Find what the first step makes of a v0 that is written where the row says."""
    copied, state_format = _Copy(optimizer, case, torch.zeros(case.shape)), StateFormat(row)
    v0, gradient = _make_gradient(case.shape, 9).square(), _make_gradient(case.shape, 1)
    state_format.prime(copied.optimizer, [copied.parameter], copied.group)
    state_format.write_(copied.state, v0.to(copied.parameter.device))
    copied.step(gradient)
    v1 = state_format.read(copied.state).double().cpu()
    from_gradient = (1 - beta2) * gradient.double().square()
    for effect, expected in ((KEPT, beta2 * v0.double() + from_gradient), (WIPED_OUT, from_gradient)):
        if torch.allclose(v1, expected, rtol=TOLERANCE, atol=0.0):
            return effect
    return None


def _require_same_steps(optimizer: torch.optim.Optimizer, row: OptimizerRow, case: _Case) -> None:
    """Refuse an optimizer that does not go on from a state made by us as from its own."""
    for dtype in {torch.float32, case.dtype}:
        values = _make_gradient(case.shape, 7).to(dtype) * 0.1
        own, primed = (_Copy(optimizer, case, values) for _ in range(2))
        StateFormat(row).prime(primed.optimizer, [primed.parameter], primed.group)
        for number in (1, 2):
            for copied in (own, primed):
                copied.step(_make_gradient(case.shape, number))
            if not torch.equal(own.parameter, primed.parameter) or not _are_equal(own.state, primed.state):
                raise _Refusal(f"{row.key}: a state built from what it holds makes another step {number} than its own")


def _are_equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value, other[key])
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in state.items()
    )
