import json
import subprocess
import sys
from pathlib import Path

import pytest

from hf_v0init.errors import InputError
from hf_v0init.records.run_table import read_run

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "tabulate_runs.py"


def make_run(folder: Path, v0: dict | None = None) -> Path:
    folder.mkdir()
    history = [
        {"step": 10, "loss": 5.0},
        {"step": 10, "eval_loss": 4.5},
        {"step": 20, "loss": 4.0},
        {"step": 20, "eval_loss": 3.75},
    ]
    (folder / "trainer_state.json").write_text(
        json.dumps({"global_step": 23, "log_history": [*history, {"step": 20, "train_loss": 4.5}]})
    )
    (folder / "all_results.json").write_text(json.dumps({"predict_bleu": 12.5, "eval_runtime": 3.0}))
    if v0 is not None:
        (folder / "v0_init.json").write_text(json.dumps(v0))
    return folder


def test_a_run_is_read_from_its_folder(tmp_path):
    run = read_run(make_run(tmp_path / "a", {"strategy": "random", "scale": 100.0}))
    assert run.num_steps == 23
    assert (run.name, run.train_steps, run.train_losses) == ("a", [10, 20], [5.0, 4.0])
    assert (run.eval_steps, run.eval_losses, run.final_eval_loss) == ([10, 20], [4.5, 3.75], 3.75)
    assert run.metrics == {"predict_bleu": 12.5} and run.v0 == {"strategy": "random", "scale": 100.0}


def test_an_unfinished_run_is_refused(tmp_path):
    with pytest.raises(InputError, match="no finished run"):
        read_run(tmp_path)


def test_script_prints_draws_and_writes(tmp_path):
    make_run(tmp_path / "a"), make_run(tmp_path / "b", {"strategy": "data_driven", "scale": 1.0})
    command = [sys.executable, str(SCRIPT), str(tmp_path / "a"), str(tmp_path / "b")]
    options = ["--figure", str(tmp_path / "f.png"), "--json", str(tmp_path / "r.json"), "--title", "Two runs"]
    done = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert "3.750" in done.stdout and "12.50" in done.stdout and "data_driven, scale 1" in done.stdout
    assert (tmp_path / "f.png").read_bytes()[:4] == b"\x89PNG"
    assert [run["name"] for run in json.loads((tmp_path / "r.json").read_text())] == ["a", "b"]
    bad = subprocess.run([*command, str(tmp_path / "missing")], capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stderr.startswith("error: ") and "Traceback" not in bad.stderr
