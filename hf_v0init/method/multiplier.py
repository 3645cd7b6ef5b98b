"""What a start value of the second moment does to the step size over time, in closed form.

With stationary gradients, E[g^2] = s, and v0 = scale * s, Adam's bias-corrected second moment obeys
E[v_hat_t] = s * (1 + scale * beta2^t / (1 - beta2^t)), so that v0 multiplies the step at time t by

    m(t) = 1 / sqrt(1 + scale * beta2^t / (1 - beta2^t))

against the run without v0. m rises from sqrt((1 - beta2) / (1 - beta2 + scale * beta2)) at the first step to 1:
a warmup whose length is set by beta2 and scale. Gradients of a real network are not stationary, so m is a guide.

Plain Python, so that the command line can use it without importing torch.
"""

import math

from ..errors import InputError

STEP_COUNTS = "optimizer steps (1000), a fraction of training (0.3) or auto"  # what v0_decay_steps takes
PRINTED_STEPS = (1, 10, 100, 1000)
WASHED_OUT = 0.9  # m(t) from which on v0 is said to have washed out


def require_beta2(beta2: float) -> float:
    """Return `beta2`; raise `InputError` unless 0 < beta2 < 1."""
    if not 0.0 < beta2 < 1.0:
        raise InputError(f"adam_beta2={beta2}: the closed form needs 0 < beta2 < 1, e.g. 0.999 (Adam's default)")
    return beta2


def require_scale(scale: float) -> float:
    """Return `scale`; raise `InputError` unless it is finite and positive."""
    if not (math.isfinite(scale) and scale > 0.0):
        raise InputError(f"v0_scale={scale}: must be a finite number > 0; for no v0 use v0_init=zeros")
    return scale


def compute_multiplier(step: float, scale: float, beta2: float) -> float:
    """Compute m(t), the factor by which v0 multiplies Adam's step at time `step` (dimensionless, in (0, 1]).

    Args:
        step: t >= 1, in optimizer steps.
        scale: v0 / E[g^2], >= 0 (0 gives 1, the run without v0).
        beta2: Adam's second-moment decay, in (0, 1).

    Raises:
        InputError: `beta2` outside (0, 1) or `step` < 1.
    """
    require_beta2(beta2)
    if step < 1:
        raise InputError(f"step={step}: optimizer steps count from 1")
    log_decay = step * math.log(beta2)
    return 1.0 / math.sqrt(1.0 + scale * math.exp(log_decay) / -math.expm1(log_decay))


def compute_steps_to_multiplier(target: float, scale: float, beta2: float) -> float:
    """Compute the time at which m(t) reaches `target`, in optimizer steps (not rounded; 0 if scale is 0).

    Solves m(t) = target: beta2^t = k / (scale + k) with k = 1 / target^2 - 1.

    Raises:
        InputError: `target` outside (0, 1) or `beta2` outside (0, 1).
    """
    require_beta2(beta2)
    if not 0.0 < target < 1.0:
        raise InputError(f"target={target}: the multiplier m(t) lies between 0 and 1, both excluded")
    if scale == 0.0:
        return 0.0
    k = 1.0 / target**2 - 1.0
    return math.log1p(scale / k) / -math.log(beta2)


def compute_scale_for_warmup(steps: float, beta2: float, target: float = WASHED_OUT) -> float:
    """Compute the scale for which m(`steps`) = `target`: scale = k * (beta2^-steps - 1), k = 1 / target^2 - 1.

    Raises:
        InputError: `steps` <= 0, or so many that the scale exceeds the float range.
    """
    require_beta2(beta2)
    if not steps > 0:
        raise InputError(f"v0_decay_steps={steps}: must be > 0 optimizer steps; for no v0 use v0_init=zeros")
    k = 1.0 / target**2 - 1.0
    exponent = -steps * math.log(beta2)
    if exponent > 80.0:
        longest = int(80.0 / -math.log(beta2))
        raise InputError(
            f"v0_decay_steps={steps}: at adam_beta2={beta2} that takes a scale above 1e34; use at most {longest} "
            "steps, a larger adam_beta2, or a warmup in the learning-rate schedule"
        )
    return k * math.expm1(exponent)


def require_decay_steps(steps: float) -> float:
    """Return `v0_decay_steps` if it is a whole number of optimizer steps >= 1 (as an int) or a fraction of training in (0, 1).

    Raises:
        InputError: neither.
    """
    is_number = isinstance(steps, (int, float)) and not isinstance(steps, bool)
    if is_number and 0.0 < steps < 1.0:
        return float(steps)
    if is_number and steps >= 1 and float(steps).is_integer():
        return int(steps)
    raise InputError(f"v0_decay_steps={steps!r}: give {STEP_COUNTS}; for no v0 use v0_init=zeros")


def compute_similar_linear_warmup(scale: float, beta2: float, max_steps: int) -> float:
    """Compute the length of the linear warmup that takes away as much step size within a run of T steps as v0 does, in optimizer steps.

    v0 takes away the integral of 1 - m(t), a linear warmup of L steps L / 2, or T - T^2 / (2 L) if it is longer than the run.
    For scale = 1 and a long run that gives (4 - 4 ln 2) / (1 - beta2), about 1.23 / (1 - beta2); the untuned linear warmup of Ma & Yarats
    is 2 / (1 - beta2).
    """
    require_beta2(beta2)
    lost = 0.0  # by the midpoint rule
    for step in range(1, max_steps + 1):
        decayed = beta2 ** (step - 0.5)
        missing = 1.0 - 1.0 / math.sqrt(1.0 + scale * decayed / (1.0 - decayed))
        lost += missing
        if missing < 1e-9:
            break
    return 2.0 * lost if lost <= max_steps / 2.0 else max_steps**2 / (2.0 * (max_steps - lost))


def compute_multiplier_table(scale: float, beta2: float, max_steps: int) -> dict[int, float]:
    """Compute {step: m(step)} at 1, 10, 100, 1000 (those before the end) and at `max_steps`."""
    steps = [step for step in PRINTED_STEPS if step < max_steps] + [max_steps]
    return {step: compute_multiplier(step, scale, beta2) for step in steps}


def compute_washout_warning(ratio: float, beta2: float, max_steps: int, asked_for: float | None = None) -> str | None:
    """Return a warning if m(`max_steps`) < 0.9, with the flag that brings it to 0.9 after a third of the run; else None.

    A third, since v0 of that length came close to the best warmup at both beta2 (configs/compare/results/ptb_small, 600 steps).

    Args:
        ratio: v0 over the g^2 of a step.
        asked_for: the `v0_decay_steps` that the user gave, if any.
    """
    at_end = compute_multiplier(max_steps, ratio, beta2)
    if at_end >= WASHED_OUT:
        return None
    needed = math.ceil(compute_steps_to_multiplier(WASHED_OUT, ratio, beta2))
    third = max(1, max_steps // 3)
    if asked_for is not None:
        remedy = f"--v0_decay_steps {third}: the {asked_for:g} given are more than the run has"
    else:
        remedy = f"--v0_decay_steps {third} (a third of training) instead of --v0_scale"
    return (
        f"v0 will not have washed out: it still multiplies the step by {at_end:.3g} at the last step ({max_steps:,}) and reaches "
        f"{WASHED_OUT} only after {needed:,} steps. Remedy: {remedy}; or --v0_decay linear"
    )
