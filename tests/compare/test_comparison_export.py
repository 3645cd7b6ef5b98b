"""Finished runs go to TensorBoard and trackio; both packages are optional, so fakes stand for them."""

import json
import sys
from types import SimpleNamespace

import pytest
from comparison_folders import EVAL_STEPS, make_losses, write_grid
from typer.testing import CliRunner

from hf_v0init.cli.main import app
from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reporting.export import export_runs, list_entries
from hf_v0init.errors import InputError


@pytest.fixture
def folder(tmp_path):
    return write_grid(
        tmp_path, lambda v0, w, r, s: "running" if w == "200" else "diverged" if v0 != "zeros" else 2.0, seeds=(1,)
    )


def test_entries_hold_every_loss_and_the_final_numbers(folder):
    run = read_comparison(folder).runs[0]
    entries = dict(list_entries(run, "eval_loss"))
    assert [entries[step]["eval/loss"] for step in EVAL_STEPS] == pytest.approx(make_losses(2.0))
    assert entries[100]["train/loss"] == pytest.approx(make_losses(2.0)[1] + 0.1)
    assert entries[400]["final/eval_loss"] == 2.0 and entries[400]["final/test_bleu"] == 30.0


def test_trackio_gets_each_ended_run_once(folder, monkeypatch):
    calls = []
    fake = SimpleNamespace(
        init=lambda **kwargs: calls.append(("init", kwargs["project"], kwargs["name"], kwargs["config"]["arm"])),
        log=lambda values, step: calls.append(("log", step, values)),
        finish=lambda: calls.append(("finish",)),
    )
    monkeypatch.setitem(sys.modules, "trackio", fake)
    comparison = read_comparison(folder)
    assert export_runs(comparison, ["trackio"]) == {"trackio": 2}  # not the one that is running
    assert [call[1:] for call in calls if call[0] == "init"] == [
        ("A-test", "zeros_lr0.001_seed1", "zeros"),
        ("A-test", "data_driven-10_lr0.001_seed1", "data_driven 10"),
    ]
    logged = [call for call in calls if call[0] == "log"]
    assert logged[0] == ("log", 0, {"eval/loss": 9.0}) and calls[-1] == ("finish",)
    assert all(value == value for _, _, values in logged for value in values.values())  # no NaN of the diverged run
    assert export_runs(comparison, ["trackio"]) == {"trackio": 0}
    assert json.loads((folder / "exported.json").read_text()).keys() == {"trackio:A-test"}


def test_tensorboard_gets_a_folder_for_each_run_and_anew_the_next_time(folder, monkeypatch):
    class Writer:
        def __init__(self, log_dir):
            self.log_dir, self.lines = log_dir, []

        def add_text(self, name, text):
            self.lines.append(f"{name} {text}")

        def add_scalar(self, name, value, step):
            self.lines.append(f"{name} {step} {value:.3f}")

        def close(self):
            from pathlib import Path

            Path(self.log_dir).mkdir(parents=True)
            (Path(self.log_dir) / "events").write_text("\n".join(self.lines))

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=Writer))
    for _ in range(2):
        done = CliRunner().invoke(app, ["report", str(folder), "--report_to", "tensorboard"])
        assert done.exit_code == 0 and "tensorboard: 2 runs exported." in done.output
        places = sorted(path.name for path in (folder / "tensorboard").iterdir())
        assert places == ["data_driven-10_lr0.001_seed1", "zeros_lr0.001_seed1"]
    lines = (folder / "tensorboard" / places[1] / "events").read_text().splitlines()
    assert "eval/loss 400 2.000" in lines and "| arm | zeros |" in lines and lines.count("eval/loss 0 9.000") == 1


@pytest.mark.parametrize(
    ("name", "words"), [("wandb", "choose tensorboard, trackio"), ("trackio", "not installed; pip install trackio")]
)
def test_what_cannot_be_reached_is_refused_before_anything_is_written(folder, monkeypatch, name, words):
    monkeypatch.setitem(sys.modules, "trackio", None)  # as if it were not there
    with pytest.raises(InputError, match=f"report_to={name}: .*{words}"):
        export_runs(read_comparison(folder), [name])
    done = CliRunner().invoke(app, ["report", str(folder), "--report_to", name])
    assert done.exit_code != 0 and not (folder / "report.md").exists()
