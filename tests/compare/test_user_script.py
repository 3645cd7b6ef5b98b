"""The example of a user's own script, and such scripts as do less than it does, with real training."""

import json
import shutil
import signal
import subprocess
from pathlib import Path

import pytest
import yaml
from comparison_fakes import make_call, wait_until

from hf_v0init.compare.results import find_odd_beginnings, read_comparison

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "configs" / "compare" / "my_script.py"
RESUME = "trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)"


def start(folder: Path, *options) -> subprocess.Popen:
    words = make_call(folder / "mine.yaml", folder / "out", *options)
    return subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


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
    content |= {"script": "mine.py", "grids": grids or content["grids"], "confirm_seeds": 0}
    content["arguments"] |= arguments
    (folder / "mine.yaml").write_text(yaml.safe_dump(content))


def test_the_example_is_short_enough_to_read():
    code = [
        line for line in EXAMPLE.read_text(encoding="utf-8").splitlines() if line.strip() and not line.startswith('"""')
    ]
    assert len(code) <= 15 and code[-2:] == [RESUME, "trainer.evaluate()"]


@pytest.mark.slow
def test_a_plain_train_and_evaluate_gets_through(tmp_path):
    """No metric is saved, no model, no checkpoint: the loss is taken from the log."""
    grids = [{"v0": ["zeros", "data_driven per_sample 1"], "learning_rate": [1e-2], "seed": [1]}]
    write(tmp_path, (RESUME, "trainer.train()"), grids, max_steps=20, eval_steps=10, v0_num_samples=128)
    code, out, err = call(tmp_path)
    assert (code, err) == (0, "") and "2 finished." in out and "Warning" not in out, out
    assert not list(tmp_path.glob("out/runs/*/output/all_results.json"))
    comparison = read_comparison(tmp_path / "out")
    assert list(comparison.evaluations["step"]) == [0, 10, 20] * 2
    assert (comparison.runs["final_loss"] < comparison.runs["start_loss"] - 0.5).all()  # it learns
    assert find_odd_beginnings(comparison.runs) == []


@pytest.mark.slow
def test_a_wrong_flag_of_a_real_script_is_found_by_one_start(tmp_path):
    write(tmp_path, widht=16)
    code, _, err = call(tmp_path, "--jobs", "2")
    assert code == 2 and err.startswith("error: the first run failed: ValueError: Some specified")
    assert "--widht=16" in err and err.count("\n") == 1 and len(list(tmp_path.glob("out/runs/*"))) == 1


@pytest.mark.slow
def test_a_run_that_is_cut_off_goes_on_bit_for_bit(tmp_path):
    grids = [{"v0": ["data_driven 1"], "learning_rate": [1e-2], "seed": [1]}]
    write(tmp_path, grids=grids, save_strategy="steps", save_steps=20, max_steps=120, eval_steps=40)
    process = start(tmp_path)
    wait_until(lambda: list(tmp_path.glob("out/runs/*/output/checkpoint-40/trainer_state.json")), 200)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 130
    code, out, err = call(tmp_path, "--resume_runs")
    assert (code, err) == (0, "") and "1 finished." in out
    record = json.loads(next(tmp_path.glob("out/runs/*/record.json")).read_text())
    assert record["resumed_from"]
    resumed = read_comparison(tmp_path / "out").evaluations["loss"]
    shutil.rmtree(tmp_path / "out")
    assert call(tmp_path)[0] == 0
    assert list(read_comparison(tmp_path / "out").evaluations["loss"]) == list(resumed)
