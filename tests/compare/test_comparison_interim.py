"""A comparison taken back to one step: the same numbers as from runs of that length, whatever became of the runs since."""

import math

import pytest
from comparison_folders import EVAL_STEPS, make_entry, make_losses, write_grid, write_plan, write_run

from hf_v0init.compare.reading.interim import knows_no_end, take_back
from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reading.summary import compute_summary
from hf_v0init.compare.reporting.report import write_report
from hf_v0init.errors import InputError

FINALS = {("zeros", "none"): 4.0, ("zeros", "200"): 2.0, ("data_driven 10", "none"): 2.4}


def make_curve(v0, warmup, rate, seed):
    return make_losses(FINALS[v0, warmup] + 0.1 * seed)


def write_curves(folder, state: str, num_evaluations: int = len(EVAL_STEPS)):
    """The grid of FINALS with the first evaluations of every curve; its runs are in the state given."""
    entries = [make_entry(v0, warmup, 1e-3, seed) for seed in (1, 2, 3) for v0, warmup in FINALS]
    write_plan(folder, entries)
    for entry in entries:
        losses = make_curve(entry["v0"], entry["warmup"], 1e-3, entry["seed"])[:num_evaluations]
        write_run(folder, entry, losses[-1] if state == "finished" else state, losses=losses)
    return folder


def list_numbers(summary):
    return [
        (arm.name, arm.best.final, arm.best.steps_to, arm.best.steps_to_charged, arm.best.seconds_to, arm.to_warmup, arm.to_plain)
        for arm in summary.arms
    ]  # fmt: skip


@pytest.mark.parametrize("state", ["finished", "running", "interrupted", "stopped_early"])
def test_the_numbers_are_those_of_runs_that_ended_there(tmp_path, state):
    """Evaluations are after 0, 100, ... steps: taken back to 200, any run is one of three evaluations."""
    short = compute_summary(read_comparison(write_curves(tmp_path / "short", "finished", 3)))
    comparison = read_comparison(write_curves(tmp_path / "long", state))
    take_back(comparison, 200)
    assert {run.state for run in comparison.runs} == {"reached_step"}
    assert {run.num_steps for run in comparison.runs} == {200}
    summary = compute_summary(comparison)
    assert list_numbers(summary) == list_numbers(short)
    assert summary.best_warmup.name == "warmup 200" and summary.find_best("v0").to_warmup.n == 3
    assert summary.best_warmup.best.train_seconds == short.best_warmup.best.train_seconds


def test_no_test_figure_is_shown_for_a_step_on_the_way(tmp_path):
    comparison = read_comparison(write_curves(tmp_path, "finished"))
    assert all("predict_bleu" in run.metrics for run in comparison.runs)
    take_back(comparison, 200)
    assert all(rate.tests == {} for arm in compute_summary(comparison).arms for rate in arm.rates.values())


def test_a_run_counts_with_what_it_was_at_the_step(tmp_path):
    outcomes = {
        1: [9.0, 8.0, 7.0, 6.0, math.nan],  # diverged after the step: well at it
        2: [9.0, math.nan],  # diverged before it
        3: [9.0, 8.0, math.nan, 5.0, 4.0],  # no finite number at it
        4: [9.0, 8.0, 9.5, 5.0, 4.0],  # above the start at it
        5: [9.0, 8.0],  # under way, not there yet
        6: [9.0, 8.0, 7.5],
    }
    states = {1: "diverged", 2: "diverged", 3: "running", 4: "running", 5: "running", 6: "running"}
    entries = [make_entry("zeros", "200", 1e-3, seed) for seed in outcomes] + [make_entry("zeros", "200", 1e-3, 7)]
    write_plan(tmp_path, entries)
    for entry in entries[:-1]:
        write_run(tmp_path, entry, states[entry["seed"]], losses=outcomes[entry["seed"]])
    write_run(tmp_path, entries[-1], "failed")
    comparison = read_comparison(tmp_path)
    take_back(comparison, 200)
    found = {run.seed: (run.state, run.scored_loss if run.is_counted else None) for run in comparison.runs}
    assert found == {
        1: ("reached_step", 7.0),
        2: ("diverged", 9.0),
        3: ("diverged", 9.0),
        4: ("diverged", 9.0),
        5: ("running", None),
        6: ("reached_step", 7.5),
        7: ("failed", None),
    }
    by_seed = {run.seed: run for run in comparison.runs}
    assert by_seed[4].reason == "the validation loss at step 200, 9.5, is above that at start, 9"
    assert by_seed[3].reason == "the validation loss is nan at step 200"
    assert by_seed[2].reason == "a loss was nan"


def test_a_finished_run_without_an_evaluation_there_is_named_and_counts_nowhere(tmp_path):
    entries = [make_entry("zeros", "200", 1e-3, 1), make_entry("zeros", "200", 1e-3, 2)]
    write_plan(tmp_path, entries)
    write_run(tmp_path, entries[0], 2.0)
    write_run(tmp_path, entries[1], 2.0, losses=[9.0, 2.0])
    comparison = read_comparison(tmp_path)
    take_back(comparison, 300)
    assert [run.is_counted for run in comparison.runs] == [True, False]
    assert comparison.runs[1].problems == ["not evaluated after step 300"]


@pytest.mark.parametrize(
    ("step", "outcome", "named"),
    [
        (150, "interrupted", "all runs that have begun have these in common: 100, 200, 300, 400"),
        (500, "interrupted", "100, 200, 300, 400"),
        (0, None, "none has been evaluated after its start"),
    ],
)
def test_a_step_at_which_no_run_was_evaluated_is_refused(tmp_path, step, outcome, named):
    comparison = read_comparison(write_grid(tmp_path, lambda *_: outcome))
    with pytest.raises(InputError, match=f"at_step={step}: no run was evaluated after that optimizer step") as error:
        take_back(comparison, step)
    assert named in str(error.value)


@pytest.mark.parametrize(
    ("schedule", "independent"),
    [("inverse_sqrt", True), ("constant_with_warmup", True), ("linear", False), ("cosine", False), (None, False)],
)
def test_the_report_says_what_it_is_worth(tmp_path, schedule, independent, monkeypatch):
    monkeypatch.setattr("hf_v0init.compare.reporting.report.draw_figures", lambda *_, **__: [])
    entry = make_entry("data_driven 10", "none", 1e-3, 1)
    entry["arguments"] |= {"lr_scheduler_type": schedule} if schedule else {}
    write_plan(tmp_path, [entry])
    write_run(tmp_path, entry, "interrupted")
    assert knows_no_end(read_comparison(tmp_path)) == independent
    write_report(tmp_path)
    finished = (tmp_path / "report.md").read_text()
    assert write_report(tmp_path, at_step=300) == tmp_path / "at_step_300" / "report.html"
    text = (tmp_path / "at_step_300" / "report.md").read_text()
    assert (tmp_path / "report.md").read_text() == finished  # beside it, not over it
    assert "**Interim: every run as it stood at its evaluation after optimizer step 300, not at its end.**" in text
    assert ("runs of that length would have come here too" in text) == independent
    assert ("judge by whole runs" in text) != independent
    assert "1 reached step." in text and "with `--report_only --at_step 300` after it" in text
    write_report(tmp_path)
    assert "Interim" not in (tmp_path / "report.md").read_text()
