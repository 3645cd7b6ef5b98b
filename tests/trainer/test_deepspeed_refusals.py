"""What a ds_config may not hold under a v0, each key with the word that names the remedy. Needs no DeepSpeed."""

import pytest
import torch

from hf_v0init import InputError
from hf_v0init.second_moment.deepspeed import STAGE_3, ZeroPartitions, find_partitions, require_supported_config

ZERO_2 = {"zero_optimization": {"stage": 2}}


def in_zero(stage: int, **settings) -> dict:
    return {"zero_optimization": {"stage": stage, **settings}}


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "zero_optimization.stage=0"),
        (in_zero(0), "zero_optimization.stage=0"),
        (in_zero(4), "zero_optimization.stage=4"),
        (ZERO_2 | {"fp16": {"enabled": True}}, 'ds_config key "fp16"'),
        (ZERO_2 | {"torch_autocast": {"enabled": True}}, 'the ds_config key "torch_autocast"'),
        (in_zero(2, offload_optimizer={"device": "cpu"}), 'the ds_config key "offload_optimizer"'),
        (in_zero(3, offload_param={"device": "nvme"}), 'the ds_config key "offload_param"'),
        (ZERO_2 | {"optimizer": {"type": "Lamb"}}, "own optimizer 'Lamb'"),
        (ZERO_2 | {"optimizer": {"type": "OneBitAdam"}}, 'remove the ds_config key "optimizer"'),
    ],
)
def test_refused_with_the_key_and_the_remedy(config, words):
    with pytest.raises(InputError) as caught:
        require_supported_config(config)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    "config",
    [
        in_zero(1),
        ZERO_2 | {"fp16": {"enabled": False}, "torch_autocast": {"enabled": False}, "bf16": {"enabled": True}},
        in_zero(3, offload_optimizer={"device": "none"}, offload_param={"device": None}),
        ZERO_2 | {"optimizer": {"type": "AdamW"}},
        ZERO_2 | {"fp16": {"enabled": "auto"}},
    ],
)
def test_accepted(config):
    assert require_supported_config(config) is None


def make_fake(qualified_name: str, **attributes):
    """An object whose class has this module and name, as the code that knows DeepSpeed's classes by name sees it."""
    module, name = qualified_name.rsplit(".", 1)
    return type(name, (), {"__module__": module, **attributes})()


def test_optimizers_and_modules_that_it_cannot_take_are_refused():
    inner = torch.optim.SGD([torch.nn.Parameter(torch.ones(2))], lr=0.1)
    with pytest.raises(InputError, match=r"with the optimizer torch\.optim\.sgd\.SGD"):
        ZeroPartitions(make_fake(STAGE_3, optimizer=inner))
    with pytest.raises(InputError, match="BF16_Optimizer"):
        find_partitions(make_fake("deepspeed.runtime.bf16_optimizer.BF16_Optimizer"))
    inner = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    with pytest.raises(InputError, match="leaf modules"):
        ZeroPartitions(make_fake(STAGE_3, optimizer=inner, _leaf_module_hooks=[object()]))
    assert find_partitions(inner) is None  # not of DeepSpeed
