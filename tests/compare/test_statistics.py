"""The numbers against scipy, against hand calculation and against enumeration."""

import itertools
import math
import statistics

import pandas as pd
import pytest
from scipy import stats

from hf_v0init.compare.stages import choose_settings, find_edges
from hf_v0init.compare.statistics import (
    Verdict,
    adjust_by_holm,
    choose_best,
    compute_budget,
    compute_paired_interval,
    judge_contrasts,
    judge_replacement,
)

ONE = {1: 4.0, 2: 4.2, 3: 4.1, 5: 3.9}
OTHER = {1: 4.1, 2: 4.5, 3: 4.1, 4: 9.0, 5: 4.3}


def test_the_interval_is_scipy_s_paired_t_test_over_the_shared_seeds():
    interval = compute_paired_interval(ONE, OTHER)
    seeds = [1, 2, 3, 5]
    test = stats.ttest_rel([ONE[s] for s in seeds], [OTHER[s] for s in seeds])
    expected = test.confidence_interval(0.95)
    assert interval.n == 4
    assert (interval.low, interval.high) == pytest.approx((expected.low, expected.high))
    assert interval.p_value == pytest.approx(test.pvalue) and interval.mean == pytest.approx(-0.2)


def test_one_seed_has_no_interval_and_none_in_common_no_difference():
    interval = compute_paired_interval({1: 2.0}, {1: 1.5})
    assert interval.mean == 0.5 and math.isnan(interval.low) and math.isnan(interval.p_value)
    assert compute_paired_interval({1: 2.0}, {2: 1.5}) is None
    assert compute_paired_interval({1: 2.0, 2: 3.0}, {1: 1.0, 2: 2.0}).p_value == 0.0  # always the same difference


def test_a_seed_that_has_no_value_is_left_out_and_counted():
    """An accuracy that is NaN on one seed of four: three are in common."""
    interval = compute_paired_interval({1: 0.8, 2: math.nan, 3: 0.7, 4: 0.9}, {1: 0.7, 2: 0.7, 3: 0.65, 4: 0.7})
    assert (interval.n, interval.lost_one, interval.lost_other) == (3, 1, 0)
    assert interval.mean == pytest.approx((0.1 + 0.05 + 0.2) / 3) and interval.low < interval.mean < interval.high


def test_holm_by_hand():
    assert adjust_by_holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert adjust_by_holm([0.5, math.nan, 0.4]) == pytest.approx([0.8, math.nan, 0.8], nan_ok=True)
    assert adjust_by_holm([0.02]) == [0.02] and adjust_by_holm([]) == []


def by_seed(*losses):
    return dict(enumerate(losses))


def test_verdicts_follow_from_the_adjusted_p():
    losses = {
        "v0": by_seed(3.0, 3.1, 2.9, 3.05),
        "warmup": by_seed(4.0, 4.1, 3.9, 4.06),
        "none": by_seed(4.1, 3.9, 4.05, 4.0),
    }
    planned = [("v0", "warmup"), ("v0", "none"), ("warmup", "none"), ("v0", "absent")]
    contrasts = judge_contrasts(losses, planned)
    assert [c.verdict for c in contrasts] == [Verdict.BETTER, Verdict.BETTER, Verdict.NOT_SIGNIFICANT]
    assert judge_contrasts(losses, planned, greater_is_better=True)[0].verdict is Verdict.WORSE
    assert all(c.p_adjusted >= c.interval.p_value for c in contrasts)
    few = judge_contrasts({name: {1: of[1]} for name, of in losses.items()}, planned)
    assert {c.verdict for c in few} == {Verdict.TOO_FEW_SEEDS}


def test_losing_a_seed_to_divergence_never_makes_a_winner():
    one, other = by_seed(3.0, 3.1, 2.9, math.nan), by_seed(4.0, 4.1, 3.9, 4.06)
    (contrast,) = judge_contrasts({"v0": one, "warmup": other}, [("v0", "warmup")])
    assert contrast.p_adjusted < 0.05 and contrast.verdict is Verdict.NOT_SIGNIFICANT
    assert judge_replacement(contrast.interval, 1.0).verdict is Verdict.NOT_SHOWN
    (contrast,) = judge_contrasts({"v0": other, "warmup": one}, [("v0", "warmup")])
    assert contrast.verdict is Verdict.NOT_SIGNIFICANT


@pytest.mark.parametrize(
    ("shift", "margin", "verdict"),
    [
        (0.0, 0.1, Verdict.CAN_REPLACE),
        (0.0, 0.02, Verdict.NOT_SHOWN),  # the interval holds 0, which shows nothing
        (0.2, 0.1, Verdict.NOT_SHOWN),
        (-0.2, 0.01, Verdict.CAN_REPLACE),
    ],
)
def test_can_replace_is_a_test_of_non_inferiority(shift, margin, verdict):
    noise = (0.02, -0.02, 0.03, -0.03, 0.0)
    one, other = by_seed(*(4.0 + shift + e for e in noise)), by_seed(*[4.0] * 5)
    interval = compute_paired_interval(one, other)
    judged = judge_replacement(interval, margin)
    assert judged.verdict is verdict and judged.worst == interval.high
    mirrored = compute_paired_interval(other, one)  # as where more is better
    assert judge_replacement(mirrored, margin, greater_is_better=True).verdict is verdict
    assert judge_replacement(compute_paired_interval({1: 1.0}, {1: 1.0}), 1.0).verdict is Verdict.TOO_FEW_SEEDS


# --------------------------------------------------------------------------------------------------------- choosing


def test_the_best_is_chosen_on_the_seeds_that_all_have():
    assert choose_best({"a": {1: 3.0}, "b": {1: 3.1, 2: 1.0}}) == "a"
    assert choose_best({"a": {1: 3.0}, "b": {2: 1.0}}) == "b"
    assert choose_best({"a": {1: math.inf, 2: 1.0}, "b": {1: 3.0, 2: 3.0}}) == "b"
    assert choose_best({"a": {1: math.inf}}) is None and choose_best({}) is None


def make_runs(rows) -> pd.DataFrame:
    columns = ["family", "setting", "learning_rate", "seed", "scored_loss", "state", "condition", "stage"]
    return pd.DataFrame([(*row, "finished", "", "tune")[:8] for row in rows], columns=columns)


def test_each_family_has_its_choice_and_what_is_confirmed_chooses_nothing():
    runs = make_runs(
        [("v0", "a", 1e-3, 1, 3.0), ("v0", "a", 1e-2, 1, 2.5), ("v0", "b", 1e-2, 1, 2.7), ("warmup", "w", 1e-3, 1, 2.0)]
    )
    later = runs.assign(stage="confirm", scored_loss=0.0, setting="c")
    diverged = runs.assign(state="diverged", scored_loss=math.nan, setting="d")
    chosen = choose_settings(pd.concat([runs, later, diverged]))
    assert [(c.family, c.setting, c.learning_rate, c.num_trials) for c in chosen] == [
        ("v0", "a", 1e-2, 5),
        ("warmup", "w", 1e-3, 2),
    ]
    assert choose_settings(runs, greater_is_better=True)[0].learning_rate == 1e-3
    assert choose_settings(diverged) == []


def make_entry(setting="a", rate=1e-3, family="v0", **flags) -> dict:
    arguments = {"learning_rate": rate, "seed": 1, "max_steps": 600, **flags}
    return {"condition": "", "family": family, "setting": setting, "learning_rate": rate, "arguments": arguments}


@pytest.mark.parametrize(
    ("flag", "values", "chosen", "edge"),
    [
        ("learning_rate", [1e-3, 3e-3, 9e-3], 9e-3, ("highest", 27e-3)),
        ("learning_rate", [1e-3, 3e-3, 9e-3], 3e-3, None),
        ("learning_rate", [1e-3], 1e-3, None),
        ("warmup_steps", [100, 200, 400], 400, ("highest", None)),  # 800 is longer than the run
        ("warmup_steps", [50, 100, 200], 200, ("highest", 400)),
        ("warmup_steps", [50, 100], 50, ("lowest", 25)),
        ("warmup_steps", [0.1, 0.3, 5], 0.3, ("highest", 0.9)),  # fractions of training and steps are two scales
        ("v0_decay_steps", [0.33, 0.66], 0.66, ("highest", None)),
        ("v0_scale", [1.0, 10.0], 10.0, ("highest", 100.0)),
        ("v0_decay_steps", ["auto", 100], 100, None),
    ],
)
def test_an_optimum_at_an_edge_is_found_with_the_value_beyond_it(flag, values, chosen, edge):
    entries = []
    for value in values:
        rate = value if flag == "learning_rate" else 1e-3
        flags = {} if flag == "learning_rate" else {flag: value}
        entries.append(make_entry("a" if flag == "learning_rate" else f"s{value}", rate, **flags))
    entries += [make_entry("other", 1e-9, weight_decay=3.0), make_entry("a", 1e-9, family="warmup")]
    rows = [(e["family"], e["setting"], e["learning_rate"], 1, 5.0) for e in entries]
    best = values.index(chosen)
    rows[best] = (*rows[best][:4], 1.0)
    (choice, *_) = choose_settings(make_runs(rows))
    found = find_edges([choice], entries)
    assert [(e.flag, e.value, e.end, e.further) for e in found] == ([] if edge is None else [(flag, chosen, *edge)])


# ----------------------------------------------------------------------------------------------------- a budget


def test_the_expected_best_is_the_mean_over_all_draws():
    losses = [4.0, 3.5, 5.0, 3.9, 4.4]
    curve = compute_budget(losses)
    for k in range(1, 6):
        best = sorted(min(draw) for draw in itertools.combinations(losses, k))
        assert curve.expected[k - 1] == pytest.approx(statistics.fmean(best))
        # The ends between which eight of ten draws lie: the lowest values that a tenth, and nine tenths, do not exceed.
        ends = [next(v for v in best if sum(b <= v for b in best) >= q * len(best) - 1e-9) for q in (0.1, 0.9)]
        assert [curve.low[k - 1], curve.high[k - 1]] == ends
    mirrored = compute_budget([-loss for loss in losses], greater_is_better=True)
    assert list(mirrored.expected) == pytest.approx([-value for value in curve.expected])
