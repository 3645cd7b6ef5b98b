"""Over how many of a run's first steps E[g^2] is estimated."""

import math

from ..errors import InputError
from ..method.decay import DEFAULT_ESTIMATION_STEPS
from ..settings import V0Plan

MAX_ESTIMATION_STEPS = 32  # of the default with beta2
ESTIMATION_FRACTION = 0.01  # of training, by default with beta2


def choose_estimation_steps(plan: V0Plan, max_steps: int | None) -> int:
    """Return K, the optimizer steps over which E[g^2] is estimated; 1 for strategies that take one gradient or none.

    Raises:
        InputError: as many as the run or the decay has steps, or more.
    """
    if plan.init != "data_driven":
        return 1
    asked, length = plan.estimation_steps, plan.decay_steps if plan.decay == "linear" else None
    if asked is None:
        return (
            DEFAULT_ESTIMATION_STEPS
            if plan.decay == "linear"
            else min(MAX_ESTIMATION_STEPS, max(1, math.floor(ESTIMATION_FRACTION * (max_steps or 0))))
        )
    for limit, name in ((max_steps, "max_steps"), (length if isinstance(length, int) else None, "v0_decay_steps")):
        if limit and asked > 1 and asked >= limit:
            raise InputError(
                f"v0_estimation_steps={asked} with {name}={limit}: give fewer, or leave it out for the default"
            )
    return asked


def fit_estimation_steps(estimation_steps: int, plan: V0Plan) -> int:
    """Return K, or what a linear decay over few steps leaves of it: at most L - 1, at least 1."""
    if plan.decay == "linear" and isinstance(plan.decay_steps, int):
        return max(1, min(estimation_steps, plan.decay_steps - 1))
    return estimation_steps
