"""What a run goes on from is the whole of it, and what a folder says is of the model that is in it."""

import json

import pytest
import torch
from image_sets import write_image_folder
from safetensors.torch import load_file, save_file
from script_runs import load_script, quiet_logging  # noqa: F401
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageClassification, AutoModelForMaskedLM

from hf_v0init import InputError
from hf_v0init.tasks.script_support import NothingToDoError
from hf_v0init.tasks.whole_weights import load_whole_weights, read_whole_weights

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
EXPERTS = {**TEXT, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | IMAGES
SWIN = {
    "image_size": 8,
    "patch_size": 2,
    "num_channels": 1,
    "embed_dim": 8,
    "depths": [1, 1],
    "num_heads": [2, 2],
    "window_size": 2,
}
# families that transformers saves under other names than their modules have
FAMILIES = {
    "vit": (AutoModelForImageClassification, {**SIZES, **IMAGES}),
    "beit": (AutoModelForImageClassification, {**SIZES, **IMAGES}),
    "dinov2": (AutoModelForImageClassification, DINO),
    "dinov2_with_registers": (AutoModelForImageClassification, DINO),
    "swin": (AutoModelForImageClassification, SWIN),
    "esm": (AutoModelForMaskedLM, {**TEXT, "pad_token_id": 1, "mask_token_id": 2}),
    "gpt_neox": (AutoModelForCausalLM, TEXT),
    "mixtral": (AutoModelForCausalLM, {**TEXT, "num_key_value_heads": 2, "num_local_experts": 2}),
    "qwen2_moe": (AutoModelForCausalLM, {**EXPERTS, "moe_intermediate_size": 8, "shared_expert_intermediate_size": 8}),
    "qwen3_moe": (AutoModelForCausalLM, {**EXPERTS, "moe_intermediate_size": 8}),
    "olmoe": (AutoModelForCausalLM, EXPERTS),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_that_are_saved_under_other_names_are_loaded_whole(family, tmp_path):
    auto_class, settings = FAMILIES[family]
    torch.manual_seed(0)
    saved, other = (auto_class.from_config(AutoConfig.for_model(family, **settings)) for _ in range(2))
    saved.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    assert set(tensors) - set(saved.state_dict()), "saved under the modules' names: needs no test"
    before = torch.get_rng_state()
    load_whole_weights(other, tmp_path)
    assert torch.equal(torch.get_rng_state(), before)
    for name, tensor in saved.state_dict().items():
        assert torch.equal(other.state_dict()[name], tensor), name

    first = sorted(tensors)[0]
    save_file(
        {k: v for k, v in tensors.items() if k != first}, tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    with pytest.raises(InputError, match=f"{tmp_path}: (is no checkpoint|its weights cannot be loaded)"):
        read_whole_weights(other, tmp_path)


@pytest.fixture(scope="module")
def script():
    return load_script("images")


@pytest.fixture
def run(script, tmp_path_factory, tmp_path):
    """Run the image script with a tiny ViT; the results and the weights."""
    data = tmp_path_factory.mktemp("images")
    for split, seed in (("train", 0), ("validation", 1)):
        write_image_folder(data / split, per_class=12, seed=seed)
    flags = {
        "model_type": "vit", "config_overrides": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=16,"
        "patch_size=4", "train_dir": data / "train", "validation_dir": data / "validation", "do_train": True, "do_eval": True,
        "use_cpu": True, "report_to": "none", "max_steps": 6, "save_strategy": "steps", "save_steps": 3, "learning_rate": 3e-3,
        "per_device_train_batch_size": 8, "per_device_eval_batch_size": 8, "logging_steps": 1, "output_dir": tmp_path / "out",
        "lr_scheduler_type": "constant",
    }  # fmt: skip

    def start(**changes):
        merged = flags | changes
        script.main([f"--{name}={value}" for name, value in merged.items() if value is not None])
        folder = merged["output_dir"]
        results = json.loads((folder / "all_results.json").read_text())
        return results, load_file(folder / "model.safetensors")

    return start


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_a_resumed_run_is_the_straight_one(run, tmp_path):
    straight, weights = run()
    run(max_steps=3, output_dir=tmp_path / "halves", do_eval=None)
    resumed, weights_of_halves = run(output_dir=tmp_path / "halves")
    assert_same(weights, weights_of_halves)
    assert resumed["eval_loss"] == straight["eval_loss"]


def test_the_evaluation_that_is_left_is_of_the_trained_model(run, tmp_path):
    together, _ = run()
    run(output_dir=tmp_path / "apart", do_eval=None)
    left, _ = run(output_dir=tmp_path / "apart")
    assert left["eval_loss"] == together["eval_loss"]


def test_the_best_model_is_loaded_whole(run, tmp_path):
    best = {
        "eval_strategy": "steps",
        "eval_steps": 3,
        "load_best_model_at_end": True,
        "metric_for_best_model": "accuracy",
    }
    results, weights = run(**best, learning_rate=0.3)
    state = json.loads((tmp_path / "out" / "trainer_state.json").read_text())
    assert results["eval_accuracy"] == pytest.approx(state["best_metric"])
    checkpoint = load_file(tmp_path / "out" / f"checkpoint-{state['best_global_step']}" / "model.safetensors")
    assert_same(weights, checkpoint)


def test_results_of_an_earlier_training_do_not_outlive_it(run, tmp_path):
    run(v0_init="data_driven")
    assert {"eval_results.json", "v0_init.json"} <= {path.name for path in (tmp_path / "out").iterdir()}
    results, _ = run(overwrite_output_dir=True, do_eval=None, max_steps=2, save_strategy="no")
    assert not any(name.startswith("eval_") for name in results)
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert not names & {"eval_results.json", "v0_init.json", "checkpoint-3", "checkpoint-6"}
    assert "started at zero" in (tmp_path / "out" / "README.md").read_text()


def test_a_finished_folder_says_so_and_what_to_type(run):
    run()
    with pytest.raises(NothingToDoError, match="finished at step 6; nothing to do"):
        run()
    with pytest.raises(NothingToDoError, match="with other settings, give --overwrite_output_dir"):
        run(learning_rate=1e-3)


def test_a_v0_is_not_forgotten_when_its_run_goes_on_without_the_flag(run, tmp_path, capsys):
    run(v0_init="random", max_steps=3, do_eval=None)
    capsys.readouterr()
    run()
    assert "began with --v0_init random, and --v0_init zeros was given" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "v0_init.json").read_text())["strategy"] == "random"
    assert "started at zero" not in (tmp_path / "out" / "README.md").read_text()


def test_the_cards_metadata_hold_what_was_measured(run, tmp_path):
    results, _ = run()
    text = (tmp_path / "out" / "README.md").read_text()
    assert "model-index:" in text and f"value: {round(results['eval_accuracy'], 4)}" in text
