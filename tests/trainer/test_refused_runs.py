"""Runs that a Trainer refuses before the first step, in one table: one line, the value, the remedy, nothing written."""

import logging

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import is_untouched, make_trainer

from hf_v0init import InputError, V0InitTrainer


class OneShot(torch.utils.data.IterableDataset):
    def __init__(self):
        self.rows = iter(make_sequences(20))

    def __iter__(self):
        return self.rows


def nothing_to_initialise():
    model = make_gpt2()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.dim() == 1])
    return {"model": model, "kwargs": {"optimizers": (optimizer, None)}}


class LossOf(V0InitTrainer):
    def compute_loss(self, model, inputs, *args, **kwargs):
        self.calls = getattr(self, "calls", 0) + 1
        loss = super().compute_loss(model, inputs, *args, **kwargs)
        return loss * float(self.args.run_name) if self.calls == 4 else loss


class GradientOf(V0InitTrainer):
    def compute_loss(self, *args, **kwargs):
        return super().compute_loss(*args, **kwargs) * float("nan")


PER_SAMPLE = {"v0_init": "data_driven", "v0_estimator": "per_sample"}
RUNS = [
    ("no matrices", {**nothing_to_initialise(), "v0_init": "random", "v0_decay": "beta2"}, ["v0_include_bias_and_norm=True"]),
    ("one-shot iterable", {"data": OneShot(), **PER_SAMPLE}, ["OneShot", "only once", "minibatch"]),
    ("loss NaN", {"trainer_class": LossOf, "run_name": "nan", **PER_SAMPLE}, ["loss is nan in batch 3"]),
    ("loss Inf", {"trainer_class": LossOf, "run_name": "inf", **PER_SAMPLE}, ["loss is inf in batch 3"]),
    ("gradient NaN", {"trainer_class": GradientOf, "v0_init": "data_driven"}, ["gradient of parameter", "is not finite"]),
    ("one batch", {"v0_num_samples": 8, "v0_stats_batch_size": 8, **PER_SAMPLE}, ["8 samples", "at most 4", "minibatch"]),
    ("share beyond floats", {"v0_init": "data_driven", "v0_decay": "beta2", "v0_decay_steps": 0.5, "max_steps": 10**7}, ["v0_decay_steps=5000000", "use at most"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), [run[1:] for run in RUNS], ids=[run[0] for run in RUNS])
def test_runs(tmp_path, options, words):
    output = tmp_path / "out"
    steps = []
    trainer = None
    with pytest.raises(InputError) as caught:
        trainer = make_trainer(output, save_strategy="steps", save_steps=1, **dict(options))
        trainer.create_optimizer()
        inner = getattr(trainer.optimizer, "optimizer", trainer.optimizer)
        inner.register_step_post_hook(lambda *_: steps.append(1))
        trainer.train()
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not steps and not list(output.glob("checkpoint-*"))
    if trainer is not None and trainer.optimizer is not None:
        assert is_untouched(trainer.optimizer) and trainer.get_v0_report() is None


def test_more_samples_than_there_are_is_a_notice_not_an_error(tmp_path, caplog):
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        trainer = make_trainer(tmp_path, v0_num_samples=10_000, max_steps=1, **PER_SAMPLE)
        trainer.train()
    assert "v0_num_samples=10000 is more than the 48 training samples: all are used" in caplog.text
    assert trainer.get_v0_report()["num_samples"] == 48
