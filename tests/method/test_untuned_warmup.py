"""The untuned warmups against `pytorch_warmup` at the periods of the paper (its own untuned classes cut 100 to 99), and through the Trainer."""

import pytest
import pytorch_warmup
import torch
from conftest import make_sequences
from trainers import make_trainer, train

from hf_v0init import InputError, V0InitCallback, compute_multiplier
from hf_v0init.method.length import compute_untuned_factor
from hf_v0init.trainer.schedule import multiply_schedule

REFERENCES = {
    "linear": lambda optimizer, beta2: pytorch_warmup.LinearWarmup(optimizer, round(2 / (1 - beta2))),
    "exponential": lambda optimizer, beta2: pytorch_warmup.ExponentialWarmup(optimizer, round(1 / (1 - beta2))),
}


def make_optimizer(beta2: float):
    return torch.optim.AdamW([torch.nn.Parameter(torch.ones(3))], lr=0.5, betas=(0.9, beta2))


@pytest.mark.parametrize("beta2", [0.98, 0.999])
@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_rates_are_those_of_the_reference(shape, beta2):
    decay = lambda step: 0.99**step  # noqa: E731
    theirs, ours = make_optimizer(beta2), make_optimizer(beta2)
    their_schedule = torch.optim.lr_scheduler.LambdaLR(theirs, decay)
    their_warmup = REFERENCES[shape](theirs, beta2)
    our_schedule = torch.optim.lr_scheduler.LambdaLR(ours, decay)
    multiply_schedule(our_schedule, lambda made: compute_untuned_factor(made + 1, beta2, shape), "untuned_warmup")
    for _ in range(150):
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-12)
        assert our_schedule.get_last_lr()[0] == ours.param_groups[0]["lr"]
        ours.step()
        theirs.step()
        our_schedule.step()
        with their_warmup.dampening():
            their_schedule.step()


def test_exponential_is_nearly_the_square_of_the_multiplier_at_scale_one():
    for step in (1, 10, 100, 400):
        assert compute_untuned_factor(step, 0.99, "exponential") == pytest.approx(
            compute_multiplier(step, 1.0, 0.99) ** 2, rel=6e-3
        )


@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.parametrize("shape", ["linear", "exponential"])
def test_trainer_trains_at_these_rates(tmp_path, shape, by_callback):
    own = {} if by_callback else {"untuned_warmup": shape}
    options = {"adam_beta2": 0.9, "max_steps": 6, "lr_scheduler_type": "linear"}
    trainer = make_trainer(tmp_path, stock=by_callback, **options, **own)
    if by_callback:
        V0InitCallback(untuned_warmup=shape).attach(trainer)
    trainer.train()
    rates = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    expected = [1e-2 * (1 - step / 6) * compute_untuned_factor(step + 1, 0.9, shape) for step in range(6)]
    assert rates == pytest.approx(expected, rel=1e-12)


def test_resumed_run_keeps_the_warmup(tmp_path):
    options = {"untuned_warmup": "linear", "adam_beta2": 0.9, "max_steps": 6, "lr_scheduler_type": "constant"}
    options |= {"save_strategy": "steps", "save_steps": 3}
    whole = train(tmp_path / "whole", **options)
    trainer = make_trainer(tmp_path / "again", **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    rates = [[e["learning_rate"] for e in t.state.log_history if "learning_rate" in e] for t in (whole, trainer)]
    assert rates[0] == rates[1] and len(set(rates[0])) == 6


def test_bad_settings_are_refused(tmp_path):
    schedule = {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps"}
    optimizer = make_optimizer(0.9)
    passed = {"optimizers": (optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0))}
    for options, words in (
        ({"warmup_steps": 5}, "two warmups"),
        ({"optim": "sgd"}, "has none; use --warmup_steps"),
        (schedule | {"eval_steps": 2, "kwargs": {"eval_dataset": make_sequences(4)}}, "ReduceLROnPlateau"),
        ({"kwargs": passed, "optim": "adamw_torch"}, "passed in"),
    ):
        with pytest.raises(InputError, match=words):
            train(tmp_path, untuned_warmup="linear", **options)
