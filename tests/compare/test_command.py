"""`hf-v0init compare` as a user calls it: what it prints, Ctrl-C and going on, two at once, the tiny comparison end to end."""

import io
import json
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest
import yaml
from command_line import Done, run_command as run_in_process
from comparison_fakes import FAKE_SCRIPT, Comparison, behave, is_alive, make_call, move_to_another_machine, wait_until
from rich.console import Console

from hf_v0init.compare import executor as executor_module
from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.compare.executor import LocalExecutor, lock_plan, make_lease
from hf_v0init.compare.progress import ProgressDisplay
from hf_v0init.compare.summary import format_seconds

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path)


def start_command(comparison, *options) -> subprocess.Popen:
    """Start `hf-v0init compare` as a user does; the report is replaced by a file that says it was written."""
    program = textwrap.dedent("""
        import sys, types
        report = types.ModuleType("hf_v0init.compare.report")
        def write_report(folder):
            (folder / "report.html").write_text("reported")
            return folder / "report.html"
        report.write_report, report.read_conclusion = write_report, lambda folder: "CONCLUSION"
        sys.modules["hf_v0init.compare.report"] = report
        from hf_v0init.cli.main import main
        main()
    """)
    words = [sys.executable, "-c", program, *make_call(comparison.config, comparison.folder, *options)[3:]]
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def run_command(comparison, *options) -> tuple[int, str, str]:
    process = start_command(comparison, *options)
    out, err = process.communicate(timeout=240)
    return process.returncode, out, err


def count_ready(comparison) -> int:
    return len(list(comparison.root.glob("journal.ready.*")))


def test_the_command_prints_rules_progress_and_report(comparison):
    comparison.write(behave("plain", "fail"), test_metrics=["predict_bleu"], keep_models=False)
    code, out, err = run_command(comparison, "--jobs", "2")
    assert (code, err) == (0, "")
    for words in ("Fake\n", "2 runs.", "Runs at a time: 2.", "CONCLUSION", "[2/2] ", "failed, step 20, validation loss 3.000",
        "RuntimeError: the data are gone", "1 finished, 1 failed.", f"Report: {comparison.folder}/report.html"):  # fmt: skip
        assert words in out, out
    assert (comparison.folder / "report.html").read_text() == "reported"


def call_command(comparison, *options) -> Done:
    """Call `hf-v0init compare` inside this process."""
    return run_in_process("compare", comparison.config, "--output_dir", comparison.folder, *options)


def test_a_dry_run_lists_the_runs_and_starts_none(comparison):
    comparison.write([{"v0": ["zeros", "random"], "seed": [1, 2]}])
    done = call_command(comparison, "--dry_run")
    out = done.stdout
    assert (
        (done.returncode, done.stderr) == (0, "")
        and "4 runs. The first:" in out
        and "--v0_init=zeros" in out
        and "random" in out
    )
    assert "The script's flags were not checked: it uses neither HfArgumentParser nor argparse." in out
    assert not comparison.folder.exists() and comparison.read_journal() == []


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--jobs", "0"), "--jobs"),
        (("--job", "2"), "--job"),
        (("--jobs", "x"), "--jobs"),
        (("--launcher", "pbs"), "'pbs' is not one of 'local', 'submitit', 'slurm'"),
        (("--launcher", "slurm", "--jobs", "2"), "jobs and devices are for runs of this call; with launcher=slurm"),
        (("--run", "plain"), "run=plain: the plan has no such run"),
    ],
)
def test_bad_options_are_one_line_and_status_2(comparison, options, words):
    done = call_command(comparison.write(behave("plain")), *options)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ") and words in done.stderr and done.stderr.count("\n") == 1
    assert not comparison.folder.exists()


def test_the_command_lines_for_another_scheduler_train_the_runs_from_anywhere(tmp_path, monkeypatch):
    """Their folder has a blank in its name, and the file's own paths begin where the lines were made."""
    place = tmp_path / "with a blank"
    place.mkdir()
    comparison = Comparison(place).write(behave("plain", "good", "fail", "third"), {"pause": 0.05})
    comparison.config, comparison.folder = Path("grid.yaml"), Path("out")
    program = make_call("grid.yaml", "out", "--list_commands")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    done = subprocess.run(program, cwd=place, capture_output=True, text=True)
    monkeypatch.chdir(place)
    lines = done.stdout.splitlines()
    words = [shlex.split(line) for line in lines]
    names = [run.name for run in read_plan(comparison.config).runs]
    assert (done.returncode, done.stderr) == (0, "") and [line[line.index("--run") + 1] for line in words] == names
    assert all(line[:3] == ["cd", str(place), "&&"] and "--resume_runs" in line for line in words)
    assert not comparison.folder.exists()
    # All at once, as a scheduler would, from another directory; the first command of a new folder writes the plan.
    options = {"cwd": "/", "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    processes = [subprocess.Popen(["sh", "-c", line], **options) for line in lines[:3]]
    ended = [process.communicate(timeout=240) for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 1] and [err for _, err in ended] == [""] * 3
    assert sorted(comparison.read_states().values()) == ["failed", "finished", "finished"]
    assert all("[1/1] " in out and " 0 runs" not in out for out, _ in ended)
    assert not (comparison.folder / "report.html").exists()
    assert subprocess.run(program, capture_output=True, text=True).stdout.splitlines() == [lines[3]]
    assert len(comparison.read_journal()) == 3


def test_a_failed_run_is_tried_again_by_its_name_and_no_other(comparison):
    comparison.write(behave("plain", "fail", "refuse")).run()
    (name,) = [run.name for run in read_plan(comparison.config).runs if "fail" in run.name]
    (comparison.root / "fake.py").write_text(FAKE_SCRIPT.replace('if behaviour == "fail"', "if False"))
    assert call_command(comparison, "--run", name).returncode == 1 and len(comparison.read_journal()) == 3
    done = call_command(comparison, "--run", name, "--retry_failed")
    assert done.returncode == 0 and f"{name}: finished." in done.stdout
    states = {"behaviour=plain 42": "finished", "behaviour=fail 42": "finished", "behaviour=refuse 42": "failed"}
    assert comparison.read_states() == states and len(comparison.read_journal()) == 4


def test_the_second_stage_is_listed_when_the_first_is_over(comparison):
    comparison.write([{"learning_rate": [1e-3, 1e-2]}], confirm_seeds=2).run()
    for record in comparison.folder.glob("runs/*seed44*/record.json"):
        record.unlink()
    code, out, _ = run_command(comparison, "--list_commands")
    assert code == 0 and "seed44" in out and out.count("\n") == 1


def test_the_exit_status_is_1_when_every_run_failed(comparison):
    comparison.write(behave("plain"))
    assert run_command(comparison)[0] == 0
    comparison.write(behave("fail", "fail"))
    code, out, _ = run_command(comparison)
    assert code == 1 and "failed" in out and "finished" not in out.splitlines()[-2]


def test_a_refused_first_run_is_the_command_s_error(comparison):
    done = call_command(comparison.write(behave("refuse", "plain")))
    assert done.returncode == 2 and done.stderr.startswith(
        "error: the first run failed: --behaviour=refuse: choose another (log: "
    )
    assert not (comparison.folder / "report.html").exists()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("ends_well", [False, True])
def test_ctrl_c_stops_the_runs_says_how_to_go_on_and_the_same_call_goes_on(comparison, number, ends_well):
    if ends_well:  # a script that answers SIGINT with exit status 0
        script = comparison.root / "fake.py"
        answer = "signal.signal(signal.SIGINT, lambda *_: os._exit(0))\n"
        script.write_text(FAKE_SCRIPT.replace("flags = dict(", answer + "flags = dict(", 1))
    comparison.write([{"behaviour": ["plain", "hang_once", "good"]}])
    process = start_command(comparison)
    wait_until(lambda: count_ready(comparison) == 1)
    process.send_signal(number)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "") and "The same command continues" in out
    assert comparison.read_states() == {"behaviour=plain 42": "finished", "behaviour=hang_once 42": "interrupted"}
    assert not any(is_alive(entry["pid"]) for entry in comparison.read_journal())
    assert (comparison.folder / "report.html").exists()  # a run was over
    code, out, _ = run_command(comparison)
    assert code == 0 and "of which 1 are over" in out and "3 finished." in out
    assert [entry["behaviour"] for entry in comparison.read_journal()] == ["plain", "hang_once", "hang_once", "good"]


def test_a_second_ctrl_c_does_not_wait_for_a_stubborn_run(comparison):
    comparison.write(behave("hang_once"), {"stubborn": True})
    process = start_command(comparison)
    wait_until(lambda: count_ready(comparison) == 1)
    process.send_signal(signal.SIGINT)
    time.sleep(1.0)
    assert process.poll() is None  # it gives the run its ten seconds
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=8)
    assert process.returncode == 130 and comparison.read_states() == {"behaviour=hang_once 42": "interrupted"}
    assert not any(is_alive(entry["pid"]) for entry in comparison.read_journal())
    assert not (comparison.folder / "report.html").exists()  # nothing to report


def test_a_run_that_a_killed_call_left_is_ended_and_started_anew(comparison):
    comparison.write(behave("hang_once", "plain"))
    first = start_command(comparison)
    wait_until(lambda: count_ready(comparison) == 1)
    (left,) = [entry["pid"] for entry in comparison.read_journal()]
    first.kill()
    first.communicate(timeout=240)
    assert is_alive(left) and comparison.read_states() == {"behaviour=hang_once 42": "running"}
    code, out, _ = run_command(comparison)
    assert code == 0 and "ended what a worker that was killed had left running: behaviour=hang_once" in out
    assert not is_alive(left) and set(comparison.read_states().values()) == {"finished"}


def test_two_calls_in_one_folder_train_every_run_once(comparison):
    """As two machines do that share a folder: each run is claimed by one of them, and both reports are on all."""
    comparison.write([{"v0": ["zeros", "random"], "seed": list(range(6))}], {"pause": 0.05})
    calls = [start_command(comparison, "--jobs", "2") for _ in range(2)]
    ended = [call.communicate(timeout=240) for call in calls]
    assert [call.returncode for call in calls] == [0, 0] and [err for _, err in ended] == ["", ""]
    trained = sorted((entry["v0"], int(entry["seed"])) for entry in comparison.read_journal())
    assert trained == [(arm, seed) for arm in ("random", "zeros") for seed in range(6)]
    assert list(comparison.read_states().values()) == ["finished"] * 12
    # Both took part, and each was told of what the other had done.
    counts = [out.count("finished, step 20") for out, _ in ended]
    assert min(counts) > 0 and sum(counts) == 12
    assert any("12 finished." in out for out, _ in ended) and any(
        "finished, by another worker" in out for out, _ in ended
    )
    assert (comparison.folder / "report.html").read_text() == "reported"


def test_a_call_waits_for_what_another_is_training_and_says_so(comparison):
    comparison.write(behave("hang_once", "plain"))
    first = start_command(comparison)
    wait_until(lambda: count_ready(comparison) == 1)
    second = start_command(comparison)
    wait_until(lambda: comparison.read_states().get("behaviour=plain 42") == "finished")
    time.sleep(1.0)
    assert second.poll() is None  # it has nothing left to do, and waits
    first.kill()
    first.communicate(timeout=240)
    out, err = second.communicate(timeout=240)
    assert (second.returncode, err) == (0, "")
    assert re.search(rf"behaviour=hang_once\S+ is left to process {first.pid}; it is taken over when", out)
    assert set(comparison.read_states().values()) == {"finished"}


def test_a_new_call_takes_over_the_run_of_a_node_that_has_died(comparison, monkeypatch):
    """Its lease is of another machine, so nobody can see that the process is gone: the call waits until the lease has lapsed."""
    monkeypatch.setattr(executor_module, "CLAIM_SECONDS", 0.1)
    monkeypatch.setattr(executor_module, "LEASE_SECONDS", 1.5)
    comparison.write(behave("plain", "good")).run()
    (run, _) = read_plan(comparison.config).runs
    record = comparison.folder / "runs" / run.name / "record.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "state": "running", "host": "node7", "pid": 1}))
    gone = make_lease(comparison.folder, f"run_{run.digest}")
    gone.acquire(blocking=False)
    move_to_another_machine(comparison.folder / ".locks" / f"run_{run.digest}.lock")
    began = time.monotonic()
    told = comparison.run()
    assert time.monotonic() - began > 1.0 and [end[2] for end in told.ends] == ["finished"]
    assert any(f"{run.name} is left to process 1 on node7" in words for words in told.told)


def test_a_process_that_has_the_number_of_a_lost_run_is_left_alone(comparison):
    comparison.write(behave("plain")).run()
    (record,) = comparison.read_records().values()
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    path = comparison.folder / "runs" / record["name"] / "record.json"
    path.write_text(json.dumps({**record, "state": "running", "pid": bystander.pid}))
    code, out, _ = run_command(comparison)
    assert code == 0 and "left running" not in out and bystander.poll() is None
    bystander.kill()
    bystander.wait()


def test_runs_can_be_stopped_though_sigint_is_ignored_around_them(comparison):
    """A shell script's `compare ... &` ignores SIGINT, and its children would inherit that."""
    comparison.write(behave("nan"), {"losses": "6,4,wait,3", "pause": 1.5})
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = start_command(comparison)
    finally:
        signal.signal(signal.SIGINT, before)
    wait_until(lambda: comparison.read_states() == {"behaviour=nan 42": "running"})
    process.send_signal(signal.SIGINT)  # still ignored
    process.communicate(timeout=240)
    assert process.returncode == 0 and comparison.read_states() == {"behaviour=nan 42": "diverged"}
    assert comparison.read_records()["behaviour=nan 42"]["exit_status"] == -signal.SIGINT  # not ignored by the run


def test_the_command_imports_neither_torch_nor_transformers(comparison):
    comparison.write(behave("plain"))
    program = (
        "import sys; from hf_v0init.cli import compare; "
        "from hf_v0init.compare import comparison_file, session; "
        f"comparison_file.read_plan({str(comparison.config)!r}); "
        "sys.exit(str([m for m in ('torch', 'transformers', 'datasets', 'matplotlib') if m in sys.modules]))"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"


def test_a_terminal_sees_runs_steps_and_losses_and_until_when(comparison):
    assert [format_seconds(s) for s in (0.4, 59, 200, 7500)] == ["0 s", "59 s", "3:20 min", "2:05 h"]
    arguments = {"max_steps": 40, "pause": 0.5}
    plan = read_plan(comparison.write([{"learning_rate": [1e-3, 1e-2]}], arguments, confirm_seeds=2).config)
    console = Console(file=io.StringIO(), force_terminal=True, width=150, color_system=None)
    with lock_plan(comparison.folder):
        pass
    with ProgressDisplay(console, 1) as display:
        display.begin_stage(plan, plan.runs)
        LocalExecutor(comparison.folder, 1, display).run(plan, plan.runs)
    shown = console.file.getvalue()
    for words in ("Stage 1 of 2, tune: 2 runs; then at most 1 chosen settings on 2 fresh seeds, 2 runs.", "no-warmup_lr0.001_seed42",
        "step 10, train –, val. 4.000", "0 of 2 over, 1 waiting", "[2/2] no-warmup_lr0.01_seed42"):  # fmt: skip
        assert words in shown, words
    pace = r"By the first run's pace a run takes \d s: 2 runs with 1 at a time until \w+ \d\d:\d\d, the second stage until \w+ \d\d:"
    assert re.search(pace, shown)


@pytest.mark.parametrize("command", ["compare", "report"])
def test_a_base_installation_is_told_what_to_install(comparison, command):
    """Without scipy there is one line, and no traceback."""
    comparison.write(behave("plain"))
    words = (
        [str(comparison.config), "--output_dir", str(comparison.folder)]
        if command == "compare"
        else [str(comparison.root)]
    )
    program = f"""
        import importlib.util, sys
        find = importlib.util.find_spec
        importlib.util.find_spec = lambda name, *rest: None if name in ("scipy", "jinja2") else find(name, *rest)
        from hf_v0init.cli.main import main
        sys.argv = ["hf-v0init", {command!r}, *{words!r}]
        main()
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == "error: scipy, jinja2 are not installed; type: pip install 'hf_v0init[compare]'\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({}, "The script accepts the flags of all 6 settings."),
        (
            {"max_steps": "three"},
            "the script refuses the flags of 6 of 6 settings; no warmup: --max_steps: invalid int value: 'three'",
        ),
        ({"widht": 3}, "--widht"),
    ],
)
def test_a_dry_run_has_the_script_check_its_flags(tmp_path, arguments, words):
    config = yaml.safe_load((ROOT / "configs" / "compare" / "my_script.yaml").read_text(encoding="utf-8"))
    config["script"] = "run_clm" if "max_steps" in arguments else str(ROOT / "configs" / "compare" / "my_script.py")
    config["arguments"] |= {"do_eval": True, **arguments} if arguments else {}
    config["grids"] = [
        {"v0": ["zeros", "random"], "learning_rate": [1e-2, 3e-2]},
        {"warmup": [0.3], "learning_rate": [1e-2, 3e-2]},
    ]
    comparison = Comparison(tmp_path)
    comparison.config.write_text(yaml.safe_dump(config))
    done = call_command(comparison, "--dry_run")
    assert done.returncode == (2 if arguments else 0) and words in (done.stderr if arguments else done.stdout), done
    assert not comparison.folder.exists()


KNOWN_FLAGS = """
import argparse, pathlib
parser = argparse.ArgumentParser()
parser.add_argument("--output_dir")
parser.add_argument("--learning_rate", type=float)
flags, _ = parser.parse_known_args()
pathlib.Path(flags.output_dir).mkdir()
pathlib.Path("trained").touch()
"""
UNREAD_FLAGS = """
import argparse, pathlib, sys
(output,) = [word.split("=")[1] for word in sys.argv if word.startswith("--output_dir=")]
pathlib.Path(output).mkdir()
(pathlib.Path(output) / "all_results.json").touch()
"""


@pytest.mark.parametrize(
    ("script", "status", "words"),
    [
        (KNOWN_FLAGS, 0, "The script accepts the flags of all 1 settings."),
        (UNREAD_FLAGS, 2, "it ended without having read its flags"),
    ],
)
def test_a_dry_run_trains_nothing_and_leaves_nothing_behind(comparison, monkeypatch, script, status, words):
    """Whatever a script does before it has read all of its flags goes into a folder that is removed."""
    comparison.write([{"v0": "zeros"}])
    (comparison.root / "fake.py").write_text(script)
    monkeypatch.chdir(comparison.root)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    before = sorted(comparison.root.rglob("*"))
    done = call_command(comparison, "--dry_run")
    assert done.returncode == status and words in done.stdout + done.stderr, done
    assert sorted(comparison.root.rglob("*")) == before


@pytest.mark.slow
def test_tiny_yaml_end_to_end(tmp_path):
    """Real training on the embedded corpus: four settings, the best of three families on fresh seeds, the report; then only the report."""
    words = make_call("configs/compare/tiny.yaml", tmp_path / "out", "--jobs", "2")
    for first in (True, False):
        done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=1200)
        assert (done.returncode, done.stderr) == (0, ""), done.stdout
        assert ("By the first run's pace" in done.stdout) is first
        assert (
            "10 finished." in done.stdout and "Warning" not in done.stdout and "can replace the warmup" in done.stdout
        )
    records = [json.loads(path.read_text()) for path in (tmp_path / "out").glob("runs/*/record.json")]
    assert sorted((r["family"], r["seed"]) for r in records if r["stage"] == "confirm") == [
        (family, seed) for family in ("no warmup", "v0", "warmup") for seed in (2, 3)
    ]
    prints, losses = {}, {}
    for record in records:
        output = tmp_path / "out" / "runs" / record["name"] / "output"
        prints.setdefault(record["seed"], set()).add((output / "fingerprint.json").read_text())
        results = json.loads((output / "all_results.json").read_text())
        losses[record["setting"], record["seed"]] = results["eval_loss"]
        assert results["predict_bleu"] >= 0 and (output / "v0_init.json").is_file() is (record["family"] == "v0")
    assert [len(found) for found in prints.values()] == [1, 1, 1] and len(set(losses.values())) == 10
    for name in ("report.md", "report.html", "results.csv", "figures/confirmed.svg"):
        assert (tmp_path / "out" / name).stat().st_size > 0
