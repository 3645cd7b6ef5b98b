"""The invariants of a run: what v0 changes, and that nothing else changes, at every precision and with every memory saving."""

import json

import pytest
import torch
from conftest import VOCAB, make_gpt2, make_sequences
from reference import per_sample_gradients
from torch import nn
from trainers import (
    Recorder,
    assert_equal_weights,
    assert_recurrence,
    is_untouched,
    make_arguments,
    make_trainer,
    read_logs,
    record,
    second_moments_of,
    train,
)
from transformers import Trainer

from hf_v0init import InputError, V0InitArguments, V0InitMixin, V0InitTrainer

RANDOM = {"v0_init": "random", "v0_decay": "beta2"}
MINIBATCH = {"v0_init": "data_driven", "v0_decay": "beta2"}
PER_SAMPLE = {"v0_init": "data_driven", "v0_estimator": "per_sample"}
STRATEGIES = {
    "random": RANDOM,
    "minibatch": MINIBATCH,
    "first_gradient": {"v0_init": "first_gradient", "v0_decay": "beta2"},
    "per_sample": PER_SAMPLE,
}
MODES = {
    "plain": {"optim": "adamw_torch"},
    "accumulation, clipping, decay": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.05, "weight_decay": 0.1, "warmup_steps": 1},
    "label smoothing, workers": {"label_smoothing_factor": 0.1, "dataloader_num_workers": 1, "data_seed": 5},
    "bf16 autocast": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "neftune": {"neftune_noise_alpha": 5.0},
    "compiled": {"torch_compile": True, "torch_compile_backend": "eager"},
}  # fmt: skip


@pytest.fixture(scope="module")
def stock_runs(tmp_path_factory):
    """By mode, the stock Trainer's run of three steps, made when first asked for."""
    runs = {}

    def get(mode: str) -> Trainer:
        if mode not in runs:
            runs[mode] = train(tmp_path_factory.mktemp("stock"), stock=True, max_steps=3, **MODES[mode])
        return runs[mode]

    return get


@pytest.mark.parametrize("mode", MODES)
def test_zeros_is_the_stock_trainer_bit_for_bit(tmp_path, stock_runs, mode):
    ours = train(tmp_path, max_steps=3, v0_init="zeros", **MODES[mode])
    assert_equal_weights(stock_runs(mode), ours)
    assert read_logs(stock_runs(mode)) == read_logs(ours) and ours.get_v0_report() is None


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("mode", MODES)
def test_v0_has_no_side_effect_and_the_first_step_starts_from_it(tmp_path, stock_runs, mode, strategy):
    """With v0 erased before the first step the run is the stock run bit for bit: same order, same dropout, same weights."""
    ours, recorder = record(tmp_path / "a", erase=True, max_steps=3, **STRATEGIES[strategy], **MODES[mode])
    assert len(recorder.v0) == 10  # wte, wpe and 4 matrices in each of 2 layers
    assert_equal_weights(stock_runs(mode), ours)
    assert read_logs(stock_runs(mode)) == read_logs(ours)
    trainer, recorder = record(tmp_path / "b", max_steps=2, **STRATEGIES[strategy], **MODES[mode])
    assert sorted(recorder.v0) == sorted(n for n, p in trainer.model.named_parameters() if p.dim() >= 2)
    assert_recurrence(recorder)
    assert {state["step"].item() for state in trainer.optimizer.state.values()} == {2.0}
    if strategy in ("minibatch", "first_gradient"):  # GI-Adam: of the very gradient, clipped and accumulated
        assert all(torch.equal(v0, recorder.gradients[0][name].square()) for name, v0 in recorder.v0.items())


def loss_alone(model, sample):
    """The Trainer's own loss of one sample. For this model it counts 10 items, not the 9 that are predicted: its scale
    is that of training, and v0 must have the same."""
    return model(input_ids=sample["input_ids"][None], labels=sample["labels"][None]).loss * 9 / 10


@pytest.mark.parametrize(
    "options", [{"gradient_accumulation_steps": 4}, {"v0_include_bias_and_norm": True, "v0_scale": 7.0}]
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


def test_random_v0_has_the_papers_mean_and_does_not_depend_on_data_or_model_state(tmp_path):
    _, a = record(tmp_path / "a", **RANDOM, max_steps=1)
    _, b = record(
        tmp_path / "b", v0_init="random", v0_preset="paper", max_steps=1, model=make_gpt2(seed=5), data=make_sequences(20, seed=9)
    )  # fmt: skip
    assert all(torch.equal(a.v0[name], b.v0[name]) for name in a.v0)
    wte = a.v0["transformer.wte.weight"]
    assert wte.mean().item() == pytest.approx(100 / (VOCAB + 16), rel=0.25)  # 640 draws of chi^2_1: 5.6% standard error
    _, c = record(tmp_path / "c", **RANDOM, max_steps=1, v0_seed=12)  # without it the run's own seed, 11
    assert not torch.equal(c.v0["transformer.wte.weight"], wte)


def test_bf16_parameters_have_bf16_state_from_fp32_sums(tmp_path):
    for name, settings in STRATEGIES.items():
        _, fp32 = record(tmp_path / name, model=make_gpt2(dropout=0.0), max_steps=1, **settings)
        model = make_gpt2(dropout=0.0).to(torch.bfloat16)
        trainer, bf16 = record(tmp_path / f"{name} bf16", model=model, max_steps=2, **settings)
        for key, v0 in fp32.v0.items():
            assert bf16.v0[key].dtype == torch.bfloat16
            assert bf16.v0[key].float().sum().item() == pytest.approx(v0.sum().item(), rel=0.05), key
        state = next(iter(trainer.optimizer.state.values()))
        assert state["exp_avg"].dtype == torch.bfloat16 and state["step"].item() == 2.0


# ---- stopping and resuming -------------------------------------------------------------------------------------------

ESTIMATES = MINIBATCH | {"v0_estimation_steps": 4}


@pytest.mark.parametrize(
    ("settings", "stop", "dtype"),
    [(RANDOM, 4, torch.float32), (STRATEGIES["first_gradient"], 4, torch.float32), (PER_SAMPLE, 4, torch.float32),
     (ESTIMATES, 1, torch.float32), (ESTIMATES, 3, torch.bfloat16), (ESTIMATES, 4, torch.float32), (ESTIMATES, 6, torch.bfloat16)],
)  # fmt: skip
def test_stop_and_resume_is_the_straight_run_with_one_v0(tmp_path, settings, stop, dtype):
    common = settings | {"max_steps": 8, "save_strategy": "steps", "save_steps": stop}
    straight = train(tmp_path / "a", model=make_gpt2().to(dtype), **common)
    stored = json.loads((tmp_path / "a" / f"checkpoint-{stop}" / "v0_init.json").read_text())
    assert stored["strategy"] == settings["v0_init"]
    assert stored.get("is_written", True) == (stop > settings.get("v0_estimation_steps", 1))
    resumed = make_trainer(tmp_path / "b", model=make_gpt2(seed=99).to(dtype), **common)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / f"checkpoint-{stop}"))
    assert_equal_weights(straight, resumed)
    for name, v in second_moments_of(straight).items():
        assert torch.equal(v, second_moments_of(resumed)[name])
    assert straight.get_v0_report()["parameters"] == resumed.get_v0_report()["parameters"]


def test_second_train_call_keeps_the_state(tmp_path):
    trainer = train(tmp_path, **RANDOM, max_steps=3)
    report, moments = trainer.get_v0_report(), second_moments_of(trainer)
    recorder = Recorder()
    recorder.trainer = trainer
    trainer.add_callback(recorder)
    trainer.train()
    assert all(torch.equal(recorder.v0[name], moments[name]) for name in moments)
    assert trainer.get_v0_report() == report


def test_resume_from_a_model_only_checkpoint_writes_v0_anew_and_says_so(tmp_path, our_log):
    common = MINIBATCH | {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "save_only_model": True}
    train(tmp_path, **common)
    recorder = Recorder()
    recorder.trainer = trainer = make_trainer(tmp_path, callbacks=[recorder], **common)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert "holds no optimizer state" in our_log.text
    assert len(recorder.v0) == 10 and trainer.get_v0_report()["global_step"] == 3

    # and such a run, stopped while its v0 decays, counts from its own first step when it goes on
    linear = common | {"v0_decay": "linear", "v0_decay_steps": 4, "v0_estimation_steps": 2}
    linear |= {"save_only_model": False, "max_steps": 9}
    straight = make_trainer(tmp_path / "linear", **linear)
    straight.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    resumed = make_trainer(tmp_path / "linear", model=make_gpt2(seed=9), **linear)
    resumed.train(resume_from_checkpoint=str(tmp_path / "linear" / "checkpoint-6"))
    assert_equal_weights(straight, resumed)
    assert resumed.get_v0_report()["global_step"] == 3


def test_resume_with_other_settings_names_them_and_keeps_the_state(tmp_path, our_log):
    common = PER_SAMPLE | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}
    straight = train(tmp_path, **common)
    for change, words in (
        ({"v0_scale": 5.0, "v0_num_samples": 40}, ["scale: 1.0 -> 5.0", "num_samples_requested: 5000 -> 40"]),
        ({"v0_estimator": "minibatch", "v0_scale": 1.0, "v0_seed": 3}, ["per_sample -> minibatch", "seed: 11 -> 3"]),
        ({"v0_init": "random", "v0_estimator": None, "v0_decay": "beta2"}, ["strategy: data_driven -> random"]),
        ({}, []),
    ):
        our_log.clear()
        trainer = make_trainer(tmp_path, **common | change)
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
        assert_equal_weights(straight, trainer)
        assert all(word in our_log.text for word in words) and ("differ" in our_log.text) == bool(words)
        assert trainer.get_v0_report()["scale"] == 1.0


# ---- what is told ----------------------------------------------------------------------------------------------------


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


def test_the_log_has_three_lines_at_most_that_agree(tmp_path, our_log):
    def lines_of(name, **options):
        our_log.clear()
        make_trainer(tmp_path / name, max_steps=12, **options).train()
        return [(record.levelname, record.getMessage()) for record in our_log.records if record.name == "hf_v0init"]

    quick = lines_of("a", **MINIBATCH, adam_beta2=0.5)
    assert [level for level, _ in quick] == ["INFO", "INFO"] and "data_driven, scale 1" in quick[0][1]
    assert "0.707 at step 1, 1 at step 10, 1 at step 12" in quick[1][1]
    slow = lines_of("b", **RANDOM)
    assert [level for level, _ in slow] == ["INFO", "INFO", "WARNING"] and "random, scale 100" in slow[0][1]
    assert "--v0_decay_steps 4 " in slow[2][1]
    mended = lines_of("c", **RANDOM, v0_decay_steps=4)
    assert [level for level, _ in mended] == ["INFO"] * 3  # the first says that the schedule keeps its plateau


def test_a_v0_that_no_gradient_reached_is_a_warning_and_no_multiplier(tmp_path, our_log):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.w, self.b = nn.Parameter(torch.ones(3, 3)), nn.Parameter(torch.ones(1))

        def forward(self, x, labels=None):
            return {"loss": (x @ (self.w * 0.0)).sum() + self.b.sum()}

    data = [{"x": torch.ones(3), "labels": torch.tensor(0.0)}] * 4
    train(tmp_path, model=Constant(), data=data, max_steps=1, remove_unused_columns=False, **PER_SAMPLE)
    (warning,) = [record.getMessage() for record in our_log.records if record.levelname == "WARNING"]
    assert "v0 is zero in all 1 tensors" in warning and "--v0_estimator minibatch" in warning
    assert "multiplies the step" not in our_log.text


# ---- optimizers and arguments of others, fractions of training ---------------------------------------------------------


def test_an_optimizer_of_the_users_over_some_parameters_gets_v0_for_those(tmp_path):
    model = make_gpt2()
    optimizer = torch.optim.Adam([model.transformer.h[1].mlp.c_fc.weight], lr=1e-3, amsgrad=True)
    _, recorder = record(tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, **MINIBATCH, max_steps=1)
    assert list(recorder.v0) == ["transformer.h.1.mlp.c_fc.weight"]


def test_mixin_with_someone_elses_trainer_and_arguments(tmp_path):
    class TheirTrainer(Trainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            return 3.0 * super().compute_loss(model, inputs, *args, **kwargs)

    class Ours(V0InitMixin, TheirTrainer):
        pass

    def run(cls, name, **settings):
        recorder = Recorder()
        recorder.trainer = trainer = cls(
            model=make_gpt2(dropout=0.0),
            args=make_arguments(tmp_path / name, v0=False, max_steps=1, max_grad_norm=0.0),
            train_dataset=make_sequences(),
            callbacks=[recorder],
            v0_arguments=V0InitArguments(**settings),
        )
        trainer.train()
        return recorder.v0

    for number, settings in enumerate((MINIBATCH, PER_SAMPLE)):
        theirs, plain = run(Ours, f"a{number}", **settings), run(V0InitTrainer, f"b{number}", **settings)
        for name in plain:  # their loss is 3 times as large, so E[g^2] is 9 times
            torch.testing.assert_close(theirs[name], 9 * plain[name], rtol=1e-3, atol=1e-6 * plain[name].max().item())


@pytest.mark.parametrize(
    "length", [{"num_train_epochs": 1.5}, {"num_train_epochs": 3, "gradient_accumulation_steps": 2}]
)
def test_a_fraction_of_training_is_that_many_steps(tmp_path, length):
    """48 sequences in batches of 4: both are runs of 18 steps."""
    options = MINIBATCH | length | {"max_steps": -1, "adam_beta2": 0.9}
    fraction, recorder = record(tmp_path / "a", v0_decay_steps=0.3, **options)
    steps, expected = record(tmp_path / "b", v0_decay_steps=6, **options)
    assert fraction.state.global_step == 18 and fraction.get_v0_report()["decay_steps"] == 6
    assert all(torch.equal(recorder.v0[name], expected.v0[name]) for name in expected.v0)
    assert_equal_weights(fraction, steps)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v0_decay_steps": 0.9, "adam_beta2": 0.1, "max_steps": -1, "num_train_epochs": 10}, r"v0_decay_steps=108: at adam_beta2=0\.1"),
        ({"v0_estimation_steps": 5, "max_steps": 5}, "v0_estimation_steps=5 with max_steps=5"),
    ],
)  # fmt: skip
def test_a_length_that_the_run_cannot_have_is_refused_before_the_first_step(tmp_path, options, words):
    trainer = make_trainer(tmp_path, **MINIBATCH, **options)
    with pytest.raises(InputError, match=words):
        trainer.train()
    assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None


def test_batches_are_drawn_as_from_the_stock_trainer_before_any_training(tmp_path):
    for stock in (True, False):
        trainer = make_trainer(tmp_path, stock=stock, **({} if stock else MINIBATCH))
        batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
        assert len(batches) == 2
