"""scripts/run_dcgan.py from end to end on small images: training, figures, resume, processes, and what it refuses."""

import json
import shutil
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, TORCHRUN, load_script, quiet_logging, start, to_argv  # noqa: F401

from hf_v0init.compare.process import judge_output
from hf_v0init.errors import InputError
from hf_v0init.records.checkpoints import find_defect
from hf_v0init.tasks.gan.dcgan import Generator

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
        "train_dir": images,
        "output_dir": output_dir,
        "feature_extractor": "classifier",
        "use_cpu": True,
        "seed": 3,
    }
    flags |= {
        "base_channels": 8,
        "latent_size": 4,
        "per_device_train_batch_size": 8,
        "num_eval_images": 60,
        "max_steps": 6,
    }
    flags |= {"do_train": True, "do_eval": True, "logging_steps": 2, "save_strategy": "no", "disable_tqdm": True}
    if options.get("v0_init", "zeros") != "zeros":
        flags["v0_decay"] = "beta2"
    return to_argv(flags | options)


def run(images, output_dir, **options) -> Path:
    run_dcgan.main(make_flags(images, output_dir, **options))
    return Path(output_dir)


def read_weights(folder: Path) -> dict[str, torch.Tensor]:
    return {
        f"{name}.{key}": value
        for name in ("generator", "discriminator")
        for key, value in load_file(folder / name / "model.safetensors").items()
    }


def read_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# ---- what a run leaves behind ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(images, tmp_path_factory) -> dict[str, Path]:
    options = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "v0_record_run": True,
        "save_strategy": "steps",
        "save_steps": 4,
    }
    folder = tmp_path_factory.mktemp("finished")
    return {name: run(images, folder / name, v0_init=name, **options) for name in ("zeros", "data_driven", "random")}


def test_a_run_leaves_figures_pictures_networks_and_a_record(finished, capsys):
    folder = finished["data_driven"]
    results = json.loads((folder / "all_results.json").read_text())
    assert results["eval_loss"] == results["eval_frechet_distance_classifier"] > 0
    assert results["eval_features"] == "classifier" and results["eval_samples"] == 60
    assert "eval_fid" not in results
    generator = Generator.from_pretrained(folder / "generator")
    assert generator(torch.zeros(2, 4)).shape == (2, 1, 8, 8)
    for step in (0, 3, 6):
        with Image.open(folder / "samples" / f"step_{step}.png") as picture:
            assert picture.mode == "L" and picture.size == (8 * 34, 8 * 34)
    report = json.loads((folder / "v0_init.json").read_text())
    assert report["strategy"] == "data_driven" and report["estimator"] == "minibatch" and report["max_steps"] == 6
    assert set(report["networks"]) == {"generator", "discriminator"}
    assert not (finished["zeros"] / "v0_init.json").exists()
    for name in ("generator", "discriminator"):
        card = (folder / name / "README.md").read_text()
        assert "- hf_v0init\n" in card and "--v0_scale 1" in card and "--v0_estimator minibatch" in card
        assert json.loads((folder / name / "v0_init.json").read_text()) == report["networks"][name]
    assert "started at zero" in (finished["zeros"] / "generator" / "README.md").read_text()


def read_eval_losses(folder: Path) -> list[float]:
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [entry["eval_loss"] for entry in history if "eval_loss" in entry]


def test_the_log_is_a_trainers_and_can_be_compared(finished):
    folder = finished["data_driven"]
    state = json.loads((folder / "trainer_state.json").read_text())
    steps = {key: [entry["step"] for entry in state["log_history"] if key in entry] for key in ("loss", "eval_loss")}
    assert (state["global_step"], steps["loss"]) == (6, [2, 4, 6])
    assert list(dict.fromkeys(steps["eval_loss"])) == [0, 3, 6]
    assert json.loads((folder / "all_results.json").read_text())["eval_loss"] == read_eval_losses(folder)[-1]
    assert json.loads((folder / "v0_init.json").read_text())["strategy"] == "data_driven"
    log = read_lines(folder / "run_log.jsonl")
    for entry in log:
        if "loss" in entry:
            assert entry["loss"] == pytest.approx(entry["discriminator_loss"] + entry["generator_loss"])
        assert entry["train_seconds"] <= entry["seconds"]
    assert [entry["step"] for entry in log if "loss" in entry] == [2, 4, 6]
    assert judge_output(folder, "eval_loss")[0] in ("finished", "diverged")
    fingerprints = {name: json.loads((each / "fingerprint.json").read_text()) for name, each in finished.items()}
    assert fingerprints["zeros"] == fingerprints["data_driven"] == fingerprints["random"]
    assert len(fingerprints["zeros"]["batches"]) == 4


def test_v0_changes_the_run_and_the_start_is_the_same(finished):
    weights = {name: read_weights(folder) for name, folder in finished.items()}
    starts = [read_eval_losses(folder)[0] for folder in finished.values()]
    assert starts[0] == starts[1] == starts[2]
    assert not torch.equal(
        weights["zeros"]["generator.layers.0.weight"], weights["random"]["generator.layers.0.weight"]
    )


def test_checkpoints_are_whole(finished):
    for step in (4, 6):
        folder = finished["data_driven"] / f"checkpoint-{step}"
        assert find_defect(folder) is None


# ---- resume ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("v0", [{}, {"v0_decay": "linear", "v0_decay_steps": 6, "v0_estimation_steps": 2}])
def test_a_resumed_run_is_the_uninterrupted_one_and_v0_is_not_written_again(images, tmp_path, capsys, v0):
    """Cut after step 4, within a logging interval and an epoch and, where it is linear, v0's decay; with other flags afterwards."""
    options = {"eval_strategy": "steps", "eval_steps": 3, "logging_steps": 3, "save_strategy": "steps", "save_steps": 4}
    options |= v0
    changed = {"v0_seed": 8} if v0 else {"v0_scale": 7.0}
    whole = run(images, tmp_path / "whole", v0_init="data_driven", v0_record_run=True, **options)
    cut = tmp_path / "cut"
    shutil.copytree(whole, cut)
    for name in ("checkpoint-6", "generator", "discriminator"):
        shutil.rmtree(cut / name)
    (cut / "train_results.json").unlink()
    capsys.readouterr()
    run(images, cut, v0_init="data_driven", v0_record_run=True, **options | changed)
    said = capsys.readouterr().out
    for name, value in read_weights(whole).items():
        assert torch.equal(value, read_weights(cut)[name]), name
    (name,) = changed
    assert "v0 settings differ" in said and f"{name}: None -> {changed[name]}" in said
    assert (cut / "v0_init.json").read_text() == (whole / "v0_init.json").read_text()
    assert (cut / "fingerprint.json").read_text() == (whole / "fingerprint.json").read_text()

    def strip(entries):
        clocks = ("seconds", "train_seconds", "train_runtime", "eval_runtime", "train_samples_per_second")
        clocks += ("train_steps_per_second", "train_loss")
        return [{k: v for k, v in entry.items() if k not in clocks} for entry in entries]

    assert strip(read_lines(cut / "run_log.jsonl")) == strip(read_lines(whole / "run_log.jsonl"))
    states = [json.loads((folder / "trainer_state.json").read_text())["log_history"] for folder in (cut, whole)]
    assert strip(states[0]) == strip(states[1])


def test_the_evaluation_that_is_left_is_made_without_training(images, finished, tmp_path, capsys):
    folder = tmp_path / "copy"
    shutil.copytree(finished["random"], folder)
    (folder / "eval_results.json").unlink()
    run(images, folder, v0_init="random")
    assert "eval: Frechet distance (classifier)" in capsys.readouterr().out
    measured = json.loads((folder / "eval_results.json").read_text())["eval_loss"]
    assert measured == pytest.approx(read_eval_losses(folder)[-1], rel=1e-6)
    assert all(torch.equal(value, read_weights(folder)[n]) for n, value in read_weights(finished["random"]).items())


def test_broken_checkpoints_are_passed_over_and_other_sizes_refused(images, finished, tmp_path):
    cut = tmp_path / "cut"
    shutil.copytree(finished["data_driven"], cut)
    (cut / "train_results.json").unlink()
    (cut / "checkpoint-6" / "_save_in_progress").write_text("")  # cut off while it was saved
    with pytest.raises(InputError, match=r"checkpoint-4 is of another run: base_channels was .* and is now 4"):
        run(images, cut, base_channels=4)
    with pytest.raises(InputError, match=r"checkpoint-4 is of another run: v0_optimizer was None"):
        run(images, cut, v0_optimizer="torch.optim:SGD")
    with pytest.raises(InputError, match=r"checkpoint-6: .*the newest valid checkpoint is .*checkpoint-4"):
        run(images, cut, resume_from_checkpoint=cut / "checkpoint-6")


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
        {"v0_optimizer": "torch.optim:Adam", "weight_decay": 0.01},
        {"v0_optimizer": "torch.optim:RMSprop", "optim_args": "alpha=0.99"},
        {"optim": "adamw_torch", "warmup_steps": 2, "max_grad_norm": 1.0},
        {"v0_optimizer": "torch.optim:RAdam", "untuned_warmup": "linear"},
        {"bf16": True},
    ],
    ids=["adam", "rmsprop", "warmup", "untuned", "bf16"],
)
def test_optimizers_schedules_and_precision(images, tmp_path, options):
    folder = run(images, tmp_path, v0_init="data_driven", max_steps=2, do_eval=False, logging_steps=1, **options)
    assert all(value.isfinite().all() for value in read_weights(folder).values())
    rates = [e["learning_rate"] for e in json.loads((folder / "trainer_state.json").read_text())["log_history"][:2]]
    if "warmup_steps" in options:
        assert rates == pytest.approx([1e-4, 2e-4])  # after steps 1 and 2
    elif "untuned_warmup" in options:
        assert rates == pytest.approx([2e-4 * 0.0005 * 2, 2e-4 * 0.0005 * 3])
    else:
        assert rates == [2e-4, 2e-4]


def test_the_committed_file_runs_as_it_stands_and_keeps_the_plateau_for_a_third_of_training(images, tmp_path):
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
    report = json.loads((tmp_path / "v0_init.json").read_text())
    assert (report["decay"], report["decay_steps"]) == ("linear", 3)
    history = json.loads((tmp_path / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "learning_rate" in entry]
    assert rates == pytest.approx([2e-4 * min(1.0, (9 - made) / 6) for made in range(1, 10)])


def test_color_images_of_32_pixels_without_classes(tmp_path):
    rng = np.random.default_rng(1)
    (tmp_path / "flat").mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "flat" / f"{number}.png")
    folder = run(tmp_path / "flat", tmp_path / "out", do_eval=False, max_steps=1, v0_init="first_gradient")
    assert Generator.from_pretrained(folder / "generator")(torch.zeros(2, 4)).shape == (2, 3, 32, 32)


@pytest.mark.parametrize("labelled", [True, False])
def test_a_data_set_by_name(images, tmp_path, labelled):
    """A folder in the form of a Hub repository."""
    paths = sorted(images.glob("*/*.png"))
    columns = {"img": [{"path": None, "bytes": path.read_bytes()} for path in paths]}
    features = {"img": datasets.Image()}
    if labelled:
        columns["label"] = [path.parent.name for path in paths]
        features["label"] = datasets.ClassLabel(names=["above", "below"])
    (tmp_path / "hub").mkdir()
    rows = datasets.Dataset.from_dict(columns, features=datasets.Features(features))
    rows.to_parquet(str(tmp_path / "hub" / "train.parquet"))
    flags = [
        flag
        for flag in make_flags(images, tmp_path / "out", max_steps=1, cache_dir=tmp_path / "cache")
        if "train_dir" not in flag
    ]
    flags.append(f"--dataset_name={tmp_path / 'hub'}")
    if not labelled:
        with pytest.raises(InputError, match="two classes or more"):
            run_dcgan.main(flags)
        flags.append("--do_eval=false")
    run_dcgan.main(flags)
    assert (tmp_path / "out" / "generator" / "model.safetensors").is_file()


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
    reports = [json.loads((folder / "v0_init.json").read_text()) for folder in (one, tmp_path / "two")]
    assert reports[1]["num_processes"] == 2
    for name in ("generator", "discriminator"):
        mine, theirs = (report["networks"][name] for report in reports)
        assert theirs["num_samples"] == mine["num_samples"] == 60
        assert theirs["v0_mean"] == pytest.approx(mine["v0_mean"], rel=1e-4)
        for parameter, figures in mine["parameters"].items():
            assert theirs["parameters"][parameter]["mean"] == pytest.approx(figures["mean"], rel=1e-4)
    assert json.loads((tmp_path / "two" / "all_results.json").read_text())["eval_loss"] > 0
    whole = read_weights(tmp_path / "two")
    shutil.rmtree(tmp_path / "two" / "checkpoint-6")
    (tmp_path / "two" / "train_results.json").unlink()
    assert launch(tmp_path / "two").returncode == 0  # resumes at step 3
    assert all(torch.equal(value, whole[name]) for name, value in read_weights(tmp_path / "two").items())
    refused = launch(tmp_path / "few", per_device_train_batch_size=31)
    assert refused.returncode != 0 and "too few for 2 process(es)" in refused.stderr


# ---- refusals ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def broken(tmp_path):
    """Folders of images with something wrong, by name."""

    def make(name: str, sizes=((8, 8), (8, 8)), spoil=None) -> Path:
        folder = tmp_path / name
        for number, size in enumerate(sizes):
            (folder / f"class{number}").mkdir(parents=True)
            Image.new("L", size).save(folder / f"class{number}" / "a.png")
        if spoil is not None:
            spoil(folder)
        return folder

    def cut(folder):
        path = folder / "class1" / "a.png"
        path.write_bytes(path.read_bytes()[:40])

    (tmp_path / "empty").mkdir()
    return {
        "cut": make("cut", spoil=cut),
        "text": make("text", spoil=lambda folder: (folder / "class0" / "b.png").write_text("no image")),
        "two sizes": make("two_sizes", ((8, 8), (16, 16))),
        "odd size": make("odd", ((28, 28), (28, 28))),
        "not square": make("oblong", ((8, 16), (8, 16))),
        "one class": make("one", ((8, 8),), spoil=lambda f: [Image.new("L", (8, 8)).save(f / "class0" / f"{i}.png") for i in range(9)]),
        "empty": tmp_path / "empty",
        "missing": tmp_path / "nowhere",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("cut", ["class1/a.png", "cannot be read as an image"]),
        ("text", ["class0/b.png", "cannot be read as an image"]),
        ("two sizes", ["is 16x16", "8x8", "--image_size"]),
        ("odd size", ["image_size=28", "8, 16, 32, 64, 128"]),
        ("not square", ["8x16", "--image_size"]),
        ("one class", ["two classes or more"]),
        ("empty", ["has no images"]),
        ("missing", ["no such folder"]),
    ],
)
def test_images_that_cannot_be_used_are_refused(broken, tmp_path, name, words):
    with pytest.raises(InputError) as caught:
        run(broken[name], tmp_path / "out", per_device_train_batch_size=2)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v0_optimizer": "torch.optim:SGD", "v0_init": "random"}, ["no second moment"]),
        ({"optim": "schedule_free_adamw"}, ["AdamWScheduleFree", "two sets of weights"]),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, ["constant_with_warmup"]),
        ({"warmup_steps": 5, "untuned_warmup": "linear"}, ["two warmups"]),
        ({"untuned_warmup": "trust_radius"}, ["--untuned_warmup=trust_radius", "a GAN has two"]),
        (
            {"v0_init": "random", "v0_decay": "linear", "warmup_steps": 5},
            ["v0_init=random", "warmup_steps=5", "two warmups"],
        ),
        ({"per_device_train_batch_size": 61}, ["60 training images are too few"]),
        ({"gradient_accumulation_steps": 4}, ["--gradient_accumulation_steps=4", "no effect"]),
        ({"fp16": True}, ["--fp16=True", "no effect"]),
        ({"image_size": 30}, ["image_size=30"]),
        ({"do_train": False}, ["nothing to do"]),
    ],
    ids=str,
)
def test_flags_that_cannot_be_used_are_refused(images, tmp_path, options, words):
    with pytest.raises(InputError) as caught:
        run(images, tmp_path / "out", **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_run_that_diverged_is_judged_so(images, tmp_path):
    run(images, tmp_path, learning_rate=1e30, max_steps=20, v0_record_run=True)
    assert judge_output(tmp_path, "eval_loss")[0] == "diverged"


def test_the_command_line_ends_with_status_2_and_one_line(images, tmp_path):
    done = start(SCRIPT, *make_flags(images, tmp_path / "out", image_size=30))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: image_size=30")
