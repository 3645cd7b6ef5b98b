"""`--untuned_warmup measured` and `--v0_decay_steps auto`: a length from the trust radius at the initial weights, acted on."""

import json
import logging

import pytest
import torch
from conftest import make_gpt2
from torch import nn
from trainers import assert_equal_weights, make_trainer, record, train
from transformers import Trainer, TrainerCallback

from hf_v0init import InputError, V0InitArguments, V0InitCallback, attach_v0, compute_warmup_length
from hf_v0init.trainer.trust_radius import measure_run

LONG = {"max_steps": 12, "learning_rate": 0.05, "adam_beta2": 0.9}


class Rates(TrainerCallback):
    """The learning rate of each step."""

    def __init__(self):
        self.rates = []

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.rates.append(optimizer.param_groups[0]["lr"])


class Length(TrainerCallback):
    """What the rule says of the same run, measured beside it."""

    def on_train_begin(self, args, state, control, train_dataloader=None, **kwargs):
        radius = measure_run(self.trainer, train_dataloader)
        self.x = args.learning_rate / radius.d50
        self.steps = compute_warmup_length(self.x, state.max_steps)


def find_length(tmp_path, **options) -> Length:
    found = Length()
    found.trainer = make_trainer(tmp_path, callbacks=[found], **options)
    found.trainer.train()
    return found


def test_a_measured_warmup_is_linear_over_the_measured_length(tmp_path):
    length, rates = find_length(tmp_path / "a", **LONG), Rates()
    assert 1 < length.steps <= 8  # two thirds of the run
    trainer = make_trainer(tmp_path / "b", untuned_warmup="measured", callbacks=[rates], **LONG)
    trainer.train()
    assert trainer._v0_callback.length["x"] == pytest.approx(length.x)
    rest = 12 - length.steps
    assert rates.rates == pytest.approx([0.05 * min(made / length.steps, (12 - made) / rest) for made in range(12)])
    assert trainer.get_v0_report() is None and trainer.args.warmup_steps == 0


@pytest.mark.parametrize("kind", ["linear", "cosine", "constant", "constant_with_warmup", "inverse_sqrt"])
def test_a_measured_warmup_is_the_trainers_own_of_that_length(kind, tmp_path):
    ours_rates, stock_rates = Rates(), Rates()
    options = LONG | {"lr_scheduler_type": kind}
    ours = train(tmp_path / "a", untuned_warmup="measured", callbacks=[ours_rates], **options)
    stock = options | {"warmup_steps": ours._v0_callback.length["steps"]}
    if kind == "constant":
        stock["lr_scheduler_type"] = "constant_with_warmup"
    assert_equal_weights(ours, train(tmp_path / "b", stock=True, callbacks=[stock_rates], **stock))
    assert ours_rates.rates == stock_rates.rates and max(ours_rates.rates) == 0.05


def test_auto_gives_v0_the_measured_length(tmp_path):
    length = find_length(tmp_path / "a", **LONG)
    ours, recorder = record(tmp_path / "b", v0_init="data_driven", v0_decay_steps="auto", **LONG)
    told, expected = record(tmp_path / "c", v0_init="data_driven", v0_decay_steps=length.steps, **LONG)
    assert ours.get_v0_report()["warmup_steps"] == length.steps
    assert all(torch.equal(recorder.v0[name], v0) for name, v0 in expected.v0.items())
    assert_equal_weights(ours, told)


def test_where_none_is_needed_adam_is_left_alone(tmp_path, caplog):
    small = {"max_steps": 4, "learning_rate": 1e-6}
    stock = train(tmp_path / "a", stock=True, **small)
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        ours = train(tmp_path / "b", v0_init="data_driven", v0_decay_steps="auto", untuned_warmup="measured", **small)
    assert_equal_weights(stock, ours)
    assert ours.get_v0_report() is None and ours._v0_callback.length["steps"] == 0
    assert "nothing needed, so Adam is left alone" in caplog.text


class Normalised(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Linear(6, 3))

    def forward(self, x, labels=None):
        return {"loss": nn.functional.cross_entropy(self.net(x), labels)}


def test_a_network_with_batch_norm_is_not_held_back(tmp_path):
    generator = torch.Generator().manual_seed(1)
    data = [{"x": torch.randn(4, generator=generator), "labels": torch.tensor(i % 3)} for i in range(64)]
    options = {"data": data, "per_device_train_batch_size": 16, "max_steps": 4, "learning_rate": 0.1}
    stock = train(tmp_path / "a", stock=True, model=Normalised(), **options)
    ours = train(tmp_path / "b", model=Normalised(), untuned_warmup="measured", **options)
    assert_equal_weights(stock, ours)
    assert all(torch.equal(a, b) for a, b in zip(stock.model.buffers(), ours.model.buffers(), strict=True))


def test_a_resumed_run_keeps_its_length(tmp_path):
    options = LONG | {"v0_init": "data_driven", "v0_decay_steps": "auto", "untuned_warmup": "measured"}
    options |= {"save_strategy": "steps", "save_steps": 3}
    straight = train(tmp_path, **options)
    stored = json.loads((tmp_path / "checkpoint-3" / "v0_init.json").read_text())["length"]
    assert stored == straight._v0_callback.length
    resumed = make_trainer(tmp_path, model=make_gpt2(seed=99), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert_equal_weights(straight, resumed)
    plain = make_trainer(tmp_path / "other", **LONG | {"save_strategy": "steps", "save_steps": 3})
    plain.train()
    late = make_trainer(tmp_path / "other", **options)
    with pytest.raises(InputError, match="trained without a measured length"):
        late.train(resume_from_checkpoint=str(tmp_path / "other" / "checkpoint-3"))


def test_auto_is_the_measured_warmup_and_no_v0(tmp_path):
    auto = train(tmp_path / "a", v0_init="auto", **LONG)
    measured = train(tmp_path / "b", untuned_warmup="measured", **LONG)
    assert_equal_weights(auto, measured)
    assert auto.get_v0_report() is None and auto._v0_callback.length["steps"] > 0
    callback = V0InitCallback(v0_init="auto")
    stock = make_trainer(tmp_path / "c", stock=True, **LONG)
    callback.attach(stock)
    stock.train()
    assert_equal_weights(auto, stock)
    assert callback.length["steps"] == auto._v0_callback.length["steps"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ({"v0_scale": 2.0}, "v0_init=auto and v0_scale=2.0: auto has no v0"),
        ({"v0_decay_steps": 20}, "v0_init=auto and v0_decay_steps=20"),
        ({"v0_preset": "paper"}, "v0_init=auto and v0_preset=paper"),
        ({"untuned_warmup": "linear"}, "v0_init=auto and untuned_warmup=linear are two warmups"),
        (
            {"warmup_steps": 5},
            r"untuned_warmup=measured \(which v0_init=auto stands for\) and warmup_steps=5 are two warmups",
        ),
    ],
)
def test_auto_beside_what_contradicts_it_is_refused(tmp_path, flags, words):
    with pytest.raises(InputError, match=words):
        make_trainer(tmp_path, v0_init="auto", **flags)


def test_a_callback_refuses_a_second_warmup_and_one_that_it_cannot_make(tmp_path):
    stock = make_trainer(tmp_path, stock=True, warmup_steps=5, max_steps=2)
    with pytest.raises(InputError, match="warmup_steps=5 are two warmups"):
        V0InitCallback(untuned_warmup="measured").attach(stock)
    stock = make_trainer(tmp_path, stock=True, max_steps=2)
    stock.add_callback(V0InitCallback(untuned_warmup="linear"))
    with pytest.raises(InputError, match="untuned_warmup=linear changes the schedule"):
        stock.train()


def test_what_cannot_be_measured_falls_back_to_two_over_one_minus_beta2(tmp_path, caplog):
    class Flat(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(3, 3))

        def forward(self, x, labels=None):
            return {"loss": (x @ self.w).sum() * 0.0 + 1.0}

    data = [{"x": torch.ones(3), "labels": torch.tensor(0.0)}] * 8
    options = {"data": data, "max_steps": 60, "remove_unused_columns": False, "adam_beta2": 0.9, "learning_rate": 1.0}
    rates = Rates()
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        train(tmp_path, model=Flat(), untuned_warmup="measured", callbacks=[rates], **options)
    assert "cannot be measured" in caplog.text and "2 / (1 - beta2) steps are taken, 20" in caplog.text
    assert rates.rates[:3] == pytest.approx([made / 20 for made in range(3)])


def test_a_measured_run_begins_as_the_others_of_a_comparison_do(tmp_path):
    """Weights, batches and random state are those of a run that measures nothing: the looks at the batches are no steps."""
    begun = []
    for folder, flags in (("a", {}), ("b", {"untuned_warmup": "measured"})):
        train(tmp_path / folder, v0_record_run=True, **flags, **LONG)
        begun.append(json.loads((tmp_path / folder / "fingerprint.json").read_text()))
    assert begun[0] == begun[1] and len(set(begun[0]["batches"])) == 4


def test_it_takes_a_trainer(tmp_path):
    stock = make_trainer(tmp_path, stock=True, **LONG)
    stock.add_callback(V0InitCallback(untuned_warmup="measured"))
    with pytest.raises(InputError, match=r"V0InitCallback\(...\).attach\(trainer\)"):
        stock.train()
    attached = make_trainer(tmp_path, stock=True, **LONG)
    callback = V0InitCallback(untuned_warmup="measured").attach(attached)
    attached.train()
    assert callback.length["steps"] > 0 and isinstance(attached, Trainer)
    with pytest.raises(InputError, match="compute_warmup_length"):
        attach_v0(torch.optim.AdamW(make_gpt2().parameters()), v0_decay_steps="auto")
    with pytest.raises(InputError, match="cannot measure v0_init=auto"):
        attach_v0(torch.optim.AdamW(make_gpt2().parameters()), v0_init="auto")
    with pytest.raises(InputError, match="choose one of linear, exponential, measured"):
        V0InitArguments(untuned_warmup="cosine")
