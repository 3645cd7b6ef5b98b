"""Runs on a SLURM cluster through submitit: its local executor, and an `sbatch` of our own that starts the tasks at once."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_fakes import FAKE_SCRIPT, Comparison, behave, wait_until
from hf_v0init.compare.running.slurm import TrainRun, make_executor, submit_runs
from test_comparison_runs import write_checkpoint

from hf_v0init.compare.claims import lock_plan
from hf_v0init.compare.folder import write_plan
from hf_v0init.compare.plan import read_plan
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
    program = [sys.executable, "-m", "hf_v0init.cli.main", "compare"]
    words = [*program, str(comparison.config), "--output_dir", str(comparison.folder), *options]
    return subprocess.run(words, cwd=comparison.root, capture_output=True, text=True, timeout=120)


def wait_for_states(comparison, expected, seconds=90):
    wait_until(lambda: sorted(comparison.read_states().values()) == sorted(expected), seconds)


def read_options(cluster) -> dict[str, str]:
    """The last submission's options of sbatch."""
    found = re.findall(r"^#SBATCH --([\w-]+)=(.*)$", (cluster / "submitted.sh").read_text(), re.MULTILINE)
    return {name: shlex.split(value)[0] for name, value in found}


# ------------------------------------------------------------------------------------------- submitit's local executor


def test_what_is_put_back_into_the_queue_is_the_same_run_that_goes_on(comparison):
    plan = read_plan(comparison.write(behave("plain")).config)
    again = TrainRun(plan, comparison.folder, retry_failed=True).checkpoint(plan.runs[0].name)
    assert again.function == TrainRun(plan, comparison.folder, retry_failed=False) and again.args == (
        plan.runs[0].name,
    )


# ----------------------------------------------------------------------------------------------------- a fake sbatch


@pytest.mark.slow
def test_an_array_job_over_the_runs_that_are_not_over(comparison, cluster):
    settings = {"partition": "gpu", "time": "2:30:00", "gpus": 1, "cpus": 4, "memory_gb": 1.5, "account": "me"}
    settings |= {"max_parallel": 2, "setup": ["module load cuda"], "further": {"nice": 100}}
    comparison.write(behave("plain", "good"), {"save_strategy": "steps"}, slurm=settings)
    done = call(comparison, "--launcher", "slurm")
    assert (done.returncode, done.stderr) == (0, "") and "Submitted 2 runs as job 77" in done.stdout
    assert "Note: save_strategy" not in done.stdout
    wait_for_states(comparison, ["finished", "finished"])
    options = read_options(cluster)
    expected = {
        "partition": "gpu",
        "time": "150",
        "gpus-per-node": "1",
        "cpus-per-task": "4",
        "mem": "1536M",
        "account": "me",
    }
    expected |= {"array": "0-1%2", "nice": "100", "job-name": "Fake"}
    assert expected.items() <= options.items()
    assert "module load cuda" in (cluster / "submitted.sh").read_text()
    assert len(comparison.read_journal()) == 2
    # A plan that has grown submits what is new; a single run is a job of its own.
    comparison.write(behave("plain", "good", "third"), {"save_strategy": "steps"}, slurm=settings)
    done = call(comparison, "--launcher", "slurm")
    assert "Submitted 1 run as job 77" in done.stdout
    wait_for_states(comparison, ["finished"] * 3)
    done = call(comparison, "--launcher", "slurm")
    assert done.returncode == 0 and "Nothing to submit." in done.stdout
    assert len(comparison.read_journal()) == 3


@pytest.mark.slow
def test_runs_in_the_queue_are_not_submitted_again(comparison, cluster):
    comparison.write(behave("plain", "good"))
    plan = read_plan(comparison.config)
    call(comparison, "--launcher", "slurm")
    wait_for_states(comparison, ["finished", "finished"])
    for path in comparison.folder.glob("runs/*/record.json"):
        path.write_text(json.dumps({**json.loads(path.read_text()), "state": "interrupted"}))
    (cluster / "queue").write_text("76_0\n77_0\n")
    jobs = json.loads((comparison.folder / "slurm" / "jobs.json").read_text())
    assert jobs == {run.digest: f"77_{i}" for i, run in enumerate(plan.runs)}
    done = call(comparison, "--launcher", "slurm")
    assert "Submitted 1 run as job 77" in done.stdout and "1 run is in the queue already." in done.stdout
    assert "Note: save_strategy is no, so a run that is preempted" in done.stdout


def test_a_task_that_reaches_its_time_limit_is_requeued_and_goes_on_from_its_checkpoint(comparison, cluster):
    comparison.write(behave("hang_once"), {"losses": "6,5,4,3,2"})
    script = FAKE_SCRIPT.replace('os.path.exists(flags["journal"] + ".once")', "resumed_at")
    (comparison.root / "fake.py").write_text(script)
    done = call(comparison, "--launcher", "slurm")
    assert done.returncode == 0, done.stderr
    wait_until(lambda: list(comparison.root.glob("journal.ready.*")), 60)
    (record,) = comparison.read_records().values()
    output = comparison.folder / "runs" / record["name"] / "output"
    checkpoint = write_checkpoint(output, 20)
    (pid,) = find_task(comparison)
    os.kill(pid, signal.SIGUSR2)  # what SLURM sends 90 seconds before the end
    wait_for_states(comparison, ["finished"])
    first, second = comparison.read_journal()
    assert (first["checkpoint"], second["checkpoint"]) == (None, str(checkpoint))
    (record,) = comparison.read_records().values()
    assert record["resumed_from"] == ["checkpoint-20"] and not record.get("cannot_resume")
    steps = [json.loads(line)["step"] for line in (output / "run_log.jsonl").read_text().splitlines()]
    assert steps == [0, 10, 20, 30, 40]


def test_a_script_that_the_scheduler_ended_is_interrupted_and_not_failed(comparison):
    """Preemption sends SIGTERM to all processes of a task, the script's too."""
    comparison.write(behave("hang_once"))
    plan = read_plan(comparison.config)
    with lock_plan(comparison.folder):
        write_plan(plan, comparison.folder)
    words = [sys.executable, "-m", "hf_v0init.cli.main", "compare", str(comparison.config), "--output_dir"]
    words += [str(comparison.folder), "--run", plan.runs[0].name]
    process = subprocess.Popen(words, cwd=comparison.root, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: list(comparison.root.glob("journal.ready.*")), 60)
    os.kill(comparison.read_journal()[0]["pid"], signal.SIGTERM)
    out, err = process.communicate(timeout=60)
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
            and str(comparison.folder / "slurm") in words
            and words[0].endswith(("python", "python3", "python3.11"))
        ):
            found.append(int(path.parent.name))
    return found


def test_what_slurm_refuses_and_where_there_is_none(comparison, cluster, monkeypatch):
    comparison.write(behave("plain", "good"))
    plan = read_plan(comparison.config)
    with lock_plan(comparison.folder):
        write_plan(plan, comparison.folder)
    (cluster / "sbatch").write_text("#!/bin/sh\necho 'sbatch: error: invalid partition specified: gpu' >&2; exit 1\n")
    with pytest.raises(InputError, match=r"slurm: the job was refused: .*invalid partition specified: gpu"):
        submit_runs(plan, comparison.folder, plan.runs, make_executor(plan, comparison.folder))
    assert not (comparison.folder / "slurm" / "jobs.json").exists()
    monkeypatch.setenv("PATH", "/usr/bin:/bin")
    with pytest.raises(InputError, match=r"there is no sbatch here; .* or use --list_commands for another scheduler"):
        make_executor(plan, comparison.folder)
    monkeypatch.setitem(sys.modules, "submitit", None)
    with pytest.raises(InputError, match=r"needs submitit; type: pip install 'hf_v0init\[cluster\]'"):
        make_executor(plan, comparison.folder)
