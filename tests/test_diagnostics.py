"""The diagnostics callback: its numbers against full-size references, and a run that it does not touch."""

import csv

import pytest
import torch
from conftest import make_gpt2
from trainers import assert_equal_weights, make_trainer, train
from transformers import TrainerCallback

from hf_v0init import InputError, V0DiagnosticsCallback, compute_multiplier, read_second_moment

DATA_DRIVEN = {"v0_init": "data_driven", "v0_decay": "beta2"}


def read_rows(folder) -> list[dict]:
    with open(folder / "v0_diagnostics.csv", newline="") as file:
        return [{name: float(cell) if cell else None for name, cell in row.items()} for row in csv.DictReader(file)]


def train_watched(folder, num_steps=200, **options):
    trainer = make_trainer(folder, **options)
    callback = V0DiagnosticsCallback(num_steps).attach(trainer)
    trainer.train()
    return trainer, callback


class Reference(TrainerCallback):
    """Records every weight and second moment, in full."""

    def __init__(self):
        self.updates, self.moments, self.rates = [], [], []

    def on_pre_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        self.before = [p.detach().clone().double() for p in model.parameters()]
        self.rates.append(optimizer.param_groups[0]["lr"])

    def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
        changes = [(p.detach() - old).flatten() for p, old in zip(model.parameters(), self.before, strict=True)]
        self.updates.append(float(torch.cat(changes).square().mean().sqrt()))
        moments = torch.cat([read_second_moment(optimizer, p).detach().flatten() for p in model.parameters()])
        self.moments.append(float(moments.double().mean()))


def test_the_numbers_are_those_of_all_elements(tmp_path):
    reference = Reference()
    trainer, callback = train_watched(
        tmp_path, callbacks=[reference], max_steps=6, learning_rate=1e-3, warmup_steps=3, **DATA_DRIVEN
    )
    rows = read_rows(tmp_path)
    assert rows == [pytest.approx(row) for row in callback.rows]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["learning_rate"] for row in rows] == pytest.approx(reference.rates)
    assert [row["update_rms"] for row in rows] == pytest.approx(reference.updates, rel=1e-4)
    assert [row["second_moment"] for row in rows] == pytest.approx(reference.moments, rel=1e-4)
    assert rows[0]["update_rms_over_lr"] == 0.0  # the first step of a linear warmup has lr = 0
    expected = [update / rate for update, rate in zip(reference.updates, reference.rates, strict=True) if rate]
    assert [row["update_rms_over_lr"] for row in rows[1:]] == pytest.approx(expected, rel=1e-4)
    ratio = trainer.get_v0_report()["measured_ratio"]
    assert [row["factor"] for row in rows] == pytest.approx([compute_multiplier(t, ratio, 0.999) for t in range(1, 7)])
    assert (tmp_path / "v0_diagnostics.png").stat().st_size > 0


def test_under_a_linear_decay_the_factor_is_t_over_the_length(tmp_path):
    options = {"v0_init": "data_driven", "v0_decay_steps": 4, "v0_estimation_steps": 2}
    train_watched(tmp_path, max_steps=6, model=make_gpt2().bfloat16(), **options)
    rows = read_rows(tmp_path)
    assert [row["factor"] for row in rows] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0] and rows[0]["update_rms"] > 0


@pytest.mark.parametrize(
    "options",
    [
        {"stock": True},
        DATA_DRIVEN | {"gradient_accumulation_steps": 2},
        {"v0_init": "random", "v0_decay": "beta2", "optim": "rmsprop"},
        {"stock": True, "optim": "sgd"},
    ],
    ids=["stock", "data_driven", "rmsprop", "sgd"],
)
def test_the_run_is_bit_for_bit_the_one_without(tmp_path, options):
    plain = train(tmp_path / "plain", **options)
    states = [torch.get_rng_state()]
    watched, callback = train_watched(tmp_path / "watched", **options)
    states.append(torch.get_rng_state())
    assert_equal_weights(plain, watched)
    assert torch.equal(*states)
    assert plain.state.log_history[:-1] == watched.state.log_history[:-1]
    assert [row["step"] for row in callback.rows] == [1, 2, 3, 4, 5]
    assert all(row["factor"] is None for row in callback.rows) == options.get("stock", False)
    assert all(row["second_moment"] is None for row in callback.rows) == (options.get("optim") == "sgd")


class Tracker(TrainerCallback):
    """Stands where trackers of `report_to` stand."""

    def __init__(self):
        self.logs = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


def test_trackers_get_the_newest_row_with_the_loss(tmp_path):
    tracker = Tracker()
    trainer, callback = train_watched(tmp_path, callbacks=[tracker], logging_steps=2, max_steps=6, **DATA_DRIVEN)
    rows = [logs for logs in tracker.logs if "loss" in logs]
    for name in ("update_rms_over_lr", "second_moment", "factor"):
        assert [row[f"v0/{name}"] for row in rows] == [callback.rows[i][name] for i in (1, 3, 5)]
    assert not any(name.startswith("v0/") for row in trainer.state.log_history for name in row)


def test_a_resumed_run_leaves_the_record_of_the_start(tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3} | DATA_DRIVEN
    train_watched(tmp_path, num_steps=2, **options)
    first = (tmp_path / "v0_diagnostics.csv").read_text()
    assert [row["step"] for row in read_rows(tmp_path)] == [1, 2]
    resumed = make_trainer(tmp_path, **options)
    V0DiagnosticsCallback().attach(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert (tmp_path / "v0_diagnostics.csv").read_text() == first


def test_a_callback_that_does_not_know_its_trainer_is_refused(tmp_path):
    with pytest.raises(InputError, match="attach"):
        train(tmp_path, callbacks=[V0DiagnosticsCallback()])
