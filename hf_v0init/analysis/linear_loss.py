"""The linear loss with Gaussian gradients, where everything about v0 has a closed form.

f(theta) = g * theta on samples whose gradients are g + s * N(0, 1), in each coordinate independently. The second moment
v_t = beta2 v_{t-1} + (1 - beta2) g_t^2 then obeys

    E[v_t] = beta2^t v0 + (1 - beta2^t) v_inf,    v_inf = g^2 + s^2                    (eq. 8 of arXiv 2412.02153)

and the drift |v_inf - v0| is what a start is off by. Three starts:

    zero          |v_inf - 0| = v_inf
    random        v0 = c chi^2_1, c = scale / (fan_in + fan_out) (eq. 11): known in distribution, blind to g and s
    data-driven   v0 = scale * (mean of g_i^2 over n = 5,000 samples) (eq. 10): |1 - scale| v_inf, up to the noise of n samples

RMSprop divides by sqrt(v_t) without a bias correction, so its step shows the drift bare: the root mean square of a step is
about lr * sqrt(v_inf / E[v_t]). From v0 = 0 the first step is lr / sqrt(1 - beta2) in every coordinate (31.6 lr at beta2 = .999)
and shrinks to lr; from the data-driven start of scale 1 it is lr from the first step on.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..method.multiplier import require_beta2

STARTS = ("zero", "random", "data-driven")
NUM_SAMPLES = 5000
NUM_COORDINATES = 2000


@dataclass(frozen=True)
class LinearLoss:
    """The setting.

    Attributes:
        gradient_mean, gradient_std: g and s.
        beta2: decay of the second moment.
        random_mean: scale / (fan_in + fan_out) of the random start, its mean.
        data_scale: scale of the data-driven start.
    """

    gradient_mean: float = 0.001
    gradient_std: float = 0.01
    beta2: float = 0.999
    random_mean: float = 100.0 / 1024
    data_scale: float = 1.0

    def __post_init__(self) -> None:
        require_beta2(self.beta2)
        if not self.stationary > 0.0:
            raise InputError("gradient_mean=0 and gradient_std=0: there is no gradient; give one of them")

    @property
    def stationary(self) -> float:
        """v_inf = g^2 + s^2, where the second moment settles (eq. 8)."""
        return self.gradient_mean**2 + self.gradient_std**2


def compute_expected_second_moment(loss: LinearLoss, start: str, step: int) -> float:
    """Compute E[v_t] after `step` steps, in units of gradient squared."""
    mean_start = {"zero": 0.0, "random": loss.random_mean, "data-driven": loss.data_scale * loss.stationary}[start]
    decay = loss.beta2**step
    return decay * mean_start + (1.0 - decay) * loss.stationary


@dataclass(frozen=True)
class LinearLossRun:
    """What a simulation measured of one start.

    Attributes:
        drift: mean over the coordinates of |v_inf - v0|.
        steps: the optimizer steps at which the following were measured.
        second_moments: mean of v_t over the coordinates.
        updates: root mean square of RMSprop's step over the coordinates, in units of the learning rate.
    """

    start: str
    drift: float
    steps: list[int]
    second_moments: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)


def draw_start(loss: LinearLoss, start: str, num_coordinates: int, generator: np.random.Generator) -> np.ndarray:
    """Draw v0 of every coordinate, shape (num_coordinates,), fp64."""
    if start == "random":
        return loss.random_mean * generator.standard_normal(num_coordinates) ** 2
    if start == "data-driven":
        means = [np.square(_draw_gradients(loss, NUM_SAMPLES, generator)).mean() for _ in range(num_coordinates)]
        return loss.data_scale * np.array(means)
    return np.zeros(num_coordinates)


def simulate_linear_loss(
    loss: LinearLoss, start: str, *, num_steps: int, num_coordinates: int = NUM_COORDINATES, seed: int = 0
) -> LinearLossRun:
    """Run RMSprop on the linear loss in fp64, and measure at steps 1, 10, 100, ... and the last.

    Args:
        start: one of `STARTS`.
        num_steps: optimizer steps; after 10 / (1 - beta2) e^-10 of v0 is left.
        num_coordinates: independent coordinates that the means are taken over.
    """
    generator = np.random.default_rng(seed)
    second_moment = draw_start(loss, start, num_coordinates, generator)
    drift = float(np.abs(loss.stationary - second_moment).mean())
    run = LinearLossRun(start, drift, choose_measured_steps(num_steps))
    for step in range(1, num_steps + 1):
        gradient = _draw_gradients(loss, num_coordinates, generator)
        second_moment = loss.beta2 * second_moment + (1.0 - loss.beta2) * gradient**2
        if step in run.steps:
            run.second_moments.append(float(second_moment.mean()))
            run.updates.append(float(np.sqrt(np.mean(gradient**2 / second_moment))))
    return run


def choose_measured_steps(num_steps: int, per_decade: int = 1) -> list[int]:
    """Choose evenly spaced steps on a logarithmic scale from 1 to `num_steps`, both included."""
    powers = range(math.ceil(per_decade * math.log10(num_steps)) + 1)
    return sorted({min(num_steps, round(10 ** (power / per_decade))) for power in powers} | {num_steps})


def _draw_gradients(loss: LinearLoss, shape, generator: np.random.Generator) -> np.ndarray:
    return loss.gradient_mean + loss.gradient_std * generator.standard_normal(shape)
