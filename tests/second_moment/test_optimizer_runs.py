"""Optimizers through the Trainer: what `--optim` and `--v0_optimizer` build holds, before its first step, the strategy's v0."""

import pytest
import torch
from conftest import make_gpt2
from optimizer_cases import REFUSED_ROWS, find_row_of_optim, quiet_and_eager
from test_optimizer_probe import Mine
from trainers import Recorder, assert_equal_weights, make_trainer, record, second_moments_of, train
from transformers import GPT2Config, GPT2LMHeadModel

from hf_v0init import InputError

DATA_DRIVEN = {"v0_init": "data_driven", "v0_decay": "beta2"}
OF_TRANSFORMERS = (
    "adamw_torch", "rmsprop", "adagrad", "rmsprop_bnb", "paged_adamw_32bit", "ademamix", "schedule_free_adamw",
    "schedule_free_radam", "grokadamw",
)  # fmt: skip
EXACT_RUNS = [
    *[{"optim": name} for name in OF_TRANSFORMERS],
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


@pytest.fixture(scope="module")
def expected(tmp_path_factory):
    """The v0 as the default optimizer gets it."""
    return record(tmp_path_factory.mktemp("expected"), **DATA_DRIVEN, max_steps=1, optim="adamw_torch")[1].v0


@pytest.mark.parametrize("options", EXACT_RUNS, ids=name_of)
def test_v0_before_the_first_step_is_that_of_adam(tmp_path, expected, options):
    require(options)
    with quiet_and_eager():
        trainer, recorder = record(tmp_path, **DATA_DRIVEN, max_steps=2, **options)
    assert sorted(recorder.v0) == sorted(expected)
    rtol = 2e-7 if "Adamax" in name_of(options) else 0.0  # the root and its square
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0, expected[name], rtol=rtol, atol=0.0)
    assert trainer.get_v0_report()["num_parameters_with_v0"] == 10
    assert all(w.isfinite().all() for w in second_moments_of(trainer).values())


@pytest.mark.parametrize(
    "optim", [*QUANTISED_RUNS[:2], *(pytest.param(name, marks=pytest.mark.slow) for name in QUANTISED_RUNS[2:])]
)
def test_quantised_state_holds_that_v0(tmp_path, optim):
    require({"optim": optim})
    with quiet_and_eager():
        _, exact = record(tmp_path / "a", model=make_wide_gpt2(), **DATA_DRIVEN, max_steps=1, optim="adamw_torch")
        trainer, recorder = record(tmp_path / "b", model=make_wide_gpt2(), **DATA_DRIVEN, max_steps=2, optim=optim)
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
    name = "transformer.h.0.mlp.c_fc.weight"
    mean = trainer.get_v0_report()["parameters"][name]["mean"]
    assert mean == pytest.approx(exact.v0[name].mean().item(), rel=0.3 if "4bit" in optim else 0.01)


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
    common = DATA_DRIVEN | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2} | options
    with quiet_and_eager():
        straight = make_trainer(tmp_path, model=make_wide_gpt2(), **common)
        straight.train()
        resumed = make_trainer(tmp_path, model=make_wide_gpt2(), **common)
        resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert_equal_weights(straight, resumed)
    assert resumed.get_v0_report() == straight.get_v0_report()


def test_an_unlisted_optimizer_passed_to_the_trainer_gets_v0_and_resumes(tmp_path, expected):
    common = DATA_DRIVEN | {"max_steps": 4, "save_strategy": "steps", "save_steps": 2}

    def make(**kwargs):
        model = make_gpt2()
        optimizer = Mine([p for p in model.parameters() if p.requires_grad], lr=1e-2, betas=(0.9, 0.999))
        return make_trainer(tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, **common, **kwargs)

    recorder = Recorder()
    recorder.trainer = straight = make(callbacks=[recorder])
    straight.train()
    assert all(torch.equal(v0, expected[name]) for name, v0 in recorder.v0.items())
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
