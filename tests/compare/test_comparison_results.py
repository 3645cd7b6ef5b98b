import json
import math

import pytest
from comparison_folders import START, make_entry, make_losses, write_grid, write_plan, write_run

from hf_v0init.compare.planning.published import PUBLISHED, get_published_tables
from hf_v0init.compare.reading.fingerprints import check_fingerprints
from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.errors import InputError

ZEROS = make_entry("zeros", "none", 1e-3, 1)
DATA_DRIVEN = make_entry("data_driven 1", "none", 1e-3, 1)


def read_one(folder, entry=ZEROS, outcome=2.0, **kwargs):
    write_plan(folder, [entry])
    write_run(folder, entry, outcome, **kwargs)
    return read_comparison(folder).runs[0]


def test_a_finished_run_is_read(tmp_path):
    run = read_one(tmp_path, DATA_DRIVEN, 2.0)
    assert (run.state, run.final_loss, run.best_loss, run.num_steps) == (
        "finished",
        pytest.approx(2.0),
        pytest.approx(2.0),
        400,
    )
    assert run.eval_steps == [0, 100, 200, 300, 400] and run.eval_losses == pytest.approx(make_losses(2.0))
    assert run.train_steps == [100, 200, 300, 400]
    assert (run.start_loss, run.start_source) == (START, "evaluation")
    # 1,280 samples at an effective batch of 64; the clock has the pass of 3 s in it and no evaluations
    assert (run.v0_samples, run.v0_extra_steps, run.v0_seconds, run.train_seconds) == (1280, 20.0, 3.0, 43.0)
    assert run.eval_seconds == pytest.approx([0.0, 13.0, 23.0, 33.0, 43.0])
    assert run.is_counted and run.scored_loss == run.final_loss and run.problems == []


def test_zeros_costs_nothing_and_a_lost_report_is_not_known(tmp_path):
    run = read_one(tmp_path / "a", ZEROS)
    assert (run.v0_samples, run.v0_extra_steps, run.v0_seconds) == (0, 0.0, 0.0)
    write_plan(tmp_path / "b", [DATA_DRIVEN])
    write_run(tmp_path / "b", DATA_DRIVEN, 2.0)
    (tmp_path / "b" / "runs" / DATA_DRIVEN["name"] / "output" / "v0_init.json").unlink()
    run = read_comparison(tmp_path / "b").runs[0]
    assert (run.v0_samples, run.v0_extra_steps, run.v0_seconds) == (None, None, None)


def test_a_diverged_run_counts_with_the_loss_at_start(tmp_path):
    run = read_one(tmp_path, outcome="diverged")
    assert run.is_counted and run.scored_loss == START and math.isnan(run.final_loss)
    assert run.best_loss == pytest.approx(min(make_losses(5.0)[:-1]))


@pytest.mark.parametrize("loss", ["NaN", "Infinity"])
def test_a_run_that_finished_without_a_finite_loss_has_diverged(tmp_path, loss):
    write_plan(tmp_path, [ZEROS])
    write_run(tmp_path, ZEROS, 2.0)
    output = tmp_path / "runs" / ZEROS["name"] / "output"
    (output / "all_results.json").write_text(f'{{"eval_loss": {loss}}}')
    run = read_comparison(tmp_path).runs[0]
    assert run.state == "diverged" and run.scored_loss == START and "eval_loss" in run.reason


@pytest.mark.parametrize("state", ["failed", "running", "interrupted"])
def test_runs_without_an_outcome_do_not_count(tmp_path, state):
    run = read_one(tmp_path, outcome=state)
    assert run.state == state and not run.is_counted


def test_a_run_that_was_stopped_early_counts_with_its_last_loss(tmp_path):
    run = read_one(tmp_path, outcome="stopped_early", losses=[9.0, 8.5, 8.2])
    assert run.is_counted and run.scored_loss == 8.2


def test_a_run_that_has_not_started_is_pending(tmp_path):
    run = read_one(tmp_path, outcome=None)
    assert run.state == "pending" and not run.is_counted and run.eval_losses == []


def test_without_a_log_the_trainers_history_is_read(tmp_path):
    write_plan(tmp_path, [ZEROS])
    write_run(tmp_path, ZEROS, 2.0)
    output = tmp_path / "runs" / ZEROS["name"] / "output"
    (output / "run_log.jsonl").unlink()
    history = [
        {"step": 10, "loss": 7.0},
        {"step": 20, "loss": 6.0},
        {"step": 20, "eval_loss": 5.5},
        {"step": 20, "train_loss": 6.5},
    ]
    (output / "trainer_state.json").write_text(json.dumps({"global_step": 20, "log_history": history}))
    (output / "all_results.json").write_text('{"eval_loss": 5.25}')
    run = read_comparison(tmp_path).runs[0]
    assert (run.train_steps, run.train_losses) == ([10, 20], [7.0, 6.0])
    # the final evaluation, of averaged checkpoints for instance, stands for the end of the curve
    assert (run.eval_steps, run.eval_losses, run.final_loss) == ([20], [5.25], 5.25)
    assert (run.start_loss, run.start_source, run.train_seconds) == (7.0, "training", None)


def test_the_loss_at_start_is_that_of_the_seed_from_the_best_source(tmp_path):
    entries = [make_entry("zeros", "none", 1e-3, seed) for seed in (1, 2)] + [
        make_entry("zeros", "50", 1e-3, seed) for seed in (1, 2)
    ]
    write_plan(tmp_path, entries)
    for entry, first in zip(entries, (9.1, 9.2, 9.1, 9.2), strict=True):
        write_run(tmp_path, entry, 2.0, losses=[first, 5.0, 2.0])
    log = tmp_path / "runs" / entries[0]["name"] / "output" / "run_log.jsonl"
    log.write_text("\n".join(log.read_text().splitlines()[1:]) + "\n")  # this run made no evaluation at step 0
    runs = read_comparison(tmp_path).runs
    assert [run.start_loss for run in runs] == [9.1, 9.2, 9.1, 9.2]


def test_damage_is_named_and_the_rest_read(tmp_path):
    write_plan(tmp_path, [ZEROS, DATA_DRIVEN])
    write_run(tmp_path, ZEROS, 2.0), write_run(tmp_path, DATA_DRIVEN, 2.0)
    output = tmp_path / "runs" / ZEROS["name"] / "output"
    log = (output / "run_log.jsonl").read_text()
    (output / "run_log.jsonl").write_text(
        "{broken\n" + log + '{"eval_loss": 1.9, "st'
    )  # the last line of a killed run is no damage
    (output / "fingerprint.json").write_text("[1, 2")
    (tmp_path / "runs" / DATA_DRIVEN["name"] / "output" / "v0_init.json").write_text("{")
    one, other = read_comparison(tmp_path).runs
    assert one.eval_losses == pytest.approx(make_losses(2.0)) and one.fingerprint is None
    assert len(one.problems) == 2 and "line 1" in one.problems[0] and "fingerprint.json" in one.problems[1]
    assert other.v0_extra_steps is None and "v0_init.json" in other.problems[0]


@pytest.mark.parametrize("content", [None, "{", "[]", '{"runs": [{"name": "a"}]}'])
def test_a_folder_without_a_whole_plan_is_refused(tmp_path, content):
    if content is not None:
        (tmp_path / "plan.json").write_text(content)
    with pytest.raises(InputError, match=r"no comparison there.*--output_dir"):
        read_comparison(tmp_path)


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_runs_that_began_alike_pass(tmp_path):
    check = check_fingerprints(read_comparison(write_grid(tmp_path, lambda *_: 2.0)).runs)
    assert (check.num_checked, check.violations, check.expected, check.unchecked) == (9, [], [], [])


@pytest.mark.parametrize(
    ("part", "value", "words"),
    [
        ("initial_weights", "other", "initial weights"),
        ("batches", ["b10", "b11", "swapped", "b13"], "first batches"),
        ("rng", "other", "dropout"),
    ],
)
def test_a_run_that_began_otherwise_is_named(tmp_path, part, value, words):
    entries = [make_entry("zeros", warmup, 1e-3, seed) for seed in (1, 2) for warmup in ("none", "50", "100")]
    write_plan(tmp_path, entries)
    usual = {"initial_weights": "w1", "batches": ["b10", "b11", "b12", "b13"], "rng": "r1"}
    for i, entry in enumerate(entries):
        write_run(tmp_path, entry, 2.0, fingerprint=usual | {part: value} if i == 1 else None)
    check = check_fingerprints(read_comparison(tmp_path).runs)
    assert len(check.violations) == 1 and check.seeds == {1}
    assert "seed 1" in check.violations[0] and words in check.violations[0] and "1 of 3" in check.violations[0]
    assert entries[1]["name"] in check.violations[0] and entries[0]["name"] not in check.violations[0]


def test_fewer_batches_of_a_short_run_are_no_difference(tmp_path):
    entries = [make_entry("zeros", warmup, 1e-3, 1) for warmup in ("none", "50")]
    write_plan(tmp_path, entries)
    write_run(
        tmp_path, entries[0], "diverged", fingerprint={"initial_weights": "w1", "batches": ["b10", "b11"], "rng": "r1"}
    )
    write_run(tmp_path, entries[1], 2.0)
    assert check_fingerprints(read_comparison(tmp_path).runs).violations == []


def test_another_model_is_expected_to_differ_and_another_optimizer_is_not(tmp_path):
    other = {"initial_weights": "wide", "batches": [f"b1{i}" for i in range(4)], "rng": "wide"}
    entries = [
        make_entry("zeros", "none", 1e-3, 1),
        make_entry("zeros", "none", 1e-3, 1, other={"config_overrides": "d_model=64,x=2"}),
    ]
    write_plan(tmp_path, entries)
    write_run(tmp_path, entries[0], 2.0), write_run(tmp_path, entries[1], 2.0, fingerprint=other)
    check = check_fingerprints(read_comparison(tmp_path).runs)
    assert check.violations == [] and len(check.expected) == 1 and "config_overrides" in check.expected[0]
    folder = tmp_path / "beta"
    entries = [make_entry("zeros", "none", 1e-3, 1), make_entry("zeros", "none", 1e-3, 1, other={"adam_beta2": 0.98})]
    write_plan(folder, entries)
    write_run(folder, entries[0], 2.0), write_run(folder, entries[1], 2.0, fingerprint=other)
    check = check_fingerprints(read_comparison(folder).runs)
    assert len(check.violations) == 2 and check.expected == []  # weights and random state


def test_runs_without_a_fingerprint_are_listed(tmp_path):
    write_plan(tmp_path, [ZEROS])
    write_run(tmp_path, ZEROS, 2.0)
    (tmp_path / "runs" / ZEROS["name"] / "output" / "fingerprint.json").unlink()
    assert check_fingerprints(read_comparison(tmp_path).runs).unchecked == [ZEROS["name"]]


# ------------------------------------------------------------------------------------------------------- the paper's tables


def test_published_tables_hold_the_papers_figures():
    table_12, table_6 = get_published_tables(["table_12", "table_6"])
    assert table_12.rows["with warmup"] == (30.14, 33.71, 33.64) and table_12.rows["without warmup"][0] == "<10"
    assert dict(zip(table_6.columns, table_6.rows["data_driven"], strict=True))["1"] == 96.02
    for table in PUBLISHED.values():
        assert all(len(row) == len(table.columns) for row in table.rows.values()), table.label
    # no v0 without a second moment
    assert all(t.rows["SGD"][1:] == (None, None) for t in PUBLISHED.values() if "SGD" in t.rows)


def test_an_unknown_published_table_is_refused():
    with pytest.raises(InputError, match=r"published=table_7.*table_12"):
        get_published_tables(["table_7"])
