"""The example of a user's own script, and such scripts as do less than it does, with real training."""

import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from comparison_fakes import wait_until

from hf_v0init.comparison.reading.results import read_comparison

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "configs" / "compare" / "my_script.py"
RESUME = "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)"


def start(folder: Path, *options) -> subprocess.Popen:
    words = [
        sys.executable,
        "-m",
        "hf_v0init.commands.main",
        "compare",
        str(folder / "mine.yaml"),
        "--output_dir",
        str(folder / "out"),
    ]
    return subprocess.Popen([*words, *options], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def call(folder: Path, *options) -> tuple[int, str, str]:
    process = start(folder, *options)
    out, err = process.communicate(timeout=500)
    return process.returncode, out, err


def write(folder: Path, exchange=("", ""), grids=None, **arguments) -> None:
    """Write the example's script with one line exchanged, and its YAML file with other grids and arguments."""
    text = EXAMPLE.read_text(encoding="utf-8")
    assert exchange[0] in text
    (folder / "mine.py").write_text(text.replace(*exchange))
    content = yaml.safe_load(EXAMPLE.with_suffix(".yaml").read_text(encoding="utf-8"))
    content |= {"script": "mine.py", "grids": grids or content["grids"]}
    content["arguments"] |= arguments
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


def test_the_example_is_short_enough_to_read():
    code = [
        line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith('"""')
    ]
    assert len(code) <= 15 and code[-2:] == [RESUME, "trainer.evaluate()"]


@pytest.mark.slow
def test_a_plain_train_and_evaluate_gets_through(tmp_path):
    """No metric is saved, no model, no checkpoint: the loss is taken from the log, and what v0 cost is charged."""
    write(
        tmp_path,
        (RESUME, "trainer.train()"),
        [{"v0": ["zeros", "data_driven 1", "random"], "learning_rate": [1e-2], "seed": [1]}],
    )
    code, out, err = call(tmp_path)
    assert (code, err) == (0, "") and "3 finished." in out and "Warning" not in out, out
    assert not list(tmp_path.glob("out/runs/*/output/all_results.json"))
    runs = {run.v0: run for run in read_comparison(tmp_path / "out").runs}
    assert all(run.eval_steps == [0, 20, 40, 60] and run.final_loss == run.eval_losses[-1] for run in runs.values())
    assert all(run.final_loss < 1.5 < run.start_loss for run in runs.values())  # it learns: log 25 is 3.2, log 2 is 0.7
    assert runs["zeros"].v0_extra_steps == 0.0 and runs["random 100"].v0_samples == 0
    report = json.loads(next(tmp_path.glob("out/runs/data_driven*/output/v0_init.json")).read_text())
    charged = runs["data_driven 1"]
    assert charged.v0_samples == report["num_samples"] and charged.v0_extra_steps == report["num_samples"] / 32
    assert len({json.dumps(run.fingerprint) for run in runs.values()}) == 1


@pytest.mark.slow
def test_a_wrong_flag_of_a_real_script_is_found_by_one_start(tmp_path):
    write(tmp_path, widht=16)
    code, _, err = call(tmp_path, "--jobs", "2")
    assert code == 2 and err.startswith(
        "error: the first run failed before it had logged anything: ValueError: Some specified"
    )
    assert "--widht=16" in err and err.count("\n") == 1 and len(list(tmp_path.glob("out/runs/*"))) == 1


@pytest.mark.slow
@pytest.mark.parametrize("resumes", [True, False])
def test_a_run_that_is_cut_off_goes_on_or_is_found_not_to(tmp_path, resumes):
    exchange = ("", "") if resumes else (RESUME, "trainer.train()")
    grids = [{"v0": ["data_driven 1"], "learning_rate": [1e-2], "seed": [1]}]
    write(tmp_path, exchange, grids, save_strategy="steps", save_steps=20, max_steps=400, eval_steps=100)
    process = start(tmp_path)
    wait_until(
        lambda: (
            list(tmp_path.glob("out/runs/*/output/checkpoint-60/save_state.json"))
            or list(tmp_path.glob("out/runs/*/output/checkpoint-80"))
        ),
        120,
    )
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    code, out, err = call(tmp_path, "--resume_runs")
    assert (code, err) == (0, "") and "1 finished." in out
    record = json.loads(next(tmp_path.glob("out/runs/*/record.json")).read_text())
    assert ("began at step 0 again" in out) is not resumes and bool(record.get("resumed_from")) is resumes
    (run,) = read_comparison(tmp_path / "out").runs
    assert run.eval_steps == [0, 100, 200, 300, 400] and not run.problems
    shutil.rmtree(tmp_path / "out")
    assert call(tmp_path)[0] == 0
    (straight,) = read_comparison(tmp_path / "out").runs
    assert straight.eval_losses == run.eval_losses  # bit for bit
