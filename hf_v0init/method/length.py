"""How long a run must warm up, from the trust radius at its initial weights.

Adam's first update moves every weight by about the learning rate. d50 is the displacement of every weight, along the sign of
the gradient, at which the decrease of the loss is half of what the gradient promises (`estimation.trust_radius`). So

    x = learning rate / d50

says how far beyond the first-order model a first step at the full rate would go. The rule that acts on it; its constants are from
runs of 500 to 680 steps on two tasks, judged on seven others, and `configs/compare/v0_decay/README.md` says what they show and what not:

| x, network | linear warmup |
| --- | --- |
| x < `NEEDED_FROM`, or a network with BatchNorm | none needed |
| else | `STEPS_PER_X` * x steps, at most `LONGEST_FRACTION` of the run |

It sees the first step alone. A post-norm OPT and an LSTM had a small x and were better with a warmup all the same (`opt.csv` in that
folder's results, `tuning.csv`).

Plain Python, so that the command line can use it without importing torch.
"""

import logging
import math
from dataclasses import asdict, dataclass

from ..errors import InputError

logger = logging.getLogger("hf_v0init")

STEPS_PER_X = 260.0  # optimizer steps of warmup for each learning rate's worth of d50
LONGEST_FRACTION = 2 / 3  # of the run; beyond it nothing is left to train with
NEEDED_FROM = (
    0.3  # x from which on a warmup is worth its steps; fine-tuning needed none at .20, and gained from one at 1.0
)


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


def compute_warmup_length(x: float, num_steps: int, *, has_batch_norm: bool = False) -> int:
    """Compute the linear warmup that a run needs, in optimizer steps; 0 where none is needed.

    Args:
        x: learning rate / d50, see `compute_relative_rate`.
        num_steps: optimizer steps of the whole run, >= 1.
        has_batch_norm: that the network normalises over the batch. Its weights before a BatchNorm have no scale of their own,
            so a step that is too long only shortens the next ones, and no warmup was needed at any x.

    Raises:
        InputError: `x` negative or not finite, or `num_steps` < 1.
    """
    if not (math.isfinite(x) and x >= 0.0):
        raise InputError(f"x={x}: learning rate / d50 must be a finite number >= 0")
    _require_num_steps(num_steps)
    if has_batch_norm or x < NEEDED_FROM:
        return 0
    return max(1, min(round(STEPS_PER_X * x), math.floor(LONGEST_FRACTION * num_steps)))


def is_cut_short(x: float, num_steps: int, *, has_batch_norm: bool = False) -> bool:
    """Whether the run is too short for the warmup that x asks for, so that a share of the run stands in for it."""
    length = compute_warmup_length(x, num_steps, has_batch_norm=has_batch_norm)
    return length > 0 and round(STEPS_PER_X * x) > length


def compute_largest_rate_without_warmup(d50: float) -> float:
    """Compute the learning rate below which this network needs no warmup: `NEEDED_FROM` * d50.

    Raises:
        InputError: d50 <= 0.
    """
    return NEEDED_FROM * _require_d50(d50)


def compute_largest_rate_with_room(d50: float, num_steps: int) -> float:
    """Compute the largest learning rate whose whole warmup fits into `LONGEST_FRACTION` of a run of `num_steps`.

    A run so short that it is less than the rate which needs no warmup at all bears that one, which is then returned.

    Raises:
        InputError: d50 <= 0 or `num_steps` < 1.
    """
    with_warmup = LONGEST_FRACTION * _require_num_steps(num_steps) / STEPS_PER_X * _require_d50(d50)
    return max(with_warmup, compute_largest_rate_without_warmup(d50))


@dataclass(frozen=True)
class WarmupLength:
    """For how long a run warms up, and what was measured for it.

    Attributes:
        steps: optimizer steps; 0 where no warmup is needed.
        d50: the trust radius, in the weights' own unit; None where it could not be measured, `reason` says why.
        learning_rate: the largest of the optimizer's groups.
        x: learning_rate / d50; None without d50.
        is_capped: whether `LONGEST_FRACTION` of the run stands in for a longer warmup that x asks for.
        num_forwards, seconds: what the measurement took.
    """

    steps: int
    d50: float | None
    learning_rate: float
    x: float | None = None
    is_capped: bool = False
    reason: str | None = None
    has_batch_norm: bool = False
    num_forwards: int = 0
    seconds: float = 0.0

    def to_dict(self) -> dict:
        """Return plain JSON types."""
        return asdict(self)

    def describe(self, what: str) -> str:
        """Say in one line what was measured and what follows; `what` takes the number of steps, as in "v0 decays over"."""
        if self.d50 is None:
            return (
                f"the trust radius cannot be measured ({self.reason}): {what} 2 / (1 - beta2) steps, {self.steps:,}; give "
                "--v0_decay_steps or --warmup_steps to choose yourself"
            )
        found = f"trust radius d50 {self.d50:.3g}, learning rate / d50 = {self.x:.3g}"
        if self.steps == 0:
            return (
                f"{found}: no warmup needed at the first step, so this run is stock Adam's; if its loss gets stuck, give "
                "--v0_decay_steps 0.66"
            )
        cut = f", cut from {round(STEPS_PER_X * self.x):,} to two thirds of the run" if self.is_capped else ""
        return f"{found}: {what} {self.steps:,} steps{cut}"

    def log(self, what: str) -> None:
        """Log what `describe` says; a warning where nothing was measured."""
        (logger.warning if self.d50 is None else logger.info)(self.describe(what))


def choose_length(
    d50: float | None, learning_rate: float, num_steps: int, *, beta2: float, has_batch_norm: bool = False, **found
) -> WarmupLength:
    """Choose the warmup of a run of `num_steps` from its trust radius; where there is none, 2 / (1 - beta2) steps.

    Args:
        d50: displacement per element, > 0; None where it could not be measured.
        learning_rate: the peak of the optimizer's groups.
        beta2: of the optimizer, in (0, 1).
        found: further fields of `WarmupLength`.
    """
    if d50 is None:
        longest = max(1, math.floor(LONGEST_FRACTION * _require_num_steps(num_steps)))
        steps = min(math.ceil(2 / (1 - beta2) - 1e-6), longest)
        return WarmupLength(steps, None, learning_rate, has_batch_norm=has_batch_norm, **found)
    x = compute_relative_rate(learning_rate, d50)
    steps = compute_warmup_length(x, num_steps, has_batch_norm=has_batch_norm)
    is_capped = is_cut_short(x, num_steps, has_batch_norm=has_batch_norm)
    return WarmupLength(steps, d50, learning_rate, x, is_capped, has_batch_norm=has_batch_norm, **found)


def _require_d50(d50: float) -> float:
    if not (math.isfinite(d50) and d50 > 0.0):
        raise InputError(f"d50={d50}: must be a finite number > 0, the displacement that --probe_only prints")
    return d50


def _require_num_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: must be a whole number >= 1, the optimizer steps of the run")
    return num_steps
