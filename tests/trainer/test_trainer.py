"""The invariants of a run: what v0 changes, and that nothing else changes."""

import json
import logging

import pytest
import torch
from conftest import VOCAB, make_gpt2, make_sequences
from reference import per_sample_gradients
from torch import nn
from trainers import (
    Recorder,
    assert_equal_weights,
    is_untouched,
    make_arguments,
    make_trainer,
    record,
    second_moments_of,
    train,
    weights_of,
)
from transformers import Trainer, TrainerCallback

from hf_v0init import V0InitArguments, V0InitMixin, V0InitTrainer
from hf_v0init.errors import InputError

STRATEGIES = {
    "random": {"v0_init": "random", "v0_decay": "beta2"},
    "minibatch": {"v0_init": "data_driven", "v0_decay": "beta2"},
    "first_gradient": {"v0_init": "first_gradient", "v0_decay": "beta2"},
    "per_sample": {"v0_init": "data_driven", "v0_estimator": "per_sample"},
}
PER_SAMPLE = STRATEGIES["per_sample"]


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
    ours, recorder = record(tmp_path / "b", erase=True, max_steps=8, **STRATEGIES[strategy], **options)
    assert len(recorder.v0) == 10  # wte, wpe and 4 matrices in each of 2 layers
    assert_equal_weights(stock, ours)
    logs = [
        [{k: v for k, v in e.items() if "runtime" not in k and "per_second" not in k} for e in t.state.log_history]
        for t in (stock, ours)
    ]
    assert logs[0] == logs[1]


def test_v0_changes_the_run(tmp_path):
    stock, ours = train(tmp_path / "a", stock=True), train(tmp_path / "b", **STRATEGIES["minibatch"])
    moved = [not torch.equal(a, b) for a, b in zip(weights_of(stock).values(), weights_of(ours).values(), strict=True)]
    assert all(moved)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 2}, {"optim": "adamw_torch", "adam_beta2": 0.9}]
)
def test_first_step_obeys_the_recurrence(tmp_path, strategy, options):
    """v1 = beta2 * v0 + (1 - beta2) * g^2 for tensors with a v0, (1 - beta2) * g^2 for the others."""
    trainer, recorder = record(tmp_path, max_steps=2, **STRATEGIES[strategy], **options)
    beta2 = trainer.args.adam_beta2
    assert sorted(recorder.v0) == sorted(n for n, p in trainer.model.named_parameters() if p.dim() >= 2)
    for name, v1 in recorder.moments[0].items():
        g = recorder.gradients[0][name].double()
        v0 = recorder.v0[name].double() if name in recorder.v0 else torch.zeros_like(g)
        torch.testing.assert_close(v1.double(), beta2 * v0 + (1 - beta2) * g.square(), rtol=1e-6, atol=1e-20)
    steps = {state["step"].item() for state in trainer.optimizer.state.values()}
    assert steps == {2.0}


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 3}, {"max_grad_norm": 0.05}])
def test_first_gradient_is_the_gradient_of_the_first_step(tmp_path, options):
    """GI-Adam: v0 = g1^2 of the very gradient, clipped and accumulated, that the first step uses; then v1 = g1^2 too."""
    _, recorder = record(tmp_path, **STRATEGIES["first_gradient"], max_steps=1, **options)
    assert len(recorder.v0) == 10
    for name, v0 in recorder.v0.items():
        assert torch.equal(v0, recorder.gradients[0][name].square()), name


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"max_grad_norm": 0.05},
        {"v0_scale": 7.0},
        {"v0_include_bias_and_norm": True},
    ],
)
def test_minibatch_is_the_mean_square_of_the_first_steps_gradients(tmp_path, options):
    """K = 3, no step lost: after step 3 the second moment is Adam's own plus beta2^3 * scale * the mean of g^2 as Adam sees it."""
    trainer, recorder = record(
        tmp_path, v0_init="data_driven", v0_decay="beta2", v0_estimation_steps=3, max_steps=5, adam_beta2=0.9, **options
    )
    scale = options.get("v0_scale", 1.0)
    for name, v3 in recorder.moments[2].items():
        u = sum(0.1 * 0.9 ** (2 - i) * g[name].double().square() for i, g in enumerate(recorder.gradients[:3]))
        has_v0 = v3.dim() >= 2 or "v0_include_bias_and_norm" in options
        expected = u * (1 + (scale * 0.9**3 / (1 - 0.9**3) if has_v0 else 0.0))
        torch.testing.assert_close(v3.double(), expected, rtol=1e-5, atol=0.0)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {5.0}
    report = trainer.get_v0_report()
    assert (report["estimation_steps"], report["estimator"], report["measured_ratio"]) == (3, "minibatch", scale)
    assert report["num_parameters_with_v0"] == (28 if "v0_include_bias_and_norm" in options else 10)


@pytest.mark.parametrize(("max_steps", "expected"), [(99, 1), (100, 1), (250, 2), (3200, 32), (100_000, 32), (None, 1)])
def test_the_default_estimates_over_one_percent_of_the_run_and_32_steps_at_most(max_steps, expected):
    for strategy, number in (("data_driven", expected), ("random", 1)):
        plan = V0InitArguments(v0_init=strategy, v0_decay="beta2").resolve(max_steps)
        assert plan.choose_estimation_steps(max_steps) == number


def test_more_estimating_than_steps_is_refused_before_the_first(tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", v0_estimation_steps=5, max_steps=5)
    with pytest.raises(InputError, match=r"v0_estimation_steps=5 with max_steps=5"):
        trainer.train()
    assert trainer.state.global_step == 0


def loss_alone(model, sample):
    """The Trainer's own loss of one sample. For this model it counts 10 items, not the 9 that are predicted: its scale
    is that of training, and v0 must have the same."""
    return model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss * 9 / 10


@pytest.mark.parametrize(
    "options", [{}, {"gradient_accumulation_steps": 4}, {"v0_include_bias_and_norm": True}, {"v0_scale": 7.0}]
)
def test_data_driven_is_scale_times_the_mean_square_of_single_sample_gradients(tmp_path, options):
    data = make_sequences(30)
    model = make_gpt2(dropout=0.0)
    exact = per_sample_gradients(model, data, loss_alone)
    trainer, recorder = record(tmp_path, model=model, data=data, max_steps=1, **PER_SAMPLE, **options)
    expected_names = [n for n, g in exact.items() if g.dim() > 2 or options.get("v0_include_bias_and_norm")]
    assert sorted(recorder.v0) == sorted(expected_names)
    for name, v0 in recorder.v0.items():
        expected = options.get("v0_scale", 1.0) * exact[name].square().mean(0)
        torch.testing.assert_close(v0.double(), expected, rtol=2e-5, atol=1e-13)
    report = trainer.get_v0_report()
    assert (report["num_samples"], report["num_batches"]) == (30, 30)


class Linear(nn.Module):
    """loss = mean over the batch of w . x: the gradient of a sample is x itself."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1, 3))

    def forward(self, x, labels=None):
        return {"loss": (x * self.w).sum(-1).mean()}


def test_closed_form_on_a_linear_model(tmp_path):
    """Gradients are the inputs, so eq. 10 is scale * mean(x^2), in batches scale * (mean^2 + b * Var over batches)."""
    x = torch.tensor([[1.0, 2.0, 0.0], [3.0, -2.0, 0.0], [-1.0, 4.0, 0.0], [1.0, 0.0, 0.0]])
    data = [{"x": row, "labels": torch.tensor(0.0)} for row in x]
    common = {"data": data, "v0_scale": 2.0, "max_steps": 1, "remove_unused_columns": False} | PER_SAMPLE
    _, recorder = record(tmp_path / "a", model=Linear(), **common)
    assert recorder.v0["w"].tolist()[0] == pytest.approx([2 * 12 / 4, 2 * 24 / 4, 0.0], rel=1e-6)
    trainer, recorder = record(tmp_path / "b", model=Linear(), v0_stats_batch_size=2, **common)
    report = trainer.get_v0_report()
    assert (report["num_samples"], report["num_batches"]) == (4, 2)
    # With two batches of two, mean^2 + 2 Var / 1 depends on which two are together: all three pairings are possible.
    pairings = [((0, 1), (2, 3)), ((0, 2), (1, 3)), ((0, 3), (1, 2))]
    possible = []
    for pairing in pairings:
        means = torch.stack([x[list(pair)].mean(0) for pair in pairing])
        possible.append(2 * (means.mean(0) ** 2 + 2 * means.var(0) * (1 - 1 / 4)))
    assert any(torch.allclose(recorder.v0["w"][0], expected, rtol=1e-5) for expected in possible)


def test_random_v0_has_the_papers_mean_and_does_not_depend_on_data_or_model_state(tmp_path):
    _, a = record(tmp_path / "a", **STRATEGIES["random"], max_steps=1)
    _, b = record(
        tmp_path / "b", **STRATEGIES["random"], max_steps=1, model=make_gpt2(seed=5), data=make_sequences(20, seed=9)
    )
    assert all(torch.equal(a.v0[name], b.v0[name]) for name in a.v0)
    wte = a.v0["transformer.wte.weight"]
    assert wte.mean().item() == pytest.approx(100 / (VOCAB + 16), rel=0.25)  # 640 draws of chi^2_1: 5.6% standard error
    _, c = record(tmp_path / "c", **STRATEGIES["random"], max_steps=1, v0_seed=12)
    assert not torch.equal(c.v0["transformer.wte.weight"], wte)
    _, d = record(tmp_path / "d", v0_init="random", max_steps=1, v0_preset="paper")
    torch.testing.assert_close(d.v0["transformer.wte.weight"], wte)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_stop_and_resume_is_the_straight_run_with_one_write(tmp_path, strategy):
    common = STRATEGIES[strategy] | {"max_steps": 8, "save_strategy": "steps", "save_steps": 4}
    straight = train(tmp_path / "a", **common)
    resumed, recorder = make_trainer(tmp_path / "a", model=make_gpt2(seed=99), **common), Recorder()
    recorder.trainer = resumed
    resumed.add_callback(recorder)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-4"))
    assert_equal_weights(straight, resumed)
    for name, v in second_moments_of(straight).items():
        assert torch.equal(v, second_moments_of(resumed)[name])
    assert resumed.get_v0_report() == straight.get_v0_report()
    files = [tmp_path / "a" / f"checkpoint-{step}" / "v0_init.json" for step in (4, 8)]
    assert [json.loads(file.read_text())["strategy"] for file in files] == [STRATEGIES[strategy]["v0_init"]] * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stop", [1, 3, 4, 6])
def test_stop_and_resume_inside_and_after_the_first_steps(tmp_path, stop, dtype):
    common = {
        "v0_init": "data_driven",
        "v0_decay": "beta2",
        "v0_estimation_steps": 4,
        "max_steps": 8,
        "save_strategy": "steps",
        "save_steps": stop,
    }
    straight = train(tmp_path / "a", model=make_gpt2().to(dtype), **common)
    record_file = json.loads((tmp_path / "a" / f"checkpoint-{stop}" / "v0_init.json").read_text())
    assert record_file["estimation_steps"] == 4 and record_file.get("is_written", True) == (stop > 4)
    resumed = make_trainer(tmp_path / "b", model=make_gpt2(seed=99).to(dtype), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_equal_weights(straight, resumed)
    for name, v in second_moments_of(straight).items():
        assert torch.equal(v, second_moments_of(resumed)[name])
    left_out = {"seconds"}
    reports = [{k: v for k, v in t.get_v0_report().items() if k not in left_out} for t in (straight, resumed)]
    assert reports[0]["parameters"] == reports[1]["parameters"]


def test_report_holds_what_was_written(tmp_path):
    trainer, recorder = record(tmp_path, max_steps=1, v0_num_samples=32, v0_stats_batch_size=8, **PER_SAMPLE)
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
    ratio = report["measured_ratio"]
    assert report["multiplier"]["1"] == pytest.approx((1 + ratio * 0.999 / 0.001) ** -0.5, rel=1e-6)
    trainer.save_model(str(tmp_path / "final"))
    assert json.loads((tmp_path / "final" / "v0_init.json").read_text()) == report


def test_an_optimizer_of_the_users_gets_v0_too(tmp_path):
    model = make_gpt2()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3, amsgrad=True)
    trainer, recorder = record(
        tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, **STRATEGIES["random"], max_steps=1
    )
    assert len(recorder.v0) == 10 and trainer.get_v0_report()["strategy"] == "random"


def test_an_optimizer_over_some_parameters_gets_v0_for_those(tmp_path):
    model = make_gpt2()
    chosen = model.transformer.h[1].mlp.c_fc.weight
    optimizer = torch.optim.AdamW([chosen], lr=1e-3)
    _, recorder = record(
        tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, **STRATEGIES["minibatch"], max_steps=1
    )
    assert list(recorder.v0) == ["transformer.h.1.mlp.c_fc.weight"]


def test_mixin_with_someone_elses_trainer_and_arguments(tmp_path):
    class TheirTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            self.calls = getattr(self, "calls", 0) + 1
            return 3.0 * super().compute_loss(model, inputs, *args, **kwargs)

    class Ours(V0InitMixin, TheirTrainer):
        pass

    def run(cls, name, **settings):
        recorder = Recorder()
        trainer = cls(
            model=make_gpt2(dropout=0.0),
            args=make_arguments(tmp_path / name, v0=False, max_steps=1, max_grad_norm=0.0),
            train_dataset=make_sequences(),
            callbacks=[recorder],
            v0_arguments=V0InitArguments(**settings),
        )
        recorder.trainer = trainer
        trainer.train()
        return recorder.v0

    for number, settings in enumerate((STRATEGIES["minibatch"], PER_SAMPLE)):
        theirs, plain = run(Ours, f"a{number}", **settings), run(V0InitTrainer, f"b{number}", **settings)
        for name in plain:  # their loss is 3 times as large, so E[g^2] is 9 times
            torch.testing.assert_close(theirs[name], 9 * plain[name], rtol=1e-3, atol=1e-6 * plain[name].max().item())


def test_second_train_call_keeps_the_state(tmp_path, caplog):
    trainer = make_trainer(tmp_path, **STRATEGIES["random"], max_steps=3)
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
    common = STRATEGIES["minibatch"] | {
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
        (
            {"v0_estimator": "minibatch", "v0_num_samples": None, "v0_stats_batch_size": None, "v0_scale": 1.0},
            "per_sample -> minibatch",
        ),
        ({"v0_num_samples": 40}, "num_samples_requested: 5000 -> 40"),
        ({"v0_init": "random", "v0_estimator": None, "v0_decay": "beta2"}, "strategy: data_driven -> random"),
        ({"v0_seed": 3}, "seed: 11 -> 3"),
        ({}, None),
    ],
)
def test_resume_with_other_settings_names_them_and_keeps_the_state(tmp_path, caplog, change, words):
    common = PER_SAMPLE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
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
    trainer = make_trainer(tmp_path, **STRATEGIES["random"], **common)
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert "was trained without a v0" in caplog.text
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
    trainer = make_trainer(tmp_path / "a", trainer_class=StopInPass, **PER_SAMPLE)
    before = weights_of(trainer)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None
    assert all(torch.equal(before[n], w) for n, w in weights_of(trainer).items())
    trainer.train()
    straight = train(tmp_path / "b", **PER_SAMPLE)
    report = trainer.get_v0_report()
    assert report["parameters"] == straight.get_v0_report()["parameters"]


def test_the_log_has_three_lines_at_most_that_agree(tmp_path, caplog):
    def lines_of(name, **options):
        caplog.clear()
        with caplog.at_level(logging.INFO, logger="hf_v0init"):
            make_trainer(tmp_path / name, max_steps=12, **options).train()
        return [(record.levelname, record.getMessage()) for record in caplog.records if record.name == "hf_v0init"]

    quick = lines_of("a", **STRATEGIES["minibatch"], adam_beta2=0.5)
    assert [level for level, _ in quick] == ["INFO", "INFO"]
    assert quick[0][1].startswith("v0 (data_driven, scale 1) from the gradient of the first step: mean ")
    assert (
        "v0 is 1 times g^2 (median over elements), which multiplies the step by 0.707 at step 1, 1 at step 10, 1 at step 12"
        in quick[1][1]
    )
    slow = lines_of("b", **STRATEGIES["random"])
    assert [level for level, _ in slow] == ["INFO", "INFO", "WARNING"]
    assert slow[0][1].startswith("v0 (random, scale 100) drawn: mean ")
    assert "Remedy: --v0_decay_steps 4 (a third of training) instead of --v0_scale" in slow[2][1]
    mended = lines_of("c", **STRATEGIES["random"], v0_decay_steps=4)
    assert [level for level, _ in mended] == ["INFO"] * 3  # the first says that the schedule keeps its plateau


def test_a_v0_that_no_gradient_reached_is_a_warning_and_no_multiplier(tmp_path, caplog):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            return {"loss": (x @ (self.w * 0.0)).sum() + self.b.sum()}

    data = [{"x": torch.ones(3), "labels": torch.tensor(0.0)}] * 4
    options = {"model": Constant(), "data": data, "max_steps": 1, "remove_unused_columns": False}
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        make_trainer(tmp_path, **options, **PER_SAMPLE).train()
    warnings = [
        record.getMessage() for record in caplog.records if record.levelname == "WARNING" and record.name == "hf_v0init"
    ]
    assert (
        len(warnings) == 1
        and "v0 is zero in all 1 tensors" in warnings[0]
        and "--v0_estimator minibatch" in warnings[0]
    )
    assert "multiplies the step" not in caplog.text


def test_parameters_whose_first_gradient_comes_later_get_their_v0_then(tmp_path, caplog):
    class Unfreeze(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 2:
                model.transformer.wte.requires_grad_(True)

    for strategy in ("data_driven", "random", "first_gradient"):
        model = make_gpt2()
        model.transformer.wte.requires_grad_(False)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        with caplog.at_level(logging.INFO, logger="hf_v0init"):
            trainer, recorder = record(
                tmp_path / strategy, model=model, kwargs={"optimizers": (optimizer, None)}, callbacks=[Unfreeze()], v0_init=strategy,
                v0_decay="beta2", max_steps=4,
            )  # fmt: skip
        assert "transformer.wte.weight" not in recorder.v0
        name, g = "transformer.wte.weight", recorder.gradients[2]["transformer.wte.weight"]
        v1 = recorder.moments[2][name]
        if strategy != "random":
            torch.testing.assert_close(v1, 0.999 * g.square() + 0.001 * g.square())
        else:
            assert v1.mean() > 100 * g.square().mean()
        assert "first gradient of 1 further tensors: transformer.wte.weight" in caplog.text
        assert optimizer.state[model.transformer.wte.weight]["step"] == 2
        assert not trainer._v0_callback.hook.is_attached


def test_decay_steps_hold_for_a_random_v0_by_the_measured_ratio(tmp_path):
    """m(30) = 0.9 for the median element."""
    _, recorder = record(tmp_path, **STRATEGIES["random"], v0_decay_steps=30, adam_beta2=0.98, max_steps=40)
    ratios = torch.cat([(v0 / recorder.gradients[0][n].square()).flatten() for n, v0 in recorder.v0.items()])
    ratio = ratios[ratios.isfinite()].median().item()
    assert 1 / (1 + ratio * 0.98**30 / (1 - 0.98**30)) ** 0.5 == pytest.approx(0.9, rel=0.05)


def test_each_group_has_the_scale_of_its_own_beta2(tmp_path):
    model = make_gpt2()
    first, second = model.transformer.h[0].mlp.c_fc.weight, model.transformer.h[1].mlp.c_fc.weight
    optimizer = torch.optim.AdamW(
        [{"params": [first], "betas": (0.9, 0.999)}, {"params": [second], "betas": (0.9, 0.95)}], lr=1e-3
    )
    _, recorder = record(
        tmp_path,
        model=model,
        kwargs={"optimizers": (optimizer, None)},
        **STRATEGIES["minibatch"],
        v0_decay_steps=30,
        max_steps=40,
    )
    for layer, beta2 in ((0, 0.999), (1, 0.95)):
        name = f"transformer.h.{layer}.mlp.c_fc.weight"
        scale = (1 / 0.81 - 1) * (beta2**-30 - 1)
        torch.testing.assert_close(recorder.v0[name], scale * recorder.gradients[0][name].square())


def test_decay_steps_choose_the_scale(tmp_path):
    trainer, _ = record(tmp_path, **STRATEGIES["minibatch"], v0_decay_steps=50, adam_beta2=0.98, max_steps=51)
    assert trainer.get_v0_report()["scale"] == pytest.approx((1 / 0.81 - 1) * (0.98**-50 - 1), rel=1e-9)


@pytest.mark.parametrize(
    "length", [{"max_steps": 18}, {"max_steps": -1, "num_train_epochs": 1.5}, {"max_steps": -1, "num_train_epochs": 3, "gradient_accumulation_steps": 2}]
)  # fmt: skip
def test_a_share_of_the_run_is_that_many_steps(tmp_path, length):
    """48 sequences in batches of 4: all three are runs of 18 steps."""
    share, recorder = record(tmp_path / "a", **STRATEGIES["minibatch"], v0_decay_steps=0.3, adam_beta2=0.9, **length)
    steps, expected = record(tmp_path / "b", **STRATEGIES["minibatch"], v0_decay_steps=6, adam_beta2=0.9, **length)
    assert share.state.global_step == 18 and share.get_v0_report()["decay_steps"] == 6
    assert all(torch.equal(recorder.v0[name], expected.v0[name]) for name in expected.v0)
    assert_equal_weights(share, steps)
    left_out = ("seconds", "versions")
    reports = [{k: v for k, v in t.get_v0_report().items() if k not in left_out} for t in (share, steps)]
    assert reports[0] == reports[1]


def test_a_share_that_takes_too_large_a_scale_is_refused_before_the_first_step(tmp_path):
    trainer = make_trainer(
        tmp_path, **STRATEGIES["minibatch"], v0_decay_steps=0.9, adam_beta2=0.1, max_steps=-1, num_train_epochs=10
    )
    with pytest.raises(InputError, match=r"v0_decay_steps=108: at adam_beta2=0\.1"):
        trainer.train()
    assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None
