"""How numbers are written in the report. The same functions write its tables and its words, so that they agree."""

from __future__ import annotations

import math

from ..reading.results import DIVERGED
from ..reading.summary import OTHER_OPTIMIZER, PLAIN, V0, V0_AND_WARMUP, WARMUP, ArmAtRate, Estimate, Interval

LOSS_DIGITS = 3
MISSING = "–"

TEST_NAMES = {
    "bleu": "BLEU", "chrf": "chrF", "fid": "FID", "frechet distance classifier": "Frechet distance in a classifier's features",
}  # fmt: skip
# What an arm is, in a table, and its family, in a sentence.
KINDS = {
    PLAIN: "plain start", WARMUP: "warmup", V0: "v0", V0_AND_WARMUP: "v0 + warmup", OTHER_OPTIMIZER: "another optimizer",
}  # fmt: skip
FAMILY_NAMES = {
    PLAIN: "plain starts", WARMUP: "warmups", V0: "v0 settings", V0_AND_WARMUP: "v0 with a warmup",
    OTHER_OPTIMIZER: "other optimizers",
}  # fmt: skip
GAN_SCRIPT = "run_dcgan"
OWN_SCRIPTS = ("run_translation", "run_clm", "run_mlm")  # whose losses are in nats per token


def format_number(value: float | None, digits: int = LOSS_DIGITS, *, signed: bool = False) -> str:
    """Write a number with so many digits after the point; a dash for None, 'diverged' for what is infinite."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return "diverged"
    text = f"{value:+,.{digits}f}" if signed else f"{value:,.{digits}f}"
    return text.replace("-", "+" if signed else "", 1) if float(text.replace(",", "")) == 0.0 else text


def format_estimate(estimate: Estimate | None, digits: int = LOSS_DIGITS) -> str:
    """Write mean ± standard deviation; the mean alone for one value."""
    if estimate is None:
        return MISSING
    if estimate.std is None:
        return format_number(estimate.mean, digits)
    return f"{format_number(estimate.mean, digits)} ± {format_number(estimate.std, digits)}"


def format_final(rate: ArmAtRate | None) -> str:
    """Write the final loss of an arm at a rate, and how many of its runs diverged: 'diverged' alone if all did."""
    if rate is None or rate.final is None:
        return MISSING
    if rate.has_diverged:
        return "diverged"
    diverged = rate.count(DIVERGED)
    return format_estimate(rate.final) + (f" ({diverged} of {rate.final.n} diverged)" if diverged else "")


def format_hours(hours: float | None) -> str:
    """Write hours with two digits that count: 0.042, 1.5, 230."""
    if hours is None:
        return MISSING
    return f"{hours:,.0f}" if hours >= 100 else f"{hours:.2g}"


def format_test(estimate: Estimate | None) -> str:
    """Write a test figure: BLEU, perplexities and distances with two decimals, shares such as an accuracy with three."""
    is_share = estimate is not None and abs(estimate.mean) <= 1.0
    return format_estimate(estimate, 3 if is_share else 2)


def format_interval(interval: Interval | None, digits: int = LOSS_DIGITS) -> str:
    """Write 'mean (low to high)' with signs; the mean alone where there is no interval."""
    if interval is None:
        return MISSING
    mean = format_number(interval.mean, digits, signed=True)
    return mean if interval.low is None else f"{mean} ({format_ends(interval, digits)})"


def format_ends(interval: Interval, digits: int = LOSS_DIGITS) -> str:
    """Write 'low to high' with signs, of an interval that has ends."""
    low, high = (format_number(end, digits, signed=True) for end in (interval.low, interval.high))
    return f"{low} to {high}"


def format_rate(learning_rate: float) -> str:
    """Write a learning rate: 0.0015, 5e-05."""
    return f"{learning_rate:.6g}"


def format_seconds(seconds: float | None) -> str:
    """Write seconds as such, or as minutes or hours where these are more readable."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 120:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.1f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def name_test_metric(name: str) -> str:
    """Name a test metric as people do: predict_bleu is 'test BLEU'. What generated images are measured by is of no test data."""
    words = name.removeprefix("predict_").removeprefix("test_").removeprefix("eval_").replace("_", " ")
    words = TEST_NAMES.get(words, words)
    return words if name.startswith("eval_") else f"test {words}"


def name_loss(metric: str, script: str) -> str:
    """Name the validation loss, with its unit where the script is one of this project."""
    if metric != "eval_loss":
        return f"validation {metric.removeprefix('eval_').replace('_', ' ')}"
    if script == GAN_SCRIPT:
        return "Frechet distance"
    return "validation loss (nats per token)" if script in OWN_SCRIPTS else "validation loss"


def explain_loss(metric: str, script: str) -> str:
    """Say what the report's words for the loss stand for, where they are not what the script measures."""
    if metric == "eval_loss" and script == GAN_SCRIPT:
        return " “Validation loss” stands here for the Frechet distance of generated images to training images; there is no other."
    if metric != "eval_loss":
        return f" “Loss” stands here for the {name_loss(metric, script)}."
    return ""


def count_of(number: int, singular: str, plural: str | None = None) -> str:
    """Write '1 seed', '3 seeds'."""
    return f"{number:,} {singular if number == 1 else plural or singular + 's'}"
