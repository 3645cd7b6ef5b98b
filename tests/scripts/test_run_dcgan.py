"""scripts/run_dcgan.py from end to end on small images: training, figures, resume, processes."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from processes import ROOT, TORCHRUN, start
from safetensors.torch import load_file
from script_runs import load_script, quiet_logging, read_results, read_state, to_argv  # noqa: F401

from hf_v0init.compare.process import judge_output
from hf_v0init.errors import InputError
from hf_v0init.records.checkpoints import find_defect
from hf_v0init.tasks.gan.dcgan import Generator
from hf_v0init.tasks.script_support import NothingToDoError

pytest.importorskip("torchmetrics", reason="torchmetrics is not installed")

SCRIPT = ROOT / "scripts" / "run_dcgan.py"
run_dcgan = load_script("dcgan")


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    """Two classes of 30 images, 8x8, grayscale: a bright half above or below."""
    folder, rng = tmp_path_factory.mktemp("data") / "halves" / "train", np.random.default_rng(0)
    for label, rows in (("above", slice(0, 4)), ("below", slice(4, 8))):
        (folder / label).mkdir(parents=True)
        for number in range(30):
            pixels = rng.integers(0, 80, (8, 8), dtype=np.uint8)
            pixels[rows] += 150
            Image.fromarray(pixels).save(folder / label / f"{number}.png")
    return folder


def make_flags(images, output_dir, **options) -> list[str]:
    flags = {
        "train_dir": images, "output_dir": output_dir, "feature_extractor": "classifier", "use_cpu": True, "seed": 3,
        "base_channels": 8, "latent_size": 4, "per_device_train_batch_size": 8, "num_eval_images": 60, "max_steps": 6,
        "do_train": True, "do_eval": True, "logging_steps": 2, "save_strategy": "no", "disable_tqdm": True,
    }  # fmt: skip
    if options.get("v0_init", "zeros") != "zeros":
        flags["v0_decay"] = "beta2"
    return to_argv(flags | options)


def run(images, output_dir, **options) -> Path:
    run_dcgan.main(make_flags(images, output_dir, **options))
    return Path(output_dir)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    networks = {name: load_file(folder / name / "model.safetensors") for name in ("generator", "discriminator")}
    return {f"{name}.{key}": value for name, weights in networks.items() for key, value in weights.items()}


def assert_equal_weights(one: Path, other: Path) -> None:
    weights = read_weights(other)
    assert all(torch.equal(value, weights[name]) for name, value in read_weights(one).items())


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def read_log(folder: Path) -> list[dict]:
    return read_state(folder)["log_history"]


def read_eval_losses(folder: Path) -> list[float]:
    return [entry["eval_loss"] for entry in read_log(folder) if "eval_loss" in entry]


# ---- what a run leaves behind ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> dict[str, Path]:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "save_strategy": "steps",
        "save_steps": 4,
        "v0_record_run": True,
    }
    folder = tmp_path_factory.mktemp("finished")
    return {name: run(images, folder / name, v0_init=name, **options) for name in ("zeros", "data_driven", "random")}


def test_a_run_leaves_figures_pictures_networks_checkpoints_and_a_record(finished):
    folder, results = finished["data_driven"], read_results(finished["data_driven"])
    assert results["eval_loss"] == results["eval_frechet_distance_classifier"] > 0
    assert results["eval_features"] == "classifier" and results["eval_samples"] == 60 and "eval_fid" not in results
    assert Generator.from_pretrained(folder / "generator")(torch.zeros(2, 4)).shape == (2, 1, 8, 8)
    for step in (0, 3, 6):
        with Image.open(folder / "samples" / f"step_{step}.png") as picture:
            assert picture.mode == "L" and picture.size == (8 * 34, 8 * 34)
    assert find_defect(folder / "checkpoint-4") is find_defect(folder / "checkpoint-6") is None
    report = read_json(folder / "v0_init.json")
    assert report["strategy"] == "data_driven" and report["estimator"] == "minibatch" and report["max_steps"] == 6
    assert set(report["networks"]) == {"generator", "discriminator"}
    assert not (finished["zeros"] / "v0_init.json").exists()
    for name in ("generator", "discriminator"):
        card = (folder / name / "README.md").read_text()
        assert "- hf_v0init\n" in card and "--v0_scale 1" in card and "--v0_estimator minibatch" in card
        assert read_json(folder / name / "v0_init.json") == report["networks"][name]
    assert "started at zero" in (finished["zeros"] / "generator" / "README.md").read_text()


def test_the_log_is_a_trainers_and_can_be_compared(finished):
    """And runs with another v0 start alike, and go another way."""
    folder = finished["data_driven"]
    steps = {key: [entry["step"] for entry in read_log(folder) if key in entry] for key in ("loss", "eval_loss")}
    assert (read_state(folder)["global_step"], steps["loss"]) == (6, [2, 4, 6])
    assert list(dict.fromkeys(steps["eval_loss"])) == [0, 3, 6]
    assert read_results(folder)["eval_loss"] == read_eval_losses(folder)[-1]
    log = [json.loads(line) for line in (folder / "run_log.jsonl").read_text().splitlines()]
    losses = [entry for entry in log if "loss" in entry]
    assert [entry["step"] for entry in losses] == [2, 4, 6]
    for entry in losses:
        assert entry["loss"] == pytest.approx(entry["discriminator_loss"] + entry["generator_loss"])
    clocks = [entry["train_seconds"] for entry in log]
    assert clocks == sorted(clocks)
    assert judge_output(folder, "eval_loss")[0] in ("finished", "diverged")
    zeros, *others = (read_json(each / "fingerprint.json") for each in finished.values())
    assert len(zeros["batches"]) == 4 and others == [zeros, zeros]
    starts = [read_eval_losses(each)[0] for each in finished.values()]
    assert starts == starts[:1] * 3
    zeros, random = (read_weights(finished[name])["generator.layers.0.weight"] for name in ("zeros", "random"))
    assert not torch.equal(zeros, random)


def test_a_run_that_diverged_is_judged_so(images, tmp_path):
    run(images, tmp_path, learning_rate=1e30, max_steps=20, v0_record_run=True)
    assert judge_output(tmp_path, "eval_loss")[0] == "diverged"


# ---- resume ------------------------------------------------------------------------------------------------------------


def strip_clocks(entries: list[dict]) -> list[dict]:
    clocks = ("seconds", "runtime", "per_second", "train_loss")
    return [{k: v for k, v in entry.items() if not k.endswith(clocks)} for entry in entries]


@pytest.mark.parametrize("v0", [{}, {"v0_decay": "linear", "v0_decay_steps": 6, "v0_estimation_steps": 2}])
def test_a_resumed_run_is_the_uninterrupted_one_and_v0_is_not_written_again(images, tmp_path, capsys, v0):
    """Cut after step 4, within a logging interval and an epoch and, where it is linear, v0's decay; with other flags afterwards."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4}
    options |= {"v0_init": "data_driven", "v0_record_run": True, **v0}
    name, stored, value = ("v0_seed", 3, 8) if v0 else ("v0_scale", 1.0, 7.0)
    whole, cut = run(images, tmp_path / "whole", **options), tmp_path / "cut"
    shutil.copytree(whole, cut)
    for folder in ("checkpoint-6", "generator", "discriminator"):
        shutil.rmtree(cut / folder)
    (cut / "train_results.json").unlink()
    capsys.readouterr()
    run(images, cut, **options | {name: value})
    said = capsys.readouterr().out
    assert_equal_weights(whole, cut)
    assert "v0 settings differ" in said and f"{name[3:]}: {stored} -> {value}" in said
    for file in ("v0_init.json", "fingerprint.json"):
        assert (cut / file).read_text() == (whole / file).read_text()
    logs = [[json.loads(line) for line in (each / "run_log.jsonl").read_text().splitlines()] for each in (cut, whole)]
    assert strip_clocks(logs[0]) == strip_clocks(logs[1])
    assert strip_clocks(read_log(cut)) == strip_clocks(read_log(whole))


def test_the_evaluation_that_is_left_is_made_without_training(images, finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished["random"], folder)
    (folder / "eval_results.json").unlink()
    run(images, folder, v0_init="random")
    assert "frechet distance classifier" in capsys.readouterr().out
    measured = read_json(folder / "eval_results.json")["eval_loss"]
    assert measured == pytest.approx(read_eval_losses(folder)[-1], rel=1e-6)
    assert_equal_weights(folder, finished["random"])
    with pytest.raises(NothingToDoError) as ended:
        run(images, folder, v0_init="random")
    assert "--overwrite_output_dir" in str(ended.value) and "--model_name_or_path" not in str(ended.value)
    with pytest.raises(InputError, match=r"is of another run: base_channels was 8 and is now 4"):
        run(images, folder, v0_init="random", base_channels=4)
    with pytest.raises(InputError, match=r"learning_rate was 0\.0002 and is now 0\.1"):
        run(images, folder, v0_init="random", learning_rate=0.1)


def test_overwriting_removes_old_checkpoints_and_the_limit_holds(images, tmp_path):
    options = {"save_strategy": "steps", "do_eval": False}
    run(images, tmp_path, save_steps=2, save_total_limit=2, **options)
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-4", "checkpoint-6"]
    run(images, tmp_path, save_steps=3, max_steps=3, overwrite_output_dir=True, **options)
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


# ---- optimizers, schedules, processes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"v0_optimizer": "torch.optim:RMSprop", "optim_args": "alpha=0.99"},
        {"optim": "adamw_torch", "warmup_steps": 2, "max_grad_norm": 1.0},
        {"v0_optimizer": "torch.optim:RAdam", "untuned_warmup": "linear"},
        {"bf16": True},
        {"v0_init": "random", "v0_preset": "paper"},
    ],
    ids=["rmsprop", "warmup", "untuned", "bf16", "preset"],
)
def test_optimizers_schedules_and_precision(images, tmp_path, options):
    options = {"v0_init": "data_driven", "max_steps": 2, "do_eval": False, "logging_steps": 1} | options
    folder = run(images, tmp_path, **options)
    assert all(value.isfinite().all() for value in read_weights(folder).values())
    rates = [entry["learning_rate"] for entry in read_log(folder)[:2]]
    if "warmup_steps" in options:
        assert rates == pytest.approx([1e-4, 2e-4])  # after steps 1 and 2
    elif "untuned_warmup" in options:
        assert rates == pytest.approx([2e-4 * 0.0005 * 2, 2e-4 * 0.0005 * 3])
    else:
        assert rates == [2e-4, 2e-4]


def test_the_committed_file_runs_as_it_stands_and_keeps_the_plateau_for_two_thirds_of_training(images, tmp_path):
    flags = {
        "train_dir": images,
        "output_dir": tmp_path,
        "image_size": 8,
        "base_channels": 8,
        "max_steps": 9,
        "logging_steps": 1,
    }
    flags |= {
        "per_device_train_batch_size": 8,
        "num_eval_images": 60,
        "lr_scheduler_type": "linear",
        "eval_strategy": "no",
    }
    run_dcgan.main([str(ROOT / "configs" / "image_generation" / "digits_dcgan.yaml"), *to_argv(flags)])
    report = read_json(tmp_path / "v0_init.json")
    assert (report["decay"], report["decay_steps"]) == ("linear", 6)
    rates = [entry["learning_rate"] for entry in read_log(tmp_path) if "learning_rate" in entry]
    assert rates == pytest.approx([2e-4 * min(1.0, (9 - made) / 3) for made in range(1, 10)])


def test_color_images_of_32_pixels_without_classes(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{number}.png")
    with pytest.raises(InputError, match="two classes or more"):
        run(tmp_path / "flat", tmp_path / "out", max_steps=1)
    folder = run(tmp_path / "flat", tmp_path / "out", do_eval=False, max_steps=1, v0_init="first_gradient")
    assert Generator.from_pretrained(folder / "generator")(torch.zeros(2, 4)).shape == (2, 3, 32, 32)


def test_a_data_set_by_name(images, tmp_path):
    """A folder in the form of a Hub repository."""
    paths = sorted(images.glob("*/*.png"))
    columns = {"img": [{"path": None, "bytes": path.read_bytes()} for path in paths]}
    columns["label"] = [path.parent.name for path in paths]
    features = datasets.Features({"img": datasets.Image(), "label": datasets.ClassLabel(names=["above", "below"])})
    (tmp_path / "hub").mkdir()
    datasets.Dataset.from_dict(columns, features).to_parquet(str(tmp_path / "hub" / "train.parquet"))
    run(None, tmp_path / "out", dataset_name=tmp_path / "hub", max_steps=1, cache_dir=tmp_path / "cache")
    assert read_results(tmp_path / "out")["eval_loss"] > 0


@pytest.mark.slow
def test_two_processes_train_one_model_with_one_v0(images, tmp_path):
    """Each network's v0 is that of one process for the same images, but for the batches they are dealt in."""
    options = {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_stats_batch_size": 4, "v0_record_run": True}
    options |= {"per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 3}

    def launch(folder, **more):
        return start(*TORCHRUN, SCRIPT, *make_flags(images, folder, **(options | more)))

    done = launch(tmp_path / "two")
    assert done.returncode == 0, done.stderr[-3000:]
    one = run(images, tmp_path / "one", **(options | {"per_device_train_batch_size": 8}))
    reports = [read_json(folder / "v0_init.json") for folder in (one, tmp_path / "two")]
    assert reports[1]["num_processes"] == 2
    for name in ("generator", "discriminator"):
        mine, theirs = (report["networks"][name] for report in reports)
        assert theirs["num_samples"] == mine["num_samples"] == 60
        assert theirs["v0_mean"] == pytest.approx(mine["v0_mean"], rel=1e-4)
        for parameter, figures in mine["parameters"].items():
            assert theirs["parameters"][parameter]["mean"] == pytest.approx(figures["mean"], rel=1e-4)
    assert read_results(tmp_path / "two")["eval_loss"] > 0
    whole = read_weights(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    (tmp_path / "two" / "train_results.json").unlink()
    assert launch(tmp_path / "two").returncode == 0  # resumes at step 3
    assert all(torch.equal(value, whole[name]) for name, value in read_weights(tmp_path / "two").items())
    refused = launch(tmp_path / "few", per_device_train_batch_size=31)
    assert refused.returncode != 0 and "too few for 2 process(es)" in refused.stderr
