"""The linear decay through Trainers: resumed at any step it is the straight run, and the schedule is that beside a warmup of L."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import Rates, assert_equal_weights, make_trainer, second_moments_of, train
from transformers import TrainerCallback

from hf_v0init import InputError, V0InitCallback, V0InitTrainer
from hf_v0init.trainer.schedule import keep_plateau

# ---- resume ----------------------------------------------------------------------------------------------------------

L = 9
RUN = {
    "max_steps": 12,
    "v0_seed": 5,
    "v0_decay_steps": L,
    "save_strategy": "steps",
    "save_steps": 1,
    "learning_rate": 1e-2,
}


def make(folder, by_callback: bool, strategy: str, seed: int = 0, **options):
    """A run of ours, or a stock Trainer's with the callback."""
    given = RUN | {"v0_init": strategy} | options
    if not by_callback:
        return make_trainer(folder, model=make_gpt2(seed), **given)
    trainer = make_trainer(folder, stock=True, model=make_gpt2(seed), **given)
    V0InitCallback(**{name: value for name, value in given.items() if name.startswith("v0_")}).attach(trainer)
    return trainer


@pytest.fixture(
    scope="module",
    params=[("data_driven", False), ("data_driven", True), ("random", False), ("first_gradient", True)],
    ids=str,
)
def straight(request, tmp_path_factory):
    """(strategy, whether by callback, the straight run, its folder)."""
    strategy, by_callback = request.param
    folder = tmp_path_factory.mktemp("straight")
    trainer = make(folder, by_callback, strategy)
    trainer.train()
    return strategy, by_callback, trainer, folder


@pytest.mark.parametrize(("stop", "is_elsewhere"), [(1, False), (6, True), (7, False), (L - 1, True), (L, False)])
def test_resumed_at_any_step_it_is_the_straight_run_bit_for_bit(straight, stop, is_elsewhere, tmp_path, our_log):
    strategy, by_callback, trainer, folder = straight
    resumed = make(tmp_path if is_elsewhere else folder, by_callback, strategy, seed=99, save_strategy="no")
    rates = Rates()
    resumed.add_callback(rates)
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{stop}"))
    assert_equal_weights(trainer, resumed)
    for name, v in second_moments_of(trainer).items():
        assert torch.equal(v, second_moments_of(resumed)[name]), name
    assert rates.rates == pytest.approx([1e-2 * min(1, (12 - t) / (12 - L)) for t in range(stop, 12)])
    assert ("stays at its peak" in our_log.text) == (stop < L)


class CutOff(TrainerCallback):
    """Ends a run after some of its steps as Ctrl-C does."""

    def __init__(self, after: int) -> None:
        self.after = after

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.after:
            self.after = 0
            raise KeyboardInterrupt


@pytest.mark.parametrize("cut_after", [3, 7])  # while g^2 is measured, and while v0 decays
@pytest.mark.parametrize("resume_at", [4, 11])
def test_a_call_that_was_cut_off_leaves_nothing_to_the_next(straight, cut_after, resume_at, tmp_path):
    strategy, by_callback, trainer, folder = straight
    resumed = make(tmp_path, by_callback, strategy, seed=99, save_strategy="no")
    resumed.add_callback(CutOff(cut_after))
    with pytest.raises(KeyboardInterrupt):
        resumed.train()
    resumed.train(resume_from_checkpoint=str(folder / f"checkpoint-{resume_at}"))
    assert_equal_weights(trainer, resumed)


def test_what_lies_beside_a_checkpoint(straight):
    strategy, _, _, folder = straight
    first = 6 if strategy == "data_driven" else 1
    for step in range(1, 13):
        checkpoint = folder / f"checkpoint-{step}"
        stored = json.loads((checkpoint / "v0_init.json").read_text())
        assert (stored["strategy"], stored["decay"], stored["decay_steps"]) == (strategy, "linear", L)
        assert stored.get("is_written", True) == (step > first)
        assert (checkpoint / "v0_decay.pt").exists() == (step < L), step
    assert "v0_decay.pt" not in {path.name for path in folder.iterdir()}


def test_a_checkpoint_without_what_v0_needs_is_refused(straight, tmp_path):
    strategy, by_callback, _, folder = straight
    copied = tmp_path / "checkpoint-7"
    shutil.copytree(folder / "checkpoint-7", copied)
    (copied / "v0_decay.pt").unlink()
    with pytest.raises(InputError, match=r"lacks v0_decay\.pt"):
        make(tmp_path / "a", by_callback, strategy).train(resume_from_checkpoint=str(copied))
    (copied / "v0_decay.pt").write_bytes(b"half a file")
    with pytest.raises(InputError, match=r"v0_decay\.pt is damaged"):
        make(tmp_path / "b", by_callback, strategy).train(resume_from_checkpoint=str(copied))


# ---- the schedule ----------------------------------------------------------------------------------------------------

WITH_WARMUP = {
    "linear": {},
    "cosine": {},
    "cosine_with_restarts": {"num_cycles": 2},
    "polynomial": {"lr_end": 1e-4, "power": 2.0},
    "cosine_with_min_lr": {"min_lr_rate": 0.1},
    "cosine_warmup_with_min_lr": {"min_lr_rate": 0.1},
    "inverse_sqrt": {},
    "warmup_stable_decay": {"num_decay_steps": 6},
    "constant_with_warmup": {},
}


def collect_rates(folder, **options) -> list[float]:
    rates = Rates()
    train(folder, callbacks=[rates], max_steps=20, learning_rate=3e-3, **options)
    return rates.rates


@pytest.mark.parametrize("name", WITH_WARMUP)
def test_the_schedule_is_that_of_a_warmup_of_L_without_its_rise(name, tmp_path):
    options = {"lr_scheduler_type": name, "lr_scheduler_kwargs": WITH_WARMUP[name]}
    for length, steps in ((7, 7), (0.25, 5)):
        ours = collect_rates(tmp_path / "a", v0_init="data_driven", v0_decay_steps=length, **options)
        stock = collect_rates(tmp_path / "b", stock=True, warmup_steps=length, **options)
        assert ours[steps:] == pytest.approx(stock[steps:], rel=1e-12)
        assert ours[:steps] == pytest.approx([3e-3] * steps)


@pytest.mark.parametrize(
    ("name", "options"),
    [("constant", {}), ("reduce_lr_on_plateau", {"eval_strategy": "steps", "eval_steps": 2})],
)
def test_schedules_without_a_warmup_stay_as_they_are(name, options, tmp_path):
    options = {"lr_scheduler_type": name, "kwargs": {"eval_dataset": make_sequences(4)}} | options
    ours = collect_rates(tmp_path / "a", v0_init="data_driven", v0_decay_steps=7, **options)
    assert ours == [3e-3] * 20


def test_a_plateau_is_kept_in_every_group_of_the_users(tmp_path):
    model, rates = make_gpt2(), Rates()
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW([{"params": parameters[:5]}, {"params": parameters[5:], "lr": 1e-4}], lr=2e-3)
    train(
        tmp_path, model=model, kwargs={"optimizers": (optimizer, None)}, callbacks=[rates], v0_init="data_driven",
        v0_decay_steps=4, max_steps=8,
    )  # fmt: skip
    factors = [min(1, (8 - t) / 4) for t in range(8)]
    assert rates.of_groups == [pytest.approx([2e-3 * f, 1e-4 * f]) for f in factors]


def test_beta2_leaves_the_schedule_alone_unless_it_is_given_a_length(tmp_path):
    stock = collect_rates(tmp_path / "a", stock=True, warmup_steps=3)
    assert collect_rates(tmp_path / "b", v0_init="data_driven", v0_decay="beta2", warmup_steps=3) == stock
    flat = collect_rates(tmp_path / "c", v0_init="data_driven", v0_decay="beta2", v0_decay_steps=5)
    assert flat == pytest.approx([3e-3 * min(1, (20 - t) / 15) for t in range(20)])


class RisingTrainer(V0InitTrainer):
    """With Noam's schedule."""

    def create_scheduler(self, num_training_steps, optimizer=None):
        if self.lr_scheduler is None:
            self.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(
                optimizer or self.optimizer, lambda t: min((t + 1) ** -0.5, (t + 1) * 4**-1.5)
            )
        return self.lr_scheduler


@pytest.mark.parametrize(
    "settings",
    [{"v0_init": "data_driven", "v0_decay_steps": 5}, {"v0_init": "data_driven"}, {"untuned_warmup": "trust_radius"}],
    ids=str,
)
@pytest.mark.parametrize("by_callback", [False, True])
@pytest.mark.parametrize("warmup", ["steps", "fraction", "own", "passed in"])
def test_two_warmups_are_refused_before_the_first_step(settings, by_callback, warmup, tmp_path):
    model = make_gpt2()
    options = {"model": model, "max_steps": 10, "learning_rate": 1e-6}  # no length would be needed
    if warmup in ("steps", "fraction"):
        options["warmup_steps"] = 3 if warmup == "steps" else 0.1
    if warmup == "own":
        options["trainer_class"] = RisingTrainer
    if warmup == "passed in":
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        one_cycle = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-6, total_steps=10)
        options["kwargs"] = {"optimizers": (optimizer, one_cycle)}
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(InputError, match=r"two warmups|a schedule that was passed in"):
        trainer = make_trainer(tmp_path, **options, **({} if by_callback else settings))
        if by_callback:
            V0InitCallback(**settings).attach(trainer)
        trainer.train()
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


# ---- what is told ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["data_driven", "random", "first_gradient"])
def test_the_report_says_what_was_done(strategy, tmp_path):
    trainer = train(tmp_path, v0_init=strategy, v0_decay_steps=0.5, max_steps=20)
    report = trainer.get_v0_report()
    done = [report[key] for key in ("strategy", "decay", "decay_steps", "scale")]
    assert done == [strategy, "linear", 10, None]
    assert report["num_parameters_with_v0"] == 28 and report["num_parameters_without_v0"] == 0
    assert report["include_bias_and_norm"] is True
    assert report["estimation_steps"] == (6 if strategy == "data_driven" else None)
    assert report["estimator"] == ("minibatch" if strategy == "data_driven" else None)
    factors = {int(step): value for step, value in report["multiplier"].items()}
    assert all(value == pytest.approx(min(1, step / 10)) for step, value in factors.items()) and 20 in factors


def test_the_plateau_needs_no_defaults_of_the_optimizer_that_the_schedule_has(tmp_path):
    """DeepSpeed's ZeRO optimizer has groups and an optimizer inside, and no `defaults`."""
    trainer = make_trainer(tmp_path, learning_rate=0.5, max_steps=10)
    trainer.create_optimizer_and_scheduler(10)
    scheduler = trainer.lr_scheduler
    scheduler.optimizer = SimpleNamespace(optimizer=trainer.optimizer, param_groups=trainer.optimizer.param_groups)
    trainer.state.max_steps = 10
    keep_plateau(trainer, scheduler, 4)
    assert [factor(t) for factor in scheduler.lr_lambdas[:1] for t in (0, 4, 7)] == [1.0, 1.0, 0.5]
