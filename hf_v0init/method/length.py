"""How long a v0 acts: for `LONGEST_FRACTION` of training, unless the user says otherwise.

`v0_decay_steps=auto` and `untuned_warmup=trust_radius` take the length from the trust radius at the initial weights, other untuned
warmups, which are baselines, from beta2 alone.

Adam's first update moves every weight by about the learning rate. d50 is the displacement of every weight, along the sign of
the gradient, at which the decrease of the loss is half of what the gradient promises (`estimation.trust_radius`). So

    x = learning rate / d50
    L = `STEPS_PER_X` * x steps, at least `SHORTEST_FRACTION` and at most `LONGEST_FRACTION` of training

x says how far beyond the first-order model a first step at the full rate would go, and sees that first step alone: a post-norm OPT and
an LSTM had an x below .3 and were far better with a warmup all the same, hence the lower bound. `configs/compare/v0_decay/README.md` says
which runs the three constants are from, and what these show and what not.

Ma & Yarats, 'On the adequacy of untuned warmup' (AAAI 2021), have the length from beta2. At optimizer step t, counted from 1, they multiply
the schedule's learning rate by

    linear         min(1, (1 - beta2) / 2 * t)       over 2 / (1 - beta2) steps
    exponential    1 - exp(-(1 - beta2) * t)

The square root of the exponential one is nearly the closed-form multiplier m(t) = sqrt(1 - beta2^t) of a data-driven v0 of scale 1.

Plain Python, so that the command line can use it without importing torch.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from ..errors import InputError

logger = logging.getLogger("hf_v0init")

STEPS_PER_X = 260.0  # optimizer steps of warmup for each learning rate's worth of d50
SHORTEST_FRACTION = 1 / 3  # of training
LONGEST_FRACTION = 2 / 3  # of training; beyond it little is left to train with
UNTUNED_WARMUPS = ("linear", "exponential")


def compute_relative_rate(learning_rate: float, d50: float) -> float:
    """Compute x = learning rate / d50 (dimensionless): the first step at this rate in units of the trust radius.

    Args:
        learning_rate: the run's peak, >= 0.
        d50: displacement per element, > 0, in the weights' own unit.

    Raises:
        InputError: a learning rate that is negative or not finite, or d50 <= 0.
    """
    if not (math.isfinite(learning_rate) and learning_rate >= 0.0):
        raise InputError(f"learning_rate={learning_rate}: must be a finite number >= 0, such as 1e-3")
    return learning_rate / _require_d50(d50)


def compute_warmup_length(x: float, num_steps: int) -> int:
    """Compute L, the linear warmup of a run, in optimizer steps.

    Args:
        x: learning rate / d50, see `compute_relative_rate`.
        num_steps: optimizer steps of the whole run, >= 1.

    Raises:
        InputError: `x` negative or not finite, or `num_steps` < 1.
    """
    shortest, longest = compute_bounds(num_steps)
    return max(shortest, min(_compute_wanted(x), longest))


def compute_bounds(num_steps: int) -> tuple[int, int]:
    """Compute the shortest and the longest L of a run of `num_steps`, in optimizer steps, each >= 1.

    Raises:
        InputError: `num_steps` < 1.
    """
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: must be a whole number >= 1, the optimizer steps of the run")
    longest = max(1, math.floor(LONGEST_FRACTION * num_steps))
    return min(longest, max(1, round(SHORTEST_FRACTION * num_steps))), longest


def compute_largest_rate_with_room(d50: float, num_steps: int) -> float:
    """Compute the largest learning rate whose whole warmup fits into `LONGEST_FRACTION` of a run of `num_steps`.

    Raises:
        InputError: d50 <= 0 or `num_steps` < 1.
    """
    return compute_bounds(num_steps)[1] / STEPS_PER_X * _require_d50(d50)


def describe_bound(x: float, steps: int) -> str:
    """Say behind a measured length how it differs from what x asks for, as in ", cut from 900 to two thirds of training"."""
    wanted = _compute_wanted(x)
    if wanted > steps:
        return f", cut from {wanted:,} to two thirds of training"
    return f", raised from {wanted:,} to a third of training" if wanted < steps else ""


@dataclass(frozen=True)
class WarmupLength:
    """For how long a run warms up, and what was measured for it.

    Attributes:
        steps: optimizer steps, >= 1.
        d50: the trust radius, in the weights' own unit; None where it could not be measured, `reason` says why.
        learning_rate: the largest of the optimizer's groups.
        x: learning_rate / d50; None without d50.
        num_forwards, seconds: what the measurement took.
    """

    steps: int
    d50: float | None
    learning_rate: float
    x: float | None = None
    reason: str | None = None
    num_forwards: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict:
        """Return plain JSON types."""
        return asdict(self)

    @classmethod
    def from_dict(cls, content: Mapping[str, Any]) -> "WarmupLength":
        """Read what `to_dict` returned; what only another version knows is left out."""
        return cls(**{field.name: content[field.name] for field in fields(cls) if field.name in content})

    def describe(self, what: str) -> str:
        """Say in one line what was measured and what follows; `what` takes the number of steps, as in "v0 decays over"."""
        if self.d50 is None:
            return (
                f"the trust radius cannot be measured ({self.reason}): {what} two thirds of training, {self.steps:,} steps; give "
                "--v0_decay_steps or --warmup_steps to choose yourself"
            )
        bound = describe_bound(self.x, self.steps)
        return (
            f"trust radius d50 {self.d50:.3g}, learning rate / d50 = {self.x:.3g}: {what} {self.steps:,} steps{bound}"
        )

    def log(self, what: str) -> None:
        """Log what `describe` says; a warning where nothing was measured."""
        (logger.warning if self.d50 is None else logger.info)(self.describe(what))


def choose_length(d50: float | None, learning_rate: float, num_steps: int, **found) -> WarmupLength:
    """Choose the warmup of a run of `num_steps` from its trust radius; two thirds of the run where there is none.

    Args:
        d50: displacement per element, > 0; None where it could not be measured.
        learning_rate: the peak of the optimizer's groups.
        found: further fields of `WarmupLength`.
    """
    if d50 is None:
        return WarmupLength(compute_bounds(num_steps)[1], None, learning_rate, **found)
    x = compute_relative_rate(learning_rate, d50)
    steps = compute_warmup_length(x, num_steps)
    return WarmupLength(steps, d50, learning_rate, x, **found)


def compute_untuned_factor(step: int, beta2: float, shape: str) -> float:
    """Compute an untuned warmup's factor on the learning rate at optimizer step `step` >= 1 (dimensionless, in (0, 1]).

    Args:
        step: t.
        beta2: of the optimizer.
        shape: one of `UNTUNED_WARMUPS`.
    """
    if shape == "linear":
        return min(1.0, (1.0 - beta2) / 2.0 * step)
    return -math.expm1(-(1.0 - beta2) * step)


def _compute_wanted(x: float) -> int:
    if not (math.isfinite(x) and x >= 0.0):
        raise InputError(f"x={x}: learning rate / d50 must be a finite number >= 0")
    return round(STEPS_PER_X * x)


def _require_d50(d50: float) -> float:
    if not (math.isfinite(d50) and d50 > 0.0):
        raise InputError(f"d50={d50}: must be a finite number > 0, the displacement that --probe_only prints")
    return d50
