"""The linear loss with Gaussian gradients, where everything about v0 has a closed form.

f(theta) = g * theta on samples whose gradients are g + s * N(0, 1), in each coordinate independently. The second moment
v_t = beta2 v_{t-1} + (1 - beta2) g_t^2 then obeys

    E[v_t] = beta2^t v0 + (1 - beta2^t) v_inf,    v_inf = g^2 + s^2                    (eq. 8 of arXiv 2412.02153)

and the drift |v_inf - v0| is what a start is off by. Three starts:

    zero          |v_inf - 0| = v_inf
    random        v0 = c chi^2_1, c = scale / (fan_in + fan_out) (eq. 11): known in distribution, blind to g and s
    data-driven   v0 = scale * (mean of g_i^2 over n samples) (eq. 10): |1 - scale| v_inf, up to the noise of n samples

RMSprop divides by sqrt(v_t) without a bias correction, so its step shows the drift bare: the root mean square of a step is
about lr * sqrt(v_inf / E[v_t]), see `compute_rmsprop_step`. From v0 = 0 the first step is lr / sqrt(1 - beta2) in every coordinate (31.6 lr
at beta2 = .999) and shrinks to lr; from the data-driven start of scale 1 it is lr from the first step on. Adam's bias
correction takes (1 - beta2^t) out, which leaves lr for v0 = 0 and m(t) of `warmup_equivalence` for a v0.
"""

import math
from dataclasses import dataclass, field

import numpy as np

from ..errors import InputError
from ..method.multiplier import require_beta2, require_scale

STARTS = ("zero", "random", "data-driven")
RANDOM_SCALE = 100.0
NUM_SAMPLES = 5000
NUM_COORDINATES = 2000


@dataclass(frozen=True)
class LinearLoss:
    """The setting.

    Attributes:
        gradient_mean, gradient_std: g and s.
        beta2: decay of the second moment.
        random_scale, fans: scale and fan_in + fan_out of the random start, whose mean is their ratio.
        data_scale, num_samples: scale of the data-driven start, and how many gradients it is taken from.

    Raises:
        InputError: a value out of range.
    """

    gradient_mean: float = 0.001
    gradient_std: float = 0.01
    beta2: float = 0.999
    random_scale: float = RANDOM_SCALE
    fans: int = 1024
    data_scale: float = 1.0
    num_samples: int = NUM_SAMPLES

    def __post_init__(self) -> None:
        require_beta2(self.beta2)
        require_scale(self.random_scale)
        require_scale(self.data_scale)
        if not math.isfinite(self.gradient_mean):
            raise InputError(f"gradient_mean={self.gradient_mean}: must be a finite number")
        if not (math.isfinite(self.gradient_std) and self.gradient_std >= 0.0):
            raise InputError(f"gradient_std={self.gradient_std}: must be a finite number >= 0")
        if self.stationary == 0.0:
            raise InputError("gradient_mean=0 and gradient_std=0: there is no gradient; give one of them")
        for name in ("fans", "num_samples"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be a whole number >= 1")

    @property
    def stationary(self) -> float:
        """v_inf = g^2 + s^2, where the second moment settles (eq. 8)."""
        return self.gradient_mean**2 + self.gradient_std**2

    @property
    def random_mean(self) -> float:
        """c, the mean of the random v0."""
        return self.random_scale / self.fans

    @property
    def square_std(self) -> float:
        """Standard deviation of one squared gradient: Var[g^2] = 2 s^4 + 4 g^2 s^2."""
        return math.sqrt(2.0 * self.gradient_std**4 + 4.0 * self.gradient_mean**2 * self.gradient_std**2)


def compute_mean_start(loss: LinearLoss, start: str) -> float:
    """Compute E[v0] of a start, in units of gradient squared."""
    return {"zero": 0.0, "random": loss.random_mean, "data-driven": loss.data_scale * loss.stationary}[start]


def compute_drift(loss: LinearLoss, start: str) -> float:
    """Compute E|v_inf - v0|, the mean over the draws of v0, in units of gradient squared.

    Of the data-driven start by the central limit theorem, so for many samples: v0 is taken as normal with mean
    scale * v_inf and standard deviation scale * sqrt(Var[g^2] / n).
    """
    settled = loss.stationary
    if start == "zero":
        return settled
    if start == "random":
        # E|c X - a| of X ~ chi^2_1, with E[X; X <= q] = F_3(q): a (2 F_1(q) - 1) + c (1 - 2 F_3(q)), q = a / c.
        q = settled / loss.random_mean
        below = math.erf(math.sqrt(q / 2.0))
        below_3 = below - math.sqrt(2.0 * q / math.pi) * math.exp(-q / 2.0)
        return settled * (2.0 * below - 1.0) + loss.random_mean * (1.0 - 2.0 * below_3)
    offset = (loss.data_scale - 1.0) * settled
    spread = loss.data_scale * loss.square_std / math.sqrt(loss.num_samples)
    if spread == 0.0:
        return abs(offset)
    z = offset / spread  # the mean of a folded normal
    return spread * math.sqrt(2.0 / math.pi) * math.exp(-z * z / 2.0) + offset * math.erf(z / math.sqrt(2.0))


def compute_expected_second_moment(loss: LinearLoss, start: str, step: int) -> float:
    """Compute E[v_t] after `step` steps, in units of gradient squared."""
    decay = loss.beta2**step
    return decay * compute_mean_start(loss, start) + (1.0 - decay) * loss.stationary


def compute_rmsprop_step(loss: LinearLoss, start: str, step: int) -> float:
    """Compute the root mean square of RMSprop's step number `step` (from 1), in units of the learning rate.

    With A the weighted mean of the squared gradients so far, v_t = beta2^t v0 + (1 - beta2^t) A. The gradients in A are as good
    as exchangeable, so that E[g_t^2 / v_t] = E[A / v_t]; A is taken as gamma-distributed with its own mean and variance, and the
    random v0 averaged over exactly. Exact at the first step where g = 0, and for v0 = 0; else off by terms of the order
    1 - beta2.
    """
    decay = loss.beta2**step
    values, weights = _average_of_squares(loss, step)
    gained = (1.0 - decay) * values
    if start == "random":
        inverse = np.array([_average_inverse(constant, decay * loss.random_mean) for constant in gained])
    else:
        inverse = 1.0 / (gained + decay * compute_mean_start(loss, start))
    return math.sqrt(float(np.sum(weights * values * inverse)))


@dataclass(frozen=True)
class LinearLossRun:
    """What a simulation measured of one start.

    Attributes:
        steps: the optimizer steps at which the following were measured.
        second_moments: mean of v_t over the coordinates.
        updates: root mean square of RMSprop's step over the coordinates, in units of the learning rate.
        drift: mean over the coordinates of |v_late - v0|, v_late the mean of v_t over coordinates and the last tenth of
            the run.
    """

    start: str
    steps: list[int]
    second_moments: list[float] = field(default_factory=list)
    updates: list[float] = field(default_factory=list)
    drift: float = math.nan


def draw_start(loss: LinearLoss, start: str, num_coordinates: int, generator: np.random.Generator) -> np.ndarray:
    """Draw v0 of every coordinate, shape (num_coordinates,), fp64."""
    if start == "random":
        return loss.random_mean * generator.standard_normal(num_coordinates) ** 2
    if start == "data-driven":
        v0 = np.empty(num_coordinates)
        for begin in range(0, num_coordinates, 100):  # bounded memory whatever the numbers
            rows = min(100, num_coordinates - begin)
            gradients = _draw_gradients(loss, (rows, loss.num_samples), generator)
            v0[begin : begin + rows] = loss.data_scale * np.square(gradients).mean(axis=1)
        return v0
    return np.zeros(num_coordinates)


def simulate_linear_loss(
    loss: LinearLoss,
    start: str,
    *,
    num_steps: int | None = None,
    num_coordinates: int = NUM_COORDINATES,
    measured_steps: list[int] | None = None,
    seed: int = 0,
) -> LinearLossRun:
    """Run RMSprop on the linear loss in fp64 and measure what the closed forms say.

    Args:
        start: one of `STARTS`.
        num_steps: optimizer steps; default 10 / (1 - beta2), when e^-10 of v0 is left.
        num_coordinates: independent coordinates that the means are taken over.
        measured_steps: default 1, 10, 100, ... and the last.

    Raises:
        InputError: an unknown start, or a number below 1.
    """
    if start not in STARTS:
        raise InputError(f"start={start!r}: choose one of {', '.join(STARTS)}")
    num_steps = math.ceil(10.0 / (1.0 - loss.beta2)) if num_steps is None else num_steps
    for name, value in (("num_steps", num_steps), ("num_coordinates", num_coordinates)):
        if value < 1:
            raise InputError(f"{name}={value}: must be a whole number >= 1")
    run = LinearLossRun(start, choose_measured_steps(num_steps) if measured_steps is None else measured_steps)
    generator = np.random.default_rng(seed)
    v0 = draw_start(loss, start, num_coordinates, generator)
    second_moment, late, late_from = v0.copy(), [], num_steps - num_steps // 10
    for step in range(1, num_steps + 1):
        gradient = _draw_gradients(loss, num_coordinates, generator)
        second_moment = loss.beta2 * second_moment + (1.0 - loss.beta2) * gradient**2
        if step in run.steps:
            run.second_moments.append(float(second_moment.mean()))
            run.updates.append(float(np.sqrt(np.mean(gradient**2 / second_moment))))
        if step >= late_from:
            late.append(second_moment.mean())
    drift = float(np.abs(np.mean(late) - v0).mean())
    return LinearLossRun(start, run.steps, run.second_moments, run.updates, drift)


def choose_measured_steps(num_steps: int, per_decade: int = 1) -> list[int]:
    """Choose evenly spaced steps on a logarithmic scale from 1 to `num_steps`, both included."""
    powers = range(math.ceil(per_decade * math.log10(num_steps)) + 1)
    steps = {min(num_steps, round(10 ** (power / per_decade))) for power in powers}
    return sorted(steps | {num_steps})


def _draw_gradients(loss: LinearLoss, shape, generator: np.random.Generator) -> np.ndarray:
    return loss.gradient_mean + loss.gradient_std * generator.standard_normal(shape)


def _average_of_squares(loss: LinearLoss, step: int, num_nodes: int = 48) -> tuple[np.ndarray, np.ndarray]:
    """Nodes and weights of E[f(A)], A the weighted mean of the squared gradients up to `step`: Gauss-Laguerre quadrature."""
    if loss.square_std == 0.0:
        return np.array([loss.stationary]), np.ones(1)
    decay = loss.beta2**step
    num_effective = (1.0 - decay) * (1.0 + loss.beta2) / ((1.0 - loss.beta2) * (1.0 + decay))
    shape = num_effective * (loss.stationary / loss.square_std) ** 2
    order = np.arange(num_nodes)
    beside = np.sqrt(order[1:] * (order[1:] + shape - 1.0))
    nodes, vectors = np.linalg.eigh(np.diag(2.0 * order + shape) + np.diag(beside, 1) + np.diag(beside, -1))
    return nodes * (loss.stationary / shape), vectors[0] ** 2


def _average_inverse(constant: float, spread: float) -> float:
    """E[1 / (constant + spread Z^2)] of a standard normal Z: sqrt(pi / (2k)) e^(k/2) erfc(sqrt(k/2)) / spread, k = constant / spread."""
    k = constant / spread
    if k > 200.0:  # where e^(k/2) and erfc leave the floats' range: the series in 1 / k
        return (1.0 - 1.0 / k + 3.0 / k**2 - 15.0 / k**3) / constant
    return math.sqrt(math.pi / (2.0 * k)) * math.exp(k / 2.0) * math.erfc(math.sqrt(k / 2.0)) / spread
