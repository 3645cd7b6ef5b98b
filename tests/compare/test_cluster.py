"""Runs on a SLURM cluster through submitit: its local executor, and an `sbatch` of our own that starts the tasks at once."""

import dataclasses
import io
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_fakes import FAKE_SCRIPT, Comparison, behave, make_call, wait_until, write_checkpoint
from rich.console import Console

from hf_v0init.compare.cluster import SubmititExecutor
from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.compare.executor import lock_plan
from hf_v0init.compare.progress import ProgressDisplay
from hf_v0init.compare.session import TrainRun
from hf_v0init.errors import InputError

submitit = pytest.importorskip("submitit", reason="submitit is not installed: pip install 'hf_v0init[cluster]'")

ROOT = Path(__file__).resolve().parents[2]

# Starts each task of the array in the background, and again as often as `scontrol requeue` asks for it.
SBATCH = """
import os, re, subprocess, sys
script = sys.argv[1]
text = open(script).read()
open(os.environ["SLURM_FAKE"] + "/submitted.sh", "a").write(text)
array = re.search(r"--array=0-(\\d+)", text)
for task in range(int(array[1]) + 1) if array else [None]:
    ids = {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": "0"}
    ids |= {"SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": str(task)} if array else {}
    mark = os.environ["SLURM_FAKE"] + f"/requeued_77_{task}" if array else os.environ["SLURM_FAKE"] + "/requeued_77"
    again = f'while bash {script}; [ -e {mark} ]; do rm {mark}; done'
    subprocess.Popen(["bash", "-c", again], env={**os.environ, **ids}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        stdin=subprocess.DEVNULL, start_new_session=True)
print("Submitted batch job 77")
"""
SRUN = """
import os, sys
words = sys.argv[1:]
while words[0].startswith("-"):
    words = words[1 if "=" in words[0] or words[0] == "--unbuffered" else 2 :]
os.execvp(words[0], words)
"""
SCONTROL = """
import os, sys
assert sys.argv[1] == "requeue"
open(os.environ["SLURM_FAKE"] + f"/requeued_{sys.argv[2]}", "w").close()
"""
SQUEUE = """
import os
print(open(os.environ["SLURM_FAKE"] + "/queue").read() if os.path.exists(os.environ["SLURM_FAKE"] + "/queue") else "")
"""


@pytest.fixture
def comparison(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    return Comparison(tmp_path)


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Put the programs of a small SLURM on the PATH; return the folder in which they leave what they were told."""
    folder = tmp_path / "cluster"
    folder.mkdir()
    for name, text in (("sbatch", SBATCH), ("srun", SRUN), ("scontrol", SCONTROL), ("squeue", SQUEUE)):
        (folder / name).write_text(f"#!{sys.executable}\n{text}")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_FAKE", str(folder))
    return folder


def call(comparison, *options) -> subprocess.CompletedProcess:
    words = make_call(comparison.config, comparison.folder, *options)
    return subprocess.run(words, cwd=comparison.root, capture_output=True, text=True, timeout=600)


def wait_for_states(comparison, expected, seconds=90):
    wait_until(lambda: sorted(comparison.read_states().values()) == sorted(expected), seconds)


def read_options(cluster) -> dict[str, str]:
    """The last submission's options of sbatch."""
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (cluster / "submitted.sh").read_text(), re.MULTILINE)
    return {name: shlex.split(value)[0] for name, value in found}


# ------------------------------------------------------------------------------------------- submitit's local executor


@pytest.mark.slow
def test_submitit_s_local_executor_trains_both_stages(comparison):
    """No secret is in what it pickles: a task reads the comparison's file itself."""
    comparison.write([{"learning_rate": [1e-3, 1e-2]}], {"hub_token": "hf_s3cret"}, confirm_seeds=2)
    done = call(comparison, "--launcher", "submitit")
    assert done.returncode == 0, done.stderr
    assert "Stage 1 of 2, tune: 2 runs" in done.stdout and "Stage 2 of 2, confirm: 2 runs" in done.stdout
    assert comparison.list_states() == ["finished"] * 4 and "4 finished." in done.stdout
    assert done.stdout.count("finished, step 20, validation loss 3.000") == 4 and "another worker" not in done.stdout
    assert {entry["secret"] for entry in comparison.read_journal()} == {"hf_s3cret"}
    assert not [path for path in comparison.folder.rglob("*") if path.is_file() and b"hf_s3cret" in path.read_bytes()]


def test_what_is_put_back_into_the_queue_is_the_same_run_that_goes_on(comparison):
    plan = read_plan(comparison.write(behave("plain")).config)
    task = TrainRun(comparison.config, comparison.folder)
    again = task.checkpoint(plan.runs[0].name)
    assert again.function == task and again.args == (plan.runs[0].name,)


# ----------------------------------------------------------------------------------------------------- a fake sbatch


@pytest.mark.slow
def test_an_array_job_for_each_stage(comparison, cluster):
    options = {"partition": "gpu", "time": "2:30:00", "cpus_per_task": 4, "mem": "1536M", "account": "me"}
    options |= {"array_parallelism": 2, "setup": ["module load cuda"], "additional_parameters": {"nice": 100}}
    comparison.write([{"learning_rate": [1e-3, 1e-2]}], {"save_strategy": "steps"}, slurm=options, confirm_seeds=2)
    done = call(comparison, "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Submitted 2 runs as job 77") == 2
    assert comparison.list_states() == ["finished"] * 4
    expected = {
        "partition": "gpu",
        "time": "2:30:00",
        "gpus-per-node": "1",
        "cpus-per-task": "4",
        "mem": "1536M",
        "account": "me",
    }
    expected |= {"array": "0-1%2", "nice": "100", "job-name": "Fake"}
    assert expected.items() <= read_options(cluster).items()
    assert "module load cuda" in (cluster / "submitted.sh").read_text()


@pytest.mark.slow
def test_runs_in_the_queue_are_not_submitted_again(comparison, cluster):
    comparison.write(behave("plain", "good"))
    done = call(comparison, "--launcher", "slurm")
    assert done.returncode == 0 and done.stdout.count("finished, step 20, validation loss 3.000") == 2, done.stdout
    for path in comparison.folder.glob("runs/*/record.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted"}))
    for path in comparison.folder.glob("jobs/*_result.pkl"):
        path.unlink()
    (cluster / "queue").write_text("76_0\n77_0\n")
    words = make_call(comparison.config, comparison.folder, "--launcher", "slurm")
    process = subprocess.Popen(words, cwd=comparison.root, stdout=subprocess.PIPE, text=True)
    wait_for_states(comparison, ["finished", "interrupted"])  # the other one is for the queue to start
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=240)
    assert (
        process.returncode == 130 and "Submitted 1 runs as job 77" in out and "1 runs are in the queue already." in out
    )
    assert "stay in the queue" in out


def test_a_task_that_reaches_its_time_limit_is_requeued_and_goes_on_from_its_checkpoint(comparison, cluster):
    comparison.write(behave("hang_once"), {"losses": "6,5,4,3,2"})
    script = FAKE_SCRIPT.replace('os.path.exists(flags["journal"] + ".once")', "resumed_at")
    (comparison.root / "fake.py").write_text(script)
    words = make_call(comparison.config, comparison.folder, "--launcher", "slurm")
    waiting = subprocess.Popen(words, cwd=comparison.root, stdout=subprocess.DEVNULL)
    wait_until(lambda: list(comparison.root.glob("journal.ready.*")), 60)
    (record,) = comparison.read_records().values()
    output = comparison.folder / "runs" / record["name"] / "output"
    checkpoint = write_checkpoint(output, 20)
    (pid,) = find_task(comparison)
    os.kill(pid, signal.SIGUSR2)  # what SLURM sends 90 seconds before the end
    wait_for_states(comparison, ["finished"])
    assert waiting.wait(60) == 0
    first, second = comparison.read_journal()
    assert (first["checkpoint"], second["checkpoint"]) == (None, str(checkpoint))
    (record,) = comparison.read_records().values()
    assert record["resumed_from"] == ["checkpoint-20"]
    steps = [json.loads(line)["step"] for line in (output / "run_log.jsonl").read_text().splitlines()]
    assert steps == [0, 10, 20, 30, 40]


def test_a_script_that_the_scheduler_ended_is_interrupted_and_not_failed(comparison):
    """Preemption sends SIGTERM to all processes of a task, the script's too."""
    comparison.write(behave("hang_once"))
    plan = read_plan(comparison.config)
    with lock_plan(comparison.folder):
        pass
    words = make_call(comparison.config, comparison.folder, "--run", plan.runs[0].name)
    process = subprocess.Popen(words, cwd=comparison.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(comparison.root.glob("journal.ready.*")), 60)
    os.kill(comparison.read_journal()[0]["pid"], signal.SIGTERM)
    out, err = process.communicate(timeout=240)
    assert (process.returncode, err) == (130, "") and f"{plan.runs[0].name}: interrupted." in out
    (record,) = comparison.read_records().values()
    assert (record["state"], record["reason"]) == ("interrupted", "it was stopped from outside")


def find_task(comparison) -> list[int]:
    """The processes of submitit that work in this comparison's folder."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().decode().split("\0")
        except OSError:
            continue
        if (
            "submitit.core._submit" in words
            and str(comparison.folder / "jobs") in words
            and words[0].endswith(("python", "python3", "python3.11"))
        ):
            found.append(int(path.parent.name))
    return found


def test_what_slurm_refuses_and_where_there_is_none(comparison, cluster, monkeypatch):
    comparison.write(behave("plain", "good"))
    plan = read_plan(comparison.config)
    with lock_plan(comparison.folder):
        pass

    def make(plan=plan):
        display = ProgressDisplay(Console(file=io.StringIO()), 1)
        return SubmititExecutor(plan, TrainRun(comparison.config, comparison.folder), display, "slurm")

    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"slurm: the job was refused: .*invalid partition specified: gpu"):
        make().run(plan, plan.runs)
    with pytest.raises(InputError, match=r"slurm: .*partitoin"):
        make(dataclasses.replace(plan, slurm={"partitoin": "gpu"}))
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(
        InputError, match=r"launcher=slurm: Could not detect .*srun.* --list_commands is for other schedulers"
    ):
        make()
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"needs submitit; type: pip install 'hf_v0init\[cluster\]'"):
        make()
