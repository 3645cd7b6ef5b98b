"""The invariants of a run: what v0 changes, and that nothing else changes."""

import json
import logging

import pytest
import torch
from conftest import VOCAB, make_gpt2, make_sequences
from reference import per_sample_gradients
from torch import nn
from trainers import (
    EraseV0,
    Recorder,
    assert_equal_weights,
    make_arguments,
    make_trainer,
    record,
    second_moments_of,
    train,
    weights_of,
)
from transformers import Trainer

from hf_v0init import V0InitArguments, V0InitMixin, V0InitTrainer
from hf_v0init.errors import InputError
from hf_v0init.optimizers.state import is_untouched

STRATEGIES = ["random", "data_driven", "first_gradient"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 3},
        {"max_grad_norm": 0.05},
        {"label_smoothing_factor": 0.1, "optim": "adamw_torch"},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1, "warmup_steps": 5, "weight_decay": 0.1},
    ],
)
def test_zeros_is_the_stock_trainer_bit_for_bit(tmp_path, options):
    stock = train(tmp_path / "a", stock=True, max_steps=20, **options)
    ours = train(tmp_path / "b", max_steps=20, v0_init="zeros", **options)
    assert_equal_weights(stock, ours)
    losses = [[entry["loss"] for entry in t.state.log_history if "loss" in entry] for t in (stock, ours)]
    assert losses[0] == losses[1] and len(losses[0]) == 20
    assert ours.get_v0_report() is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2, "data_seed": 5}, {"dataloader_num_workers": 1}]
)
def test_v0_has_no_side_effect_on_the_run(tmp_path, strategy, options):
    """With v0 erased before the first step the run is the stock run bit for bit: same order, same dropout, same weights."""
    stock = train(tmp_path / "a", stock=True, max_steps=8, **options)
    erase = EraseV0()
    ours = make_trainer(tmp_path / "b", max_steps=8, v0_init=strategy, callbacks=[erase], **options)
    erase.trainer = ours
    ours.train()
    assert erase.erased == 10  # wte, wpe and 4 matrices in each of 2 layers
    assert_equal_weights(stock, ours)


def test_v0_changes_the_run(tmp_path):
    stock, ours = train(tmp_path / "a", stock=True), train(tmp_path / "b", v0_init="data_driven")
    moved = [not torch.equal(a, b) for a, b in zip(weights_of(stock).values(), weights_of(ours).values(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adamw_torch", "adam_beta2": 0.9}]
)
def test_first_step_obeys_the_recurrence(tmp_path, strategy, options):
    """v1 = beta2 * v0 + (1 - beta2) * g^2 for tensors with a v0, (1 - beta2) * g^2 for the others."""
    trainer, recorder = record(tmp_path, v0_init=strategy, max_grad_norm=0.0, max_steps=2, **options)
    beta2 = trainer.args.adam_beta2
    assert sorted(recorder.v0) == sorted(n for n, p in trainer.model.named_parameters() if p.dim() >= 2)
    for name, v1 in recorder.moments[0].items():
        g = recorder.gradients[0][name].double()
        v0 = recorder.v0[name].double() if name in recorder.v0 else torch.zeros_like(g)
        torch.testing.assert_close(v1.double(), beta2 * v0 + (1 - beta2) * g.square(), rtol=1e-6, atol=1e-20)
    steps = {state["step"].item() for state in trainer.optimizer.state.values()}
    assert steps == {2.0}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"label_smoothing_factor": 0.1}])
def test_first_gradient_is_the_gradient_of_the_first_step(tmp_path, options):
    """GI-Adam: v0 = g0^2 of the very batch, with the very dropout, that the first step sees; then v1 = g0^2 too."""
    _, recorder = record(tmp_path, v0_init="first_gradient", max_grad_norm=0.0, max_steps=1, **options)
    for name, v0 in recorder.v0.items():
        assert torch.equal(v0, recorder.gradients[0][name].square()), name


def loss_alone(model, sample):
    """The Trainer's own loss of one sample. For this model it counts 10 items, not the 9 that are predicted: its scale
    is that of training, and v0 must have the same."""
    return model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss * 9 / 10


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 4}, {"v0_one_dimensional": True}, {"v0_scale": 7.0}]
)
def test_data_driven_is_scale_times_the_mean_square_of_single_sample_gradients(tmp_path, options):
    data = make_sequences(30)
    model = make_gpt2(dropout=0.0)
    exact = per_sample_gradients(model, data, loss_alone)
    trainer, recorder = record(
        tmp_path, model=model, data=data, v0_init="data_driven", v0_stats_batch_size=1, max_steps=1, **options
    )
    expected_names = [n for n, g in exact.items() if g.dim() > 2 or options.get("v0_one_dimensional")]
    assert sorted(recorder.v0) == sorted(expected_names)
    for name, v0 in recorder.v0.items():
        expected = options.get("v0_scale", 1.0) * exact[name].square().mean(0)
        torch.testing.assert_close(v0.double(), expected, rtol=2e-5, atol=1e-13)
    report = trainer.get_v0_report()
    assert (report["num_samples"], report["num_batches"]) == (30, 30)


def test_per_step_is_the_mean_square_of_the_effective_batch(tmp_path):
    """For B = 4 x 3 samples, E[g_B^2] over many random steps of this data set, each drawn without replacement."""
    data = make_sequences(24)
    model = make_gpt2(dropout=0.0)
    exact = per_sample_gradients(model, data, loss_alone)
    _, recorder = record(
        tmp_path, model=model, data=data, v0_init="data_driven", v0_statistic="per_step", v0_stats_batch_size=1, max_steps=1,
        gradient_accumulation_steps=3,
    )  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    draws = torch.stack([torch.randperm(24, generator=generator)[:12] for _ in range(4000)])
    name = "transformer.h.1.mlp.c_proj.weight"
    simulated = torch.stack([exact[name][d].mean(0).square() for d in draws]).mean(0)
    ratio = (recorder.v0[name].double() / simulated).flatten()
    assert ratio.median().item() == pytest.approx(1.0, abs=0.03)
    assert recorder.v0[name].sum().item() == pytest.approx(simulated.sum().item(), rel=0.03)


class Linear(nn.Module):
    """loss = mean over the batch of w . x: the gradient of a sample is x itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x, labels=None):
        return {"loss": (x * self.w).sum(-1).mean()}


def test_closed_form_on_a_linear_model(tmp_path):
    """Gradients are the inputs, so eq. 10 is scale * mean(x^2), and per_step scale * (mean^2 + var / B - var / N)."""
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 0.0], [-1.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
    data = [{"x": row, "labels": torch.tensor(0.0)} for row in x]
    common = {
        "model": Linear(),
        "data": data,
        "v0_init": "data_driven",
        "v0_scale": 2.0,
        "max_steps": 1,
        "remove_unused_columns": False,
    }
    _, recorder = record(tmp_path / "a", v0_stats_batch_size=1, **common)
    assert recorder.v0["w"].tolist()[0] == pytest.approx([2 * 12 / 4, 2 * 24 / 4, 0.0], rel=1e-6)
    _, recorder = record(
        tmp_path / "b",
        v0_stats_batch_size=1,
        v0_statistic="per_step",
        per_device_train_batch_size=2,
        **common | {"model": Linear()},
    )
    mean, var = x.mean(0), x.var(0)
    expected = 2 * (mean**2 + var * (1 / 2 - 1 / 4))
    assert recorder.v0["w"][0].tolist() == pytest.approx(expected.tolist(), rel=1e-6)


def test_random_v0_has_the_papers_mean_and_does_not_depend_on_data_or_model_state(tmp_path):
    _, a = record(tmp_path / "a", v0_init="random", max_steps=1)
    _, b = record(
        tmp_path / "b", v0_init="random", max_steps=1, model=make_gpt2(seed=5), data=make_sequences(20, seed=9)
    )
    assert all(torch.equal(a.v0[name], b.v0[name]) for name in a.v0)
    wte = a.v0["transformer.wte.weight"]
    assert wte.mean().item() == pytest.approx(100 / (VOCAB + 16), rel=0.25)  # 640 draws of chi^2_1: 5.6% standard error
    _, c = record(tmp_path / "c", v0_init="random", max_steps=1, v0_seed=12)
    assert not torch.equal(c.v0["transformer.wte.weight"], wte)
    _, d = record(tmp_path / "d", v0_init="random", max_steps=1, v0_scale=50.0, v0_fan_factor=2.0)
    torch.testing.assert_close(d.v0["transformer.wte.weight"], wte)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_and_resume_is_the_straight_run_with_one_pass(tmp_path, strategy, monkeypatch):
    import hf_v0init.trainer.mixin as module

    writes = []
    for name in ("write_random_v0", "write_data_driven_v0", "write_first_gradient_v0"):
        original = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *a, original=original, **k: (writes.append(1), original(*a, **k))[1])
    common = {"v0_init": strategy, "max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = train(tmp_path / "a", **common)
    resumed = make_trainer(tmp_path / "a", model=make_gpt2(seed=99), **common)
    before = len(writes)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert (before, len(writes)) == (1, 1)
    assert_equal_weights(straight, resumed)
    for name, v in second_moments_of(straight).items():
        assert torch.equal(v, second_moments_of(resumed)[name])
    assert resumed.get_v0_report() == straight.get_v0_report()
    files = [tmp_path / "a" / f"checkpoint-{step}" / "v0_init.json" for step in (4, 8)]
    assert [json.loads(file.read_text())["strategy"] for file in files] == [strategy, strategy]


def test_report_holds_what_was_written(tmp_path):
    trainer, recorder = record(tmp_path, v0_init="data_driven", max_steps=1, v0_num_samples=32, v0_stats_batch_size=8)
    report = trainer.get_v0_report()
    assert report["strategy"] == "data_driven" and report["scale"] == 1.0 and report["seed"] == 11
    assert (report["num_samples"], report["num_batches"], report["stats_batch_size"]) == (32, 4, 8)
    assert report["num_parameters_with_v0"] == len(recorder.v0) == 10
    for name, v0 in recorder.v0.items():
        figures = report["parameters"][name]
        assert figures["mean"] == pytest.approx(v0.mean().item(), rel=1e-5)
        assert (figures["min"], figures["max"]) == (v0.min().item(), v0.max().item())
    everything = torch.cat([v.flatten() for v in recorder.v0.values()])
    assert report["v0_mean"] == pytest.approx(everything.mean().item(), rel=1e-5)
    assert report["num_elements_with_v0"] == everything.numel()
    assert report["multiplier"]["1"] == pytest.approx((1 - 0.999) ** 0.5, rel=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "v0_init.json").read_text()) == report


def test_an_optimizer_of_the_users_gets_v0_too(tmp_path):
    model = make_gpt2()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    trainer, recorder = record(
        tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, v0_init="random", max_steps=1
    )
    assert len(recorder.v0) == 10 and trainer.get_v0_report()["strategy"] == "random"


def test_an_optimizer_over_some_parameters_gets_v0_for_those(tmp_path):
    model = make_gpt2()
    chosen = model.transformer.h[1].mlp.c_fc.weight
    optimizer = torch.optim.AdamW([chosen], lr=1e-3)
    _, recorder = record(
        tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, v0_init="data_driven", max_steps=1
    )
    assert list(recorder.v0) == ["transformer.h.1.mlp.c_fc.weight"]


def test_mixin_with_someone_elses_trainer_and_arguments(tmp_path):
    class TheirTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return 3.0 * super().compute_loss(model, inputs, *args, **kwargs)

    class Ours(V0InitMixin, TheirTrainer):
        pass

    def run(cls, name, **kwargs):
        recorder = Recorder()
        trainer = cls(
            model=make_gpt2(dropout=0.0),
            args=make_arguments(tmp_path / name, v0=False, max_steps=1),
            train_dataset=make_sequences(),
            callbacks=[recorder],
            v0_arguments=V0InitArguments(v0_init="data_driven"),
            **kwargs,
        )
        recorder.trainer = trainer
        trainer.train()
        return recorder.v0

    theirs, plain = run(Ours, "a"), run(V0InitTrainer, "b")
    for name in plain:  # their loss is 3 times as large, so E[g^2] is 9 times
        torch.testing.assert_close(theirs[name], 9 * plain[name], rtol=1e-4, atol=1e-12)


def test_second_train_call_keeps_the_state(tmp_path, caplog):
    trainer = make_trainer(tmp_path, v0_init="random", max_steps=3)
    trainer.train()
    report, moments = trainer.get_v0_report(), second_moments_of(trainer)
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        trainer.train()
    assert all(torch.equal(recorder.v0[name], moments[name]) for name in moments)
    assert trainer.get_v0_report() == report
    assert "keeps the state of an earlier train()" in caplog.text


def test_resume_from_a_model_only_checkpoint_writes_v0_anew_and_says_so(tmp_path, caplog):
    common = {
        "v0_init": "data_driven",
        "max_steps": 6,
        "save_strategy": "steps",
        "save_steps": 3,
        "save_only_model": True,
    }
    make_trainer(tmp_path, **common).train()
    recorder = Recorder()
    trainer = make_trainer(tmp_path, callbacks=[recorder], **common)
    recorder.trainer = trainer
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "holds no optimizer state" in caplog.text
    assert len(recorder.v0) == 10 and trainer.get_v0_report()["global_step"] == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"v0_scale": 5.0}, "scale: 1.0 -> 5.0"),
        ({"v0_statistic": "per_step"}, "statistic: per_sample -> per_step"),
        ({"v0_num_samples": 40}, "num_samples_requested: 5000 -> 40"),
        ({"v0_init": "random"}, "strategy: data_driven -> random"),
        ({"v0_seed": 3}, "seed: 11 -> 3"),
        ({}, None),
    ],
)
def test_resume_with_other_settings_names_them_and_keeps_the_state(tmp_path, caplog, change, words):
    common = {"v0_init": "data_driven", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = train(tmp_path, **common)
    trainer = make_trainer(tmp_path, **common | change)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(straight, trainer)
    assert (words in caplog.text) if words else ("differ" not in caplog.text)
    assert trainer.get_v0_report()["scale"] == 1.0


def test_resume_of_a_stock_checkpoint_says_that_v0_has_no_effect(tmp_path, caplog):
    common = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    stock = train(tmp_path, stock=True, **common)
    trainer = make_trainer(tmp_path, v0_init="random", **common)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "no record of a v0" in caplog.text
    assert_equal_weights(stock, trainer)


class StopInPass(V0InitTrainer):
    calls = 0

    def compute_loss(self, *args, **kwargs):
        type(self).calls += 1
        if type(self).calls == 3:
            raise KeyboardInterrupt
        return super().compute_loss(*args, **kwargs)


def test_an_interrupted_pass_leaves_nothing_and_the_trainer_usable(tmp_path):
    StopInPass.calls = 0
    trainer = make_trainer(tmp_path / "a", trainer_class=StopInPass, v0_init="data_driven")
    before = weights_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    trainer.train()
    straight = train(tmp_path / "b", v0_init="data_driven")
    report = trainer.get_v0_report()
    assert report["parameters"] == straight.get_v0_report()["parameters"]


def test_user_is_told_before_the_first_step(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        make_trainer(tmp_path / "a", v0_init="data_driven", adam_beta2=0.5, max_steps=12).train()
        quick = caplog.text
        caplog.clear()
        make_trainer(tmp_path / "b", v0_init="random", max_steps=12).train()
        slow = caplog.text
    assert "closed form (beta2 0.5, scale 1): 0.707 at step 1, 1 at step 10, 1 at step 12" in quick
    assert "not have washed out" not in quick
    assert "times one batch's g^2 (median over elements)" in slow and "will not have washed out" in slow
    assert "Remedy: v0_scale divided by" in slow


def test_warmup_steps_choose_the_scale(tmp_path):
    trainer, _ = record(tmp_path, v0_init="data_driven", v0_warmup_steps=50, adam_beta2=0.98, max_steps=1)
    assert trainer.get_v0_report()["scale"] == pytest.approx((1 / 0.81 - 1) * (0.98**-50 - 1), rel=1e-9)


@pytest.mark.parametrize(
    "length", [{"max_steps": 18}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}]
)  # fmt: skip
def test_a_share_of_the_run_is_that_many_steps(tmp_path, length):
    """48 sequences in batches of 4: all three are runs of 18 steps."""
    share, recorder = record(tmp_path / "a", v0_init="data_driven", v0_warmup_steps=0.3, adam_beta2=0.9, **length)
    steps, expected = record(tmp_path / "b", v0_init="data_driven", v0_warmup_steps=6, adam_beta2=0.9, **length)
    assert share.state.global_step == 18 and share.get_v0_report()["warmup_steps"] == 6
    assert all(torch.equal(recorder.v0[name], expected.v0[name]) for name in expected.v0)
    assert_equal_weights(share, steps)
    left_out = ("seconds", "versions")
    reports = [{k: v for k, v in t.get_v0_report().items() if k not in left_out} for t in (share, steps)]
    assert reports[0] == reports[1]


def test_a_share_that_takes_too_large_a_scale_is_refused_before_the_pass(tmp_path):
    trainer = make_trainer(
        tmp_path, v0_init="data_driven", v0_warmup_steps=0.9, adam_beta2=0.1, max_steps=-1, num_train_epochs=10
    )
    with pytest.raises(InputError, match=r"v0_warmup_steps=108: at adam_beta2=0\.1"):
        trainer.train()
    assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None
