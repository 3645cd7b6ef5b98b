"""What the numbers say, in words: what to use on this task, what it saves, and how sure that is. Generated, never edited.

The question is always the same: the best arm that has a v0 and no warmup, against the best warmup without a v0, each at its best
learning rate, over the seeds they share. `decide` names the answer; the sentences follow from it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...closed_form.defaults import DEFAULT_SCALE
from ..planning.axes import UNTUNED
from ..reading.fingerprints import FingerprintCheck
from ..reading.results import DIVERGED, FAILED, START_SOURCES
from ..reading.summary import (
    OTHER_OPTIMIZER,
    PLAIN,
    V0,
    V0_AND_WARMUP,
    WARMUP,
    Arm,
    Interval,
    Summary,
    compute_paired_interval,
)
from .decision import (
    ALL_DIVERGED,
    FEW_SEEDS,
    MARGIN,
    NEITHER_NEEDED,
    NO_DIFFERENCE,
    NO_SHARED_SEED,
    NO_V0_RESULT,
    NO_WARMUP_RESULT,
    NOTHING,
    TOO_FEW,
    UNDECIDED,
    V0_USELESS,
    V0_WINS,
    WARMUP_WINS,
    compare_to_plain,
    decide,
)
from .formats import (
    count_of,
    format_ends,
    format_estimate,
    format_number,
    format_rate,
    format_seconds,
    format_test,
    name_loss,
    name_test_metric,
)


@dataclass(frozen=True)
class Conclusion:
    """The answer by name, its one line, and the points that carry it, each as (topic, sentences)."""

    verdict: str
    headline: str
    points: list[tuple[str, str]]


def compose_conclusion(summary: Summary, check: FingerprintCheck) -> Conclusion:
    """Compose the conclusion: headline and points, as Markdown."""
    verdict = decide(summary)
    v0, warmup, plain = summary.find_best(V0), summary.best_warmup, summary.plain
    points: list[tuple[str, str]] = []
    if verdict == NOTHING:
        ended = summary.comparison.count(FAILED)
        headline = "No run has a result yet" + (f"; {count_of(ended, 'run')} failed." if ended else ".")
        return Conclusion(verdict, headline, _compose_cautions(summary, check))
    if verdict == ALL_DIVERGED:
        headline = "Every run that has ended diverged: this says nothing on v0 or warmup but that neither made these settings work."
        points.append(
            ("What next", "Try smaller learning rates, gradient clipping, or look for a defect in data or model.")
        )
        return Conclusion(verdict, headline, points + _compose_cautions(summary, check))
    if verdict == NO_V0_RESULT:
        headline = "No run with a v0 and without a warmup has a result, so v0 cannot be judged."
        points.append(("Best so far", _describe(summary.arms[0]) + "."))
        return Conclusion(verdict, headline, points + _compose_cautions(summary, check))
    headline = _compose_headline(verdict, summary, v0, warmup, plain)
    points.append(("Use", _compose_advice(verdict, summary, v0, warmup, plain)))
    if warmup is not None:
        if v0.to_warmup is not None:
            points.append(("Beyond noise?", _compose_noise(v0, warmup)))
        points.append(("What it saves", _compose_savings(summary, v0, warmup)))
    points.append(("Against a plain start", _compose_plain(summary, v0, warmup, plain)))
    points += [("Other arms", text)] if (text := _compose_others(summary, v0, warmup)) else []
    points += [("Tuning", text)] if (text := _compose_tuning(summary)) else []
    points.append(("Learning rates", _compose_sensitivity(summary, v0, warmup, plain)))
    points.append(("Diverged or failed", _compose_diverged([a for a in (v0, warmup, plain) if a is not None])))
    points += [("Test", text)] if (text := _compose_tests(summary, v0, warmup)) else []
    return Conclusion(verdict, headline, points + _compose_cautions(summary, check))


# ------------------------------------------------------------------------------------------------------------- the answer


def _compose_headline(verdict: str, summary: Summary, v0: Arm, warmup: Arm | None, plain: Arm | None) -> str:
    if verdict == NO_WARMUP_RESULT:
        gain = compare_to_plain(summary, v0)
        against = f" Against a plain start it is {_judge(gain)}." if gain is not None else ""
        return f"No run with a warmup and without a v0 has a result, so whether v0 replaces one stays open.{against}"
    if verdict == NO_SHARED_SEED:
        return "The best v0 and the best warmup have no seed in common yet, so they cannot be compared."
    mean = v0.to_warmup.mean
    size = format_number(abs(mean))
    if verdict == TOO_FEW:
        where = f"{size} {'below' if mean < 0 else 'above'}" if format_number(mean) != "0.000" else "level with"
        return (
            f"Too few seeds to tell: over {count_of(v0.to_warmup.n, 'seed')} `{v0.name}` without a warmup ends {where} "
            f"`{warmup.name}`, the best warmup."
        )
    return {
        NEITHER_NEEDED: "Neither a warmup nor a v0 is needed here: the plain start is not worse than either beyond noise.",
        V0_WINS: f"v0 beats the best warmup here: `{v0.name}` without a warmup ends {size} below `{warmup.name}`.",
        NO_DIFFERENCE: f"v0 can replace the warmup here, as far as {count_of(v0.to_warmup.n, 'seed')} can tell: `{v0.name}` without a "
        f"warmup and `{warmup.name}`, the best warmup, are not told apart.",
        UNDECIDED: f"Undecided: `{v0.name}` without a warmup ends {size} {'below' if mean < 0 else 'above'} `{warmup.name}`, the best "
        "warmup, but the seeds differ too much to tell.",
        WARMUP_WINS: f"The warmup is better here: `{v0.name}`, the best v0 without a warmup, ends {size} above `{warmup.name}`.",
        V0_USELESS: f"v0 does not help here: `{v0.name}`, the best v0 without a warmup, ends {size} above `{warmup.name}` and is "
        "not better than a plain start beyond noise.",
    }[verdict]


def _compose_advice(verdict: str, summary: Summary, v0: Arm, warmup: Arm | None, plain: Arm | None) -> str:
    combined = summary.find_best(V0_AND_WARMUP)
    if verdict == NEITHER_NEEDED:
        return f"{_describe(plain)}: the simplest, {_compare_means(plain, v0, warmup)}."
    if verdict in (V0_WINS, NO_WARMUP_RESULT):
        return f"{_describe(v0)}."
    if verdict == NO_DIFFERENCE:
        return _weigh(summary, v0, warmup)
    if verdict in (WARMUP_WINS, V0_USELESS):
        if combined is not None and combined.to_warmup is not None and combined.to_warmup.verdict == "lower":
            return f"{_describe(combined)}: v0 with a warmup is better than the best warmup alone."
        if plain is not None and plain.best.final.mean <= warmup.best.final.mean:
            return f"{_describe(plain)}: the simplest, and not above {_describe(warmup)}."
        return f"{_describe(warmup)}."
    if warmup is None or v0.to_warmup is None:
        return f"Nothing yet; {_describe(v0)} is the best v0 so far."
    better = v0 if v0.to_warmup.mean < 0 else warmup
    return f"Nothing yet. {_describe(better)} is ahead; run more seeds (3 at least, better 5) before you choose."


def _weigh(summary: Summary, v0: Arm, warmup: Arm) -> str:
    """Say which of two arms that are not told apart to take, by what else is known of them."""
    difference = compute_paired_interval(v0.sensitivities, warmup.sensitivities)
    robust = "" if difference is None else difference.verdict
    if robust == "higher":
        return f"{_describe(warmup)}: it is the more robust one against the learning rate. {_describe(v0)} ends as low, as far as these runs can tell."
    reasons = ["it is the more robust one against the learning rate"] if robust == "lower" else []
    if len(summary.list_arms(V0)) == 1 and len(summary.list_arms(WARMUP)) > 1:
        reasons.append("it spares the choice of a warmup length")
    if reasons:
        return f"{_describe(v0)}: {', and '.join(reasons)}. {_describe(warmup)} ends as low, as far as these runs can tell."
    return f"Either: {_describe(v0)}, or {_describe(warmup)}."


def _compose_noise(v0: Arm, warmup: Arm) -> str:
    difference = v0.to_warmup
    text = f"Difference of final losses, `{v0.name}` - `{warmup.name}`, over {count_of(difference.n, 'seed')}: "
    text += format_number(difference.mean, signed=True)
    if difference.low is None:
        return f"{text}. With one seed there is no interval: noise cannot be told from effect."
    text += f", 95% confidence interval {format_ends(difference)}. "
    if difference.verdict != "same":
        return (
            text
            + f"The interval leaves out 0, so the difference is beyond the noise of the {count_of(difference.n, 'seed')}."
        )
    above, below = max(0.0, difference.high), max(0.0, -difference.low)
    return text + (
        f"The interval holds 0. That is not proof of equality: v0 may be up to {format_number(above)} worse or "
        f"{format_number(below)} better; {'within' if difference.high <= MARGIN * warmup.best.final.mean else 'more than'} "
        f"{MARGIN:.0%} of the loss."
    )


def _compose_savings(summary: Summary, v0: Arm, warmup: Arm) -> str:
    mine, own = v0.best, warmup.best
    if not mine.num_with_target:
        return "Cannot be said: no seed of the best warmup has a final loss to reach."
    if mine.steps_to is None:
        return (
            f"No steps: no run of `{v0.name}` came down to the final loss of the best warmup on its seed "
            f"({count_of(mine.num_with_target, 'run')})."
        )
    steps = f"{mine.steps_to.mean:,.0f} steps"
    if mine.steps_to_charged is not None and mine.steps_to_charged.mean != mine.steps_to.mean:
        steps += f" ({mine.steps_to_charged.mean:,.0f} with the samples of the statistics pass)"
    if mine.steps_to.n < mine.num_with_target:
        return (
            f"{mine.steps_to.n} of {count_of(mine.num_with_target, 'run')} of `{v0.name}` came down to the best warmup's final loss, "
            f"after {steps} on their average; the others did not, so no steps can be said to be saved."
        )
    text = f"`{v0.name}` comes down to the best warmup's final loss of the same seed after {steps}"
    if own.steps_to is None or mine.steps_to_charged is None:
        return text + "."
    saved = own.steps_to.mean - mine.steps_to_charged.mean
    share = abs(saved) / own.steps_to.mean if own.steps_to.mean else math.nan
    text += f", the warmup itself after {own.steps_to.mean:,.0f}: "
    text += f"{abs(saved):,.0f} steps ({share:.0%}) {'saved' if saved >= 0 else 'more'}, the pass charged."
    if mine.seconds_to is not None and own.seconds_to is not None:
        text += (
            f" In time without evaluations: {format_seconds(mine.seconds_to.mean)} with the pass against "
            f"{format_seconds(own.seconds_to.mean)}."
        )
    return text


def _compose_plain(summary: Summary, v0: Arm, warmup: Arm | None, plain: Arm | None) -> str:
    gain = compare_to_plain(summary, v0)
    if gain is None:
        return "Not known: no run without both v0 and warmup shares a seed with it."
    text = f"`{v0.name}` is {_judge(gain)}: {_write_difference(gain)}."
    if plain is None or warmup is None:
        return text
    other = compute_paired_interval(warmup.best.losses, plain.best.losses)
    if other is None:
        return text
    text += f" The best warmup is {_judge(other)}: {_write_difference(other)}."
    if other.verdict == "lower" and gain.mean < 0:
        text += f" So v0 alone gets {gain.mean / other.mean:.0%} of what the warmup gains."
    return text


def _compose_others(summary: Summary, v0: Arm, warmup: Arm | None) -> str:
    texts = []
    for kind, words in (
        (V0_AND_WARMUP, "v0 together with a warmup"),
        (OTHER_OPTIMIZER, "another optimizer without v0 and warmup"),
    ):
        arm = summary.find_best(kind)
        if arm is None:
            continue
        text = f"The best of {words}: {_describe(arm)}"
        if arm.to_warmup is not None:
            text += f"; against the best warmup {_judge(arm.to_warmup)}, {_write_difference(arm.to_warmup)}"
        texts.append(text + ".")
    best = summary.arms[0]
    if best is not v0 and best is not warmup:
        texts.append(f"The lowest mean of all is that of `{best.name}`.")
    return " ".join(texts)


def _compose_tuning(summary: Summary) -> str:
    texts = []
    for kind, words in ((WARMUP, "warmups"), (V0, "v0 settings without a warmup")):
        means = [arm.best.final.mean for arm in summary.list_arms(kind)]
        if len(means) > 1:
            ends = f"{format_number(min(means))} to {format_number(max(means))}"
            texts.append(
                f"Of {len(means)} {words}, the mean final losses at their best learning rates range from {ends}."
            )
    untuned = [arm for arm in summary.list_arms(V0, WARMUP) if needs_no_choice(arm)]
    if untuned:
        parts = [
            f"`{arm.name}` {format_number(arm.best.final.mean)}"
            + (f" ({_write_difference(arm.to_warmup)} against the best warmup)" if arm.to_warmup is not None else "")
            for arm in untuned
        ]
        texts.append(f"With nothing to choose but the learning rate: {'; '.join(parts)}.")
    return " ".join(texts)


def needs_no_choice(arm: Arm) -> bool:
    """Whether the arm's v0 or warmup is a default that nobody has to tune: a strategy at its default scale, an untuned warmup."""
    if arm.kind == WARMUP:
        return arm.warmup in UNTUNED
    return not arm.other and arm.v0 in {f"{strategy} {scale:g}" for strategy, scale in DEFAULT_SCALE.items()}


def _compose_sensitivity(summary: Summary, v0: Arm, warmup: Arm | None, plain: Arm | None) -> str:
    grid = summary.comparison.learning_rates
    if len(grid) < 2:
        return f"Only {format_rate(grid[0])} was run, so robustness against the learning rate is not known."
    known = {arm.name: arm for arm in (v0, warmup, plain) if arm is not None and arm.sensitivity is not None}
    if not known:
        return f"None of these arms has results on the whole grid of {len(grid)} learning rates; their sensitivity is not known."
    text = f"Sensitivity over {len(grid)} learning rates (mean excess over the best loss; lower is more robust): "
    text += ", ".join(f"`{name}` {format_number(arm.sensitivity)}" for name, arm in known.items()) + "."
    if warmup is None or v0.name not in known or warmup.name not in known:
        return text
    difference = compute_paired_interval(v0.sensitivities, warmup.sensitivities)
    if difference is None:
        return text
    words = {
        "lower": "v0 is the more robust one, beyond noise",
        "higher": "the warmup is the more robust one, beyond noise",
        "same": "the difference is within noise",
        "unknown": f"{'v0' if difference.mean < 0 else 'the warmup'} has the lower one, on one seed",
    }[difference.verdict]
    return f"{text} Of v0 and warmup, {words} ({_write_difference(difference)})."


def _compose_diverged(arms: list[Arm]) -> str:
    parts = []
    for arm in arms:
        diverged, ended = arm.share(DIVERGED)
        failed, _ = arm.share(FAILED)
        parts.append(f"`{arm.name}` {diverged} of {ended} diverged" + (f", {failed} failed" if failed else ""))
    return "Runs over all learning rates and seeds: " + "; ".join(parts) + "."


def _compose_tests(summary: Summary, v0: Arm, warmup: Arm | None) -> str:
    parts = []
    for name in summary.comparison.test_metrics:
        figures = [
            f"`{arm.name}` {format_test(arm.best.tests[name])} (n = {arm.best.tests[name].n})"
            for arm in (v0, warmup)
            if arm is not None and name in arm.best.tests
        ]
        if figures:
            parts.append(f"{name_test_metric(name)}: {', '.join(figures)}")
    return "; ".join(parts) + "." if parts else ""


def _compose_cautions(summary: Summary, check: FingerprintCheck) -> list[tuple[str, str]]:
    comparison, texts = summary.comparison, []
    counted = sum(run.is_counted for run in comparison.runs)
    failed = comparison.count(FAILED)
    if counted + failed < len(comparison.runs):
        texts.append(f"Preliminary: {counted} of {len(comparison.runs)} runs have a result.")
    if check.violations:
        seeds = ", ".join(map(str, sorted(check.seeds)))
        texts.append(
            f"Runs of seed {seeds} did not begin alike (see the checks); paired differences over them are not to be trusted."
        )
    seeds = len({run.seed for run in comparison.runs if run.is_counted})
    if 0 < seeds < FEW_SEEDS:
        texts.append(f"{count_of(seeds, 'seed')}: too few to tell noise from effect; 3 are the least, 5 better.")
    picked = [(len(summary.list_arms(kind)), words) for kind, words in ((V0, "v0 settings"), (WARMUP, "warmups"))]
    picked = [f"the best of {number} {words}" for number, words in picked if number > 1]
    if picked and min(len(summary.list_arms(V0)), len(summary.list_arms(WARMUP))):
        texts.append(
            f"{' and '.join(picked).capitalize()} {'was' if len(picked) == 1 else 'were'} picked by the losses compared here; the "
            "interval does not allow for that choice."
        )
    if comparison.pocket and counted:
        texts.append("Pocket scale: a small model for a short time. What holds here need not hold at full scale.")
    sources = {run.start_source for run in comparison.runs if run.state == DIVERGED and run.start_source}
    if sources:
        texts.append(
            f"Diverged runs count with the loss at start: {'; '.join(START_SOURCES[s] for s in sorted(sources))}."
        )
    return [("Mind", " ".join(texts))] if texts else []


# -------------------------------------------------------------------------------------------------------------- the words


def _describe(arm: Arm) -> str:
    final = arm.best.final
    diverged = arm.best.count(DIVERGED)
    seeds = count_of(final.n, "seed") + (f", {diverged} diverged" if diverged else "")
    return f"`{arm.name}` at learning rate {format_rate(arm.best.learning_rate)}, final loss {format_estimate(final)} ({seeds})"


def _compare_means(plain: Arm, *others: Arm) -> str:
    return "against " + " and ".join(f"{format_number(arm.best.final.mean)} of `{arm.name}`" for arm in others)


def _judge(interval: Interval) -> str:
    if interval.verdict == "unknown":
        return (
            "ahead on one seed"
            if interval.mean < 0
            else "behind on one seed"
            if interval.mean > 0
            else "level on one seed"
        )
    return {"lower": "better beyond noise", "higher": "worse beyond noise", "same": "not told apart"}[interval.verdict]


def _write_difference(interval: Interval) -> str:
    mean = format_number(interval.mean, signed=True)
    return mean if interval.low is None else f"{mean}, 95% interval {format_ends(interval)}"


def describe_unit(summary: Summary) -> str:
    """Return the loss's name and unit, for headings."""
    return name_loss(summary.comparison.metric, summary.comparison.script)


KINDS = {PLAIN: "neither", WARMUP: "warmup", V0: "v0", V0_AND_WARMUP: "v0 + warmup", OTHER_OPTIMIZER: "other optimizer"}
