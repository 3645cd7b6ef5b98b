"""scripts/run_image_classification.py from end to end on small images, and that bad input ends in one line and status 2."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from image_sets import CLASSES, write_image, write_image_folder
from PIL import Image
from safetensors.torch import load_file
from script_runs import ROOT, TORCHRUN, load_script, quiet_logging, read_results, refuse, start, to_argv  # noqa: F401
from torch.nn import functional
from transformers import AutoImageProcessor, AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_v0init.tasks.images.folders import load_image_folder

SCRIPT = ROOT / "scripts" / "run_image_classification.py"
CONFIGS = ROOT / "configs" / "image_classification"

TINY = {
    "model_type": "cifar_resnet",
    "config_overrides": "layer_type=basic,embedding_size=4",
    "per_device_train_batch_size": 8,
    "per_device_eval_batch_size": 5,
    "seed": 3,
    "use_cpu": True,
    "report_to": "none",
    "disable_tqdm": True,
    "log_level": "error",
    "logging_steps": 1,
}
RESNET = {
    "model_type": "cifar_resnet",
    "layer_type": "basic",
    "embedding_size": 4,
    "hidden_sizes": [4, 8],
    "depths": [1, 1],
}
VIT = {"model_type": "vit", "patch_size": 4, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}


@pytest.fixture(scope="module")
def script():
    return load_script("images")


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> dict:
    """Flags that name folders of three classes: 30 images for training, 12 for validation, 9 for test; and a small model."""
    folder = tmp_path_factory.mktemp("images")
    sizes = {"train": 10, "validation": 4, "test": 3}
    flags = {
        f"{role}_dir": str(write_image_folder(folder / role, per_class, seed=i))
        for i, (role, per_class) in enumerate(sizes.items())
    }
    for name, settings in (("resnet", RESNET), ("vit", {**VIT, "intermediate_size": 16})):
        (folder / f"{name}.json").write_text(json.dumps(settings))
    return {**flags, "config_name": str(folder / "resnet.json")}


@pytest.fixture
def tiny(data, tmp_path) -> dict:
    common = {name: value for name, value in TINY.items() if name not in ("model_type", "config_overrides")}
    return {**common, **data, "do_train": True, "max_steps": 6, "save_strategy": "no", "output_dir": tmp_path / "out"}


def score_by_hand(folder: Path, images_folder: str) -> dict:
    """Loss and accuracy of a saved model over a folder: image by image, through what was saved beside it."""
    network = AutoModelForImageClassification.from_pretrained(folder).eval()
    processor = AutoImageProcessor.from_pretrained(folder)
    losses, hits = [], []
    for path in sorted(Path(images_folder).glob("*/*.png")):
        pixels = processor(Image.open(path), return_tensors="pt")["pixel_values"]
        with torch.no_grad():
            logits = network(pixel_values=pixels).logits[0].double()
        label = network.config.label2id[path.parent.name]
        losses.append(functional.cross_entropy(logits, torch.tensor(label)).item())
        hits.append(int(logits.argmax()) == label)
    return {"loss": np.mean(losses), "accuracy": np.mean(hits)}


def test_trains_evaluates_and_saves(script, tiny, tmp_path, capsys):
    out = tmp_path / "out"
    flags = {
        **tiny, "do_eval": True, "do_predict": True, "max_steps": 60, "learning_rate": 3e-2, "v0_init": "data_driven", "v0_decay": "beta2",
        "label_smoothing_factor": 0.1, "random_crop": "pad", "crop_padding": 1, "random_flip": True,
        "lr_scheduler_type": "constant", "lr_decay_epochs": [6, 12], "lr_decay_factor": 0.2, "image_mode": "RGB",
        "adam_beta2": 0.98, "save_strategy": "steps", "save_steps": 30,
    }  # fmt: skip
    (tmp_path / "flags.yaml").write_text(yaml.safe_dump({"lr_decay_epochs": [6, 12], "max_steps": 5}))
    del flags["lr_decay_epochs"]
    script.main([str(tmp_path / "flags.yaml"), *to_argv(flags)])

    results = read_results(out)
    assert results["eval_accuracy"] > 0.8 and results["predict_accuracy"] > 0.8  # chance is a third
    counted = (results["train_samples"], results["eval_num_images"], results["predict_num_images"])
    assert counted == (30, 12, 9)
    for role, folder in (("eval", flags["validation_dir"]), ("predict", flags["test_dir"])):
        expected = score_by_hand(out, folder)
        assert results[f"{role}_loss"] == pytest.approx(expected["loss"], rel=1e-4)
        assert results[f"{role}_accuracy"] == pytest.approx(expected["accuracy"])
    assert f"accuracy {results['predict_accuracy']:.4f}" in capsys.readouterr().out

    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    rates = [entry["learning_rate"] for entry in history if "loss" in entry]
    assert rates == pytest.approx([3e-2] * 24 + [6e-3] * 24 + [1.2e-3] * 12)  # 4 steps per epoch
    config = json.loads((out / "config.json").read_text())
    assert config["id2label"] == dict(zip("012", CLASSES, strict=True)) and config["num_channels"] == 3
    report = json.loads((out / "v0_init.json").read_text())
    assert (report["strategy"], report["estimator"], report["estimation_steps"]) == ("data_driven", "minibatch", 1)
    card = (out / "README.md").read_text()
    assert "pipeline_tag: image-classification" in card and "hf_v0init" in card and "trained from scratch" in card
    assert str(tmp_path) not in card

    # evaluated alone, by the settings saved with it
    alone = {**tiny, "do_train": False, "do_eval": True, "model_name_or_path": out, "output_dir": tmp_path / "alone"}
    for name in ("config_name", "train_dir", "max_steps"):
        del alone[name]
    script.main(to_argv(alone))
    for name in ("eval_loss", "eval_accuracy"):
        assert read_results(tmp_path / "alone")[name] == pytest.approx(results[name])


def test_training_loss_is_the_smoothed_one_and_that_of_the_pass(script, tiny, tmp_path):
    """Without a step's worth of change, both are the mean over the same images of the same function."""
    flags = {
        **tiny, "v0_init": "data_driven", "v0_estimator": "per_sample", "learning_rate": 0.0, "label_smoothing_factor": 0.3, "max_steps": 1,
        "per_device_train_batch_size": 30, "v0_stats_batch_size": 15, "config_name": tiny["config_name"].replace("resnet", "vit"),
    }  # fmt: skip
    script.main(to_argv(flags))
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    report = json.loads((tmp_path / "out" / "v0_init.json").read_text())
    assert report["mean_loss"] == pytest.approx(state["log_history"][0]["loss"], rel=1e-4)
    network = AutoModelForImageClassification.from_pretrained(tmp_path / "out").eval()
    processor = AutoImageProcessor.from_pretrained(tmp_path / "out")
    images = load_image_folder(flags["train_dir"], role="train")
    pixels = [processor(Image.open(row["image"]["path"]), return_tensors="pt")["pixel_values"] for row in images]
    with torch.no_grad():
        logits = network(pixel_values=torch.cat(pixels)).logits
    expected = functional.cross_entropy(logits, torch.tensor(images["label"]), label_smoothing=0.3)
    assert report["mean_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_accumulated_batches_give_the_step_of_one_batch(script, tiny, tmp_path):
    """With a network without BatchNorm; transformers' own loss would give twice the gradient."""
    flags = {**tiny, "max_steps": 1, "max_grad_norm": 0.0, "optim": "sgd", "learning_rate": 1.0}
    flags["config_name"] = tiny["config_name"].replace("resnet", "vit")
    for name, cut in (("one", (12, 1)), ("two", (6, 2))):
        sizes = {"per_device_train_batch_size": cut[0], "gradient_accumulation_steps": cut[1]}
        script.main(to_argv({**flags, **sizes, "output_dir": tmp_path / name}))
    one, two = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(torch.allclose(one[name], two[name], atol=1e-6) for name in one)


def test_resume_in_the_middle_of_an_epoch_equals_a_straight_run(script, tiny, tmp_path):
    """Augmentation, BatchNorm statistics, steps of the learning rate and Adam's state, bit for bit."""
    flags = {
        **tiny, "max_steps": 10, "save_strategy": "steps", "save_steps": 6, "random_crop": "resize", "random_flip": True,
        "image_size": 8, "v0_init": "data_driven", "lr_decay_epochs": [1, 2],
    }  # fmt: skip
    script.main(to_argv({**flags, "output_dir": tmp_path / "straight"}))
    (tmp_path / "stopped").mkdir()
    (tmp_path / "straight" / "checkpoint-6").rename(tmp_path / "stopped" / "checkpoint-6")
    script.main(to_argv({**flags, "output_dir": tmp_path / "stopped"}))
    straight, resumed = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "stopped"))
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_data_set_by_name_a_split_off_and_a_vit(script, tiny, tmp_path):
    """A folder stands for the Hub: `datasets` takes both by the same argument."""
    for role in ("train", "test"):
        write_image_folder(tmp_path / "named" / role, 10, size=(9, 12), channels=3)
    flags = {name: value for name, value in tiny.items() if name not in ("train_dir", "validation_dir", "test_dir")}
    flags |= {
        "dataset_name": tmp_path / "named", "validation_split_percentage": 20, "do_eval": True, "do_predict": True,
        "config_name": tiny["config_name"].replace("resnet", "vit"), "image_size": 8, "crop_fraction": 0.9,
        "max_train_samples": 20, "max_predict_samples": 7, "cache_dir": tmp_path / "cache", "v0_init": "data_driven",
        "v0_estimator": "per_sample",
        "max_steps": 2,
    }  # fmt: skip
    script.main(to_argv(flags))
    results = read_results(tmp_path / "out")
    counted = (results["train_samples"], results["eval_num_images"], results["predict_num_images"])
    assert counted == (20, 6, 7)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["image_size"], config["num_channels"], len(config["id2label"])) == (8, 3, 3)
    processor = json.loads((tmp_path / "out" / "preprocessor_config.json").read_text())
    assert (processor["size"], processor["crop_size"]) == ({"shortest_edge": 9}, {"height": 8, "width": 8})
    assert json.loads((tmp_path / "out" / "v0_init.json").read_text())["stats_batch_size"] == 1  # no BatchNorm


def test_a_pretrained_model_gets_a_new_head_or_keeps_its_numbering(script, tiny, tmp_path, capsys, monkeypatch):
    names = {0: "bee", 1: "cat", 2: "ant"}
    for folder, labels in (("same", names), ("other", {0: "dog", 1: "eel"})):
        config = ViTConfig(**{**VIT, "intermediate_size": 16}, image_size=8, num_channels=1, id2label=labels)
        config.label2id = {name: number for number, name in labels.items()}
        ViTForImageClassification(config).save_pretrained(tmp_path / folder)
    del tiny["config_name"]
    for folder in ("same", "other"):
        flags = {
            **tiny,
            "model_name_or_path": tmp_path / folder,
            "learning_rate": 0.0,
            "output_dir": tmp_path / f"{folder}2",
        }
        script.main(to_argv({**flags, "max_steps": 1, "do_eval": True}))
    same, head = (load_file(tmp_path / name / "model.safetensors") for name in ("same", "same2"))
    assert torch.equal(same["classifier.weight"], head["classifier.weight"])
    config = json.loads((tmp_path / "same2" / "config.json").read_text())
    assert config["id2label"] == {str(number): name for number, name in names.items()}
    assert read_results(tmp_path / "same2")["eval_loss"] == pytest.approx(
        score_by_hand(tmp_path / "same2", tiny["validation_dir"])["loss"], rel=1e-4
    )
    other, head = (load_file(tmp_path / name / "model.safetensors") for name in ("other", "other2"))
    assert head["classifier.weight"].shape == (3, 16)
    assert all(torch.equal(other[name], head[name]) for name in other if not name.startswith("classifier"))
    flags = {**tiny, "do_train": False, "do_eval": True, "model_name_or_path": tmp_path / "other"}
    refuse(script, to_argv(flags), ["class 'ant'", "none that the model knows"], capsys, monkeypatch)


@pytest.mark.slow
def test_two_processes_count_each_image_once(script, tiny, tmp_path):
    script.main(to_argv({**tiny, "v0_init": "random", "max_steps": 3}))
    flags = {**tiny, "do_train": False, "do_eval": True, "do_predict": True, "model_name_or_path": tmp_path / "out"}
    for name in ("config_name", "max_steps"):
        del flags[name]
    script.main(to_argv({**flags, "output_dir": tmp_path / "one"}))
    flags |= {"per_device_eval_batch_size": 2, "output_dir": tmp_path / "two"}  # 12 = 3 x 4, 9 leaves a rest
    done = start(*TORCHRUN, SCRIPT, *to_argv(flags))
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = read_results(tmp_path / "one"), read_results(tmp_path / "two")
    for name in (
        "eval_loss",
        "eval_accuracy",
        "eval_num_images",
        "predict_loss",
        "predict_accuracy",
        "predict_num_images",
    ):
        assert two[name] == pytest.approx(one[name], rel=1e-6), name


# ---- bad input


def break_image(folder: Path) -> dict:
    path = folder / "bad" / "train" / "bee" / "03.png"
    write_image_folder(folder / "bad" / "train", 10)
    path.write_bytes(path.read_bytes()[:70])
    return {"train_dir": folder / "bad" / "train"}


def mix(folder: Path, pixels: np.ndarray) -> dict:
    write_image_folder(folder / "mixed", 10)
    write_image(folder / "mixed" / "cat" / "zz.png", pixels)
    return {"train_dir": folder / "mixed"}


BAD_INPUT = {
    "no training data": ({"-train_dir": 0}, ["no train data", "--train_dir"]),
    "no validation data": ({"-validation_dir": 0, "do_eval": True}, ["no validation data", "--validation_split_percentage"]),
    "no folder": ({"train_dir": "/no/such"}, ["--train_dir=/no/such", "no such folder"]),
    "broken image": (break_image, ["bee/03.png", "cannot be read"]),
    "one class": (lambda folder: {"train_dir": write_image_folder(folder / "one", 9, classes=("ant",))}, ["one class only"]),
    "other classes": (
        lambda folder: {"validation_dir": write_image_folder(folder / "v", 3, classes=("ant", "bee", "dog")), "do_eval": True},
        ["'dog'", "validation data"],
    ),
    "other sizes": (lambda folder: mix(folder, np.zeros((9, 8), np.uint8)), ["zz.png is 8x9", "--image_size"]),
    "other modes": (lambda folder: mix(folder, np.zeros((8, 8, 3), np.uint8)), ["zz.png is RGB", "--image_mode"]),
    "falling epochs": ({"lr_decay_epochs": [3, 2]}, ["--lr_decay_epochs", "increasing"]),
    "no factor": ({"lr_decay_epochs": [3], "lr_decay_factor": 1.5}, ["--lr_decay_factor=1.5"]),
    "whole validation": ({"-validation_dir": 0, "validation_split_percentage": 100}, ["--validation_split_percentage=100"]),
    "nothing left of an image": ({"crop_fraction": 0}, ["--crop_fraction=0", "above 0"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_is_one_line_before_training(script, tiny, tmp_path, capsys, monkeypatch, name):
    changes, words = BAD_INPUT[name]
    flags = dict(tiny)
    for key, value in (changes(tmp_path) if callable(changes) else changes).items():
        if key.startswith("-"):
            del flags[key[1:]]
        else:
            flags[key] = value
    refuse(script, to_argv(flags), words, capsys, monkeypatch)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_digits_are_learned_from_the_folder_that_the_script_writes(script, tmp_path, monkeypatch, capsys):
    """configs/image_classification/digits_resnet.yaml, a quarter of it."""
    pytest.importorskip("sklearn")
    spec = importlib.util.spec_from_file_location("write_digits_folder", ROOT / "scripts" / "write_digits_folder.py")
    monkeypatch.setitem(sys.modules, spec.name, module := importlib.util.module_from_spec(spec))
    spec.loader.exec_module(module)
    module.main([str(tmp_path / "digits"), "--seed", "1"])
    assert "1078 images for train, 359 images for validation, 360 images for test" in capsys.readouterr().out
    monkeypatch.chdir(ROOT)
    flags = {f"{role}_dir": tmp_path / "digits" / role for role in ("train", "validation", "test")}
    flags |= {"output_dir": tmp_path / "out", "num_train_epochs": 5, "v0_init": "zeros", "disable_tqdm": True}
    script.main([str(CONFIGS / "digits_resnet.yaml"), *to_argv(flags)])
    results = read_results(tmp_path / "out")
    assert results["predict_accuracy"] > 0.85 and results["predict_top5_accuracy"] > 0.97  # chance: 0.1 and 0.5
    assert results["predict_num_images"] == 360
