"""Successive halving over seeds: what it trains, and what it would have found and cost on the committed comparisons."""

import csv
import json
import math
import statistics
from pathlib import Path

import pytest
from comparison_fakes import Comparison

from hf_v0init.compare.planning.halving import get_family, select_runs
from hf_v0init.compare.planning.plan import PlannedRun, read_plan
from hf_v0init.compare.running import runs as runs_module

ROOT = Path(__file__).resolve().parents[2]


def make_run(v0="zeros", warmup="none", rate=1e-3, seed=1, optimizer="adamw", other=None) -> PlannedRun:
    arm = " + ".join([v0, warmup, optimizer, *map(str, (other or {}).items())])
    return PlannedRun(f"{arm} {rate} {seed}", arm, v0, warmup, optimizer, other or {}, rate, seed, {})


def replay(runs, losses) -> list[PlannedRun]:
    """The runs that halving trains, if each ends with the loss that is known for it."""
    known = {}
    while now := select_runs(runs, known).now:
        known |= {run.name: losses[run.name] for run in now}
    selection = select_runs(runs, known)
    assert {run.name for run in selection.over} == set(known)
    assert len(selection.over) + len(selection.dropped) == len(runs)
    return selection.over


def test_the_better_half_of_each_family_gets_the_next_seed():
    scales, warmups, seeds = (1, 2, 3, 4), ("100", "200", "400"), (1, 2, 3)
    runs = [make_run(f"data_driven {scale}", seed=seed) for seed in seeds for scale in scales]
    runs += [make_run(warmup=warmup, seed=seed) for seed in seeds for warmup in warmups]
    runs += [make_run(seed=seed) for seed in seeds]
    runs.sort(key=lambda run: run.seed)
    # By scale; seed 2 turns scales 1 and 2 round. Warmups are worse than any v0, the plain start is the worst.
    losses = {run.name: {"data": int(run.v0[-1]) if run.v0 != "zeros" else 0}["data"] for run in runs}
    for run in runs:
        if run.v0 == "data_driven 1" and run.seed == 2:
            losses[run.name] = 5.0  # its mean of two seeds is 3, scale 2's is 2
        elif run.v0 == "zeros":
            losses[run.name] = 10.0 + (int(run.warmup) / 100 if run.warmup != "none" else 20.0)
    trained = {(run.v0, run.warmup, run.seed) for run in replay(runs, losses)}
    expected = {(f"data_driven {scale}", "none", 1) for scale in scales}
    expected |= {("data_driven 1", "none", 2), ("data_driven 2", "none", 2), ("data_driven 2", "none", 3)}
    expected |= {("zeros", warmup, 1) for warmup in warmups}
    expected |= {("zeros", "100", 2), ("zeros", "200", 2), ("zeros", "100", 3)}
    expected |= {("zeros", "none", seed) for seed in seeds}  # one of a family is its best half
    assert trained == expected


def test_what_is_started_waits_for_the_seed_before():
    runs = [make_run(f"random {scale}", seed=seed) for seed in (7, 3) for scale in (1, 10)]
    first = select_runs(runs, {})
    assert [run.seed for run in first.now] == [7, 7] and first.over == first.dropped == []
    half = select_runs(runs, {runs[0].name: 2.0})
    assert half.now == [runs[1]] and half.over == [runs[0]]
    both = select_runs(runs, {runs[0].name: 2.0, runs[1].name: math.inf})
    assert (both.now, both.dropped) == ([runs[2]], [runs[3]])


def test_families_are_not_halved_against_each_other():
    names = [
        get_family(run).name
        for run in (
            make_run(),
            make_run("random 1", optimizer="radam"),
            make_run("random 1", other={"v0_floor": 1, "adam_beta2": 0.999}),
            make_run("data_driven 1", warmup="200"),
            make_run(warmup="0.3"),
        )
    ]
    assert names == [
        "no warmup, no v0, adamw",
        "v0, radam",
        "v0, adamw, adam_beta2=0.999",
        "v0 + warmup, adamw",
        "warmup, adamw",
    ]


# ------------------------------------------------------------------------------------------------ in the queue


@pytest.mark.parametrize(("metric", "kept"), [("eval_loss", 1e-3), ("predict_bleu", 2e-3)])
def test_halving_goes_by_the_metric_and_by_which_way_it_gets_better(tmp_path, monkeypatch, metric, kept):
    monkeypatch.setattr(runs_module, "POLL_SECONDS", 0.01)
    comparison = Comparison(tmp_path)
    script = tmp_path / "fake.py"
    script.write_text(
        script.read_text().replace('"predict_bleu": 1.0', '"predict_bleu": 1e3 * float(flags["learning_rate"])')
    )
    comparison.write([{"v0": ["random"], "learning_rate": [1e-3, 2e-3], "seed": [1, 2]}], metric=metric)
    comparison.run(jobs=1, halving=True)
    plan = read_plan(comparison.config)
    second = [
        run.learning_rate for run in plan.runs if run.seed == 2 and (comparison.folder / "runs" / run.name).exists()
    ]
    assert second == [kept]


def test_halving_as_it_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(runs_module, "POLL_SECONDS", 0.01)
    comparison = Comparison(tmp_path)
    by_rate = {1e-3: "6,5,4", 2e-3: "6,4,3", 4e-3: "6,4,7", 8e-3: "6,4,2"}  # the third diverges
    grids = [
        {"v0": ["random"], "learning_rate": [rate], "losses": [loss], "seed": [1, 2, 3]}
        for rate, loss in by_rate.items()
    ]
    comparison.write(grids)
    told = comparison.run(jobs=2, halving=True)
    rates = {f"random 100 + losses={loss}": rate for rate, loss in by_rate.items()}
    trained = sorted((seed, rates[arm]) for arm, seed, *_ in told.ends)
    # `losses` is a flag of the script, so each is a family of its own: nothing is halved.
    assert len(trained) == 12
    comparison.folder = tmp_path / "second"
    script = tmp_path / "fake.py"
    table = {str(rate): loss for rate, loss in by_rate.items()}
    script.write_text(
        script.read_text().replace('flags.get("losses", "6,4,3")', f'{table!r}[str(float(flags["learning_rate"]))]')
    )
    comparison.write([{"v0": ["random"], "learning_rate": list(by_rate), "seed": [1, 2, 3]}])
    told = comparison.run(jobs=2, halving=True)
    plan = read_plan(comparison.config)
    done = {(run.seed, run.learning_rate) for run in plan.runs if (comparison.folder / "runs" / run.name).exists()}
    assert done == {(1, rate) for rate in by_rate} | {(2, 2e-3), (2, 8e-3), (3, 8e-3)}
    assert comparison.run(jobs=2, halving=True).ends == []  # a second call comes to the same
    assert len(comparison.run().ends) == 5  # and one without it trains the rest


# -------------------------------------------------------------------------- replayed on what has been measured

# Comparison -> runs trained of those planned; the share of the committed runs' training time; and of what the full grid, every arm
# and rate on every seed, would have taken (the committed grids had been thinned out by hand).
REPLAYED = {
    "multi30k": (26, 30, 0.89, 0.62),
    "multi30k_paper_model": (14, 18, 0.77, 0.77),
    "multi30k_pocket": (95, 111, 0.91, 0.45),
    "ptb_pocket": (35, 37, 0.95, 0.54),
}


def read_results(name) -> list[dict]:
    with open(ROOT / "configs" / "compare" / "results" / name / "results.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def find_winner(runs, losses) -> tuple[str, float]:
    """Arm and rate of the lowest mean loss, among those with the most seeds."""
    cells = {}
    for run in runs:
        cells.setdefault((run.arm, run.learning_rate), []).append(losses[run.name])
    most = max(map(len, cells.values()))
    return min((cell for cell in cells if len(cells[cell]) == most), key=lambda cell: statistics.fmean(cells[cell]))


@pytest.mark.parametrize("name", REPLAYED)
def test_halving_finds_the_same_winners_on_the_committed_comparisons_for_less(name):
    rows = read_results(name)
    runs = [
        PlannedRun(
            row["name"], row["arm"], row["v0"], row["warmup"], row["optimizer"], json.loads(row["other"] or "{}"),
            float(row["learning_rate"]), int(row["seed"]), {},
        )
        for row in rows
    ]  # fmt: skip
    losses = {row["name"]: math.inf if row["state"] == "diverged" else float(row["final_loss"]) for row in rows}
    seconds = {row["name"]: float(row["train_seconds"]) for row in rows}
    trained = replay(runs, losses)
    for family in {get_family(run) for run in runs}:
        of_family = [run for run in runs if get_family(run) == family]
        kept = [run for run in trained if get_family(run) == family]
        assert find_winner(kept, losses) == find_winner(of_family, losses), family.name
    assert find_winner(trained, losses) == find_winner(runs, losses)
    cells = {}
    for run in runs:
        cells.setdefault((run.arm, run.learning_rate), []).append(seconds[run.name])
    full = len({run.seed for run in runs}) * sum(statistics.fmean(found) for found in cells.values())
    cost = sum(seconds[run.name] for run in trained)
    shares = round(cost / sum(seconds.values()), 2), round(cost / full, 2)
    print(
        f"{name}: {len(trained)} of {len(runs)} runs, {shares[0]:.0%} of their time, {shares[1]:.0%} of the full grid's"
    )
    assert (len(trained), len(runs), *shares) == REPLAYED[name]
