"""`--probe_only`: what is printed is what was measured, and no run is left behind."""

import json
import re
from pathlib import Path

import pytest
import yaml
from command_line import run_command
from image_sets import write_image_folder
from script_runs import quiet_logging  # noqa: F401

from hf_v0init import compute_warmup_length
from hf_v0init.tasks import probing

COMMON = {"use_cpu": True, "seed": 1, "learning_rate": 0.004, "max_steps": 300, "v0_init": "data_driven"}


def write_config(folder: Path, task: str) -> Path:
    """A tiny run of one of the scripts, with an output folder that is in use."""
    lines = [f"{a} cat {b} the mat" for a in ("the", "a", "one", "my") for b in ("on", "under", "sees", "hears")]
    flags = dict(COMMON, output_dir=str(folder / "in_use"))
    if task == "clm":
        (folder / "train.txt").write_text("\n".join(lines * 8))
        flags |= {"train_file": str(folder / "train.txt"), "model_type": "gpt2", "tokenizer_kind": "word"}
        flags |= {"config_overrides": "n_layer=2,n_embd=16,n_head=2,n_positions=16", "block_size": 16}
    else:
        write_image_folder(folder / "images", per_class=16)
        model = {"model_type": "cifar_resnet", "embedding_size": 4, "hidden_sizes": [4], "depths": [1]}
        (folder / "model.json").write_text(json.dumps(model | {"layer_type": "basic"}))
        flags |= {"train_dir": str(folder / "images"), "config_name": str(folder / "model.json")}
    (folder / "in_use").mkdir()
    (folder / "in_use" / "file").write_text("mine")
    config = folder / "run.yaml"
    config.write_text(yaml.safe_dump(flags))
    return config


@pytest.mark.parametrize("task", ["clm", "images"])
def test_the_probe_prints_what_was_measured_and_leaves_nothing(task, tmp_path, monkeypatch):
    config, measured = write_config(tmp_path, task), []
    before = sorted(tmp_path.rglob("*"))
    measure = probing.measure_run
    monkeypatch.setattr(probing, "measure_run", lambda *args: measured.append(measure(*args)) or measured[-1])
    monkeypatch.setattr(probing.tempfile, "gettempdir", lambda: str(tmp_path))
    early = "--early_stopping_patience 2 --eval_strategy steps --eval_steps 5 --load_best_model_at_end --save_steps 5".split()
    done = run_command(task, config, "--learning_rate", "0.002", "--probe_only", *early)
    assert not done.returncode
    ((radius, _),) = measured
    printed = dict(re.findall(r"│ +([\d.e-]+) │ +(-?[\d.]+) │", done.stdout))
    assert {float(d): float(rho) for d, rho in printed.items()} == {
        float(f"{d:.3g}"): float(f"{rho:.3f}") for d, rho in zip(radius.displacements, radius.rho, strict=True)
    }
    assert f"{0.002:g} / {radius.d50:.3g} = {0.002 / radius.d50:.3g}" in done.stdout
    assert f"--warmup_steps {compute_warmup_length(0.002 / radius.d50, 300)}" in done.stdout
    assert sorted(tmp_path.rglob("*")) == before
