"""Finds the second moment of an optimizer that nobody listed, by dry runs of copies that step one small parameter.

One tensor of the copy's state must obey v1 = beta2 * v0 + (1 - beta2) * g^2 in the first step from a written v0, and a state put back to
zero must step bit for bit like the one that the optimizer builds itself. That is tried with all group options, numbers of dimensions and
dtypes that the user's parameters have, in two sizes; anything else is a refusal with its reason.
The user's optimizer, its parameters and all random states stay as they are.
"""

import weakref
from dataclasses import dataclass, replace

import torch
from torch import nn

from ..errors import InputError
from ..state_guard import preserve_rng
from .formats import State, StateFormat, copy_optimizer
from .table import OptimizerRow, read_option

# Few elements, and enough that state which is quantised or factored from some size on shows itself (8-bit optimizers: 4,096).
SIZES = ((5, 3, 2), (64, 128, 3))
BETA2_OPTIONS = ("betas[1]", "beta2", "alpha", "rho")

_verdicts: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # optimizer -> (row or None, reason)


def probe_optimizer(optimizer: torch.optim.Optimizer) -> tuple[OptimizerRow | None, str]:
    """Find how `optimizer` keeps its second moment by dry runs, once for each optimizer.

    Returns:
        (a row like those of the table, ""), or (None, the reason why it is refused).
    """
    if optimizer not in _verdicts:
        try:
            with preserve_rng(), torch.no_grad():
                _verdicts[optimizer] = _find_row(optimizer), ""
        except InputError as refusal:
            _verdicts[optimizer] = None, str(refusal)
        except Exception as error:  # whatever an unknown optimizer raises is a reason not to write into it
            _verdicts[optimizer] = None, f"it raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
    return _verdicts[optimizer]


def _find_row(optimizer: torch.optim.Optimizer) -> OptimizerRow:
    if any(optimizer.state.values()):
        raise InputError(
            "it already holds state, from its construction or from steps, and what it started from cannot be seen"
        )
    if any(isinstance(value, nn.Module) for value in vars(optimizer).values()):
        raise InputError("it holds a model, of which no small copy can be made")
    option, beta2 = _find_beta2(optimizer)
    runs = _list_runs(optimizer)
    if not runs:
        raise InputError("it holds no parameter")
    parameter, state = runs[0].make_steps(1)
    tensors = {key: value for key, value in sorted(state.items()) if isinstance(value, torch.Tensor)}
    row = OptimizerRow(
        type(optimizer).__name__,
        beta2=option,
        no_linear="it is not listed, and how it corrects the bias of its second moment is not known",
    )
    rows = [replace(row, key=key) for key, value in tensors.items() if value.shape == parameter.shape]
    accepted = [row for row in rows if all(run.keeps_v0(row, beta2) for run in runs)]
    if len(accepted) > 1:
        raise InputError("more than one state tensor obeys the recurrence: " + ", ".join(row.key for row in accepted))
    if not accepted:
        raise InputError(
            f"no tensor of the parameter's shape in its state ({', '.join(tensors)}) is (1 - beta2) * g^2 + beta2 * v0 after one step from v0"
        )
    for run in runs:
        run.require_same_steps(accepted[0])
    return accepted[0]


def _find_beta2(optimizer: torch.optim.Optimizer) -> tuple[str, float]:
    for option in BETA2_OPTIONS:
        values = {read_option(group, option) for group in optimizer.param_groups}
        beta2 = values.pop()
        if not values and beta2 is not None and 0.0 < beta2 < 1.0:
            return option, beta2
    names = ", ".join(option.partition("[")[0] for option in BETA2_OPTIONS)
    raise InputError(f"its groups name no decay of a second moment (looked for {names})")


@dataclass(frozen=True)
class _DryRun:
    """Steps of copies of an optimizer that have one group's options and one small parameter."""

    optimizer: torch.optim.Optimizer
    group: dict
    shape: tuple[int, ...]
    device: torch.device
    dtype: torch.dtype

    def make_steps(
        self, num_steps: int, row: OptimizerRow | None = None, *, weights: torch.Tensor | None = None, v0=None
    ) -> tuple[nn.Parameter, State]:
        """Make a copy and its steps, from its own state or from the one that a row gives it; returns the parameter and the state."""
        weights = torch.zeros(self.shape) if weights is None else weights
        parameter = nn.Parameter(weights.to(self.device, copy=True))
        copied = copy_optimizer(self.optimizer, self.group, parameter)
        group = copied.param_groups[0]
        if "lr" in group:
            group["lr"] = torch.full_like(group["lr"], 1e-3) if isinstance(group["lr"], torch.Tensor) else 1e-3
        if row is not None:
            StateFormat(row).prime(copied, [parameter], group)
        if v0 is not None:
            copied.state[parameter][row.key].copy_(v0)
        for number in range(1, num_steps + 1):
            parameter.grad = self.make_numbers(number).to(parameter, copy=True)
            with torch.enable_grad():
                copied.step()
        return parameter, copied.state.get(parameter, {})

    def make_numbers(self, seed: int) -> torch.Tensor:
        """Make numbers of either sign whose absolute values lie between 0.5 and 1.5."""
        generator = torch.Generator().manual_seed(seed)
        numbers = torch.rand(self.shape, generator=generator) + 0.5
        return numbers * (torch.randint(0, 2, self.shape, generator=generator) * 2 - 1)

    def keeps_v0(self, row: OptimizerRow, beta2: float) -> bool:
        """Whether the first step from a v0 that is written where the row says is that of a decaying mean of g^2."""
        v0, gradient = self.make_numbers(9).square(), self.make_numbers(1).double()
        _, state = self.make_steps(1, row, v0=v0)
        expected = beta2 * v0.double() + (1 - beta2) * gradient.square()
        return torch.allclose(state[row.key].double().cpu(), expected, rtol=1e-5, atol=0.0)

    def require_same_steps(self, row: OptimizerRow) -> None:
        """Raise `InputError` if a state made by us is not gone on from as its own."""
        for dtype in {torch.float32, self.dtype}:
            weights = self.make_numbers(7).to(dtype) * 0.1
            for num_steps in (1, 2):
                own, ours = (self.make_steps(num_steps, made_by, weights=weights) for made_by in (None, row))
                if not torch.equal(own[0], ours[0]) or not _are_equal(own[1], ours[1]):
                    raise InputError(
                        f"{row.key}: a state built from what it holds makes another step {num_steps} than its own"
                    )


def _list_runs(optimizer: torch.optim.Optimizer) -> list[_DryRun]:
    """List a run for each set of options, number of dimensions and dtype of the optimizer's parameters, in two sizes."""
    runs: dict[tuple, _DryRun] = {}
    for group in optimizer.param_groups:
        left_out = ("params", "param_names", "lr")
        options = repr(sorted((key, repr(value)) for key, value in group.items() if key not in left_out))
        for parameter in group["params"]:
            for size in SIZES:
                shape = (size + (2,) * parameter.dim())[: parameter.dim()]
                run = _DryRun(optimizer, group, shape, parameter.device, parameter.dtype)
                runs.setdefault((options, size, shape, parameter.dtype), run)
    return list(runs.values())


def _are_equal(state: State, other: State) -> bool:
    return state.keys() == other.keys() and all(
        value.dtype == other[key].dtype and torch.equal(value, other[key])
        if isinstance(value, torch.Tensor)
        else value == other[key]
        for key, value in state.items()
    )
