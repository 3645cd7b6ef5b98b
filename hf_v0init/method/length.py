"""How long a run must hold its learning rate back, from the trust radius at its initial weights.

Adam's first update moves every weight by about the learning rate. d50 is the displacement of every weight, along the sign of
the gradient, at which the decrease of the loss is half of what the gradient promises (`gradients.trust_radius`). So

    x = learning rate / d50

says how far beyond the first-order model a first step at the full rate would go. The rule that acts on it; its constants are from
runs of 500 to 680 steps on two tasks, judged on seven others, and `configs/compare/results/measured_length/README.md` says what they show
and what not:

| x, network | linear warmup |
| --- | --- |
| x < `NEEDED_FROM`, or a network with BatchNorm | none needed |
| else | `STEPS_PER_X` * x steps, at most `LONGEST_SHARE` of the run |

Plain Python, so that the command line can use it without importing torch.
"""

import math

from ..errors import InputError

STEPS_PER_X = 260.0  # optimizer steps of warmup for each learning rate's worth of d50
LONGEST_SHARE = 2 / 3  # of the run; beyond it nothing is left to train with
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
    return max(1, min(round(STEPS_PER_X * x), math.floor(LONGEST_SHARE * num_steps)))


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
    """Compute the largest learning rate whose whole warmup fits into `LONGEST_SHARE` of a run of `num_steps`.

    A run so short that it is less than the rate which needs no warmup at all bears that one, which is then returned.

    Raises:
        InputError: d50 <= 0 or `num_steps` < 1.
    """
    with_warmup = LONGEST_SHARE * _require_num_steps(num_steps) / STEPS_PER_X * _require_d50(d50)
    return max(with_warmup, compute_largest_rate_without_warmup(d50))


def _require_d50(d50: float) -> float:
    if not (math.isfinite(d50) and d50 > 0.0):
        raise InputError(f"d50={d50}: must be a finite number > 0, the displacement that `hf-v0init probe` prints")
    return d50


def _require_num_steps(num_steps: int) -> int:
    if num_steps < 1:
        raise InputError(f"num_steps={num_steps}: must be a whole number >= 1, the optimizer steps of the run")
    return num_steps
