"""The average of checkpoints: numbers, dtypes, shards, and settings that cannot leave enough of them."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import MarianMTModel, TrainingArguments
from translation_models import make_marian

from hf_v0init.errors import InputError
from hf_v0init.tasks.checkpoint_averaging import average_checkpoints, find_last_checkpoints, require_enough_checkpoints


def write_checkpoint(folder, **tensors):
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors")
    return folder


def test_mean_in_float64_dtype_kept_and_counters_from_the_last(tmp_path):
    folders = [
        write_checkpoint(
            tmp_path / str(i),
            weight=torch.tensor([2.0**24 if i == 0 else 1.0, float(i)]),
            half=torch.tensor([1.0 + i], dtype=torch.bfloat16),
            num_batches_tracked=torch.tensor(10 * i),
        )
        for i in range(5)
    ]
    average = average_checkpoints(folders)
    assert average["weight"].dtype == torch.float32
    # 2^24 + 1 is not a float32: a float32 sum would lose every one of the four
    assert average["weight"].tolist() == [torch.tensor((2**24 + 4) / 5, dtype=torch.float32).item(), 2.0]
    assert average["half"].dtype == torch.bfloat16
    assert average["half"].item() == 3.0
    assert average["num_batches_tracked"].item() == 40


def test_one_checkpoint_is_itself_and_shards_give_the_same(tmp_path):
    models = [make_marian(seed=seed) for seed in range(3)]
    for i, model in enumerate(models):
        model.save_pretrained(tmp_path / f"whole-{i}")
        model.save_pretrained(tmp_path / f"sharded-{i}", max_shard_size="4KB")
    assert len(list((tmp_path / "sharded-0").glob("*.safetensors"))) > 3
    whole = average_checkpoints([tmp_path / f"whole-{i}" for i in range(3)])
    sharded = average_checkpoints([tmp_path / f"sharded-{i}" for i in range(3)])
    assert whole.keys() == sharded.keys()
    states = [model.state_dict() for model in models]
    for name, tensor in whole.items():
        assert torch.equal(tensor, sharded[name]), name
        expected = (states[0][name].double() + states[1][name] + states[2][name]) / 3
        assert torch.equal(tensor, expected.to(tensor.dtype)), name
    alone = average_checkpoints([tmp_path / "whole-1"])
    loaded = MarianMTModel.from_pretrained(tmp_path / "whole-1").state_dict()
    assert all(torch.equal(tensor, loaded[name]) for name, tensor in alone.items())


def test_checkpoints_that_do_not_match_are_refused(tmp_path):
    a = write_checkpoint(tmp_path / "a", x=torch.zeros(2), y=torch.zeros(1))
    b = write_checkpoint(tmp_path / "b", x=torch.zeros(2))
    c = write_checkpoint(tmp_path / "c", x=torch.zeros(3))
    (tmp_path / "d").mkdir()
    for folders, words in (
        ([a, b], r"other weights than .*b \(y\)"),
        ([b, c], r"c: x has shape \(3,\), elsewhere \(2,\)"),
        ([b, tmp_path / "d"], r"d: has no model.safetensors"),
        ([], "at least one folder"),
    ):
        with pytest.raises(InputError, match=words):
            average_checkpoints(folders)


def test_last_checkpoints_are_by_step_not_by_name_and_whole(tmp_path):
    for name in ("checkpoint-900", "checkpoint-1000", "checkpoint-80", "checkpoint-1100", "checkpoint-best", "other"):
        write_checkpoint(tmp_path / name, w=torch.ones(3))
        (tmp_path / name / "trainer_state.json").write_text('{"global_step": 1}')
    weights = tmp_path / "checkpoint-1100" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1])  # a save that was cut off
    assert [f.name for f in find_last_checkpoints(tmp_path, 2)] == ["checkpoint-900", "checkpoint-1000"]
    with pytest.raises(InputError, match=r"average_checkpoints=4: .* has only 3 whole checkpoints"):
        find_last_checkpoints(tmp_path, 4)


@pytest.mark.parametrize(
    ("settings", "num_steps", "words"),
    [
        ({"save_strategy": "no"}, 100, "save_strategy is 'no'"),
        ({"save_steps": 10, "save_total_limit": 4}, 100, "save_total_limit=4"),
        ({"save_steps": 30}, 100, "save only 4"),
        ({"save_steps": 0.3}, 100, "save only 4"),
        ({"save_strategy": "epoch", "num_train_epochs": 4}, None, "save only 4"),
        (
            {"save_steps": 10, "eval_strategy": "steps", "eval_steps": 10, "load_best_model_at_end": True},
            100,
            "load_best_model_at_end",
        ),
    ],
)
def test_settings_that_cannot_leave_five_checkpoints(tmp_path, settings, num_steps, words):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    with pytest.raises(InputError, match=words):
        require_enough_checkpoints(arguments, 5, num_steps)


@pytest.mark.parametrize(
    ("settings", "num_steps"),
    [
        ({"save_steps": 10, "save_total_limit": 5}, 50),
        ({"save_steps": 25}, 101),
        ({"save_strategy": "epoch", "num_train_epochs": 4.2}, None),
        ({"save_steps": 10}, None),
    ],
)
def test_settings_that_can(tmp_path, settings, num_steps):
    arguments = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", **settings)
    require_enough_checkpoints(arguments, 5, num_steps)
    with pytest.raises(InputError, match="must be 1 or more"):
        require_enough_checkpoints(arguments, 0, num_steps)
