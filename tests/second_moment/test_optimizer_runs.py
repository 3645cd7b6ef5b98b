"""Optimizers through the Trainer: what `--optim` and `--v0_optimizer` build holds, before its first step, the strategy's v0."""

import pytest
import torch
from conftest import make_gpt2
from optimizer_cases import REFUSED_ROWS, find_row_of_optim, quiet_and_eager
from test_optimizer_probe import Mine
from trainers import Recorder, assert_equal_weights, is_untouched, make_trainer, record, second_moments_of, train
from transformers import GPT2Config, GPT2LMHeadModel

from hf_v0init import InputError

STRATEGIES = ["random", "data_driven", "first_gradient"]
EXACT_RUNS = [
    *[
        {"optim": name}
        for name in ("adamw_torch", "rmsprop", "adagrad", "rmsprop_bnb", "paged_adamw_32bit", "ademamix")
    ],
    *[{"optim": name} for name in ("schedule_free_adamw", "schedule_free_radam", "grokadamw")],
    *[{"v0_optimizer": f"torch.optim:{name}"} for name in ("Adam", "NAdam", "RAdam", "Adamax", "Adadelta")],
    *[{"v0_optimizer": f"pytorch_optimizer:{name}"} for name in ("AdaBelief", "AdaBound", "ADOPT", "Yogi", "LaProp")],
    {"v0_optimizer": "torch.optim:AdamW", "optim_args": "amsgrad=true"},
]
QUANTISED_RUNS = [
    "adamw_torch_8bit", "adamw_bnb_8bit", "adamw_torch_4bit", "paged_adamw_8bit", "ademamix_8bit", "rmsprop_bnb_8bit",
]  # fmt: skip


def name_of(options) -> str:
    return "-".join(str(value) for value in options.values())


def require(options) -> None:
    """Skip where the package is not installed."""
    if "v0_optimizer" in options:
        pytest.importorskip(options["v0_optimizer"].split(":")[0], exc_type=ImportError)
        return
    package = find_row_of_optim(options["optim"]).package
    if package in ("bitsandbytes", "schedulefree", "grokadamw", "torchao"):
        pytest.importorskip(package, exc_type=ImportError)


def make_wide_gpt2():
    """Its matrices have 4,096 elements and more, which 8-bit optimizers quantise."""
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=40, n_positions=16, n_embd=64, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    )


def slow_unless(strategy, quick):
    """Every pair is tried; the quick ones each time."""
    return pytest.param(strategy, marks=() if quick else pytest.mark.slow)


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The v0 of each strategy as the default optimizer gets it."""
    return {
        s: record(tmp_path_factory.mktemp(s), v0_init=s, v0_decay="beta2", max_steps=1, optim="adamw_torch")[1].v0
        for s in STRATEGIES
    }


@pytest.mark.parametrize("strategy", [slow_unless(s, s == "data_driven") for s in STRATEGIES])
@pytest.mark.parametrize("options", EXACT_RUNS, ids=name_of)
def test_v0_before_the_first_step_is_the_strategys(tmp_path, expected, strategy, options):
    require(options)
    with quiet_and_eager():
        trainer, recorder = record(tmp_path, v0_init=strategy, v0_decay="beta2", max_steps=2, **options)
    assert sorted(recorder.v0) == sorted(expected[strategy])
    rtol = 2e-7 if "Adamax" in name_of(options) else 0.0  # the root and its square
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0, expected[strategy][name], rtol=rtol, atol=0.0)
    report = trainer.get_v0_report()
    assert report["strategy"] == strategy and report["num_parameters_with_v0"] == 10
    assert all(w.isfinite().all() for w in second_moments_of(trainer).values())


@pytest.mark.parametrize("strategy", ["random", "data_driven"])
@pytest.mark.parametrize("optim", [slow_unless(o, o in ("adamw_torch_8bit", "adamw_bnb_8bit")) for o in QUANTISED_RUNS])
def test_quantised_state_holds_the_strategys_v0(tmp_path, strategy, optim):
    require({"optim": optim})
    with quiet_and_eager():
        _, exact = record(
            tmp_path / "a", model=make_wide_gpt2(), v0_init=strategy, v0_decay="beta2", max_steps=1, optim="adamw_torch"
        )
        trainer, recorder = record(
            tmp_path / "b", model=make_wide_gpt2(), v0_init=strategy, v0_decay="beta2", max_steps=2, optim=optim
        )
    assert sorted(recorder.v0) == sorted(exact.v0)
    row, quantised = find_row_of_optim(optim), 0
    for name, v0 in exact.v0.items():
        stored = recorder.v0[name]
        if torch.equal(stored, v0):
            continue  # a small tensor, or an embedding under bitsandbytes
        quantised += 1
        stored, blocks = stored.reshape(-1, 256), v0.reshape(-1, 256)
        largest = blocks.amax(1, keepdim=True)
        near = (blocks > largest / 10) & (largest > 1e-12)  # torchao's least scale
        assert near.any() and ((stored - blocks).abs() / blocks)[near].max().item() <= row.stored_error, name
    assert quantised >= 4
    state = trainer.get_v0_report()["parameters"]["transformer.h.0.mlp.c_fc.weight"]
    assert state["mean"] == pytest.approx(
        exact.v0["transformer.h.0.mlp.c_fc.weight"].mean().item(), rel=0.3 if "4bit" in optim else 0.01
    )


@pytest.mark.parametrize(
    "options",
    [
        {"optim": "adagrad"},
        {"optim": "paged_adamw_8bit"},
        {"optim": "schedule_free_adamw"},
        {"v0_optimizer": "pytorch_optimizer:AdaBelief"},
    ],
    ids=name_of,
)
def test_stop_and_resume_is_the_straight_run(tmp_path, options):
    require(options)
    common = {
        "v0_init": "data_driven",
        "v0_decay": "beta2",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
    } | options
    with quiet_and_eager():
        straight = make_trainer(tmp_path, model=make_wide_gpt2(), **common)
        straight.train()
        resumed = make_trainer(tmp_path, model=make_wide_gpt2(), **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(straight, resumed)
    assert resumed.get_v0_report() == straight.get_v0_report()


def test_an_unlisted_optimizer_passed_to_the_trainer_gets_v0_and_resumes(tmp_path, expected):
    common = {"v0_init": "data_driven", "v0_decay": "beta2", "max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def make(**kwargs):
        model = make_gpt2()
        optimizer = Mine([p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.999))
        return make_trainer(tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, **common, **kwargs)

    recorder = Recorder()
    recorder.trainer = straight = make(callbacks=[recorder])
    straight.train()
    assert all(torch.equal(v0, expected["data_driven"][name]) for name, v0 in recorder.v0.items())
    assert len(recorder.v0) == 10
    resumed = make()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(straight, resumed)


@pytest.mark.parametrize("value", ["sgd", "adafactor", "stable_adamw", "lion_32bit", "schedule_free_sgd"])
def test_refused_values_raise_before_any_training_and_train_as_stock_with_zeros(tmp_path, value):
    row = find_row_of_optim(value)
    assert row in REFUSED_ROWS
    pytest.importorskip(row.classes[0].split(".")[0], exc_type=ImportError)
    trainer = make_trainer(tmp_path, v0_init="random", v0_decay="beta2", optim=value)
    with pytest.raises(InputError) as caught:
        trainer.train()
    assert row.refusal in str(caught.value) and trainer.state.global_step == 0
    if value == "adafactor":
        assert train(tmp_path, v0_init="zeros", optim=value, max_steps=2).state.global_step == 2


@pytest.mark.parametrize("value", ["galore_adamw", "apollo_adamw", "galore_adamw_layerwise"])
def test_projecting_optimizers_are_refused(tmp_path, value):
    pytest.importorskip(value.split("_")[0] + "_torch", exc_type=ImportError)

    class WithLinear(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = torch.nn.Linear(8, 8)

        def forward(self, x, labels=None):
            return {"loss": self.linear(x).square().mean()}

    data = [{"x": torch.ones(8), "labels": torch.tensor(0.0)} for _ in range(8)]
    trainer = make_trainer(
        tmp_path, model=WithLinear(), data=data, v0_init="random", v0_decay="beta2", optim=value, optim_target_modules="all-linear", remove_unused_columns=False
    )  # fmt: skip
    with quiet_and_eager(), pytest.raises(InputError, match="projected into a space"):
        trainer.train()


def test_a_length_needs_a_decaying_second_moment(tmp_path):
    trainer = make_trainer(tmp_path, v0_init="data_driven", v0_decay="beta2", v0_decay_steps=50, optim="adagrad")
    with pytest.raises(InputError, match="no decaying mean"):
        trainer.train()
    assert is_untouched(trainer.optimizer)


def test_closed_form_takes_rmsprops_alpha(tmp_path):
    trainer, _ = record(
        tmp_path, v0_init="data_driven", v0_decay="beta2", optim="rmsprop", optim_args="alpha=0.75", max_steps=1
    )
    assert trainer.get_v0_report()["beta2"] == 0.75
    assert trainer.get_v0_report()["multiplier"]["1"] == pytest.approx(0.5)
