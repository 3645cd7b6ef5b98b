"""The runs of a comparison: started in order, some at a time, judged by what they leave, not repeated."""

import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from comparison_fakes import FAKE_SCRIPT, Comparison, behave, is_alive, make_call, wait_until, write_checkpoint

from hf_v0init.compare import process as process_module
from hf_v0init.compare.executor import lock_plan
from hf_v0init.compare.launch import count_cores, make_environment
from hf_v0init.compare.process import LossTrace, RunProcess, find_error_line, judge_output
from hf_v0init.compare.report import write_report
from hf_v0init.compare.results import read_comparison
from hf_v0init.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path)


# --------------------------------------------------------------------------------------------- order, jobs, records


def test_runs_go_in_order_and_leave_what_they_were_made_with(comparison):
    grids = [{"v0": ["zeros", "random 100"], "warmup": ["none", 5], "seed": [1, 2]}]
    told = comparison.write(grids, {"learning_rate": 0.5}).run()
    order = [(e["v0"], e["warmup"], e["seed"]) for e in comparison.read_journal()]
    assert order == [(v0, w, s) for s in "12" for v0 in ("zeros", "random") for w in "05"]
    assert told.most_active == 1 and not told.warnings
    assert [end[2] for end in told.ends] == ["finished"] * 8
    assert not any(entry["folder"] for entry in comparison.read_journal())  # the output folder is the script's to make

    record = comparison.read_records()["random 100 + warmup 5 2"]
    folder = comparison.folder / "runs" / record["name"]
    plan = json.loads((comparison.folder / "plan.json").read_text())
    entry = next(run for run in plan["runs"] if run["name"] == record["name"])
    assert entry.items() <= record.items()
    assert (record["state"], record["reason"], record["exit_status"]) == ("finished", None, 0)
    assert record["command"][:2] == [sys.executable, str(comparison.root / "fake.py")]
    assert {f"--output_dir={folder}/output", "--v0_record_run=true", "--v0_scale=100.0", "--seed=2"} <= set(
        record["command"]
    )
    assert record["host"] == platform.node()
    assert record["versions"]["torch"] and record["hardware"]["cores"] == os.cpu_count() and record["seconds"] > 0
    assert (folder / "log.txt").read_text() == "done\n" and "pid" not in record


def test_jobs_run_side_by_side_with_their_share_of_the_cores(comparison, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    told = comparison.write([{"seed": [1, 2, 3, 4, 5, 6]}], {"pause": 0.1}).run(jobs=3, devices=("4", "7"))
    assert told.most_active == 3
    environments = [entry["env"] for entry in comparison.read_journal()]
    assert {e["OMP_NUM_THREADS"] for e in environments} == {str(max(1, count_cores() // 3))}
    assert {e["TOKENIZERS_PARALLELISM"] for e in environments} == {"false"}
    assert {e["CUDA_VISIBLE_DEVICES"] for e in environments} == {"4", "7"}
    hardware = comparison.read_records()["no warmup 1"]["hardware"]
    assert hardware["jobs"] == 3 and hardware["CUDA_VISIBLE_DEVICES"] == "4"


def test_threads_and_devices_that_are_the_user_s_or_the_launcher_s(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2")
    environment = make_environment("python", {}, jobs=2, slot=1)
    assert (environment["OMP_NUM_THREADS"], environment["CUDA_VISIBLE_DEVICES"]) == ("5", "2")
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    environment = make_environment("accelerate launch --num_processes 2", {}, jobs=2, slot=1)
    assert "OMP_NUM_THREADS" not in environment and environment["CUDA_VISIBLE_DEVICES"] == "0,1"


# ------------------------------------------------------------------------------------------------- how a run ends


@pytest.mark.parametrize(
    ("behaviour", "losses", "state", "reason"),
    [
        ("", "6,4,3", "finished", None),
        ("", "6,4,6", "finished", None),  # at the start's loss is not above it
        ("", "6,4,7", "diverged", "the final validation loss, 7, is above that at the start, 6"),
        ("no_eval_on_start", "6,4,5.5", "finished", None),
        ("no_eval_on_start", "6,4,4.5", "finished", None),
        ("nan", "6,4,3", "diverged", "the training loss is nan at step 10"),
        ("", "6,inf,3", "diverged", "the validation loss is inf at step 10"),
        ("fail", "6,4,3", "failed", "RuntimeError: the data are gone"),
        ("killed", "6,4,3", "failed", "ended by SIGKILL, out of memory?; last line: "),
        ("refuse", "6,4,3", "failed", "error: --behaviour=refuse: choose another"),
        ("no_metric", "6,4,3", "failed", "the script ended well but left no eval_loss, neither in all_results.json nor in its log (nothing was evaluated: set eval_strategy, or call trainer.evaluate())"),
        ("plain_evaluate", "6,4,3", "finished", None),  # the metric is in the log alone
        ("plain_evaluate", "6,4,7", "diverged", "the final validation loss, 7, is above that at the start, 6"),
    ],
)  # fmt: skip
def test_states_and_reasons(comparison, behaviour, losses, state, reason):
    good, judged = {"losses": "6,5,4", "behaviour": "good"}, {"losses": losses, "behaviour": behaviour or "plain"}
    grids = [{key: [value] for key, value in one.items()} for one in (good, judged)]
    told = comparison.write(grids).run()
    assert told.ends[0][2:] == ("finished", None)
    assert told.ends[1][2:] == (state, reason)
    record = list(comparison.read_records().values())
    assert sorted(r["state"] for r in record) == sorted(["finished", state])


def test_a_run_whose_loss_is_no_number_is_stopped_and_diverged(comparison):
    began = time.monotonic()
    told = comparison.write(behave("nan"), {"losses": "6,4,wait,3"}).run()
    assert told.ends[0][2:] == ("diverged", "the training loss is nan at step 10")
    assert time.monotonic() - began < 50  # it would have gone on for 60 seconds
    assert comparison.read_records()["behaviour=nan 42"]["exit_status"] == -signal.SIGINT


def test_a_run_that_has_ended_well_before_it_is_told_to_stop_is_finished(tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "all_results.json").write_text('{"eval_loss": 1.0, "loss": null}')
    process = subprocess.Popen([sys.executable, "-c", ""], start_new_session=True)
    process.wait()
    run = RunProcess(None, tmp_path, process, slot=0, record={"state": "running"}, started=time.monotonic())
    run.stop("interrupted", "the comparison was stopped")
    assert run.write_end(SimpleNamespace(metric="eval_loss", keep_models=True)) == "finished"


def test_a_stubborn_run_is_killed_after_the_grace_period(comparison, monkeypatch):
    monkeypatch.setattr(process_module, "GRACE_SECONDS", 0.3)
    told = comparison.write(behave("nan"), {"losses": "6,4,wait,3", "stubborn": True}).run()
    assert told.ends[0][2:] == ("diverged", "the training loss is nan at step 10")
    assert comparison.read_records()["behaviour=nan 42"]["exit_status"] == -signal.SIGKILL
    worker = int((comparison.root / "journal.worker").read_text())  # of a session of its own, as launchers start theirs
    wait_until(lambda: not is_alive(worker))


def test_models_are_removed_only_if_asked(comparison):
    for keep, left in ((True, {"model.safetensors", "checkpoint-10"}), (False, set())):
        comparison.folder = comparison.root / str(keep)
        comparison.write(behave("save"), keep_models=keep).run()
        (record,) = comparison.read_records().values()
        found = {path.name for path in (comparison.folder / "runs" / record["name"] / "output").iterdir()}
        kept = {
            "all_results.json",
            "run_log.jsonl",
            "fingerprint.json",
            "config.json",
            "v0_init.json",
            "tokenizer.json",
        }
        assert found == kept | left and record.get("models_removed", False) is not keep


def test_the_line_that_explains_a_failure(tmp_path):
    log = tmp_path / "log.txt"
    log.write_text("Traceback\n  File x\ntorch.OutOfMemoryError: CUDA out of memory\n\nE1124 launcher: child failed\n")
    assert find_error_line(log) == "torch.OutOfMemoryError: CUDA out of memory"
    log.write_text("loading\nerror: --x=3: unknown; remedy\n")
    assert find_error_line(log) == "error: --x=3: unknown; remedy"
    log.write_text(
        "error: --x=3: unknown; remedy\nerror: --x=3: unknown; remedy (process 1)\nTraceback\n  raise ChildFailedError(\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n==\nrun_clm.py FAILED\n"
    )
    assert find_error_line(log) == "error: --x=3: unknown; remedy"
    log.write_text(
        "[rank1]: ValueError: odd\nsubprocess.CalledProcessError: Command returned non-zero exit status 1.\n"
    )
    assert find_error_line(log) == "ValueError: odd"
    log.write_text("loading\nlast words\n\n")
    assert find_error_line(log) == "last words"
    assert find_error_line(tmp_path / "none") == ""


def test_a_run_without_a_run_log_is_judged_by_the_trainer_s_state(tmp_path):
    def judge(history, **results):
        (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": history}))
        (tmp_path / "all_results.json").write_text(json.dumps(results))
        return judge_output(tmp_path, "eval_loss")[0]

    assert judge([{"loss": 5.0, "step": 1}, {"eval_loss": 4.0, "step": 2}], eval_loss=4.0) == "finished"
    # A training loss is no measure of a validation loss; one of step 0 is.
    assert judge([{"loss": 2.9, "step": 1}, {"eval_loss": 3.5, "step": 2}], eval_loss=3.5) == "finished"
    assert judge([{"eval_loss": 5.0, "step": 0}, {"eval_loss": 4.0, "step": 2}], eval_loss=5.1) == "diverged"
    assert judge([{"loss": 5.0, "step": 1}, {"loss": None, "step": 2}], eval_loss=4.0) == "diverged"
    assert judge([{"loss": 5.0, "step": 1}], eval_loss=float("nan")) == "diverged"
    assert judge([], eval_loss=5.0) == "finished"


def test_the_log_is_read_as_it_grows(tmp_path):
    path, trace = tmp_path / "run_log.jsonl", LossTrace()
    trace.read_new(path)
    assert not trace.has_logged
    path.write_text('{"loss": 5.5, "step": 1, "epoch": 0.1}\n{"eval_loss": 5.0, "st')
    trace.read_new(path)
    assert trace.has_logged and (trace.step, trace.train_loss, trace.eval_loss) == (1, 5.5, None)
    with path.open("a") as file:
        file.write('ep": 2, "epoch": 0.2}\nnonsense\n{"train_runtime": 3.0, "step": 2}\n')
    trace.read_new(path)
    assert (trace.step, trace.epoch, trace.eval_loss, trace.start_loss) == (2, 0.2, 5.0, None)


# --------------------------------------------------------------------------------------------- continue and change


def test_a_second_call_repeats_nothing_and_retry_repeats_what_failed(comparison):
    comparison.write(behave("plain", "fail", "nan")).run()
    assert sorted(comparison.read_states().values()) == ["diverged", "failed", "finished"]
    assert comparison.run().ends == [] and len(comparison.read_journal()) == 3
    told = comparison.run(retry_failed=True)
    assert [end[0] for end in told.ends] == ["behaviour=fail"] and len(comparison.read_journal()) == 4


def test_a_plan_that_grows_shrinks_or_renames_keeps_its_results(comparison):
    comparison.write([{"v0": ["zeros", "data_driven 10"]}]).run()
    ours = {"name": "ours", "v0_init": "data_driven", "v0_scale": 10, "v0_decay": "beta2"}
    comparison.write([{"v0": ["random", ours, "zeros"]}])
    assert [end[0] for end in comparison.run().ends] == ["random"]
    runs = read_comparison(comparison.folder).runs.set_index("setting")
    assert dict(runs["state"]) == {"no warmup": "finished", "ours": "finished", "random": "finished"}
    assert runs.loc["ours", "v0"] == "ours" and runs.loc["ours", "final_loss"] == 3.0
    comparison.write([{"v0": ["random"]}])
    assert comparison.run().ends == [] and len(comparison.read_states()) == 3
    # A changed common argument makes other runs of all of them; the old ones stay.
    comparison.write([{"v0": ["random"]}], {"weight_decay": 0.1})
    assert [end[0] for end in comparison.run().ends] == ["random"]
    assert len(list(comparison.folder.glob("runs/*"))) == 4


def test_folders_of_something_else_are_refused_and_left_alone(comparison):
    comparison.write(behave("plain"))
    comparison.folder.mkdir()
    (comparison.folder / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no comparison"):
        comparison.run()
    assert [path.name for path in comparison.folder.iterdir()] == ["notes.txt"]
    for place in (Path("/proc/compare"), comparison.folder / "notes.txt"):
        with pytest.raises(InputError, match="cannot be written"), lock_plan(place):
            pass


def test_a_run_that_was_cut_off_starts_anew_in_an_emptied_folder(comparison):
    comparison.write(behave("plain")).run()
    (record,) = comparison.read_records().values()
    folder = comparison.folder / "runs" / record["name"]
    for state in ("running", "interrupted"):
        (folder / "record.json").write_text(json.dumps({**record, "state": state}))
        (folder / "output" / "left.txt").write_text("half")
        assert len(comparison.run().ends) == 1
        assert not (folder / "output" / "left.txt").exists() and comparison.read_states() == {
            "behaviour=plain 42": "finished"
        }


@pytest.mark.parametrize("state", ["running", "interrupted"])
def test_a_run_that_was_cut_off_goes_on_from_its_newest_whole_checkpoint_if_asked(comparison, state):
    comparison.write(behave("plain")).run()
    (record,) = comparison.read_records().values()
    folder = comparison.folder / "runs" / record["name"]
    (folder / "record.json").write_text(json.dumps({**record, "state": state, "seconds": 1000.0}))
    (folder / "log.txt").write_text("before\n")
    newest = write_checkpoint(folder / "output", 20)
    write_checkpoint(folder / "output", 10)
    write_checkpoint(folder / "output", 30, "trainer_state.json")  # its save was cut off
    write_checkpoint(folder / "output", 40, "optimizer.pt", "scheduler.pt")  # a model only: the run would be another
    assert len(comparison.run(resume=True).ends) == 1
    assert comparison.read_journal()[-1]["checkpoint"] == str(newest) and comparison.read_journal()[-1]["folder"]
    (record,) = comparison.read_records().values()
    assert record["state"] == "finished" and record["resumed_from"] == ["checkpoint-20"] and record["seconds"] > 1000.0
    assert (folder / "log.txt").read_text() == "before\ndone\n" and newest.exists()
    assert "resume_from_checkpoint" not in record["arguments"]


def test_a_run_with_nothing_to_go_on_from_starts_anew(comparison):
    comparison.write(behave("plain")).run()
    (record,) = comparison.read_records().values()
    folder = comparison.folder / "runs" / record["name"]
    for left_out in (("trainer_state.json",), ("optimizer.pt", "scheduler.pt")):
        (folder / "record.json").write_text(json.dumps({**record, "state": "interrupted"}))
        write_checkpoint(folder / "output", 20, *left_out)
        comparison.run(resume=True)
        last = comparison.read_journal()[-1]
        assert last["checkpoint"] is None and not last["folder"]
        assert "resumed_from" not in next(iter(comparison.read_records().values()))


def test_a_log_that_a_continued_run_has_cut_back_is_read_from_its_start(tmp_path):
    path, trace = tmp_path / "run_log.jsonl", LossTrace()
    lines = [json.dumps({"eval_loss": 9.0 - step, "step": step}) + "\n" for step in range(5)]
    for text in ("".join(lines), "".join(lines[:3]), "".join(lines) + json.dumps({"eval_loss": 2.5, "step": 5}) + "\n"):
        path.write_text(text)
        trace.read_new(path)
    assert (trace.start_loss, trace.eval_loss, trace.step) == (9.0, 2.5, 5)


@pytest.mark.slow
def test_a_continued_run_ends_as_the_straight_one_bit_for_bit(tmp_path):
    """The script of the tiny comparison, cut off after its second of three checkpoints."""
    config = tmp_path / "grid.yaml"
    content = yaml.safe_load((ROOT / "configs" / "compare" / "tiny.yaml").read_text())
    content["arguments"] |= {"save_strategy": "steps", "save_steps": 10, "eval_on_start": True}
    config.write_text(yaml.safe_dump(content | {"confirm_seeds": 0, "grids": [{"v0": ["data_driven 1"], "seed": [1]}]}))
    command = make_call(config, tmp_path / "out")
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    (folder,) = (tmp_path / "out" / "runs").iterdir()
    output, record = folder / "output", json.loads((folder / "record.json").read_text())

    def read():
        log = [json.loads(line) for line in (output / "run_log.jsonl").read_text().splitlines()]
        losses = [(e["step"], e.get("loss"), e.get("eval_loss")) for e in log if "loss" in e or "eval_loss" in e]
        results = json.loads((output / "all_results.json").read_text())
        return set(losses), {k: results[k] for k in ("eval_loss", "predict_bleu", "predict_loss")}

    straight, fingerprint = read(), (output / "fingerprint.json").read_text()
    (folder / "record.json").write_text(json.dumps(record | {"state": "interrupted"}))
    for name in ("all_results.json", "model.safetensors", "trainer_state.json"):
        (output / name).unlink()
    shutil.rmtree(output / "checkpoint-30")
    log = (output / "run_log.jsonl").read_text().splitlines(keepends=True)
    cut = [line for line in log if json.loads(line)["step"] <= 25]
    (output / "run_log.jsonl").write_text("".join(cut) + log[-1][:20])
    subprocess.run([*command, "--resume_runs"], cwd=ROOT, check=True, capture_output=True)
    record = json.loads((folder / "record.json").read_text())
    assert (record["state"], record["resumed_from"]) == ("finished", ["checkpoint-20"])
    assert read() == straight and (output / "fingerprint.json").read_text() == fingerprint
    comparison = read_comparison(tmp_path / "out")
    assert list(comparison.evaluations["step"]) == [0, 10, 20, 30] and comparison.runs.iloc[0]["train_seconds"] > 0


# ---------------------------------------------------------------------------------------------- bad input, hopeless


@pytest.mark.parametrize("keep_models", [True, False])
def test_a_refused_first_run_stops_everything_and_is_tried_again(comparison, keep_models):
    comparison.write([{"seed": [1, 2, 3]}], {"behaviour": "refuse"}, keep_models=keep_models)
    with pytest.raises(
        InputError, match=r"the first run failed: --behaviour=refuse: choose another \(log: .*log.txt\)"
    ):
        comparison.run()
    assert len(comparison.read_journal()) == 1 and comparison.read_states() == {"no warmup 1": "interrupted"}
    with pytest.raises(InputError):
        comparison.run(jobs=3)
    assert set(comparison.read_states().values()) == {"interrupted"}
    # The script is mended: nothing has to be said to try the same runs again.
    script = comparison.root / "fake.py"
    script.write_text(FAKE_SCRIPT.replace('if behaviour == "refuse"', "if False"))
    assert [end[2] for end in comparison.run().ends] == ["finished"] * 3


@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize(
    ("exchange", "words"),
    [
        ({}, "the first run failed: ValueError: Some specified arguments are not used by the HfArgumentParser"),
        ({"raise ValueError(": "import argparse; argparse.ArgumentParser(prog='my.py').error("}, "the first run failed: my.py: error: Some specified"),
        ({"raise ValueError(": "sys.exit("}, "the first run failed: Some specified"),
    ],
    ids=["HfArgumentParser", "argparse", "sys.exit"],
)  # fmt: skip
def test_a_wrong_flag_is_found_by_one_start(comparison, exchange, words, jobs):
    text = FAKE_SCRIPT
    for old, new in exchange.items():
        text = text.replace(old, new)
    (comparison.root / "fake.py").write_text(text)
    comparison.write([{"seed": list(range(20))}], {"behaviour": "no_start"})
    with pytest.raises(InputError, match=re.escape(words)):
        comparison.run(jobs=jobs)
    assert len(comparison.read_journal()) == 1 and comparison.read_states() == {"no warmup 0": "interrupted"}


def test_a_later_run_that_fails_before_its_first_step_is_that_run_s_failure(comparison):
    told = comparison.write(behave("plain", "no_start", "good")).run(jobs=2)
    assert sorted(end[2] for end in told.ends) == ["failed", "finished", "finished"]


def test_a_first_run_without_the_metric_stops_everything(comparison):
    with pytest.raises(InputError, match=r"left no eval_perplexity, .* \(eval_loss\)"):
        comparison.write([{"seed": [1, 2]}], metric="eval_perplexity").run()
    assert len(comparison.read_journal()) == 1


def test_a_later_refusal_is_that_run_s_failure(comparison):
    told = comparison.write(behave("plain", "refuse", "good")).run()
    assert [end[2] for end in told.ends] == ["finished", "failed", "finished"]
    comparison.folder = comparison.root / "second"
    comparison.write(behave("plain")).run()
    told = comparison.write(behave("refuse", "plain", "good")).run()  # the first of this call, but a run has ended well
    assert [end[2] for end in told.ends] == ["failed", "finished"]


# --------------------------------------------------------------------------------------------------------- secrets


def test_a_secret_reaches_the_script_and_nothing_that_is_written(comparison):
    secret = "hf_" + "s3cret" * 4
    kwargs = {"api_key": secret + "3", "more": [{"access_key": secret + "4"}]}
    arguments = {"hub_token": secret, "db_password": secret + "2", "lr_scheduler_kwargs": kwargs}
    comparison.write([{"v0": ["zeros", "random"]}], arguments, slurm={"additional_parameters": {"db_token": secret}})
    assert [end[2] for end in comparison.run().ends] == ["finished"] * 2
    assert {entry["secret"] for entry in comparison.read_journal()} == {secret}
    (comparison.root / "journal").unlink()
    write_report(comparison.folder, summary_dir=comparison.folder / "copy")
    written = [path for path in comparison.folder.rglob("*") if path.is_file()]
    assert {"plan.json", "record.json", "report.md", "report.html", "results.csv"} <= {path.name for path in written}
    assert not [path for path in written if secret in path.read_text(errors="replace")]
    plan = json.loads((comparison.folder / "plan.json").read_text())
    assert plan["arguments"]["hub_token"] == plan["arguments"]["db_password"] == "***"
    assert plan["arguments"]["lr_scheduler_kwargs"] == {"api_key": "***", "more": [{"access_key": "***"}]}
    command = next(iter(comparison.read_records().values()))["command"]
    assert "hf_v0init.compare.start_script" in command and not [word for word in command if "token" in word]
    # Another token is the same run.
    comparison.write([{"v0": ["zeros", "random"]}], {**arguments, "hub_token": "hf_other"})
    assert comparison.run().ends == []


# ---------------------------------------------------------------------------------------------------------- stages


def test_the_best_of_each_family_is_trained_again_on_fresh_seeds(comparison):
    """Its stage 1 chooses `good` of v0 and 1e-3 of the baseline; nothing is started twice."""
    settings = [{"name": n, "v0_init": "random", "losses": of} for n, of in (("bad", "6,5,4"), ("good", "6,5,3"))]
    grids = [{"v0": settings, "seed": [7]}, {"learning_rate": [1e-3, 1e-2], "seed": [7]}]
    comparison.write(grids, confirm_seeds=2)
    told = comparison.run(jobs=2)
    confirmed = [(end[0], end[1]) for end in told.ends[4:]]
    assert sorted(confirmed) == [("good", 8), ("good", 9), ("no warmup", 8), ("no warmup", 9)]
    plan = json.loads((comparison.folder / "plan.json").read_text())
    stages = [(run["stage"], run["seed"]) for run in plan["runs"]]
    assert stages == [("tune", 7)] * 4 + [("confirm", seed) for seed in (8, 8, 9, 9)]
    assert comparison.run().ends == [] and len(comparison.read_journal()) == 8
    # A grid that grows by something better is confirmed anew; what was confirmed before stays in the folder.
    settings.append({"name": "best", "v0_init": "random", "losses": "6,5,2"})
    told = comparison.write(grids, confirm_seeds=2).run()
    assert [(end[0], end[1]) for end in told.ends] == [("best", 7), ("best", 8), ("best", 9)]


def test_a_setting_that_failed_is_not_chosen(comparison):
    settings = [{"name": "a", "v0_init": "random", "behaviour": "plain"}]
    settings.append({"name": "b", "v0_init": "random", "behaviour": "fail", "losses": "6,2,1"})
    comparison.write([{"v0": settings}], confirm_seeds=[5]).run()
    assert comparison.read_states() == {"a 42": "finished", "b 42": "failed", "a 5": "finished"}


def test_an_optimum_at_an_edge_extends_its_axis_before_the_second_stage(comparison):
    """The fake's loss falls with the rate up to 8e-3; the grid ends at 2e-3, by a factor of 2."""
    losses = '("6,5,%g" % (4 - min(rate, 8e-3) + 10 * max(0, rate - 8e-3)))'
    script = FAKE_SCRIPT.replace('flags.get("losses", "6,4,3")', losses)
    script = script.replace("output, behaviour =", 'rate = float(flags["learning_rate"])\noutput, behaviour =')
    (comparison.root / "fake.py").write_text(script)
    grids = [{"learning_rate": [1e-3, 2e-3]}]
    comparison.write(grids, confirm_seeds=1, extend=True).run()
    rates = [entry["rate"] for entry in comparison.read_journal()]
    assert rates == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3, 8e-3]  # inside at last; the last is the confirmation
    comparison.folder = comparison.root / "second"
    comparison.write(grids, confirm_seeds=1).run()
    assert [entry["rate"] for entry in comparison.read_journal()][6:] == [1e-3, 2e-3, 2e-3]


def test_a_length_at_an_edge_is_extended_and_named(comparison):
    """The fake's loss falls with the warmup up to 20 steps; the grid ends at 10, by a factor of 2."""
    script = FAKE_SCRIPT.replace(
        'flags.get("losses", "6,4,3")', '("60,50,%g" % (3 + abs(int(flags["warmup_steps"]) - 20)))'
    )
    (comparison.root / "fake.py").write_text(script)
    comparison.write([{"warmup": [5, 10]}], {"max_steps": 100}, confirm_seeds=1, extend=True).run()
    assert [int(entry["warmup"]) for entry in comparison.read_journal()] == [5, 10, 20, 40, 20]
    confirmed = [run for run in read_comparison(comparison.folder).plan["runs"] if run["stage"] == "confirm"]
    assert [run["setting"] for run in confirmed] == ["warmup 10 (warmup_steps=20)"]
