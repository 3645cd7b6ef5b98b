"""The toy saddle: a loss with its optimum at 0 and a flat inflection point ("saddle") at -1 and 1.

    f(x) = (x - b)^n    for x >= x_s
         = -(x + b)^n   for x <= -x_s
         = x^2 + d      between

n = 7, b = 1, slope s = 0.5, x_s = b - (s / n)^(1 / (n - 1)) = 0.3559 and d = (x_s - b)^n - x_s^2 = -0.1726, so that the pieces
meet in value (Abuduweili & Liu, arXiv 2412.02153, section 3.1; their eq. 14 is printed with another sign). Their slopes do
not meet: 2 x_s = 0.712 from inside, s from outside.

The start x_0 = -1e-6 is next to the optimum. Adam's first step with v0 = 0 is lr * sign(g), here 1: on to the saddle, however
small the gradient. Plain Python, fp64.
"""

import math
from dataclasses import dataclass, replace

DEGREE = 7
SADDLE = 1.0  # b
SLOPE = 0.5  # s
JOIN = SADDLE - (SLOPE / DEGREE) ** (1.0 / (DEGREE - 1))  # x_s
BASE = (JOIN - SADDLE) ** DEGREE - JOIN**2  # d

START = -1e-6
NUM_STEPS = 50
BETAS = (0.9, 0.999)
EPS = 1e-8
SGD_LEARNING_RATE = 1e-3
WARMUP_STEPS = 100
RANDOM_V0 = 100.0


def compute_saddle_loss(x: float) -> float:
    """Compute f(x)."""
    if x >= JOIN:
        return (x - SADDLE) ** DEGREE
    if x <= -JOIN:
        return -((x + SADDLE) ** DEGREE)
    return x * x + BASE


def compute_saddle_gradient(x: float) -> float:
    """Compute f'(x); at the joins, that of the outer piece."""
    if x >= JOIN:
        return DEGREE * (x - SADDLE) ** (DEGREE - 1)
    if x <= -JOIN:
        return -DEGREE * (x + SADDLE) ** (DEGREE - 1)
    return 2.0 * x


def run_adam(v0: float = 0.0, warmup_steps: int = 0, *, num_steps: int = NUM_STEPS) -> list[float]:
    """Run Adam as torch.optim.Adam does, with a learning rate of 1, from a second moment of v0.

    Args:
        v0: start of the second moment, in units of gradient squared, >= 0.
        warmup_steps: the learning rate of step t (from 1) is min(1, t / warmup_steps); 0: no warmup.

    Returns:
        x at the start and after each step, `num_steps` + 1 numbers.
    """
    beta1, beta2 = BETAS
    x, first_moment, second_moment = START, 0.0, v0
    path = [x]
    for step in range(1, num_steps + 1):
        gradient = compute_saddle_gradient(x)
        first_moment = beta1 * first_moment + (1.0 - beta1) * gradient
        second_moment = beta2 * second_moment + (1.0 - beta2) * gradient**2
        denominator = math.sqrt(second_moment / (1.0 - beta2**step)) + EPS
        factor = min(1.0, step / warmup_steps) if warmup_steps else 1.0
        x -= factor * first_moment / (1.0 - beta1**step) / denominator
        path.append(x)
    return path


def run_sgd(learning_rate: float = SGD_LEARNING_RATE, *, num_steps: int = NUM_STEPS) -> list[float]:
    """Run gradient descent without momentum; returns x at the start and after each step."""
    path = [START]
    for _ in range(num_steps):
        path.append(path[-1] - learning_rate * compute_saddle_gradient(path[-1]))
    return path


@dataclass(frozen=True)
class SaddleRun:
    """One optimizer's way over the saddle loss.

    Attributes:
        path: x at the start and after each step.
        published: the final value in the paper, as printed there; None for what the paper does not have.
    """

    name: str
    path: list[float]
    published: str | None = None

    @property
    def final(self) -> float:
        """x after the last step."""
        return self.path[-1]


def run_saddle(
    *, v0: float = RANDOM_V0, warmup_steps: int = WARMUP_STEPS, num_steps: int = NUM_STEPS
) -> list[SaddleRun]:
    """Run the paper's four optimizers and Adam with a data-driven v0 (scale 1, v0 = f'(x_0)^2).

    What the paper leaves open was found by trying. lr = 1 moves plain descent from x to -x and leaves it at 1e-6; the 9e-7
    are those of lr = 0.001. v0 = 100 is eq. 11 at scale 100 with fans that add up to 1 and a draw of chi^2 = 1. Linear warmups
    of 74 to 100 steps (the run has 50) all end at 0.01. The data-driven v0 ends as badly as Adam with v0 = 0: it is g^2 at a start
    this flat, and gone after one step.

    Args:
        v0: the one draw of the random v0.
        warmup_steps: length of the linear warmup of the warmup run.
    """
    data_driven = compute_saddle_gradient(START) ** 2
    warmup = run_adam(warmup_steps=warmup_steps, num_steps=num_steps)
    runs = [
        SaddleRun("Adam, v0 = 0", run_adam(num_steps=num_steps), "-0.96"),
        SaddleRun(f"Adam, linear warmup over {warmup_steps} steps", warmup, "0.01"),
        SaddleRun(f"Adam, random v0 = {v0:g}", run_adam(v0, num_steps=num_steps), "1e-7"),
        SaddleRun("SGD, lr 0.001", run_sgd(num_steps=num_steps), "9e-7"),
        SaddleRun(f"Adam, data-driven v0 = {data_driven:.0e}", run_adam(data_driven, num_steps=num_steps)),
    ]
    return runs if num_steps == NUM_STEPS else [replace(run, published=None) for run in runs]
