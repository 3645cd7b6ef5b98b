"""What a tuning budget buys and what runs cost, against enumeration and by hand."""

import itertools
import statistics

import pytest
from comparison_folders import make_entry, write_grid, write_plan, write_run

from hf_v0init.compare.reading.budget import compute_budget, compute_expected_best, compute_quantile
from hf_v0init.compare.reading.cost import compute_run_hours, name_hours, sum_hours
from hf_v0init.compare.reading.results import RunResult, read_comparison
from hf_v0init.compare.reading.summary import compute_summary

LOSSES = [3.1, 2.0, 5.0, 2.0, 4.2, 3.3]


def list_bests(losses, num_draws):
    """The lowest loss of every set of so many draws."""
    return sorted(min(draw) for draw in itertools.combinations(losses, num_draws))


@pytest.mark.parametrize("num_draws", range(1, len(LOSSES) + 1))
def test_the_expected_best_is_the_mean_over_all_draws(num_draws):
    assert compute_expected_best(LOSSES, num_draws) == pytest.approx(statistics.fmean(list_bests(LOSSES, num_draws)))


def test_quantiles_are_those_of_the_list():
    values = [1.0, 2.0, 3.0, 4.0]
    assert [compute_quantile([(v, 0.25) for v in values], q) for q in (0.1, 0.25, 0.26, 0.9)] == [1.0, 1.0, 2.0, 4.0]


@pytest.mark.parametrize("greater_is_better", [False, True])
def test_curves_and_bands_are_those_of_all_draws_of_every_seed(tmp_path, greater_is_better):
    arms = [("zeros", "none"), ("zeros", "100"), ("zeros", "200"), ("random 1", "none")]
    finals = {}

    def outcome(v0, warmup, rate, seed):
        return finals.setdefault((v0, warmup, rate, seed), 2.0 + (len(finals) * 7 % 11) / 10)

    metric = {"metric": "eval_bleu", "greater_is_better": True} if greater_is_better else {}
    folder = write_grid(tmp_path, outcome, arms=arms, rates=(1e-3, 2e-3), seeds=(1, 2), **metric)
    if greater_is_better:
        for path in folder.glob("runs/*/output/*.json*"):
            path.write_text(path.read_text().replace("eval_loss", "eval_bleu"))
    budget = compute_budget(compute_summary(read_comparison(folder)))
    assert budget.seeds == (1, 2) and budget.num_left_out == 0
    curve = next(c for c in budget.curves if c.kind == "warmup")
    assert [c.num_trials for c in budget.curves] == [2, 4, 2]
    best = max if greater_is_better else min
    for k in range(1, 5):
        bests = [
            best(draw)
            for seed in (1, 2)
            for draw in itertools.combinations(
                [finals["zeros", w, r, seed] for w in ("100", "200") for r in (1e-3, 2e-3)], k
            )
        ]
        bests.sort(reverse=greater_is_better)
        assert curve.expected[k - 1] == pytest.approx(statistics.fmean(bests))
        ends = [next(b for i, b in enumerate(bests, 1) if i >= q * len(bests) * (1 - 1e-12)) for q in (0.1, 0.9)]
        assert [curve.low[k - 1], curve.high[k - 1]] == pytest.approx(ends)
    assert curve.hours == pytest.approx(60.0 / 3600.0)


def test_trials_are_those_of_the_seed_that_has_the_most(tmp_path):
    entries = [make_entry("random 1", "none", 1e-3, s) for s in (1, 2)] + [make_entry("random 2", "none", 1e-3, 1)]
    write_plan(tmp_path, entries)
    for entry, final in zip(entries, (3.0, 1.0, 2.0), strict=True):
        write_run(tmp_path, entry, final)
    budget = compute_budget(compute_summary(read_comparison(tmp_path)))
    assert budget.seeds == (1,) and budget.curves[0].expected == pytest.approx([2.5, 2.0])


def make_run(**changes):
    fields = {"name": "a", "arm": "a", "v0": "zeros", "warmup": "none", "optimizer": "adamw", "other": {}}
    return RunResult(**fields, learning_rate=1e-3, seed=1, **changes)


@pytest.mark.parametrize(
    ("hardware", "launch", "hours"),
    [
        ({"jobs": 1}, "python", 2.0),
        ({"jobs": 4}, "python", 0.5),
        ({"gpus": ["H100"], "jobs": 8}, "python", 0.25),
        ({"gpus": ["H100"] * 8, "jobs": 8}, "python", 2.0),
        ({"gpus": ["H100"] * 8, "jobs": 1}, "python", 2.0),  # it holds one
        ({"gpus": ["H100"] * 8, "jobs": 1}, "torchrun --nproc_per_node 8", 16.0),
        ({"gpus": ["H100"] * 8, "jobs": 2}, "accelerate launch", 8.0),
    ],
)
def test_hours_are_those_of_the_share_of_the_machine(hardware, launch, hours):
    run = make_run(seconds=7200.0, hardware=hardware, launch=launch)
    assert compute_run_hours(run) == pytest.approx(hours)
    assert name_hours([run]) == ("accelerator-hours" if "gpus" in hardware else "machine-hours")


def test_unknown_times_are_left_out():
    assert compute_run_hours(make_run()) is None and sum_hours([make_run()]) is None
    assert sum_hours([make_run(), make_run(seconds=3600.0, state="failed")]) == 1.0
