"""Finds the second moment of an optimizer that nobody listed, by dry runs on small copies of it.

A copy of the optimizer (its class, options and other attributes) gets a small parameter in the place of the user's and makes
steps with known gradients; one copy for each set of group options, number of dimensions and size. What it then holds tells
where the second moment is; a state built from that must step bit for bit like the one that the optimizer builds itself; and
from a written v0 its first step must obey v1 = beta2 * v0 + (1 - beta2) * g^2. Anything else is a refusal with its reason.
The user's optimizer, its parameters and all random states stay as they are.
"""

import copy
import types
import weakref
from collections import OrderedDict, defaultdict
from dataclasses import dataclass

import torch
from torch import nn

from ..state_guard import preserve_rng
from .layouts import PlainLayout, State

# Few elements, and enough that state which is quantised or factored from some size on shows itself (8-bit optimizers: 4,096).
SIZES = ((5, 3, 2), (64, 128, 3))
BETA2_OPTIONS = ("betas", "beta2", "alpha", "rho")
TOLERANCE = 1e-5

_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> (layout or None, reason)


@dataclass(frozen=True)
class ProbedLayout(PlainLayout):
    """State as a dry run found it.

    Attributes:
        zeros_like_parameter: keys of tensors of the parameter's shape and dtype, all zero before the first step.
        small: keys and start values of everything else: numbers, and tensors of at most one element.
    """

    zeros_like_parameter: tuple[str, ...] = ()
    small: tuple[tuple[str, object], ...] = ()

    def create_state(self, optimizer, parameter: nn.Parameter, group: dict) -> State:
        """Create the state as the dry run's copy did."""
        state: State = {key: torch.zeros_like(parameter, requires_grad=False) for key in self.zeros_like_parameter}
        for key, value in self.small:
            if isinstance(value, torch.Tensor):
                # A scalar on the CPU stays there, as torch's `step` does; others go where the parameter is.
                value = (
                    value.clone()
                    if value.device.type == "cpu" and value.dim() == 0
                    else value.to(parameter.device, copy=True)
                )
            state[key] = value
        return state


class _Refusal(Exception):
    """Carries the reason."""


def probe_layout(optimizer: torch.optim.Optimizer) -> tuple[ProbedLayout | None, str]:
    """Find the layout of `optimizer` by dry runs, once an optimizer.

    Returns:
        (layout, ""), or (None, the reason why it is refused).
    """
    if optimizer not in _verdicts:
        _verdicts[optimizer] = _probe(optimizer)
    return _verdicts[optimizer]


def _probe(optimizer: torch.optim.Optimizer) -> tuple[ProbedLayout | None, str]:
    try:
        with preserve_rng(), torch.no_grad():
            return _find_layout(optimizer), ""
    except _Refusal as refusal:
        return None, str(refusal)
    except Exception as error:  # whatever an unknown optimizer raises is a reason not to write into it
        return None, f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _find_layout(optimizer: torch.optim.Optimizer) -> ProbedLayout:
    if any(len(state) > 0 for state in optimizer.state.values()):
        raise _Refusal(
            "it already holds state, from its construction or from steps, and what it started from cannot be seen"
        )
    if any(isinstance(value, nn.Module) for value in vars(optimizer).values()):
        raise _Refusal("it holds a model, of which no small copy can be made")
    option, beta2 = _find_beta2(optimizer)
    cases = _list_cases(optimizer)
    template = None
    for case in cases:
        for dtype in {torch.float32, case.dtype}:
            run = _copy_with_parameter(optimizer, case.index, torch.zeros(case.shape, dtype=dtype))
            run.step(_make_gradient(case.shape, 1))
            found = _describe_state(run)
            if template is None:
                template, keys = found, found.zeros
            elif found != template:
                raise _Refusal("what it keeps differs between tensors or groups")
            if dtype == torch.float32:
                keys = [key for key in keys if _is_mean_of_squares(run, key, beta2)]
    if not keys:
        names = ", ".join(sorted([*template.zeros, *(key for key, _ in template.small)])) or "none"
        raise _Refusal(f"no tensor of the parameter's shape in its state ({names}) is (1 - beta2) * g^2 after one step")
    accepted, reasons = [], []
    for key in keys:
        layout = ProbedLayout(
            key,
            scratch=None,
            find_decay=lambda group: _read_beta2(group, option),
            zeros_like_parameter=template.zeros,
            small=template.small,
            no_linear_decay="it is not listed, and how it corrects the bias of its second moment is not known",
        )
        reason = next((r for r in (_try_layout(optimizer, layout, case, beta2) for case in cases) if r), "")
        if reason:
            reasons.append(f"{key}: {reason}")
        else:
            accepted.append(layout)
    if len(accepted) > 1:
        raise _Refusal(
            "more than one state tensor obeys the recurrence: " + ", ".join(x.second_moment for x in accepted)
        )
    if not accepted:
        raise _Refusal("; ".join(reasons))
    return accepted[0]


@dataclass(frozen=True)
class _Case:
    """A group (by its index) and a shape and dtype to try its options with."""

    index: int
    shape: tuple[int, ...]
    dtype: torch.dtype


def _list_cases(optimizer: torch.optim.Optimizer) -> list[_Case]:
    """List the distinct options, numbers of dimensions and dtypes of the optimizer's parameters, each in two sizes."""
    cases: dict[tuple, _Case] = {}
    for index, group in enumerate(optimizer.param_groups):
        options = repr(
            sorted((key, repr(value)) for key, value in group.items() if key not in ("params", "param_names", "lr"))
        )
        for parameter in group["params"]:
            for number, size in enumerate(SIZES):
                shape = (size + (2,) * parameter.dim())[: parameter.dim()]
                cases.setdefault((options, shape, parameter.dtype, number), _Case(index, shape, parameter.dtype))
    if not cases:
        raise _Refusal("it holds no parameter")
    return list(cases.values())


def _find_beta2(optimizer: torch.optim.Optimizer) -> tuple[str, float]:
    for option in BETA2_OPTIONS:
        values = {_read_beta2(group, option) for group in optimizer.param_groups}
        if len(values) == 1 and None not in values:
            return option, values.pop()
    raise _Refusal(f"its groups name no decay of a second moment (looked for {', '.join(BETA2_OPTIONS)})")


def _read_beta2(group: dict, option: str) -> float | None:
    value = group.get(option)
    if isinstance(value, (tuple, list)):
        value = value[1] if len(value) > 1 else None
    return float(value) if isinstance(value, (int, float)) and 0.0 < value < 1.0 else None


# ---- a copy with small parameters ---------------------------------------------------------------------------------------------


@dataclass
class _Run:
    """A copy of the optimizer with one small parameter, and the gradients it was given."""

    optimizer: torch.optim.Optimizer
    parameter: nn.Parameter
    gradients: list[torch.Tensor]

    @property
    def state(self) -> State:
        return self.optimizer.state.get(self.parameter, {})

    def step(self, gradient: torch.Tensor) -> None:
        self.gradients.append(gradient)
        self.parameter.grad = gradient.to(self.parameter, copy=True)
        with torch.enable_grad():
            self.optimizer.step()


def _copy_with_parameter(optimizer: torch.optim.Optimizer, index: int, values: torch.Tensor) -> _Run:
    """Copy the optimizer with group `index` alone, and in it one parameter with these values."""
    originals = [p for group in optimizer.param_groups for p in group["params"]]
    parameter = nn.Parameter(values.to(originals[0].device, copy=True))
    memo = {id(p): parameter for p in originals}
    clone = type(optimizer).__new__(type(optimizer))
    for name, value in vars(optimizer).items():
        if isinstance(value, types.MethodType) or (callable(value) and hasattr(type(optimizer), name)):
            continue  # a `step` that a scheduler or accelerate patched, which would step the user's: the class's own is run
        if name == "param_groups":
            options = {key: option for key, option in value[index].items() if key not in ("params", "param_names")}
            copied = [copy.deepcopy(options, memo) | {"params": [parameter]}]
        elif isinstance(value, OrderedDict) and "hooks" in name:
            copied = OrderedDict()  # hooks belong to the user's run
        elif name == "state":
            copied = defaultdict(dict)
        else:
            copied = copy.deepcopy(value, memo)
        clone.__dict__[name] = copied
    group = clone.param_groups[0]
    if "lr" in group:
        group["lr"] = torch.full_like(group["lr"], 1e-3) if isinstance(group["lr"], torch.Tensor) else 1e-3
    return _Run(clone, parameter, [])


def _make_gradient(shape: tuple[int, ...], number: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(number)
    gradient = torch.rand(shape, generator=generator) + 0.5
    return gradient * (torch.randint(0, 2, shape, generator=generator) * 2 - 1)


# ---- what the state looks like ----------------------------------------------------------------------------------------------


@dataclass
class _Template:
    """What a state holds before the first step: tensors of zeros like the parameter, and the rest with its start value."""

    zeros: tuple[str, ...]
    small: tuple[tuple[str, object], ...]

    def __eq__(self, other) -> bool:
        return self.zeros == other.zeros and repr(self.small) == repr(other.small)


def _describe_state(run: _Run) -> _Template:
    zeros, small = [], []
    if not run.state:
        raise _Refusal("it keeps no state for a parameter in `optimizer.state`")
    for key, value in run.state.items():
        if isinstance(value, torch.Tensor) and value.shape == run.parameter.shape:
            kind = (type(value), value.dtype, value.device)
            if kind != (torch.Tensor, run.parameter.dtype, run.parameter.device):
                raise _Refusal(f"its state {key!r} is no plain tensor of the parameter's dtype and device")
            zeros.append(key)
        elif isinstance(value, torch.Tensor) and value.numel() <= 1:
            small.append((key, torch.zeros_like(value)))
        elif value is None or isinstance(value, (bool, str)):
            small.append((key, value))
        elif isinstance(value, (int, float)):
            small.append((key, type(value)(0)))
        else:
            raise _Refusal(f"its state {key!r} is neither a number nor a tensor of the parameter's shape")
    return _Template(tuple(zeros), tuple(small))


def _is_mean_of_squares(run: _Run, key: str, beta2: float) -> bool:
    expected = (1 - beta2) * run.gradients[0].double().square()
    return torch.allclose(run.state[key].double().cpu(), expected, rtol=TOLERANCE, atol=0.0)


def _try_layout(optimizer, layout: ProbedLayout, case: _Case, beta2: float) -> str:
    """Hold the layout to two dry runs; returns what went wrong, or ''."""
    start = _make_gradient(case.shape, 7) * 0.1
    own, built = (_copy_with_parameter(optimizer, case.index, start) for _ in range(2))
    _give_state(built, layout)
    for number in (1, 2):
        for run in (own, built):
            run.step(_make_gradient(case.shape, number))
        if not torch.equal(own.parameter, built.parameter) or not _are_equal(own.state, built.state):
            return f"a state built from what it holds makes another step {number} than its own"

    written = _copy_with_parameter(optimizer, case.index, torch.zeros(case.shape))
    v0, gradient = _make_gradient(case.shape, 9).square(), _make_gradient(case.shape, 1)
    layout.write_(_give_state(written, layout), v0.to(written.parameter.device))
    written.step(gradient)
    v1 = layout.read(written.state).double().cpu()
    from_gradient = (1 - beta2) * gradient.double().square()
    if torch.allclose(v1, beta2 * v0.double() + from_gradient, rtol=TOLERANCE, atol=0.0):
        return ""
    if torch.allclose(v1, from_gradient, rtol=TOLERANCE, atol=0.0):
        return "its first step wipes a written v0 out"
    return "from a written v0 its first step does not give beta2 * v0 + (1 - beta2) * g^2"


def _are_equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(
        torch.equal(value, other[key]) if isinstance(value, torch.Tensor) else value == other[key]
        for key, value in state.items()
    )


def _give_state(run: _Run, layout: ProbedLayout) -> State:
    state = layout.create_state(run.optimizer, run.parameter, run.optimizer.param_groups[0])
    run.optimizer.state[run.parameter] = state
    return state
