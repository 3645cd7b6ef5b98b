"""`--v0_optimizer package:Class` with `--optim_args`: what is built, and what is refused before any training."""

import pytest
import torch
from conftest import make_gpt2
from optimizer_cases import load
from trainers import assert_equal_weights, make_arguments, make_trainer, train, weights_of
from transformers import Trainer

from hf_v0init import InputError, V0InitArguments, V0InitMixin
from hf_v0init.second_moment.choice import (
    compute_optimizer_arguments,
    parse_optimizer_arguments,
)


class Tripled(torch.optim.AdamW):
    """Takes `rate` and any further option; three betas."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.99, 0.5), eps=1e-3, rate=1.0, label="", **options):
        super().__init__(params, lr=lr * rate, betas=betas[:2], eps=eps, **options)


class NoDecay(torch.optim.AdamW):
    def __init__(self, params, lr=1e-3, momentum=0.9):
        if momentum == 0.5:
            raise ValueError("momentum must not be 0.5")
        super().__init__(params, lr=lr)


HERE = __name__


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (None, {}),
        ("", {}),
        ("a=1,b=2.5e-3, c = x", {"a": 1, "b": 2.5e-3, "c": "x"}),
        ("a=true,b=False,c=None", {"a": True, "b": False, "c": None}),
        ("betas=(0.9, 0.98),eps=1e-16", {"betas": (0.9, 0.98), "eps": 1e-16}),
        ("ks=[1,2],z=-1", {"ks": [1, 2], "z": -1}),
    ],
)
def test_arguments_are_parsed(text, expected):
    assert parse_optimizer_arguments(text) == expected


@pytest.mark.parametrize("text", ["a", "a=", "=1", "a=1,b"])
def test_what_is_no_argument_is_refused(text):
    with pytest.raises(InputError, match="name=value"):
        parse_optimizer_arguments(text)


def test_the_trainers_settings_are_passed_on(tmp_path):
    args = make_arguments(tmp_path, learning_rate=0.25, adam_beta1=0.8, adam_beta2=0.97)
    assert compute_optimizer_arguments(Tripled, args) == {"lr": 0.25, "betas": (0.8, 0.97, 0.5)}
    args = make_arguments(tmp_path, adam_epsilon=1e-6, optim_args="rate=3,lr=0.5,betas=(0.1,0.2),amsgrad=true")
    expected = {"lr": 0.5, "betas": (0.1, 0.2), "eps": 1e-6, "rate": 3, "amsgrad": True}
    assert compute_optimizer_arguments(Tripled, args) == expected
    assert compute_optimizer_arguments(NoDecay, make_arguments(tmp_path)) == {"lr": 1e-2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"v0_optimizer": "AdaBelief"}, "give package:Class"),
        ({"v0_optimizer": "no_such_package:AdaBelief"}, "No module named .no_such_package"),
        ({"v0_optimizer": "torch.optim:AdamX"}, "has no attribute .AdamX"),
        ({"v0_optimizer": "torch:Tensor"}, "is no torch.optim.Optimizer"),
        ({"v0_optimizer": f"{HERE}:NoDecay", "weight_decay": 0.1}, "NoDecay takes no weight_decay; set it to 0"),
        ({"v0_optimizer": "torch.optim:AdamW", "optim_args": "weight_decay=0.1"}, "use --weight_decay 0.1"),
        ({"v0_optimizer": "torch.optim:AdamW", "optim": "adafactor"}, "optim=adafactor both name the optimizer"),
    ],
)
def test_bad_choices_are_refused_when_the_trainer_is_built(tmp_path, options, words):
    for v0_init in ("zeros", "random"):
        with pytest.raises(InputError, match=words) as caught:
            make_trainer(tmp_path, v0_init=v0_init, **options)
        assert "\n" not in str(caught.value)


def test_an_optimizer_passed_to_the_trainer_excludes_it(tmp_path):
    model = make_gpt2()
    passed = torch.optim.AdamW(model.parameters())
    for kwargs in ({"optimizers": (passed, None)}, {"optimizer_cls_and_kwargs": (torch.optim.AdamW, {"lr": 1e-3})}):
        with pytest.raises(InputError, match="and an optimizer passed to the Trainer: give one"):
            make_trainer(tmp_path, model=model, kwargs=kwargs, v0_optimizer="torch.optim:Adam")


def test_what_the_constructor_refuses_is_one_line_before_any_training(tmp_path):
    for given, words in (
        ("momentum=0.5", "momentum must not be 0.5"),
        ("lr_rate=3", "unexpected keyword argument 'lr_rate'"),
    ):
        trainer = make_trainer(tmp_path, v0_optimizer=f"{HERE}:NoDecay", optim_args=given)
        before = weights_of(trainer)
        with pytest.raises(InputError, match=f"NoDecay' cannot be built with .*{words}"):
            trainer.train()
        assert all(torch.equal(before[name], w) for name, w in weights_of(trainer).items())


@pytest.mark.parametrize("v0_init", ["zeros", "data_driven"])
def test_torchs_adamw_by_name_is_optim_adamw_torch(tmp_path, v0_init):
    options = {"v0_init": v0_init, "weight_decay": 0.1, "adam_beta2": 0.95, "warmup_steps": 2}
    options |= {} if v0_init == "zeros" else {"v0_decay": "beta2"}
    named = train(tmp_path / "a", v0_optimizer="torch.optim:AdamW", **options)
    assert_equal_weights(named, train(tmp_path / "b", optim="adamw_torch", **options))
    assert type(named.optimizer.optimizer) is torch.optim.AdamW
    groups = named.optimizer.param_groups
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0] and groups[0]["betas"] == (0.9, 0.95)


def test_zeros_is_that_optimizer_in_the_stock_trainer(tmp_path):
    adabelief = load("pytorch_optimizer:AdaBelief")
    stock = train(
        tmp_path / "a",
        stock=True,
        kwargs={"optimizer_cls_and_kwargs": (adabelief, {"lr": 1e-2, "betas": (0.9, 0.999)})},
    )
    ours = train(tmp_path / "b", v0_init="zeros", v0_optimizer="pytorch_optimizer:AdaBelief")
    assert_equal_weights(stock, ours)
    assert ours.optimizer.param_groups[0]["eps"] == 1e-16  # its own, not the Trainer's 1e-8


def test_with_someone_elses_arguments_and_a_learning_rate_that_is_changed_as_in_a_search(tmp_path):
    class Ours(V0InitMixin, Trainer):
        pass

    v0_arguments = V0InitArguments(v0_init="random", v0_optimizer="torch.optim:NAdam")
    trainer = Ours(model=make_gpt2(), args=make_arguments(tmp_path, v0=False), v0_arguments=v0_arguments)
    trainer.args.learning_rate = 0.125
    optimizer = trainer.create_optimizer()
    assert type(optimizer) is torch.optim.NAdam and optimizer.param_groups[0]["lr"] == 0.125
