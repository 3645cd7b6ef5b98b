"""The warmups that need no tuning, as a baseline for v0: Ma & Yarats, 'On the adequacy of untuned warmup' (AAAI 2021).

Both have their length from beta2 alone. At optimizer step t, counted from 1, they multiply the schedule's learning rate by

    linear         min(1, (1 - beta2) / 2 * t)       over 2 / (1 - beta2) steps
    exponential    1 - exp(-(1 - beta2) * t)

The square root of the exponential one is nearly the closed-form multiplier m(t) = sqrt(1 - beta2^t) of a data-driven v0 of scale 1.
"""

import math

from ..errors import InputError

UNTUNED_WARMUPS = ("linear", "exponential")


def compute_untuned_factor(step: int, beta2: float, shape: str) -> float:
    """Compute the factor on the learning rate at optimizer step `step` >= 1 (dimensionless, in (0, 1]).

    Raises:
        InputError: `shape` is neither 'linear' nor 'exponential'.
    """
    if shape not in UNTUNED_WARMUPS:
        raise InputError(f"untuned_warmup={shape!r}: choose one of {', '.join(UNTUNED_WARMUPS)}")
    if shape == "linear":
        return min(1.0, (1.0 - beta2) / 2.0 * step)
    return -math.expm1(-(1.0 - beta2) * step)
