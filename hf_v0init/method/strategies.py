"""The strategies, their scales, and what of eq. 11 needs no tensor. Imports nothing, so that the command line starts at once.

Notation of Abuduweili & Liu, arXiv 2412.02153: g is the gradient of the loss on a sample, v0 the start value of the
second moment, sigma (here `scale`) its size.

    zeros            v0 = 0                                              stock Adam
    random           v0 ~ scale / (fan_in + fan_out) * chi^2_1           eq. 11
    data_driven      v0 = scale * (E[g]^2 + Var[g]) = scale * E[g^2]     eq. 10; g of a sample, or of a step
    first_gradient   v0 = scale * g1^2, g1 of the first step             GI-Adam (Kalra & Barkeshli, 2024)
"""

import math

STRATEGIES = ("zeros", "random", "data_driven", "first_gradient")
SCALED_BY_GRADIENTS = ("data_driven", "first_gradient")  # v0 is a multiple of a mean of g^2

PAPER_SCALE = {"random": 100.0, "data_driven": 1.0}  # its section 4
DEFAULT_SCALE = {"zeros": 0.0, "random": 100.0, "data_driven": 1.0, "first_gradient": 1.0}


def compute_fans(shape: tuple[int, ...]) -> tuple[int, int]:
    """Compute (fan_in, fan_out) as the paper's Algorithm 1 does: size(1) and size(0), times the receptive field.

    The receptive field is prod(shape[2:]), 1 for matrices. A tensor of one dimension, which the paper leaves at zero,
    acts on each of its n units alone: (1, n). A scalar has (1, 1).
    """
    if len(shape) == 0:
        return 1, 1
    if len(shape) == 1:
        return 1, shape[0]
    receptive_field = math.prod(shape[2:])
    return shape[1] * receptive_field, shape[0] * receptive_field


def compute_random_v0_mean(shape: tuple[int, ...], scale: float) -> float:
    """Compute the mean of the random v0 (eq. 11): scale / (fan_in + fan_out), since E[chi^2_1] = 1.

    The authors' code squares a Xavier-normal draw, which is twice that.
    """
    fan_in, fan_out = compute_fans(shape)
    return scale / (fan_in + fan_out)


def is_eligible(shape: tuple[int, ...], include_bias_and_norm: bool = False) -> bool:
    """Whether a parameter of this shape gets a v0: two or more dimensions, or all if `include_bias_and_norm`.

    The paper's text leaves biases and norms at zero; its Algorithm 2 does not.
    """
    return include_bias_and_norm or len(shape) >= 2
