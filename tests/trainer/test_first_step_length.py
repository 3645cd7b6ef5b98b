"""The length that is measured inside the first optimizer step: what it is, and that the run is as if it had been given."""

import random
import signal

import numpy as np
import pytest
import torch
from snapshots import assert_same, take_generators
from torch import nn
from trainers import make_trainer
from transformers import Trainer, set_seed

from hf_v0init import InputError, V0InitCallback, V0InitMixin, attach_v0, compute_warmup_length

STEPS = 18

AUTO = {"v0_init": "data_driven", "v0_decay_steps": "auto"}


class Network(nn.Module):
    """What a forward may move: dropout, a buffer, a tensor and a counter that are plain attributes, Python's and NumPy's numbers."""

    def __init__(self, batch_norm: bool = False):
        super().__init__()
        torch.manual_seed(0)
        self.net = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 4))
        self.norm = nn.BatchNorm1d(6) if batch_norm else nn.Identity()
        self.register_buffer("seen", torch.zeros(6))
        self.average, self.calls, self.last = torch.zeros(6), 0, None

    def forward(self, x, labels=None):
        if self.training:
            self.seen.add_(x.mean(0))
            self.average.mul_(0.9).add_(x.mean(0), alpha=0.1)
            self.last, self.calls = x.detach().sum(), self.calls + 1
        x = x + 1e-3 * random.random() + 1e-3 * float(np.random.rand())
        return {"loss": nn.functional.cross_entropy(self.net(self.norm(x)), labels)}


class WatchingTrainer:
    """Put before a Trainer: counts, averages, draws and a teacher, as subclasses have them."""

    def __init__(self, *args, **kwargs):
        self.num_losses, self.store, self.average = 0, {"train": []}, torch.zeros(())
        self.average_in_place = torch.zeros(())
        self.own = torch.Generator().manual_seed(4)
        self.teacher = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))
        super().__init__(*args, **kwargs)

    def compute_loss(self, model, inputs, *args, **kwargs):
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        if model.training:
            self.num_losses += 1
            self.average = 0.9 * self.average + 0.1 * loss.detach()
            self.average_in_place.mul_(0.9).add_(loss.detach())
            self.store["train"].append(self.num_losses)
            with torch.no_grad():
                self.teacher.train()(torch.randn(8, 6, generator=self.own))
        return loss


class OursTrainer(WatchingTrainer, V0InitMixin, Trainer):
    pass


class StockTrainer(WatchingTrainer, Trainer):
    pass


class Stream(torch.utils.data.IterableDataset):
    """Can be read once."""

    def __init__(self, rows):
        self.rows = iter(rows)

    def __iter__(self):
        return self.rows


def make_rows(num: int = 400) -> list[dict]:
    generator = torch.Generator().manual_seed(1)
    return [{"x": torch.randn(6, generator=generator), "labels": torch.tensor(i % 4)} for i in range(num)]


def make_optimizer(model, rate: float = 0.15) -> torch.optim.Optimizer:
    groups = [{"params": model.net[0].parameters(), "lr": rate}, {"params": model.net[3].parameters(), "lr": rate / 3}]
    return torch.optim.AdamW(groups, betas=(0.9, 0.95))


class Sampled(OursTrainer):
    """The order of the data comes from a generator of its own."""

    def _get_train_sampler(self, *args, **kwargs):
        self.sampler_generator = torch.Generator().manual_seed(8)
        return torch.utils.data.RandomSampler(self.train_dataset, generator=self.sampler_generator)


def build(
    folder, *, stock=False, trainer_class=None, make=make_optimizer, data="rows", batch_norm=False, callback=None, **options
):  # fmt: skip
    """A Trainer of the network above; with `callback` a stock one that has that attached."""
    torch.manual_seed(7)
    stock, model = stock or callback is not None, Network(batch_norm)
    rows = Stream(make_rows()) if data == "stream" else make_rows()
    trainer = make_trainer(
        folder, stock=stock, model=model, data=rows, kwargs={"optimizers": (make(model), None)},
        trainer_class=trainer_class or (StockTrainer if stock else OursTrainer),
        **{"max_steps": STEPS, "per_device_train_batch_size": 8, "remove_unused_columns": False, "logging_steps": 3} | options,
    )  # fmt: skip
    if callback is not None:
        callback.attach(trainer)
    return trainer


def run(folder, **options):
    trainer = build(folder, **options)
    trainer.train()
    return trainer


def take(trainer) -> dict:
    """All that a run leaves behind."""
    model = trainer.model
    return {
        "weights": dict(model.state_dict()),
        "model": [model.average, model.calls, model.last],
        "teacher": dict(trainer.teacher.state_dict()),
        "optimizer": list(trainer.optimizer.state.values()),
        "trainer": [trainer.average, trainer.average_in_place, trainer.num_losses, trainer.store["train"]],
        "generators": [trainer.own.get_state(), *take_generators()],
        "logs": [[entry[key] for key in ("loss", "learning_rate")] for entry in trainer.state.log_history if "loss" in entry],
    }  # fmt: skip


def assert_same_run(a, b) -> None:
    assert_same(take(a), take(b))


CASES = {
    "plain": {},
    "accumulated": {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
    "stream": {"data": "stream"},
    "sampler": {"trainer_class": Sampled},
    "workers": {"dataloader_num_workers": 1},
}


@pytest.mark.parametrize(
    ("strategy", "case"), [*(("data_driven", case) for case in CASES), ("random", "plain"), ("random", "accumulated")]
)
def test_a_measured_length_gives_the_run_of_that_length_bit_for_bit(strategy, case, tmp_path):
    measured = run(tmp_path / "a", v0_init=strategy, v0_decay_steps="auto", **CASES[case])
    report = measured.get_v0_report()
    length = report["length"]
    assert 1 < length["steps"] == report["decay_steps"] <= STEPS * 2 / 3 and length["num_forwards"] >= 5
    assert length["x"] == pytest.approx(0.15 / length["d50"]) and length["learning_rate"] == 0.15
    assert length["steps"] == compute_warmup_length(length["x"], STEPS)
    given = run(tmp_path / "b", v0_init=strategy, v0_decay_steps=length["steps"], **CASES[case])
    assert_same_run(measured, given)


@pytest.mark.parametrize(
    ("settings", "given", "batch_norm"),
    [
        (AUTO, {"v0_init": "data_driven", "v0_decay_steps": 6}, True),
        ({"untuned_warmup": "trust_radius"}, {"stock": True, "warmup_steps": 6}, False),
    ],
)
def test_a_small_rate_gets_a_third_of_training(settings, given, batch_norm, tmp_path):
    options = {"make": lambda model: make_optimizer(model, 1e-6), "batch_norm": batch_norm}
    ours = run(tmp_path / "a", **settings, **options)
    length = ours.get_v0_report()["length"]
    assert length["steps"] == STEPS / 3 > round(260 * length["x"])
    assert_same_run(run(tmp_path / "b", **given, **options), ours)


def test_a_callback_on_a_stock_trainer_measures_the_same(tmp_path):
    ours = run(tmp_path / "a", **AUTO)
    callback = V0InitCallback(**AUTO)
    stock = run(tmp_path / "b", callback=callback)
    assert_same_run(ours, stock)
    assert callback.length["steps"] == ours.get_v0_report()["length"]["steps"]
    assert "compute_loss" not in vars(stock) and "compute_loss" not in vars(ours)


# ---- what is measured ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("rates", "factor"), [((1.0, 1.0), 1e-3), ((1.0, 0.1), 1.0), ((0.01, 1.0), 1e-3)])
def test_the_radius_is_along_the_update_that_each_groups_rate_makes(rates, factor):
    """loss = sum c w^2 / 2 at w = 1 moves to d50 = sum(c r) / sum(c r^2), also where the gradient was scaled (clipped)."""
    c = torch.tensor([0.5, 2.0]), torch.tensor([1.0, 3.0, 0.2])
    weights = [nn.Parameter(torch.ones_like(one).double()) for one in c]
    groups = [{"params": [w], "lr": 2e-2 * rate} for w, rate in zip(weights, rates, strict=True)]
    optimizer = torch.optim.AdamW(groups)

    def compute() -> torch.Tensor:
        return sum((one * w.square()).sum() / 2 for one, w in zip(c, weights, strict=True))

    hook = attach_v0(optimizer, None, v0_decay_steps="auto", loss_fn=compute, max_steps=1000)
    compute().backward()
    for w in weights:
        w.grad.mul_(factor)
    optimizer.step()
    scaled = [(one, rate / max(rates)) for one, rate in zip(c, rates, strict=True)]
    d50 = sum(float((one * r).sum()) for one, r in scaled) / sum(float((one * r * r).sum()) for one, r in scaled)
    assert hook.length.d50 == pytest.approx(d50, rel=0.02)
    assert hook.length.learning_rate == pytest.approx(2e-2 * max(rates))


def test_in_a_loop_the_measured_length_is_that_of_the_same_run_with_it_given():
    rows = torch.stack([row["x"] for row in make_rows(160)]).split(8)
    labels = torch.tensor([i % 4 for i in range(8)])

    def train(**options):
        set_seed(0)
        model, current = Network(), []
        optimizer = make_optimizer(model)

        def compute():
            return model(current[0], labels)["loss"]

        hook = attach_v0(optimizer, model, max_steps=20, **options or {"v0_decay_steps": "auto", "loss_fn": compute})
        for batch in rows:
            current[:] = [batch]
            optimizer.zero_grad()
            compute().backward()
            optimizer.step()
        return model, hook

    measured, hook = train()
    given, _ = train(v0_decay_steps=hook.plan.decay_steps)
    assert hook.length.steps == hook.plan.decay_steps > 1
    assert_same([dict(measured.state_dict()), measured.average], [dict(given.state_dict()), given.average])
    assert measured.calls == given.calls == 20


# ---- what cannot be measured -----------------------------------------------------------------------------------------


class OwnStepTrainer(OursTrainer):
    """With a training_step that never calls compute_loss."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        loss = model(**inputs)["loss"]
        loss.backward()
        return loss.detach()


def test_a_step_of_ones_own_falls_back_and_says_why(tmp_path, our_log):
    trainer = run(tmp_path, trainer_class=OwnStepTrainer, max_steps=60, **AUTO)
    length = trainer.get_v0_report()["length"]
    assert (length["steps"], length["d50"], length["x"]) == (40, None, None)  # two thirds of 60
    warnings = [r.getMessage() for r in our_log.records if r.levelname == "WARNING" and r.name == "hf_v0init"]
    assert len(warnings) == 1 and length["reason"] in warnings[0] and "compute_loss" in length["reason"]


class Lomo(torch.optim.SGD):
    """Steps in backward; its `step` does nothing."""

    def step(self, closure=None):
        return None


@pytest.mark.parametrize("optimizer_class", [torch.optim.SGD, Lomo, torch.optim.Adagrad])
def test_optimizers_of_another_kind_are_refused_before_any_step(optimizer_class, tmp_path):
    trainer = build(
        tmp_path, make=lambda model: optimizer_class(model.parameters(), lr=1e-2), untuned_warmup="trust_radius"
    )
    with pytest.raises(InputError, match=r"untuned_warmup=trust_radius.*give --warmup_steps"):
        trainer.train()
    assert trainer.model.calls == 0
    assert_same(dict(trainer.model.state_dict()), dict(Network().state_dict()))


# ---- errors and Ctrl-C -----------------------------------------------------------------------------------------------


@pytest.fixture
def ctrl_c_raises():
    """Whatever the caller of pytest set for SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("how", ["raised", "signal", "error"])
@pytest.mark.parametrize("settings", [AUTO, {"untuned_warmup": "trust_radius"}], ids=str)
def test_cut_off_at_any_forward_the_trainer_is_as_before(settings, how, tmp_path, ctrl_c_raises):
    for number in range(2, 12) if how == "signal" else (2, 6, 11):

        class Cut(OursTrainer):
            calls = 0

            def compute_loss(self, *args, _number=number, **kwargs):
                type(self).calls += 1
                if type(self).calls == _number:
                    if how == "raised":
                        raise KeyboardInterrupt
                    if how == "error":
                        raise RuntimeError("of the loss")
                    signal.raise_signal(signal.SIGINT)
                return super().compute_loss(*args, **kwargs)

        trainer = build(tmp_path / str(number), trainer_class=Cut, **settings)
        model = trainer.model
        with pytest.raises(RuntimeError if how == "error" else KeyboardInterrupt):
            trainer.train()
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), Network().parameters(), strict=True))
        assert model.calls == trainer.num_losses == 1 and model.training
        assert all(group["lr"] == group["initial_lr"] for group in trainer.optimizer.param_groups)
        assert "compute_loss" not in vars(trainer) and not trainer.optimizer.state
    trainer.train()  # after all
    assert trainer.get_v0_report()["length"]["steps"] > 1 and "compute_loss" not in vars(trainer)
