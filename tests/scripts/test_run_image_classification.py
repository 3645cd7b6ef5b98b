"""scripts/run_image_classification.py from end to end on small images: what it learns and measures, and folders in use."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_sets import CLASSES, write_image_folder
from PIL import Image
from processes import ROOT, TORCHRUN, start
from safetensors.torch import load_file
from script_runs import (  # noqa: F401
    SMALL_RUN,
    assert_equal_weights,
    load_script,
    of_trained,
    quiet_logging,
    read_results,
    read_state,
    to_argv,
)  # fmt: skip
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_v0init.errors import InputError
from hf_v0init.tasks.images.folders import load_image_folder
from hf_v0init.tasks.script_support import NothingToDoError

SCRIPT = ROOT / "scripts" / "run_image_classification.py"
CONFIGS = ROOT / "configs" / "image_classification"
script = load_script("images")
RESNET = {
    "model_type": "cifar_resnet", "layer_type": "basic", "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1],
}  # fmt: skip
VIT = {
    "model_type": "vit", "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """Folders of three classes: 30 images for training, 12 for validation, 9 for test; and small models."""
    folder = tmp_path_factory.mktemp("images")
    for seed, (role, per_class) in enumerate({"train": 10, "validation": 4, "test": 3}.items()):
        write_image_folder(folder / role, per_class, seed=seed)
    for name, settings in (("resnet", RESNET), ("vit", VIT)):
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def flags(data, tmp_path):
    """The flags of a small run, as a dict that a test changes; None leaves a flag out."""
    base = {
        **{f"{role}_dir": data / role for role in ("train", "validation", "test")}, "config_name": data / "resnet.json",
        "log_level": "error", "logging_steps": 1, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 5, "do_train": True,
        "max_steps": 6, "save_strategy": "no",
    }  # fmt: skip
    return lambda name="out", **changes: to_argv(SMALL_RUN | base | {"output_dir": tmp_path / name} | changes)


@pytest.fixture
def run(flags, tmp_path):
    """Run the script; its output folder and its results."""

    def run(name: str = "out", **changes) -> tuple[Path, dict]:
        script.main(flags(name, **changes))
        return tmp_path / name, read_results(tmp_path / name)

    return run


def score_by_hand(folder: Path, images_folder: Path) -> dict:
    """Loss and accuracy of a saved model over a folder: image by image, through what was saved beside it."""
    network = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    losses, hits = [], []
    for path in sorted(images_folder.glob("*/*.png")):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = network(pixel_values=pixels).logits[0].double()
        label = network.config.label2id[path.parent.name]
        losses.append(functional.cross_entropy(logits, torch.tensor(label)).item())
        hits.append(int(logits.argmax()) == label)
    return {"loss": np.mean(losses), "accuracy": np.mean(hits)}


def test_trains_evaluates_and_saves(run, flags, data, tmp_path, capsys):
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({"lr_decay_epochs": [6, 12], "max_steps": 5}))
    out = tmp_path / "out"
    script.main([
        str(tmp_path / "flags.yaml"), *flags(
            do_eval=True, do_predict=True, max_steps=60, learning_rate=3e-2, v0_init="data_driven", v0_decay="beta2",
            label_smoothing_factor=0.1, random_crop="pad", crop_padding=1, random_flip=True, lr_scheduler_type="constant",
            lr_decay_factor=0.2, image_mode="RGB", adam_beta2=0.98,
        )
    ])  # fmt: skip
    results = read_results(out)
    assert results["eval_accuracy"] > 0.8 and results["predict_accuracy"] > 0.8  # chance is a third
    counted = (results["train_samples"], results["eval_num_images"], results["predict_num_images"])
    assert counted == (30, 12, 9) and "eval_top5_accuracy" not in results  # of three classes
    for role, folder in (("eval", "validation"), ("predict", "test")):
        expected = score_by_hand(out, data / folder)
        found = {name: results[f"{role}_{name}"] for name in expected}
        assert found == pytest.approx(expected, rel=1e-4)
    assert f"accuracy {results['predict_accuracy']:.4f}" in capsys.readouterr().out

    rates = [entry["learning_rate"] for entry in read_state(out)["log_history"] if "loss" in entry]
    assert rates == pytest.approx([3e-2] * 24 + [6e-3] * 24 + [1.2e-3] * 12)  # 4 steps per epoch
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", CLASSES, strict=True)) and config["num_channels"] == 3
    report = json.loads((out / "v0_init.json").read_text())
    assert (report["strategy"], report["estimator"], report["estimation_steps"]) == ("data_driven", "minibatch", 1)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "trained from scratch" in card and str(tmp_path) not in card

    # evaluated alone, by the settings saved with it
    _, alone = run("alone", **of_trained(out, train_dir=None))
    for name in ("eval_loss", "eval_accuracy"):
        assert alone[name] == pytest.approx(results[name])


def test_training_loss_is_the_smoothed_one_and_that_of_the_pass(run, data):
    """Without a step's worth of change, both are the mean over the same images of the same function."""
    out, _ = run(
        v0_init="data_driven", v0_estimator="per_sample", learning_rate=0.0, label_smoothing_factor=0.3, max_steps=1,
        per_device_train_batch_size=30, v0_stats_batch_size=15, config_name=data / "vit.json",
    )  # fmt: skip
    report = json.loads((out / "v0_init.json").read_text())
    assert report["mean_loss"] == pytest.approx(read_state(out)["log_history"][0]["loss"], rel=1e-4)
    network = AutoModelForImageClassification.from_pretrained(out).eval()
    processor = AutoImageProcessor.from_pretrained(out)
    images = load_image_folder(str(data / "train"), role="train")
    pixels = [processor(Image.open(row["image"]["path"]), return_tensors="pt")["pixel_values"] for row in images]
    with torch.no_grad():
        logits = network(pixel_values=torch.cat(pixels)).logits
    expected = functional.cross_entropy(logits, torch.tensor(images["label"]), label_smoothing=0.3)
    assert report["mean_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_resume_in_the_middle_of_an_epoch_equals_a_straight_run(run, tmp_path):
    """Augmentation, BatchNorm statistics, steps of the learning rate and Adam's state, bit for bit."""
    changes = {
        "max_steps": 10, "save_strategy": "steps", "save_steps": 6, "random_crop": "resize", "random_flip": True, "image_size": 8,
        "v0_init": "data_driven", "lr_decay_epochs": [1, 2],
    }  # fmt: skip
    straight, _ = run("straight", **changes)
    (tmp_path / "stopped").mkdir()
    (straight / "checkpoint-6").rename(tmp_path / "stopped" / "checkpoint-6")
    assert_equal_weights(straight, run("stopped", **changes)[0])


def test_a_data_set_by_name_a_split_off_and_a_vit(run, data, tmp_path):
    """A folder stands for the Hub: `datasets` takes both by the same argument."""
    for role in ("train", "test"):
        write_image_folder(tmp_path / "named" / role, 10, size=(9, 12), channels=3)
    out, results = run(
        train_dir=None, validation_dir=None, test_dir=None, dataset_name=tmp_path / "named", validation_split_percentage=20,
        do_eval=True, do_predict=True, config_name=data / "vit.json", image_size=8, crop_fraction=0.9, max_train_samples=20,
        max_predict_samples=7, cache_dir=tmp_path / "cache", v0_init="data_driven", v0_estimator="per_sample", max_steps=2,
    )  # fmt: skip
    counted = (results["train_samples"], results["eval_num_images"], results["predict_num_images"])
    assert counted == (20, 6, 7)
    config, processor, report = (
        json.loads((out / name).read_text()) for name in ("config.json", "preprocessor_config.json", "v0_init.json")
    )
    assert (config["image_size"], config["num_channels"], len(config["id2label"])) == (8, 3, 3)
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 9}, {"height": 8, "width": 8})
    assert report["stats_batch_size"] == 1  # no BatchNorm


def test_a_pretrained_model_gets_a_new_head_or_keeps_its_numbering(run, data, tmp_path):
    names = {0: "bee", 1: "cat", 2: "ant"}
    weights = {}
    for folder, labels in (("same", names), ("other", {0: "dog", 1: "eel"})):
        numbers = {name: number for number, name in labels.items()}
        config = ViTConfig(**VIT, image_size=8, num_channels=1, id2label=labels, label2id=numbers)
        ViTForImageClassification(config).save_pretrained(tmp_path / folder)
        changes = {"config_name": None, "model_name_or_path": tmp_path / folder, "learning_rate": 0.0, "max_steps": 1}
        out, results = run(f"{folder}2", **changes, do_eval=True)
        weights[folder] = load_file(tmp_path / folder / "model.safetensors"), load_file(out / "model.safetensors")
        if folder == "same":
            assert results["eval_loss"] == pytest.approx(score_by_hand(out, data / "validation")["loss"], rel=1e-4)
            found = json.loads((out / "config.json").read_text())["id2label"]
            assert found == {str(number): name for number, name in names.items()}
    same, head = weights["same"]
    assert torch.equal(same["classifier.weight"], head["classifier.weight"])
    other, head = weights["other"]
    assert head["classifier.weight"].shape == (3, 16)
    assert all(torch.equal(other[name], head[name]) for name in other if not name.startswith("classifier"))


# ---- folders in use ----------------------------------------------------------------------------------------------------


@pytest.fixture
def run_vit(run, data):
    vit = {"config_name": data / "vit.json", "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3}
    return lambda name="out", **changes: run(name, **vit | {"lr_scheduler_type": "constant", "do_eval": True} | changes)


def test_a_finished_folder_is_evaluated_or_begun_again_but_not_continued(run_vit):
    out, together = run_vit(v0_init="data_driven")
    card = (out / "README.md").read_text()
    assert "model-index:" in card and f"value: {round(together['eval_accuracy'], 4)}" in card
    with pytest.raises(NothingToDoError, match="finished at step 6; nothing to do"):
        run_vit(v0_init="data_driven")

    # the evaluation that is left is of the trained model, and not under the name of another
    run_vit("apart", v0_init="data_driven", do_eval=None)
    for name in ("out", "apart"):
        with pytest.raises(
            InputError, match=r"learning_rate was 0.003 and is now 0.001; v0_init was .*--overwrite_output_dir"
        ):
            run_vit(name, v0_init="random", learning_rate=1e-3)
    with pytest.raises(InputError, match="finished at step 6 with other flags: max_steps was 6 and is now 4"):
        run_vit("apart", v0_init="data_driven", max_steps=4)
    _, left = run_vit("apart", v0_init="data_driven")
    assert left["eval_loss"] == together["eval_loss"]

    # results of an earlier training do not outlive it
    assert {"eval_results.json", "v0_init.json"} <= {path.name for path in out.iterdir()}
    _, results = run_vit(overwrite_output_dir=True, do_eval=None, max_steps=2, save_strategy="no")
    assert not any(name.startswith("eval_") for name in results)
    names = {path.name for path in out.iterdir()}
    assert not names & {"eval_results.json", "v0_init.json", "checkpoint-3", "checkpoint-6"}
    assert "started at zero" in (out / "README.md").read_text()


def test_the_best_model_is_loaded_whole(run_vit):
    best = {"eval_strategy": "steps", "load_best_model_at_end": True, "metric_for_best_model": "accuracy"}
    out, results = run_vit(**best, eval_steps=3, learning_rate=0.3)
    state = read_state(out)
    assert results["eval_accuracy"] == pytest.approx(state["best_metric"])
    assert_equal_weights(out, out / f"checkpoint-{state['best_global_step']}")


def test_a_v0_is_not_forgotten_when_its_run_goes_on_without_the_flag(run_vit, capsys):
    run_vit(v0_init="random", max_steps=3, do_eval=None)
    capsys.readouterr()
    out, _ = run_vit(log_level="info")
    assert "began with --v0_init random, and --v0_init zeros was given" in capsys.readouterr().out
    assert json.loads((out / "v0_init.json").read_text())["strategy"] == "random"
    assert "started at zero" not in (out / "README.md").read_text()


# ---- slow --------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_two_processes_count_each_image_once(run, flags, tmp_path):
    out, _ = run(v0_init="random", max_steps=3)
    trained = of_trained(out, do_predict=True)
    _, one = run("one", **trained)
    done = start(
        *TORCHRUN, SCRIPT, *flags("two", **trained, per_device_eval_batch_size=2)
    )  # 12 = 3 x 4, 9 leaves a rest
    assert done.returncode == 0, done.stderr[-3000:]
    two = read_results(tmp_path / "two")
    names = [f"{role}_{name}" for role in ("eval", "predict") for name in ("loss", "accuracy", "num_images")]
    assert {name: two[name] for name in names} == pytest.approx({name: one[name] for name in names}, rel=1e-6)
