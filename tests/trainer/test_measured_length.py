"""A measured length through the Trainer classes: the schedule, the record, resuming, and where nothing can be measured."""

import json

import pytest
import torch
from conftest import make_gpt2, make_sequences
from torch import nn
from trainers import Rates, assert_equal_weights, make_trainer, train, weights_of

from hf_v0init import InputError, V0InitCallback, compute_warmup_length, measure_trust_radius
from hf_v0init.trainer.probe import measure_run

LONG = {"max_steps": 12, "learning_rate": 0.05, "adam_beta2": 0.9}


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "inverse_sqrt"])
def test_a_measured_warmup_is_the_trainers_own_of_that_length(kind, tmp_path):
    ours_rates, stock_rates = Rates(), Rates()
    options = LONG | {"lr_scheduler_type": kind}
    ours = train(tmp_path / "a", untuned_warmup="trust_radius", callbacks=[ours_rates], **options)
    length = ours.get_v0_report()["length"]
    assert 1 < length["steps"] == compute_warmup_length(length["x"], 12)
    stock = options | {"warmup_steps": length["steps"]}
    if kind == "constant":
        stock["lr_scheduler_type"] = "constant_with_warmup"
    assert_equal_weights(ours, train(tmp_path / "b", stock=True, callbacks=[stock_rates], **stock))
    assert ours_rates.rates == stock_rates.rates and max(ours_rates.rates) == 0.05
    assert ours.args.warmup_steps == 0


@pytest.mark.parametrize(
    "settings",
    [
        *({"v0_init": name, "v0_decay_steps": "auto"} for name in ("data_driven", "random")),
        {"untuned_warmup": "trust_radius"},
    ],
    ids=str,
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
    train(tmp_path, **options | {"max_steps": 3})
    late = make_trainer(tmp_path, **options, untuned_warmup="trust_radius")
    with pytest.raises(InputError, match="trained without a measured warmup"):
        late.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3, 3))

    def forward(self, x, labels=None):
        loss = (x @ self.w).sum() * 1e-30
        return {"loss": loss + 1.0}


def test_what_cannot_be_measured_falls_back_to_two_thirds_of_training(tmp_path, our_log):
    data = [{"x": torch.ones(3), "labels": torch.tensor(0.0)}] * 8
    options = {"data": data, "max_steps": 60, "remove_unused_columns": False, "adam_beta2": 0.9, "learning_rate": 1.0}
    rates = Rates()
    trainer = train(tmp_path, model=Flat(), callbacks=[rates], untuned_warmup="trust_radius", **options)
    length = trainer.get_v0_report()["length"]
    assert length["steps"] == 40 and length["d50"] is None and "rounding" in length["reason"]
    assert "cannot be measured" in our_log.text
    assert rates.rates[:3] == pytest.approx([made / 40 for made in range(3)])


def test_a_callback_knows_its_trainer_and_what_it_cannot_do(tmp_path):
    stock = make_trainer(tmp_path, stock=True, max_steps=2)
    stock.add_callback(V0InitCallback(v0_init="random"))
    with pytest.raises(InputError, match=r"V0InitCallback\(...\).attach\(trainer\)"):
        stock.train()


@pytest.mark.parametrize("settings", [{"v0_init": "xavier"}, {"v0_scale": -1.0}, {"v0_decay": "cubic"}], ids=str)
def test_settings_that_are_changed_after_construction_are_checked_when_they_are_used(settings, tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", max_steps=2)
    for name, value in settings.items():
        setattr(trainer.args, name, value)
    with pytest.raises(InputError, match=next(iter(settings))):
        trainer.train()
    assert trainer.state.global_step == 0


# ---- a run that is not made ------------------------------------------------------------------------------------------


def test_measure_run_is_what_the_run_itself_measures_and_no_update_is_made(tmp_path):
    options = {"learning_rate": 0.02, "gradient_accumulation_steps": 2, "max_steps": 8}
    trainer = make_trainer(tmp_path / "a", **options)
    before = weights_of(trainer)
    radius, rate = measure_run(trainer)
    assert rate == 0.02 and all(torch.equal(w, before[name]) for name, w in weights_of(trainer).items())
    assert not trainer.optimizer.state and "compute_loss" not in vars(trainer)
    length = train(tmp_path / "b", untuned_warmup="trust_radius", **options).get_v0_report()["length"]
    assert radius.d50 is not None and (length["d50"], length["num_forwards"]) == (radius.d50, radius.num_forwards)


@pytest.mark.parametrize("max_norm", [0.0, 0.01])
def test_measure_run_is_measure_trust_radius_on_the_same_batch(tmp_path, max_norm):
    """Eight sequences: one batch is all the data, in whatever order; clipping scales the gradient and not the radius."""
    data, model = make_sequences(8), make_gpt2(dropout=0.0)
    options = {"data": data, "per_device_train_batch_size": 8, "max_steps": 2, "max_grad_norm": max_norm}
    radius, _ = measure_run(make_trainer(tmp_path, model=model, **options))
    rows = torch.stack([row["input_ids"] for row in data])

    def compute() -> torch.Tensor:
        return model(input_ids=rows, labels=rows).loss

    model.zero_grad()
    compute().backward()
    again = measure_trust_radius(torch.optim.SGD(model.parameters(), lr=1.0), model, compute)
    assert radius.d50 == pytest.approx(again.d50, rel=0.02)


def test_measure_run_without_a_gradient_is_refused(tmp_path):
    trainer = make_trainer(tmp_path, max_steps=1)
    trainer.compute_loss = lambda model, inputs, **_: 0.0 * model(**inputs).loss
    with pytest.raises(InputError, match="no step of the run had a gradient"):
        measure_run(trainer)
