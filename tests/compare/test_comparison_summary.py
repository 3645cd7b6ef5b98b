import math
import statistics

import pytest
from comparison_folders import START, make_entry, make_losses, write_grid, write_plan, write_run

from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reading.summary import (
    compute_cost_to_loss,
    compute_estimate,
    compute_lr_sensitivity,
    compute_paired_interval,
    compute_share_interval,
    compute_steps_to_loss,
    compute_summary,
    compute_t_interval,
)

# Quantiles of Student's t at .975 from printed tables, by degrees of freedom.
T_975 = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 9: 2.262}


def find_arm(summary, name):
    return next(arm for arm in summary.arms if arm.name == name)


# --------------------------------------------------------------------------------------------------------------- numbers


def test_estimate_is_mean_and_sample_deviation():
    estimate = compute_estimate([2.0, 4.0, 9.0])
    assert (estimate.mean, estimate.n) == (5.0, 3)
    assert estimate.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    assert compute_estimate([3.0]).std is None and compute_estimate([]) is None


def test_t_interval_by_hand():
    # mean 0.2, s = 0.1, half width 4.303 * 0.1 / sqrt(3)
    interval = compute_t_interval({1: 0.1, 2: 0.2, 3: 0.3})
    assert interval.mean == pytest.approx(0.2) and interval.seeds == (1, 2, 3)
    assert interval.low == pytest.approx(0.2 - 0.24843, abs=2e-5) and interval.high == pytest.approx(
        0.2 + 0.24843, abs=2e-5
    )
    assert interval.verdict == "unclear"


@pytest.mark.parametrize("n", [2, 3, 4, 5, 10])
def test_t_interval_against_printed_quantiles(n):
    differences = {seed: math.sin(seed) for seed in range(n)}
    interval = compute_t_interval(differences)
    half = T_975[n - 1] * statistics.stdev(differences.values()) / math.sqrt(n)
    assert interval.high - interval.mean == pytest.approx(half, rel=2e-4)
    assert interval.mean - interval.low == pytest.approx(half, rel=2e-4)


@pytest.mark.parametrize(("shift", "verdict"), [(-1.0, "better"), (1.0, "worse"), (0.0, "unclear")])
def test_verdict_is_where_the_interval_lies(shift, verdict):
    assert compute_t_interval({1: shift - 0.01, 2: shift, 3: shift + 0.01}).verdict == verdict


def test_one_seed_has_no_interval():
    interval = compute_t_interval({7: 0.3})
    assert (interval.mean, interval.low, interval.high, interval.n, interval.verdict) == (0.3, None, None, 1, "unknown")
    assert compute_t_interval({}) is None and compute_t_interval({1: math.inf, 2: 0.0}) is None


def test_differences_are_paired_by_seed():
    interval = compute_paired_interval({1: 2.0, 2: 3.0, 3: 9.0}, {2: 2.5, 1: 1.0, 4: 0.0})
    assert interval.seeds == (1, 2) and interval.mean == pytest.approx((1.0 + 0.5) / 2)
    # the spread between the seeds does not matter, that of the differences does
    assert compute_paired_interval({1: 1.1, 2: 5.1, 3: 9.1}, {1: 1.0, 2: 5.0, 3: 9.0}).verdict == "worse"


@pytest.mark.parametrize(
    ("target", "steps"),
    [
        (4.0, 200.0),  # reached at an evaluation
        (5.0, 150.0),  # half way from 6 to 4
        (3.5, 300.0 + 100.0 / 1.5),  # from 4.5 to 3
        (9.0, 0.0),  # there from the start
        (2.9, None),
    ],
)
def test_steps_to_loss_by_hand(target, steps):
    losses = [9.0, 6.0, 4.0, 4.5, 3.0]
    assert compute_steps_to_loss([0, 100, 200, 300, 400], losses, target) == (
        None if steps is None else pytest.approx(steps)
    )


def test_steps_to_loss_does_not_interpolate_over_what_is_not_finite():
    assert compute_steps_to_loss([100, 200, 300], [math.nan, 3.0, 2.0], 4.0) == 200.0
    assert compute_steps_to_loss([100, 200], [math.nan, math.nan], 4.0) is None
    assert compute_steps_to_loss([], [], 4.0) is None


def test_steps_to_loss_against_a_fine_search():
    steps, losses = [0, 50, 120, 300], [9.0, 5.0, 5.5, 2.0]

    def loss_at(step):
        for left, right, a, b in zip(steps, steps[1:], losses, losses[1:], strict=False):
            if left <= step <= right:
                return a + (b - a) * (step - left) / (right - left)

    for target in (8.0, 5.2, 4.9, 3.3, 2.0):
        slow = next(i / 100 for i in range(30_001) if loss_at(i / 100) <= target + 1e-12)
        assert compute_steps_to_loss(steps, losses, target) == pytest.approx(slow, abs=2e-2)


def test_learning_rate_sensitivity_by_hand():
    # min(loss, 9) = 3, 2, 4, 9: mean 4.5, best 2
    assert compute_lr_sensitivity({1e-4: 3.0, 1e-3: 2.0, 1e-2: 4.0, 1e-1: 50.0}, 9.0) == pytest.approx(2.5)
    assert compute_lr_sensitivity({1e-4: 3.0, 1e-3: 3.0}, 9.0) == 0.0


# --------------------------------------------------------------------------------------------------------------- summary


def test_arms_are_judged_at_their_best_learning_rate(tmp_path):
    table = {1e-3: 3.0, 2e-3: 2.0, 4e-3: 2.5}
    folder = write_grid(tmp_path, lambda v0, warmup, rate, seed: table[rate] + 0.1 * seed, rates=table)
    summary = compute_summary(read_comparison(folder))
    for arm in summary.arms:
        assert arm.best.learning_rate == 2e-3
        assert (arm.best.final.mean, arm.best.final.std, arm.best.final.n) == (
            pytest.approx(2.2),
            pytest.approx(0.1),
            3,
        )
        assert arm.best.tests["predict_bleu"].mean == pytest.approx(40.0 - 5.0 * 2.2)


def test_the_best_warmup_is_the_lowest_mean_without_v0(tmp_path):
    finals = {"zeros/none": 4.0, "zeros/50": 2.3, "zeros/200": 2.1, "data_driven 1/none": 1.5, "data_driven 1/200": 1.0}
    arms = [tuple(name.split("/")) for name in finals]
    summary = compute_summary(read_comparison(write_grid(tmp_path, lambda v0, w, *_: finals[f"{v0}/{w}"], arms=arms)))
    assert summary.best_warmup.name == "warmup 200" and summary.plain.name == "zeros"
    assert [arm.name for arm in summary.arms] == [
        "data_driven 1 + warmup 200",
        "data_driven 1",
        "warmup 200",
        "warmup 50",
        "zeros",
    ]
    assert summary.find_best("v0").name == "data_driven 1"
    assert find_arm(summary, "data_driven 1").to_warmup.mean == pytest.approx(-0.6)
    assert find_arm(summary, "warmup 200").to_plain.mean == pytest.approx(-1.9)
    assert summary.best_warmup.to_warmup is None and summary.plain.to_plain is None


def test_the_best_mean_chooses_the_learning_rate_also_on_fewer_seeds(tmp_path):
    def outcome(v0, warmup, rate, seed):
        return (None if seed == 3 else 1.0) if rate == 2e-3 else 2.0

    summary = compute_summary(read_comparison(write_grid(tmp_path, outcome, rates=(1e-3, 2e-3))))
    assert all((arm.best.learning_rate, arm.best.final.n) == (2e-3, 2) for arm in summary.arms)


def test_losing_its_bad_runs_does_not_make_an_arm_better(tmp_path):
    """2 of 3 seeds diverge at the rate whose third run is the best: it counts (2 * 9 + 1.5) / 3."""

    def outcome(v0, warmup, rate, seed):
        return ("diverged" if seed < 3 else 1.5) if rate == 2e-3 else 2.0

    summary = compute_summary(read_comparison(write_grid(tmp_path, outcome, rates=(1e-3, 2e-3))))
    arm = find_arm(summary, "zeros")
    assert arm.best.learning_rate == 1e-3
    assert arm.rates[2e-3].final.mean == pytest.approx((2 * START + 1.5) / 3)
    assert arm.share("diverged") == (2, 6)


def test_failed_runs_count_nowhere_but_are_shown(tmp_path):
    summary = compute_summary(
        read_comparison(write_grid(tmp_path, lambda v0, w, r, s: "failed" if s == 2 else 2.0 + s))
    )
    arm = find_arm(summary, "zeros")
    assert arm.best.losses == pytest.approx({1: 3.0, 3: 5.0}) and arm.share("failed") == (1, 3)


def test_steps_to_the_best_warmups_loss_with_and_without_the_pass(tmp_path):
    """The warmup ends at 3; this v0 is at 4 after 200 steps and at 2 after 300: half way, 250; the pass is 20 steps and 3 s."""
    entries = [
        make_entry(v0, warmup, 1e-3, 1)
        for v0, warmup in (("zeros", "200"), ("data_driven 1", "none"), ("zeros", "none"))
    ]
    write_plan(tmp_path, entries)
    write_run(tmp_path, entries[0], 3.0, losses=[9.0, 8.0, 6.0, 4.0, 3.0])
    write_run(tmp_path, entries[1], 1.0, losses=[9.0, 6.0, 4.0, 2.0, 1.0])
    write_run(tmp_path, entries[2], 5.0, losses=[9.0, 8.0, 7.0, 6.0, 5.0])
    comparison = read_comparison(tmp_path)
    assert compute_cost_to_loss(comparison.runs[1], 3.0) == pytest.approx((250.0, 270.0, 25.0 + 3.0))
    summary = compute_summary(comparison)
    mine, own, never = (find_arm(summary, name).best for name in ("data_driven 1", "warmup 200", "zeros"))
    assert (mine.steps_to.mean, mine.steps_to_charged.mean, mine.seconds_to.mean) == pytest.approx((250.0, 270.0, 28.0))
    assert (own.steps_to.mean, own.steps_to_charged.mean, own.seconds_to.mean) == pytest.approx((400.0, 400.0, 40.0))
    assert never.steps_to is None and never.num_with_target == 1


def test_the_target_is_that_of_the_same_seed(tmp_path):
    def outcome(v0, warmup, rate, seed):
        return {("zeros", "200"): 2.0 + seed}.get((v0, warmup), 2.5 + seed)

    summary = compute_summary(read_comparison(write_grid(tmp_path, outcome)))
    assert summary.targets == pytest.approx({1: 3.0, 2: 4.0, 3: 5.0})
    assert find_arm(summary, "warmup 200").best.steps_to.mean == 400.0
    assert find_arm(summary, "data_driven 10").best.steps_to is None  # though seed 1's run went below seed 2's target


def test_steps_are_of_those_that_reach_it_and_their_number_is_known(tmp_path):
    finals = {
        ("zeros", "200"): [3.0, 3.0, 3.0],
        ("data_driven 10", "none"): [2.0, 2.5, 3.5],
        ("zeros", "none"): [5.0] * 3,
    }
    summary = compute_summary(read_comparison(write_grid(tmp_path, lambda v0, w, r, s: finals[v0, w][s - 1])))
    rate = find_arm(summary, "data_driven 10").best
    slow = [compute_steps_to_loss([0, 100, 200, 300, 400], make_losses(final), 3.0) for final in (2.0, 2.5)]
    assert (rate.steps_to.n, rate.num_with_target) == (2, 3) and rate.steps_to.mean == pytest.approx(sum(slow) / 2)


def test_sensitivity_of_an_arm_by_hand(tmp_path):
    table = {1e-3: [3.0, 3.2], 2e-3: [2.0, 2.4], 4e-3: ["diverged", 4.0]}
    folder = write_grid(tmp_path, lambda v0, w, rate, seed: table[rate][seed - 1], rates=table, seeds=(1, 2))
    arm = find_arm(compute_summary(read_comparison(folder)), "zeros")
    means = [3.1, 2.2, (START + 4.0) / 2]
    assert arm.sensitivity == pytest.approx(sum(means) / 3 - 2.2)
    assert arm.sensitivities == pytest.approx({1: (3.0 + 2.0 + START) / 3 - 2.0, 2: (3.2 + 2.4 + 4.0) / 3 - 2.4})
    assert statistics.fmean(arm.sensitivities.values()) == pytest.approx(arm.sensitivity)


def test_no_sensitivity_without_the_whole_grid(tmp_path):
    def outcome(v0, warmup, rate, seed):
        return None if (v0, rate) == ("data_driven 10", 4e-3) else 2.0 + rate

    summary = compute_summary(read_comparison(write_grid(tmp_path, outcome, rates=(1e-3, 2e-3, 4e-3))))
    assert find_arm(summary, "data_driven 10").sensitivity is None
    assert find_arm(summary, "zeros").sensitivity == pytest.approx((0.0 + 0.001 + 0.003) / 3)


def test_other_optimizers_are_no_plain_start(tmp_path):
    entries = [make_entry("zeros", "none", 1e-3, s, optimizer) for s in (1, 2) for optimizer in ("adamw", "radam")]
    entries += [make_entry("zeros", "100", 1e-3, s) for s in (1, 2)] + [
        make_entry("random 100", "none", 1e-3, s, "radam") for s in (1, 2)
    ]
    entries.append(make_entry("zeros", "none", 1e-3, 1, "sgd"))
    write_plan(tmp_path, entries)
    for entry in entries:
        write_run(
            tmp_path,
            entry,
            {"adamw": 4.0, "radam": 2.0, "sgd": 6.0}[entry["optimizer"]] - 0.5 * (entry["v0"] != "zeros"),
        )
    summary = compute_summary(read_comparison(tmp_path))
    # One with a v0 of its own is a plain start, one without v0 and warmup of its own a rival.
    assert (summary.plain.name, find_arm(summary, "radam").kind, find_arm(summary, "zeros").kind) == (
        "radam",
        "plain",
        "plain",
    )
    assert find_arm(summary, "sgd").kind == "other optimizer"
    # against the plain start of its own optimizer
    assert find_arm(summary, "random 100 + radam").to_plain.mean == pytest.approx(-0.5)


def test_settings_of_v0_do_not_part_an_arm_from_its_plain_start(tmp_path):
    entries = [make_entry("zeros", "none", 1e-3, 1), make_entry("zeros", "none", 1e-3, 1, other={"adam_beta2": 0.999})]
    entries.append(make_entry("data_driven 1", "none", 1e-3, 1, other={"v0_include_bias_and_norm": True}))
    entries.append(make_entry("data_driven 1", "none", 1e-3, 1, other={"adam_beta2": 0.999, "v0_floor": 1.0}))
    write_plan(tmp_path, entries)
    for entry, final in zip(entries, (5.0, 4.0, 2.0, 2.5), strict=True):
        write_run(tmp_path, entry, final)
    summary = compute_summary(read_comparison(tmp_path))
    assert find_arm(summary, "data_driven 1 + v0_include_bias_and_norm=True").to_plain.mean == pytest.approx(-3.0)
    assert find_arm(summary, "data_driven 1 + adam_beta2=0.999 + v0_floor=1.0").to_plain.mean == pytest.approx(-1.5)


def test_the_interval_of_a_share_holds_the_shares_that_the_t_test_does_not_refuse():
    """Fieller's interval against a scan: r is inside where the interval of (plain - one) - r (plain - other) holds 0."""
    plain, one, other = (
        {1: 5.0, 2: 5.2, 3: 4.9, 4: 5.1},
        {1: 3.1, 2: 3.0, 3: 2.9, 4: 3.3},
        {1: 2.5, 2: 2.7, 3: 2.4, 4: 2.45},
    )
    share = compute_share_interval(plain, one, other)
    held = []
    for r in (i / 10_000 for i in range(20_000)):
        test = compute_t_interval({s: (plain[s] - one[s]) - r * (plain[s] - other[s]) for s in plain})
        held += [r] if test.low <= 0.0 <= test.high else []
    assert share.low == pytest.approx(held[0], abs=2e-4) and share.high == pytest.approx(held[-1], abs=2e-4)
    assert share.mean == pytest.approx(sum(plain[s] - one[s] for s in plain) / sum(plain[s] - other[s] for s in plain))
    assert compute_share_interval(plain, one, {1: 9.0, 2: 1.0, 3: 5.0, 4: 5.1}) is None  # no gain to have a share of
    assert compute_share_interval({1: 5.0}, one, other) is None


def test_more_is_better_turns_everything_round(tmp_path):
    def outcome(v0, warmup, rate, seed):
        return {("zeros", "none"): 10.0, ("zeros", "200"): 11.0}.get((v0, warmup), 12.0) + rate * 100

    folder = write_grid(tmp_path, outcome, rates=(1e-3, 2e-3), seeds=(1, 2), metric="eval_bleu", greater_is_better=True)
    for path in folder.glob("runs/*/output/*.json*"):
        path.write_text(path.read_text().replace("eval_loss", "eval_bleu"))
    summary = compute_summary(read_comparison(folder))
    assert [arm.name for arm in summary.arms] == ["data_driven 10", "warmup 200", "zeros"]
    best = summary.arms[0]
    assert (
        best.best.learning_rate == 2e-3
        and best.to_warmup.verdict == "better"
        and best.to_warmup.mean == pytest.approx(1.0)
    )
    assert best.best.best.mean == pytest.approx(12.2) and best.sensitivity == pytest.approx(0.05)  # (0.1 + 0) / 2
    # From 9 to 12.2, the half of the way in every quarter: 11.2 is (11.2 - 9) / 3.2 of it, within the second quarter.
    assert best.best.steps_to.mean == pytest.approx(100 + 100 * ((2.2 / 3.2 * 0.9375 - 0.5) / 0.25))
