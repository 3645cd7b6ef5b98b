"""A measured length through the Trainer classes: the schedule, the record, resuming, and where nothing can be measured."""

import json
import logging

import pytest
import torch
from conftest import make_gpt2
from torch import nn
from trainers import assert_equal_weights, make_trainer, train
from transformers import TrainerCallback

from hf_v0init import InputError, V0InitArguments, V0InitCallback, attach_v0, compute_warmup_length

LONG = {"max_steps": 12, "learning_rate": 0.05, "adam_beta2": 0.9}


class Rates(TrainerCallback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_a_measured_warmup_is_the_trainers_own_of_that_length(kind, tmp_path):
    ours_rates, stock_rates = Rates(), Rates()
    options = LONG | {"lr_scheduler_type": kind}
    ours = train(tmp_path / "a", untuned_warmup="trust_radius", callbacks=[ours_rates], **options)
    length = ours.get_v0_report()["length"]
    assert 1 < length["steps"] == compute_warmup_length(length["x"], 12) and length["is_capped"]
    stock = options | {"warmup_steps": length["steps"]}
    if kind == "constant":
        stock["lr_scheduler_type"] = "constant_with_warmup"
    assert_equal_weights(ours, train(tmp_path / "b", stock=True, callbacks=[stock_rates], **stock))
    assert ours_rates.rates == stock_rates.rates and max(ours_rates.rates) == 0.05
    assert ours.args.warmup_steps == 0


@pytest.mark.parametrize(
    "settings", [{"v0_init": "data_driven"}, {"v0_init": "random"}, {"untuned_warmup": "trust_radius"}], ids=str
)
def test_a_resumed_run_keeps_its_length(settings, tmp_path):
    options = LONG | settings | {"save_strategy": "steps", "save_steps": 3}
    straight = train(tmp_path, **options)
    stored = json.loads((tmp_path / "checkpoint-3" / "v0_init.json").read_text())["length"]
    assert stored == straight.get_v0_report()["length"] and stored["steps"] > 3
    resumed = make_trainer(tmp_path, model=make_gpt2(seed=99), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_weights(straight, resumed)
    assert resumed.get_v0_report()["length"] == stored


def test_a_measured_warmup_cannot_begin_in_the_middle(tmp_path):
    options = LONG | {"save_strategy": "steps", "save_steps": 3}
    train(tmp_path, **options)
    late = make_trainer(tmp_path, **options, untuned_warmup="trust_radius")
    with pytest.raises(InputError, match="trained without a measured warmup"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_a_resumed_run_of_another_strategy_keeps_the_checkpoints(tmp_path, caplog):
    """Of a measured run, too."""
    options = LONG | {"save_strategy": "steps", "save_steps": 3}
    straight = train(tmp_path, v0_init="data_driven", **options)
    resumed = make_trainer(tmp_path, v0_init="random", **options)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "strategy: data_driven -> random" in caplog.text
    assert_equal_weights(straight, resumed)


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x, labels=None):
        loss = (x @ self.w).sum() * 1e-30
        return {"loss": loss + 1.0}


@pytest.mark.parametrize("settings", [{"v0_init": "data_driven"}, {"untuned_warmup": "trust_radius"}], ids=str)
def test_what_cannot_be_measured_falls_back_to_a_third_of_training(settings, tmp_path, caplog):
    data = [{"x": torch.ones(3), "labels": torch.tensor(0.0)}] * 8
    options = {"data": data, "max_steps": 60, "remove_unused_columns": False, "adam_beta2": 0.9, "learning_rate": 1.0}
    rates = Rates()
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer = train(tmp_path, model=Flat(), callbacks=[rates], **settings, **options)
    length = trainer.get_v0_report()["length"]
    assert length["steps"] == 20 and length["d50"] is None and "rounding" in length["reason"]
    assert "cannot be measured" in caplog.text
    if "untuned_warmup" in settings:
        assert rates.rates[:3] == pytest.approx([made / 20 for made in range(3)])


def test_a_measured_run_begins_as_the_others_of_a_comparison_do(tmp_path):
    """Weights, batches and random state are those of a run that measures nothing."""
    begun = []
    for folder, flags in (("a", {}), ("b", {"untuned_warmup": "trust_radius"}), ("c", {"v0_init": "data_driven"})):
        train(tmp_path / folder, v0_record_run=True, **flags, **LONG)
        begun.append(json.loads((tmp_path / folder / "fingerprint.json").read_text()))
    assert begun[0] == begun[1] == begun[2] and len(set(begun[0]["batches"])) == 4


def test_a_callback_knows_its_trainer_and_what_it_cannot_do(tmp_path):
    for settings in ({"v0_init": "random"}, {"untuned_warmup": "trust_radius"}):
        stock = make_trainer(tmp_path, stock=True, max_steps=2)
        stock.add_callback(V0InitCallback(**settings))
        with pytest.raises(InputError, match=r"V0InitCallback\(...\).attach\(trainer\)"):
            stock.train()
    stock = make_trainer(tmp_path, stock=True, max_steps=2)
    V0InitCallback(untuned_warmup="linear").attach(stock)
    with pytest.raises(InputError, match="untuned_warmup=linear changes the schedule"):
        stock.train()
    with pytest.raises(InputError, match="v0_decay_steps=auto needs loss_fn"):
        attach_v0(torch.optim.AdamW(make_gpt2().parameters()), v0_decay_steps="auto")
    with pytest.raises(InputError, match="v0_init='auto': choose one of"):
        V0InitArguments(v0_init="auto")
    with pytest.raises(InputError, match="choose one of linear, exponential, trust_radius"):
        V0InitArguments(untuned_warmup="cosine")


@pytest.mark.parametrize("settings", [{"v0_init": "xavier"}, {"v0_scale": -1.0}, {"v0_decay": "cubic"}], ids=str)
def test_settings_that_are_changed_after_construction_are_checked_when_they_are_used(settings, tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", max_steps=2)
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    with pytest.raises(InputError, match=next(iter(settings))):
        trainer.train()
    assert trainer.state.global_step == 0
