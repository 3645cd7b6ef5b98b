"""Folders of runs become tables, and tables a folder again."""

import json
import math

import pandas as pd
import pytest
from comparison_folders import EVAL_STEPS, make_entry, make_losses, write_grid, write_plan, write_run

from hf_v0init.compare.results import find_odd_beginnings, read_comparison, write_tables
from hf_v0init.errors import InputError


def read_one(folder, entry, outcome, **options):
    write_plan(folder, [entry])
    write_run(folder, entry, outcome, **options)
    comparison = read_comparison(folder)
    return comparison, comparison.runs.iloc[0]


def test_a_finished_run_is_read(tmp_path):
    comparison, run = read_one(tmp_path, make_entry("data_driven 10", "none", 1e-3, 1), 3.0)
    assert (run["state"], run["final_loss"], run["scored_loss"], run["start_loss"]) == ("finished", 3.0, 3.0, 9.0)
    assert (run["num_steps"], run["train_seconds"], run["seconds"], run["predict_bleu"]) == (400, 43.0, 60.0, 25.0)
    assert run["problems"] == ""
    assert list(comparison.evaluations["step"]) == list(EVAL_STEPS)
    assert list(comparison.evaluations["loss"]) == pytest.approx(make_losses(3.0))
    assert comparison.machines == [{"versions": {"torch": "2.13.0"}, "hardware": {"cpu": "two cores"}}]


def test_a_diverged_run_counts_with_the_loss_at_the_start_and_never_with_a_training_loss(tmp_path):
    entry = make_entry("zeros", "none", 1e-3, 1)
    assert read_one(tmp_path / "a", entry, "diverged")[1]["scored_loss"] == 9.0
    # Without an evaluation at step 0 nothing is known of the start, however small the first training loss is.
    read_one(tmp_path / "b", entry, "diverged")
    log = tmp_path / "b" / "runs" / entry["name"] / "output" / "run_log.jsonl"
    log.write_text("".join(line + "\n" for line in log.read_text().splitlines() if '"step": 0' not in line))
    run = read_comparison(tmp_path / "b").runs.iloc[0]
    assert run["state"] == "diverged" and math.isnan(run["scored_loss"]) and math.isnan(run["start_loss"])


@pytest.mark.parametrize("state", ["running", "interrupted", "failed", None])
def test_runs_without_an_outcome_do_not_count(tmp_path, state):
    comparison, run = read_one(tmp_path, make_entry("zeros", "none", 1e-3, 1), state)
    assert (
        run["state"] == (state or "pending")
        and comparison.get_counted("confirm").empty
        and math.isnan(run["scored_loss"])
    )


def test_without_a_log_the_trainers_history_is_read(tmp_path):
    entry = make_entry("zeros", "none", 1e-3, 1)
    read_one(tmp_path, entry, 3.0)
    output = tmp_path / "runs" / entry["name"] / "output"
    history = [json.loads(line) for line in (output / "run_log.jsonl").read_text().splitlines()]
    (output / "run_log.jsonl").unlink()
    (output / "trainer_state.json").write_text(json.dumps({"global_step": 400, "log_history": history}))
    comparison = read_comparison(tmp_path)
    assert list(comparison.evaluations["step"]) == list(EVAL_STEPS) and comparison.runs.iloc[0]["final_loss"] == 3.0


def test_damage_is_named_and_the_rest_read(tmp_path):
    entry = make_entry("random 1", "none", 1e-3, 1)
    read_one(tmp_path, entry, 3.0)
    output = tmp_path / "runs" / entry["name"] / "output"
    (output / "trainer_state.json").write_text("{")
    (output / "fingerprint.json").write_text("[1]")
    run = read_comparison(tmp_path).runs.iloc[0]
    assert (
        run["problems"] == "trainer_state.json cannot be read; fingerprint.json cannot be read"
        and run["final_loss"] == 3.0
    )


@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_folder_without_a_whole_plan_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match="no comparison there"):
        read_comparison(tmp_path)


def test_the_tables_are_all_that_is_needed(tmp_path):
    write_grid(
        tmp_path / "whole",
        lambda v0, warmup, rate, seed: "failed" if warmup == "200" and seed == 4 else 3.0 + rate + seed,
    )
    whole = read_comparison(tmp_path / "whole")
    write_tables(whole, tmp_path / "copy")
    copy = read_comparison(tmp_path / "copy")
    pd.testing.assert_frame_equal(copy.runs, whole.runs, check_dtype=False)
    pd.testing.assert_frame_equal(copy.evaluations, whole.evaluations, check_dtype=False)
    assert (copy.plan, copy.machines) == (whole.plan, whole.machines)


def test_what_a_run_did_not_leave_is_named(tmp_path):
    entry = make_entry("zeros", "none", 1e-3, 1)
    write_plan(tmp_path, [entry], test_metrics=["predict_chrf"])
    write_run(tmp_path, entry, 3.0)
    output = tmp_path / "runs" / entry["name"] / "output"
    (output / "all_results.json").write_text("{}")
    with (output / "run_log.jsonl").open("a") as log:
        log.write('{"loss": 2.0, "step": 500}\n')
    (output / "trainer_state.json").unlink()
    problems = read_comparison(tmp_path).runs.iloc[0]["problems"]
    assert "left no predict_chrf" in problems and "last evaluated at step 400" in problems


def test_runs_that_began_otherwise_are_named(tmp_path):
    folder = write_grid(tmp_path, lambda *place: 3.0)
    assert find_odd_beginnings(read_comparison(folder).runs) == []
    odd = make_entry("data_driven 10", "none", 1e-3, 2)["name"]
    path = folder / "runs" / odd / "output" / "fingerprint.json"
    begun = json.loads(path.read_text())
    for part, value in (("initial_weights", "w9"), ("batches", ["b9"]), ("rng", "r9")):
        path.write_text(json.dumps(begun | {part: value}))
        (found,) = find_odd_beginnings(read_comparison(folder).runs)
        assert found == {"seed": 2, "condition": "", "part": part, "names": [odd], "total": 3}
    path.write_text(json.dumps(begun | {"batches": begun["batches"][:2]}))  # it ended within two steps
    assert find_odd_beginnings(read_comparison(folder).runs) == []
