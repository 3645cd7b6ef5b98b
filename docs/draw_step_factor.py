"""Draws docs/images/step_factor.svg, the picture of docs/method.md: how far a step goes, as a fraction of Adam's at the full learning rate.

    python docs/draw_step_factor.py

Nothing is trained. Adam's second moment is followed over 1,000 steps for an element whose gradients have the sizes that the
legend says, with what `hf_v0init.method.decay` adds to it; the paper's v0 is its closed form m(t), sized for the same length.
"""

import math
import sys
from pathlib import Path

import matplotlib

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from hf_v0init.method.decay import DEFAULT_ESTIMATION_STEPS, compute_addend  # noqa: E402
from hf_v0init.method.multiplier import compute_multiplier, compute_scale_for_warmup  # noqa: E402

NUM_STEPS, LENGTH, BETA2 = 1000, 400, 0.98
PICTURE = ROOT / "docs" / "images" / "step_factor.svg"


def simulate_linear(gradients: list[float]) -> list[float]:
    """The factor that a v0 with the linear decay puts on each step of one element, beside Adam with the same gradients."""
    plain = moment = held = spread = 0.0
    factors = []
    for step, gradient in enumerate(gradients, start=1):
        if step == DEFAULT_ESTIMATION_STEPS + 1:
            spread = moment / (1.0 - BETA2 ** (step - 1))
        if DEFAULT_ESTIMATION_STEPS < step <= LENGTH:
            addend, held = compute_addend(step, LENGTH, BETA2, num_updates=step, held=held)
            moment += addend * spread
        plain = BETA2 * plain + (1.0 - BETA2) * gradient**2
        moment = BETA2 * moment + (1.0 - BETA2) * gradient**2
        lent = step / LENGTH if step <= DEFAULT_ESTIMATION_STEPS else 1.0
        factors.append(lent * math.sqrt(plain / moment))
    return factors


def main() -> None:
    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.hashsalt": "hf_v0init", "svg.fonttype": "none", "font.size": 9})
    import matplotlib.pyplot as plt

    steps = range(1, NUM_STEPS + 1)
    figure, axes = plt.subplots(figsize=(6.4, 2.9), layout="constrained")
    axes.plot(steps, [min(1.0, t / LENGTH) for t in steps], color="0.75", lw=6, label="learning-rate warmup")
    for label, ratio, style in (
        ("v0, linear: gradients keep their size", 1.0, "-"),
        ("v0, linear: gradients grow to twice their size", 2.0, "--"),
        ("v0, linear: gradients shrink to half", 0.5, ":"),
    ):
        sizes = [ratio ** min(1.0, t / 100) for t in steps]
        axes.plot(steps, simulate_linear(sizes), style, color="C0", lw=1.5, label=label)
    scale = compute_scale_for_warmup(LENGTH, BETA2)
    factors = [compute_multiplier(t, scale, BETA2) for t in steps]
    axes.plot(steps, factors, color="C1", lw=1.5, label="v0, beta2 (the paper's)")
    axes.set(xlabel="optimizer step", ylabel="fraction of Adam's step", xlim=(0, 700), ylim=(0, 1.05))
    axes.legend(loc="lower right", frameon=False, fontsize=8)
    figure.savefig(PICTURE, metadata={"Date": None, "Creator": None})
    print(PICTURE.relative_to(ROOT))


if __name__ == "__main__":
    main()
