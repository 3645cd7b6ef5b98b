"""Checkpoints are loaded whole; their average: numbers, dtypes and shards."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
)
from translation_models import make_marian

from hf_v0init.errors import InputError
from hf_v0init.tasks.whole_weights import (
    average_checkpoints,
    find_last_checkpoints,
    load_whole_weights,
    read_whole_weights,
)

SIZES = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1}
TEXT = {**SIZES, "vocab_size": 40, "max_position_embeddings": 16}
EXPERTS = {**TEXT, "num_key_value_heads": 2, "num_experts": 2, "num_experts_per_tok": 1}
DINO = {name: value for name, value in SIZES.items() if name != "intermediate_size"} | IMAGES
SWIN = IMAGES | {"patch_size": 2, "embed_dim": 8, "depths": [1, 1], "num_heads": [2, 2], "window_size": 2}
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
RESNET = {"num_channels": 1, "embedding_size": 4, "hidden_sizes": [4, 8], "depths": [1, 1], "layer_type": "basic"}


def write_checkpoint(folder, **tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def test_the_mean_is_of_float64_and_shards_give_the_same(tmp_path):
    models = [make_marian(seed=seed) for seed in range(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"whole-{i}")
        model.save_pretrained(tmp_path / f"sharded-{i}", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded-0").glob("*.safetensors"))) > 3
    before = {name: tensor.clone() for name, tensor in models[0].state_dict().items()}
    whole = average_checkpoints(models[0], [tmp_path / f"whole-{i}" for i in range(3)])
    sharded = average_checkpoints(models[0], [tmp_path / f"sharded-{i}" for i in range(3)])
    states = [model.state_dict() for model in models]
    assert whole.keys() == sharded.keys() == before.keys()
    for name, tensor in whole.items():
        assert torch.equal(tensor, sharded[name]) and torch.equal(before[name], states[0][name]), name
        expected = (states[0][name].double() + states[1][name] + states[2][name]) / 3
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    alone = average_checkpoints(models[0], [tmp_path / "whole-1"])
    assert all(torch.equal(tensor, states[1][name]) for name, tensor in alone.items())


def test_a_family_that_is_saved_under_other_names_is_averaged_whole_and_counters_are_the_last(tmp_path):
    make = {"vit": {**SIZES, **IMAGES}, "resnet": RESNET}
    for kind, settings in make.items():
        models = [AutoModelForImageClassification.from_config(AutoConfig.for_model(kind, **settings)) for _ in range(2)]
        for i, model in enumerate(models):
            for name, buffer in model.named_buffers():
                if "num_batches" in name:
                    buffer.fill_(10 * i)
            model.save_pretrained(tmp_path / f"{kind}-{i}")
        average = average_checkpoints(models[0], [tmp_path / f"{kind}-{i}" for i in range(2)])
        for name, tensor in models[1].state_dict().items():
            expected = tensor if not tensor.is_floating_point() else (tensor + models[0].state_dict()[name]) / 2
            assert torch.allclose(average[name], expected), name


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
    write_checkpoint(tmp_path, **{name: tensor for name, tensor in tensors.items() if name != first})
    with pytest.raises(InputError, match=f"{tmp_path}: (is no checkpoint|its weights cannot be loaded)"):
        read_whole_weights(other, tmp_path)


def test_last_checkpoints_are_by_step_not_by_name_and_whole(tmp_path):
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-80", "checkpoint-1100", "checkpoint-best", "other"):
        write_checkpoint(tmp_path / name, w=torch.ones(3))
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 1}')
    (tmp_path / "checkpoint-1100" / "trainer_state.json").write_text('{"global')  # a save that was cut off
    assert [f.name for f in find_last_checkpoints(tmp_path, 2)] == ["checkpoint-900", "checkpoint-1000"]
    assert len(find_last_checkpoints(tmp_path, 4)) == 3  # the training is not thrown away
    with pytest.raises(InputError, match="no valid checkpoint"):
        find_last_checkpoints(tmp_path / "other", 4)
