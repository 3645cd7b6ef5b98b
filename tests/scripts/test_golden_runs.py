"""The scripts against version 0.2: 20 steps of each task, with the losses of every step and the results as they were then.

`golden_runs.json` holds the flags of each run and its numbers. Data are generated here, so that no download is needed.
"""

import json
import random
from pathlib import Path

import pytest
from script_runs import load_script, quiet_logging  # noqa: F401
from write_digits_folder import write_digits_folder

GOLDEN = json.loads((Path(__file__).parent / "golden_runs.json").read_text(encoding="utf-8"))
TOLERANCE = 1e-4  # relative; the machine's arithmetic may differ in the last digits
PARTS = (
    ("the", "a"), ("old", "small", "quick", "red"), ("cat", "dog", "bird", "horse"), ("sees", "hears", "likes"),
    ("the", "a"), ("mat", "moon", "street", "house"), (".", "!"),
)  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("golden")
    chooser = random.Random(0)
    lines = [" ".join(chooser.choice(words) for words in PARTS) for _ in range(480)]
    rows = [json.dumps({"question": f"what does {line.split()[2]} do?", "answer": line}) for line in lines]
    for name, content in (
        ("train.txt", lines[:400]), ("validation.txt", lines[400:]), ("qa.jsonl", rows[:400]), ("qa_validation.jsonl", rows[400:420]),
    ):  # fmt: skip
        (folder / name).write_text("".join(f"{line}\n" for line in content), encoding="utf-8")
    settings = {
        "model_type": "cifar_resnet", "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
    }  # fmt: skip
    (folder / "resnet.json").write_text(json.dumps(settings), encoding="utf-8")
    write_digits_folder(folder / "digits")
    return folder


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_the_numbers_are_those_of_version_0_2(name, data, tmp_path):
    run = GOLDEN[name]
    argv = [f"--{flag}={str(value).replace('{data}', str(data))}" for flag, value in run["flags"].items()]
    script = load_script(run["script"])
    script.main([*argv, f"--output_dir={tmp_path / 'out'}", f"--cache_dir={data / 'cache'}"])

    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    results = json.loads((tmp_path / "out" / "all_results.json").read_text())
    losses = [line["loss"] for line in state["log_history"] if "loss" in line]
    assert losses == pytest.approx(run["losses"], rel=TOLERANCE)
    assert {key: results.get(key) for key in run["results"]} == pytest.approx(run["results"], rel=TOLERANCE)
