"""One run of one process on one GPU: which devices a call finds, and what each run is told."""

import json

import pytest
from comparison_fakes import Comparison

from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.compare.launch import choose_jobs, list_devices, make_environment

FOUR_GPUS = "0\n1\n2\n3\n"


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Make a machine whose `nvidia-smi` lists these GPUs, or that has none."""
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def make(listing):
        folder = tmp_path / "bin"
        folder.mkdir()
        if listing is not None:
            (tmp_path / "listing").write_text(listing)
            (folder / "nvidia-smi").write_text(f'#!/bin/sh\n[ "$1" = --query-gpu=index ] && cat {tmp_path}/listing\n')
            (folder / "nvidia-smi").chmod(0o755)
            monkeypatch.setenv("PATH", f"{folder}:/usr/bin:/bin")
        else:
            monkeypatch.setenv("PATH", str(folder))

    return make


@pytest.fixture
def plan(tmp_path):
    return read_plan(Comparison(tmp_path).write([{"seed": [1, 2]}]).config)


@pytest.mark.parametrize(
    ("listing", "visible", "wanted", "devices"),
    [
        (None, None, None, None),
        ("", None, None, None),
        (FOUR_GPUS, None, None, ("0", "1", "2", "3")),
        (FOUR_GPUS, "2,3", None, ("2", "3")),  # the user's choice stands, or a cluster's
        (FOUR_GPUS, "GPU-7", None, ("GPU-7",)),
        (FOUR_GPUS, "", None, None),
        (FOUR_GPUS, None, "1, 3,1", ("1", "3")),
        (FOUR_GPUS, "2,3", "0", ("0",)),
        (None, None, "0,1", ("0", "1")),  # of another maker
        (FOUR_GPUS, None, "none", ()),
    ],
)
def test_which_devices_are_handed_out(machine, monkeypatch, plan, listing, visible, wanted, devices):
    machine(listing)
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert list_devices(plan, wanted) == devices


def test_a_plan_on_the_cpu_needs_no_devices(machine, tmp_path):
    machine(FOUR_GPUS)
    plan = read_plan(Comparison(tmp_path).write([{"seed": [1]}], {"use_cpu": True}).config)
    assert list_devices(plan) is None and choose_jobs(plan, None) == 1


def test_every_gpu_gets_a_run_and_every_run_one_gpu(machine, tmp_path):
    """The scripts say which device they were shown; two that ran at the same time never the same."""
    machine(FOUR_GPUS)
    comparison = Comparison(tmp_path).write([{"seed": list(range(8))}], {"pause": 1.0})
    plan = read_plan(comparison.config)
    devices = list_devices(plan)
    jobs = choose_jobs(plan, devices)
    told = comparison.run(jobs=jobs, devices=devices)
    assert (jobs, told.most_active) == (4, 4)
    shown = [entry["env"]["CUDA_VISIBLE_DEVICES"] for entry in comparison.read_journal()]
    assert set(shown) == {"0", "1", "2", "3"} and len(shown) == 8
    spans = []
    for path in comparison.folder.glob("runs/*/record.json"):
        record = json.loads(path.read_text())
        began = next(e["time"] for e in comparison.read_journal() if e["seed"] == str(record["seed"]))
        spans.append((record["hardware"]["CUDA_VISIBLE_DEVICES"], began, began + 3.0))  # three pauses, at least
    for device, began, ended in spans:
        others = [other for other in spans if other != (device, began, ended)]
        assert not any(d == device and b < ended and began < e for d, b, e in others)


def test_one_job_on_a_machine_with_several_gpus_sees_one(machine, tmp_path):
    """With several visible the Trainer would split each batch over them by DataParallel."""
    machine(FOUR_GPUS)
    comparison = Comparison(tmp_path).write([{"seed": [1, 2]}])
    comparison.run(jobs=1, devices=list_devices(read_plan(comparison.config)))
    assert [entry["env"]["CUDA_VISIBLE_DEVICES"] for entry in comparison.read_journal()] == ["0", "0"]


def test_launchers_get_all_devices_and_are_one_at_a_time(monkeypatch, plan):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    launch = "accelerate launch --num_processes 2"
    assert make_environment(launch, {}, 1, 0, ("2", "5"))["CUDA_VISIBLE_DEVICES"] == "2,5"
    assert "CUDA_VISIBLE_DEVICES" not in make_environment(launch, {}, 1, 0, None)
    assert make_environment("python", {}, 1, 0, ())["CUDA_VISIBLE_DEVICES"] == ""
    several = type(plan)(**{**vars(plan), "launch": launch})
    assert (choose_jobs(several, ("0", "1")), choose_jobs(plan, ("0", "1")), choose_jobs(plan, ())) == (1, 2, 1)
