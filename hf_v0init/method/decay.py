"""How a v0 leaves the second moment, in closed form: so that the step grows linearly, or by Adam's own beta2.

With v_hat_t the bias-corrected mean of g^2 from a zero start, t the optimizer step, L `v0_decay_steps` and s = E[g^2]:

    Adam:      denominator^2 = v_hat_t
    beta2:     denominator^2 = v_hat_t + beta2^t / (1 - beta2^t) * v0       Abuduweili & Liu (arXiv 2412.02153), v0 = scale * s
    linear:    denominator^2 = v_hat_t + ((L / t)^2 - 1) * s   for t < L, v_hat_t from L on

Under `linear` the step of an element whose gradients keep their size is multiplied by exactly t / L: a linear warmup, made in
the second moment. In the first K steps s is v_hat_t itself, which makes it Adam's step times t / L; after step K s stays what it is.
So the difference to a warmup is that elements whose gradients have grown since are slowed less, and those whose gradients have shrunk
are slowed more.

Plain Python, so that the command line can use it without importing torch.
"""

DECAYS = ("linear", "beta2")
DEFAULT_ESTIMATION_STEPS = 6  # K of the linear decay


def compute_linear_factor(step: int, decay_steps: int) -> float:
    """Compute the effective learning-rate factor min(1, t / L) at optimizer step t >= 1 under the linear decay (dimensionless).

    It holds for an element whose g^2 keeps its size.
    """
    return min(1.0, step / decay_steps)


def compute_extra_weight(step: int, decay_steps: int) -> float:
    """Compute c_t = (L / t)^2 - 1, what the linear decay adds to the denominator's square as a multiple of s; 0 from L on."""
    return (decay_steps / step) ** 2 - 1.0 if step < decay_steps else 0.0


def compute_addend(step: int, decay_steps: int, beta2: float, *, num_updates: int, held: float) -> tuple[float, float]:
    """Compute what to add to the stored second moment before optimizer step t, so that Adam's own update gives the linear decay.

    Adam stores v_n, its mean of g^2 not yet divided by 1 - beta2^n. It shall hold (1 - beta2^n) c_t s more than from a zero start
    after the update, and the update multiplies by beta2 what stands there: beta2 * (held + addend) = (1 - beta2^n) c_t.

    Args:
        step: t, of the run.
        decay_steps: L.
        beta2: of the parameter's group, in (0, 1).
        num_updates: n, the parameter's own count after this step.
        held: what the second moment holds already, as a multiple of s.

    Returns:
        (addend, what is held after the update), multiples of s. The addend is negative where v0 must leave faster than by beta2.
    """
    after = (1.0 - beta2**num_updates) * compute_extra_weight(step, decay_steps)
    return after / beta2 - held, after
