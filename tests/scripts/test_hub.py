"""Pushing with the real `huggingface_hub` client, over HTTP, to a loopback Hub; and reading it back."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import RepoCard
from loopback_hub import LoopbackHub
from safetensors.torch import load_file

from hf_v0init.records.model_card import PAPER_TAG, SECTION_TITLE, TAG, compose_v0_section

REPO_ID = "someone/tiny-v0"
BROKEN_REPO_ID = "someone/broken-commits"
PROGRAM = Path(__file__).parents[1] / "launched" / "train_and_push.py"
LOAD_AND_SAVE = """
import sys, torch
from transformers import AutoModelForCausalLM
torch.save(AutoModelForCausalLM.from_pretrained(sys.argv[1]).state_dict(), sys.argv[2])
"""


def run_python(arguments: list[str], environment: dict[str, str], stdin: str = "") -> str:
    finished = subprocess.run(
        [sys.executable, *arguments],
        env=environment | {"OMP_NUM_THREADS": "1"},
        input=stdin,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout


@pytest.fixture(scope="module")
def hub():
    with LoopbackHub() as running:
        running.fail("POST", rf"^/api/models/{BROKEN_REPO_ID}/commit/", 500, "the disk is full")
        yield running


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    base = tmp_path_factory.mktemp("push")
    return {name: base / name for name in ("pushed", "broken", "refused", "home", "other_home")}


@pytest.fixture(scope="module")
def outcomes(hub, folders) -> dict[str, dict]:
    """Train three times in one process: pushed, refused at the commit, refused for a wrong token."""

    def make_flags(output: Path, repo_id: str, *more: str) -> list[str]:
        flags = f"--max_steps 4 --per_device_train_batch_size 4 --eval_strategy steps --eval_steps 2 --use_cpu \
            --report_to none --save_strategy steps --save_steps 2 --push_to_hub --hub_model_id {repo_id} \
            --v0_init data_driven --v0_decay beta2".split()
        return ["--output_dir", str(output), *flags, *more]

    runs = {
        "pushed": make_flags(folders["pushed"], REPO_ID),
        "broken": make_flags(folders["broken"], BROKEN_REPO_ID, "--hub_strategy", "end"),
        "refused": make_flags(folders["refused"], "someone/never", "--hub_token", "wrong"),
    }
    environment = hub.make_environment(folders["home"])
    printed = run_python([str(PROGRAM)], environment, stdin=json.dumps(list(runs.values())))
    answers = [json.loads(line) for line in printed.splitlines() if line.startswith('{"report"')]
    return dict(zip(runs, answers, strict=True))


@pytest.fixture(scope="module")
def pushed_files(hub, outcomes) -> dict[str, bytes]:
    assert outcomes["pushed"]["error"] is None
    return hub.repositories[REPO_ID].head.files


def test_a_push_makes_its_calls_and_commits_the_local_files(hub, folders, pushed_files):
    (create,) = [r for r in hub.find("POST", "/api/repos/create") if b"tiny-v0" in r.body]
    assert json.loads(create.body)["organization"] == "someone" and create.status == 200
    for step in (
        "/api/validate-yaml", f"/api/models/{REPO_ID}/preupload/main", f"/{REPO_ID}.git/info/lfs/objects/batch",
        f"/api/models/{REPO_ID}/commit/main",
    ):  # fmt: skip
        calls = {(call.status, call.headers["authorization"]) for call in hub.find("POST", step)}
        assert calls == {(200, "Bearer dummy")}, step
    summaries = [commit.summary for commit in hub.repositories[REPO_ID].commits]
    assert summaries[0] == "initial commit" and summaries[-1] == "End of training"
    assert any(summary.startswith("Training in progress, step") for summary in summaries)
    paths = {path.relative_to(folders["pushed"]): path for path in folders["pushed"].rglob("*") if path.is_file()}
    local = {str(at): path.read_bytes() for at, path in paths.items() if not at.parts[0].startswith("checkpoint-")}
    assert {"README.md", "v0_init.json", "model.safetensors", "config.json"} <= local.keys()
    assert {path: content for path, content in pushed_files.items() if path != ".gitattributes"} == local


def test_the_card_and_the_record_are_those_of_this_run(outcomes, pushed_files):
    report = outcomes["pushed"]["report"]
    assert json.loads(pushed_files["v0_init.json"]) == report
    card = RepoCard(pushed_files["README.md"].decode())
    assert {TAG, PAPER_TAG} <= set(card.data["tags"])
    assert len(card.data["tags"]) == len(set(card.data["tags"]))
    assert card.data["pipeline_tag"] == "text-generation"
    assert card.text.count(f"## {SECTION_TITLE}") == 1 and compose_v0_section(report) in card.text
    flags = "--v0_init data_driven --v0_decay beta2 --v0_scale 1 --v0_estimator minibatch --v0_estimation_steps 1 --v0_seed 42"
    assert f"{flags} --v0_include_bias_and_norm False\n" in card.text


def test_from_pretrained_reads_bit_identical_weights_from_the_hub(hub, folders, pushed_files, tmp_path):
    loaded_file = tmp_path / "loaded.pt"
    environment = hub.make_environment(folders["other_home"])
    run_python(["-c", LOAD_AND_SAVE, REPO_ID, str(loaded_file)], environment)
    loaded = torch.load(loaded_file)
    local = load_file(folders["pushed"] / "model.safetensors")
    assert local.keys() <= loaded.keys()
    assert all(torch.equal(loaded[name], weight) for name, weight in local.items())
    assert hub.find("GET", f"/{REPO_ID}/resolve/[^/]+/config.json")
    stored = hub.find("GET", "/lfs/objects/.*") + hub.find("PUT", "/lfs/objects/.*")
    assert {request.method for request in stored} == {"GET", "PUT"}
    assert not any("authorization" in request.headers for request in stored)


def test_failed_commit_names_the_cause_and_leaves_the_trained_model(hub, outcomes, folders):
    outcome = outcomes["broken"]
    assert outcome["error"].startswith("HfHubHTTPError: Server error '500")
    assert "the disk is full" in outcome["error"]
    assert [commit.summary for commit in hub.repositories[BROKEN_REPO_ID].commits] == ["initial commit"]
    kept = load_file(folders["broken"] / "model.safetensors")
    same_run = load_file(folders["pushed"] / "model.safetensors")
    assert kept.keys() == same_run.keys()
    assert all(torch.equal(kept[name], weight) for name, weight in same_run.items())
    assert json.loads((folders["broken"] / "v0_init.json").read_text()) == outcome["report"]
    assert SECTION_TITLE in (folders["broken"] / "README.md").read_text()


def test_wrong_token_is_refused_before_training(hub, outcomes, folders):
    outcome = outcomes["refused"]
    assert "401" in outcome["error"]
    assert "Invalid credentials" in outcome["error"]
    assert outcome["report"] is None
    assert not list(folders["refused"].rglob("*.safetensors"))
    assert "someone/never" not in hub.repositories
