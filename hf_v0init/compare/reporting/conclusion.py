"""What the numbers say, in words: what to use on this task, what it saves, and how sure that is. Generated, never edited.

`verdict.decide` names the answer; the sentences follow from it.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

from ...method.defaults import DEFAULT_SCALE
from ...settings import AUTO, TRUST_RADIUS as MEASURED
from ..planning.axes import UNTUNED
from ..reading.budget import Budget
from ..reading.choice import Contest
from ..reading.cost import name_hours, sum_hours
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
    compute_share_interval,
)
from .formats import (
    FAMILY_NAMES,
    count_of,
    format_ends,
    format_final,
    format_hours,
    format_number,
    format_rate,
    format_seconds,
    format_test,
    name_test_metric,
)
from .verdict import (
    ALL_DIVERGED,
    FEW_SEEDS,
    MARGIN,
    NEITHER_NEEDED,
    NO_DIFFERENCE,
    NO_SHARED_SEED,
    NO_V0_RESULT,
    NO_WARMUP_RESULT,
    NOTHING,
    PLAIN_WINS,
    TOO_FEW,
    UNDECIDED,
    V0_HARMS,
    V0_USELESS,
    V0_WINS,
    WARMUP_WINS,
    Contests,
    decide,
    hold_contests,
    read,
)


@dataclass(frozen=True)
class Conclusion:
    """The answer by name, its one line, and the points that carry it, each as (topic, sentences)."""

    verdict: str
    headline: str
    points: list[tuple[str, str]]


def compose_conclusion(summary: Summary, check: FingerprintCheck, budget: Budget | None = None) -> Conclusion:
    """Compose the conclusion: headline and points, as Markdown."""
    contests = hold_contests(summary)
    verdict = decide(summary, contests)
    v0, warmup, plain = summary.find_best(V0), summary.best_warmup, summary.plain
    deciding = [arm for arm in (v0, warmup, plain) if arm is not None]
    cautions = _compose_cautions(summary, check, contests, deciding)
    if verdict == NOTHING:
        ended = summary.comparison.count(FAILED)
        headline = "No run has a result yet" + (f"; {count_of(ended, 'run')} failed." if ended else ".")
        return Conclusion(verdict, headline, cautions)
    if verdict == ALL_DIVERGED:
        headline = "Every run that has ended diverged: this says nothing about v0 or warmup, only that these settings do not work."
        points = [
            ("What next", "Try smaller learning rates, gradient clipping, or look for a defect in data or model.")
        ]
        return Conclusion(verdict, headline, points + cautions)
    if verdict == NO_V0_RESULT:
        headline = "No run with a v0 and without a warmup has a result, so v0 cannot be judged."
        points = [("Best so far", _describe(summary.arms[0]) + "."), *_list_measured(summary)]
        return Conclusion(verdict, headline, points + cautions)
    headline = _compose_headline(verdict, summary, contests)
    if find_edges(deciding) and verdict not in (TOO_FEW, UNDECIDED):
        headline = f"So far: {headline}"
    points = [("Use", _compose_advice(verdict, summary, contests))]
    if contests.of_both is not None:
        points.append(("Beyond noise?", _compose_noise(contests.of_both)))
        points.append(("What it saves", _compose_savings(v0, warmup)))
    points.append(("Against a plain start", _compose_plain(summary, contests)))
    points += [("Other arms", text)] if (text := _compose_others(summary, v0, warmup)) else []
    points += [("Tuning", text)] if (text := _compose_tuning(summary, budget)) else []
    points += _list_measured(summary)
    points.append(("Learning rates", _compose_sensitivity(summary, v0, warmup, plain)))
    points.append(("Diverged or failed", _compose_diverged(deciding)))
    points += [("Cost", text)] if (text := _compose_cost(summary)) else []
    points += [("Test", text)] if (text := _compose_tests(summary, v0, warmup)) else []
    return Conclusion(verdict, headline, points + cautions)


# ----------------------------------------------------------------------------------------------------------- the sentences


def _compose_headline(verdict: str, summary: Summary, contests: Contests) -> str:
    both, to_plain = contests.of_both, contests.v0_to_plain
    plain = _say_where_plain_is(contests)
    v0 = summary.find_best(V0)
    if verdict == V0_HARMS:
        return f"v0 does harm here: {_introduce(to_plain.one, to_plain.num_one)} ends {_place(to_plain)}, the plain start, beyond noise."
    if verdict == NO_WARMUP_RESULT:
        text = "No run with a warmup and without a v0 has a result, so whether v0 replaces one stays open."
        if to_plain is None:
            return text
        return (
            f"{text} {_introduce(v0, to_plain.num_one)} ends {_place(to_plain)}, the plain start, {_judge(to_plain)}."
        )
    if verdict == NO_SHARED_SEED:
        return f"The best v0 and the best warmup have no seed in common yet, so they cannot be compared.{plain}"
    ends = f"{_introduce(both.one, both.num_one)}, without a warmup, ends {_place(both)}{_count_trials(both.other, both.num_other)}"
    if verdict == TOO_FEW:
        judges = ""
        if both.screened:
            number = len(both.of_the_chosen.seeds) - len(both.screened)
            judges = f", since {number or 'none'} of {both.of_the_chosen.n} had no part in choosing the settings"
        return f"Too few seeds to tell{judges}: {ends}, the best warmup, {_judge(both)}.{plain}"
    starts = {
        PLAIN_WINS: "Neither a warmup nor a v0 helps here, since the plain start is better than both beyond noise",
        NEITHER_NEEDED: "Neither a warmup nor a v0 is needed here, since neither is better than the plain start beyond noise",
        V0_WINS: "v0 beats the best warmup here",
        NO_DIFFERENCE: f"v0 can replace the warmup here, as far as {count_of(both.interval.n, 'seed')} can tell",
        UNDECIDED: "Undecided",
        WARMUP_WINS: "The warmup is better here",
        V0_USELESS: "v0 does not help here, since it is not better than a plain start beyond noise",
    }
    return f"{starts[verdict]}: {ends}, the best warmup, {_judge(both)}.{plain}"


def _say_where_plain_is(contests: Contests) -> str:
    """Say in a sentence, with a space before it, where the plain start ends: nearer to v0's side, else to the warmup's."""
    contest, name = (contests.v0_to_plain, "v0") if contests.v0_to_plain else (contests.warmup_to_plain, "the warmup")
    if contest is None:
        return " No plain start has a result on the same seeds."
    mean = contest.interval.mean
    side = "level with" if _is_zero(mean) else f"{format_number(abs(mean))} {'above' if mean < 0 else 'below'}"
    count = _count_trials(contest.other, contest.num_other)
    return f" The plain start, `{contest.other.name}`{count}, ends {side} {name}, {_judge(contest)}."


def _introduce(arm: Arm, num_trials: int) -> str:
    return f"`{arm.name}`{_count_trials(arm, num_trials)}"


def _count_trials(arm: Arm, num_trials: int) -> str:
    words = {V0: "v0 settings", WARMUP: "warmups", PLAIN: "plain starts"}[arm.kind]
    return f" (chosen from {num_trials} trials of {words})" if num_trials > 1 else ""


def _place(contest: Contest) -> str:
    """Say '0.086 above `warmup 400`'."""
    mean = contest.interval.mean
    side = "level with" if _is_zero(mean) else f"{format_number(abs(mean))} {'below' if mean < 0 else 'above'}"
    return f"{side} `{contest.other.name}`"


def _is_zero(number: float) -> bool:
    return format_number(number) == format_number(0.0)


def _compose_advice(verdict: str, summary: Summary, contests: Contests) -> str:
    v0, warmup, plain, combined = (
        summary.find_best(V0),
        summary.best_warmup,
        summary.plain,
        summary.find_best(V0_AND_WARMUP),
    )
    if verdict in (NEITHER_NEEDED, PLAIN_WINS):
        return f"{_describe(plain)}: the simplest, {_compare_means(v0, warmup)}."
    if verdict == V0_HARMS:
        return f"{_describe(plain)}: the simplest, {_compare_means(v0)}."
    if verdict == NO_WARMUP_RESULT:
        reading = read(contests.v0_to_plain)
        if reading == "better":
            return f"{_describe(v0)}, until a warmup has been tried."
        if reading == "unclear" and contests.v0_to_plain.interval.n >= FEW_SEEDS:
            return f"{_describe(plain)}: the simplest, and v0 is not better beyond noise ({_compare_means(v0)})."
        return f"Nothing yet; {_describe(v0)} is the best v0 so far. Run a plain start and warmups on the same seeds, 3 or more."
    if verdict == V0_WINS:
        return f"{_describe(v0)}."
    if verdict == NO_DIFFERENCE:
        return _weigh(summary, contests)
    if verdict in (WARMUP_WINS, V0_USELESS):
        if combined is not None and combined.to_warmup is not None and combined.to_warmup.verdict == "better":
            return f"{_describe(combined)}: v0 with a warmup is better than the best warmup alone."
        return f"{_describe(warmup)}."
    ahead = min((arm for arm in (plain, warmup, v0) if arm is not None), key=lambda arm: summary.arms.index(arm))
    return (
        f"Nothing yet. {_describe(ahead)} has the best mean; run more seeds (3 at least, better 5) before you choose."
    )


def _weigh(summary: Summary, contests: Contests) -> str:
    """Say which of two arms within noise of each other to take, by what else is known of them."""
    v0, warmup = contests.of_both.one, contests.of_both.other
    if (
        read(contests.v0_to_plain) == "better"
        and contests.warmup_to_plain
        and read(contests.warmup_to_plain) != "better"
    ):
        return f"{_describe(v0)}: it is better than the plain start beyond noise, which {_describe(warmup)} is not."
    difference = compute_paired_interval(v0.sensitivities, warmup.sensitivities)
    robust = "" if difference is None else difference.verdict
    as_good = "ends as well, as far as these runs can tell"
    if robust == "worse":
        return f"{_describe(warmup)}: it is the more robust one against the learning rate. {_describe(v0)} {as_good}."
    reasons = ["it is the more robust one against the learning rate"] if robust == "better" else []
    if len(summary.list_arms(V0)) == 1 and len(summary.list_arms(WARMUP)) > 1:
        reasons.append("it spares the choice of a warmup length")
    if reasons:
        return f"{_describe(v0)}: {', and '.join(reasons)}. {_describe(warmup)} {as_good}."
    return f"Either: {_describe(v0)}, or {_describe(warmup)}."


def _compose_noise(contest: Contest) -> str:
    chosen, judged = contest.of_the_chosen, contest.interval
    text = f"`{contest.one.name}` - `{contest.other.name}`, each at its best learning rate, over {count_of(chosen.n, 'seed')}: "
    text += _write_difference(chosen) + ". "
    if contest.has_choice:
        families = f"{count_of(contest.num_one, 'trial')} of v0 and {contest.num_other} of warmups"
        text += (
            f"These two are the best of {families}, which flatters both, so each seed judges a choice made without it: "
        )
        if judged.low is None and judged.n != 1:
            return text + (
                "no seed is left for that, since more settings were tried on every one of them than on all together. Run the "
                "chosen ones on fresh seeds."
            )
        text += f"{_write_difference(judged)}, over {count_of(judged.n, 'seed')}"
        if contest.screened:
            listed = ", ".join(map(str, contest.screened))
            text += f" (not seed {listed}, where more settings were tried than on the others)"
        text += ". "
    if judged.low is None:
        return f"{text}With one seed there is no interval: noise cannot be told from effect."
    if judged.verdict != "unclear":
        return f"{text}The interval leaves out 0, so the difference is beyond the noise of the {count_of(judged.n, 'seed')}."
    loss, gain = max(0.0, judged.largest_loss), max(0.0, judged.largest_gain)
    tolerated = MARGIN * abs(contest.other.best.final.mean)
    return text + (
        f"The interval holds 0. That is not proof of equality: v0 may be up to {format_number(loss)} worse or "
        f"{format_number(gain)} better; {'within' if loss <= tolerated else 'more than'} {MARGIN:.0%} of the loss."
    )


def _compose_savings(v0: Arm, warmup: Arm) -> str:
    mine, own = v0.best, warmup.best
    if not mine.num_with_target:
        return "Cannot be said: the runs that share a seed with the best warmup have no final loss of it to reach, or no record of when they did."
    if mine.steps_to is None:
        return (
            f"No steps: no run of `{v0.name}` reached the final loss of the best warmup on its seed "
            f"({count_of(mine.num_with_target, 'run')})."
        )
    steps = f"{mine.steps_to.mean:,.0f} steps"
    if mine.steps_to_charged is not None and mine.steps_to_charged.mean != mine.steps_to.mean:
        steps += f" ({mine.steps_to_charged.mean:,.0f} with the samples of the statistics pass)"
    if mine.steps_to.n < mine.num_with_target:
        return (
            f"{mine.steps_to.n} of {count_of(mine.num_with_target, 'run')} of `{v0.name}` reached the best warmup's final loss, "
            f"after {steps} on average; the others did not, so no steps can be said to be saved."
        )
    text = f"`{v0.name}` reaches the best warmup's final loss of the same seed after {steps}"
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


def _compose_plain(summary: Summary, contests: Contests) -> str:
    parts = []
    for contest, name in ((contests.v0_to_plain, "v0"), (contests.warmup_to_plain, "The best warmup")):
        if contest is not None:
            parts.append(
                f"{name}, `{contest.one.name}`, is {_compare(contest)} `{contest.other.name}`: {_write_difference(contest.interval)}"
                f" over {count_of(contest.interval.n, 'seed')}."
            )
    if not parts:
        return "Not known: no run without both v0 and warmup shares a seed with them."
    if len(parts) == 2 and read(contests.warmup_to_plain) == "better":
        parts += [share] if (share := _compose_share(contests)) else []
    return " ".join(parts)


def _compose_share(contests: Contests) -> str:
    """Say which share of the warmup's gain v0 has, only with its interval, and only against a plain start that was tuned as much."""
    v0, warmup, plain = contests.v0_to_plain.one, contests.warmup_to_plain.one, contests.v0_to_plain.other
    if _count_rates(plain) < max(_count_rates(v0), _count_rates(warmup)):
        return f"What share of the warmup's gain v0 has is not said: `{plain.name}` was run at fewer learning rates."
    share = compute_share_interval(plain.best.losses, v0.best.losses, warmup.best.losses)
    if share is None:
        return ""
    ends = f"{share.low:.0%} to {share.high:.0%}"
    return f"So v0 has {share.mean:.0%} of the warmup's gain (95% interval {ends}, over {count_of(share.n, 'seed')})."


def _count_rates(arm: Arm) -> int:
    return sum(rate.final is not None for rate in arm.rates.values())


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
        if _can_be_compared(arm):
            on_one = " on one seed" if arm.to_warmup.verdict == "unknown" else ""
            text += f"; {_compare_interval(arm.to_warmup)} the best warmup{on_one}, {_write_difference(arm.to_warmup)}"
        texts.append(text + ".")
    best = summary.arms[0]
    if best is not v0 and best is not warmup:
        texts.append(f"The best mean of all is that of `{best.name}`.")
    return " ".join(texts)


def _compose_tuning(summary: Summary, budget: Budget | None) -> str:
    texts = []
    if budget is not None and sum(curve.num_trials > 1 for curve in budget.curves):
        of_one, of_four = (
            [
                f"{format_number(curve.expected[k - 1])} with {FAMILY_NAMES[curve.kind]}"
                for curve in budget.curves
                if curve.num_trials >= k and curve.kind in (PLAIN, WARMUP, V0)
            ]
            for k in (1, 4)
        )
        text = f"One random trial is expected to end at {', '.join(of_one)}"
        texts.append(text + (f"; the best of four at {', '.join(of_four)}." if len(of_four) > 1 else "."))
    untuned = [arm for arm in summary.list_arms(V0, WARMUP) if needs_no_choice(arm)]
    if untuned:
        parts = [
            f"`{arm.name}` {format_final(arm.best)}"
            + (f" ({_write_difference(arm.to_warmup)} against the best warmup)" if _can_be_compared(arm) else "")
            for arm in untuned
        ]
        texts.append(f"With nothing to choose but the learning rate: {'; '.join(parts)}.")
    return " ".join(texts)


def _list_measured(summary: Summary) -> list[tuple[str, str]]:
    """Say what length was measured, beside the best of those that were tried; nothing if no warmup is a measured one."""
    arms = summary.list_arms(WARMUP, PLAIN)
    measured = next((arm for arm in arms if arm.warmup == MEASURED), None)
    if measured is None:
        return []
    text = f"`{measured.name}` held back for {_name_lengths(measured)} and ends at {format_final(measured.best)}"
    tried = [arm for arm in arms if arm.warmup not in UNTUNED]
    if not tried:
        return [("Measured length", text + ". No length was tried beside it.")]
    best = tried[0]
    text += f"; the best of {count_of(len(tried), 'length')} tried, `{best.name}`, at {format_final(best.best)}"
    difference = summary.subtract(measured.best, best.best)
    text += "." if difference is None else f" ({_write_difference(difference)} against it)."
    return [("Measured length", text)]


def _name_lengths(arm: Arm) -> str:
    lengths = sorted({run.held_back for run in arm.best.runs if run.held_back is not None})
    if not lengths:
        return "a length that is not on record"
    if lengths == [0]:
        return "no steps"
    return f"{lengths[0]:,} steps" if len(lengths) == 1 else f"{lengths[0]:,} to {lengths[-1]:,} steps"


def _can_be_compared(arm: Arm) -> bool:
    return arm.to_warmup is not None and not arm.best.has_diverged


def needs_no_choice(arm: Arm) -> bool:
    """Whether nobody has to tune the arm's v0 or warmup: a strategy at its default scale or of measured length, an untuned warmup."""
    if arm.kind == WARMUP:
        return arm.warmup in UNTUNED
    untuned = {f"{strategy} {scale:g}" for strategy, scale in DEFAULT_SCALE.items()}
    return not arm.other and (arm.v0 in untuned or arm.v0.endswith(f" warmup {AUTO}"))


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
        "better": "v0 is the more robust one, beyond noise",
        "worse": "the warmup is the more robust one, beyond noise",
        "unclear": "the difference is within noise",
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


def _compose_cost(summary: Summary) -> str:
    runs = summary.comparison.runs
    total = sum_hours(runs)
    if total is None:
        return ""
    parts = []
    for kind, words in FAMILY_NAMES.items():
        of_kind = [run for arm in summary.arms if arm.kind == kind for run in arm.runs]
        hours = sum_hours(of_kind)
        if hours is not None:
            parts.append(f"{words} {format_hours(hours)}")
    return f"{format_hours(total)} {name_hours(runs)} in all: {', '.join(parts)}."


def _compose_tests(summary: Summary, v0: Arm, warmup: Arm | None) -> str:
    parts = []
    for name in summary.comparison.test_metrics:
        numbers = [
            f"`{arm.name}` {format_test(arm.best.tests[name])} (n = {arm.best.tests[name].n})"
            for arm in (v0, warmup)
            if arm is not None and name in arm.best.tests
        ]
        if numbers:
            parts.append(f"{name_test_metric(name)}: {', '.join(numbers)}")
    return "; ".join(parts) + "." if parts else ""


def _compose_cautions(
    summary: Summary, check: FingerprintCheck, contests: Contests, deciding: list[Arm]
) -> list[tuple[str, str]]:
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
    edges = find_edges(deciding)
    if edges:
        parts = [
            f"`{arm.name}`, {format_rate(arm.best.learning_rate)} (add {format_rate(rate)})" for arm, rate in edges
        ]
        one = len(edges) == 1
        texts.append(
            f"The best learning {'rate' if one else 'rates'} of {', of '.join(parts)} {'is' if one else 'are'} at the edge of those that "
            f"were run: {'a better one' if one else 'better ones'} may lie beyond, so add what stands in brackets to the grid."
        )
    narrow = [arm for arm in deciding if _count_rates(arm) == 1]
    if narrow and len(comparison.learning_rates) > 1:
        names = ", ".join(f"`{arm.name}`" for arm in narrow)
        texts.append(
            f"{names} {'was' if len(narrow) == 1 else 'were'} run at one learning rate only, other arms at more."
        )
    for arm in deciding:
        most = max((rate for rate in arm.rates.values() if rate.final is not None), key=lambda rate: rate.final.n)
        if most.final.n > arm.best.final.n:
            word = "higher" if summary.greater_is_better else "lower"
            texts.append(
                f"`{arm.name}` is {word} at {format_rate(arm.best.learning_rate)} ({format_final(arm.best)}, "
                f"{count_of(arm.best.final.n, 'seed')}) than at {format_rate(most.learning_rate)} ({format_final(most)}, "
                f"{count_of(most.final.n, 'seed')}), on fewer seeds."
            )
    if comparison.pocket and counted:
        texts.append("Pocket scale: a small model for a short time. What holds here need not hold at full scale.")
    sources = {run.start_source for run in comparison.runs if run.state == DIVERGED and run.start_source}
    if sources:
        texts.append(
            f"Diverged runs count with the loss at start: {'; '.join(START_SOURCES[s] for s in sorted(sources))}."
        )
    return [("Mind", " ".join(texts))] if texts else []


def find_edges(arms: Iterable[Arm]) -> list[tuple[Arm, float]]:
    """Find the arms whose best learning rate is the lowest or highest of several, each with the next rate beyond."""
    edges = []
    for arm in arms:
        rates = [rate.learning_rate for rate in arm.rates.values() if rate.final is not None]
        if len(rates) < 2 or arm.best.learning_rate not in (rates[0], rates[-1]):
            continue
        edge, neighbour = (rates[0], rates[1]) if arm.best.learning_rate == rates[0] else (rates[-1], rates[-2])
        edges.append((arm, float(f"{edge * edge / neighbour:.2g}")))
    return edges


# -------------------------------------------------------------------------------------------------------------- the words


def _describe(arm: Arm) -> str:
    seeds = count_of(arm.best.final.n, "seed")
    return f"`{arm.name}` at learning rate {format_rate(arm.best.learning_rate)}, ending at {format_final(arm.best)} ({seeds})"


def _compare_means(*others: Arm) -> str:
    return "against " + " and ".join(f"{format_final(arm.best)} of `{arm.name}`" for arm in others)


def _judge(contest: Contest) -> str:
    """Say how sure a difference is, after its size."""
    interval = contest.interval
    if interval.verdict == "unknown":
        return "on one seed" if interval.n == 1 else "with no seed left to judge the choice"
    return "within noise" if interval.verdict == "unclear" else "beyond noise"


def _compare(contest: Contest) -> str:
    if contest.interval.verdict == "unknown" and contest.interval.n > 1:
        return f"{'ahead of' if contest.interval.is_ahead else 'behind'}, with no seed left to judge the choice,"
    return _compare_interval(contest.interval)


def _compare_interval(interval: Interval) -> str:
    if interval.verdict == "unknown":
        return "level with" if interval.mean == 0 else "ahead of" if interval.is_ahead else "behind"
    return {
        "better": "better beyond noise than",
        "worse": "worse beyond noise than",
        "unclear": "within noise of",
    }[interval.verdict]


def _write_difference(interval: Interval) -> str:
    mean = format_number(interval.mean, signed=True)
    return mean if interval.low is None else f"{mean}, 95% interval {format_ends(interval)}"
