"""Training on contiguous streams against a loop that knows no Trainer: states, v0, checkpoints, learning rates, refusals."""

import gc
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from test_awd_lstm import compute_loss_slowly, make_awd_lstm, run_slowly
from test_token_streams import make_streams
from trainers import Recorder, assert_equal_weights, make_arguments, weights_of
from transformers import TrainerCallback

from hf_v0init import V0InitTrainer
from hf_v0init.errors import InputError
from hf_v0init.tasks.language_modeling.samples import PaddingCollator
from hf_v0init.tasks.language_modeling.streams import ContiguousStreamsMixin
from hf_v0init.tasks.token_loss import ExactPerplexityMixin
from hf_v0init.trainer.per_sample import choose_samples

gc.freeze()  # every `train()` collects garbage, which takes a second over all that has been imported
DROPOUT = dict.fromkeys(("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop"), 0.3)
REGULARISERS = {"ar_alpha": 2.0, "tar_beta": 1.0}


# ------------------------------------------------------------------------------------------------------ training


class StreamTrainer(ExactPerplexityMixin, ContiguousStreamsMixin, V0InitTrainer):
    pass


def make_trainer(output_dir, streams, model=None, eval_streams=None, callbacks=(), **overrides) -> StreamTrainer:
    arguments = make_arguments(
        output_dir, **{"max_steps": -1, "num_train_epochs": 2, "max_grad_norm": 0.0, "weight_decay": 0.0} | overrides
    )
    trainer = StreamTrainer(
        model=make_awd_lstm(2, **DROPOUT, **REGULARISERS) if model is None else model,
        args=arguments,
        train_dataset=streams,
        eval_dataset=eval_streams,
        data_collator=PaddingCollator(0),
        callbacks=list(callbacks),
    )
    for callback in callbacks:
        callback.trainer = trainer
    return trainer


def train(output_dir, streams, resume=None, **options) -> StreamTrainer:
    trainer = make_trainer(output_dir, streams, **options)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def detach_slowly(states):
    return [[[part.detach() for part in layer] for layer in row] for row in states]


def compute_segment_loss_slowly(model, segments, states):
    """Loss and states of one batch of segments, all padding left out, each row alone; the regularisers as means over tokens."""
    nll = activation = change = 0.0
    counts, after = [0, 0, 0], []
    for row, segment in enumerate(segments):
        inputs, targets = (torch.as_tensor(segment[name]).long()[None] for name in ("input_ids", "shift_labels"))
        logits, outputs, dropped, state = run_slowly(model, inputs, states=None if states is None else [states[row]])
        after += state
        nll = nll + compute_loss_slowly(logits, targets) * targets.numel()
        activation = activation + dropped.square().mean(dim=2).sum()
        steps = (outputs[:, 1:] - outputs[:, :-1]).square().mean(dim=2)
        change = change + steps.sum()
        counts = [counts[0] + targets.numel(), counts[1] + dropped.shape[1], counts[2] + steps.numel()]
    config = model.config
    loss = nll / counts[0] + config.ar_alpha * activation / counts[1] + config.tar_beta * change / max(counts[2], 1)
    return loss, counts[0], after


def train_slowly(model, streams, num_epochs: int, accumulation: int, learning_rate: float):
    """Truncated back-propagation by hand: batches in order, states carried and detached, reset where an epoch begins."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.999), weight_decay=0.0)
    num_streams, losses = streams.num_streams, []
    num_steps = num_epochs * math.ceil(len(streams) / num_streams / accumulation)
    for _ in range(num_epochs):
        states = None
        batches = [
            [streams[i] for i in range(start, start + num_streams)] for start in range(0, len(streams), num_streams)
        ]
        for start in range(0, len(batches), accumulation):
            optimizer.param_groups[0]["lr"] = learning_rate * (1 - len(losses) / num_steps)  # the linear schedule
            micro_batches = batches[start : start + accumulation]
            total, num_tokens = 0.0, 0
            for segments in micro_batches:
                loss, num_here, states = compute_segment_loss_slowly(model, segments, states)
                states = detach_slowly(states)
                total, num_tokens = total + loss * num_here, num_tokens + num_here
            optimizer.zero_grad()
            (total / num_tokens).backward()
            optimizer.step()
            losses.append((total / num_tokens).item())
    return losses


@pytest.mark.parametrize("accumulation", [1, 2])
def test_training_is_truncated_backpropagation_through_carried_states(tmp_path, accumulation):
    streams = make_streams(num_tokens=63, num_streams=2, segment_length=6)
    model, slow = (make_awd_lstm(2, **REGULARISERS) for _ in range(2))
    trainer = train(
        tmp_path, streams, model=model, per_device_train_batch_size=2, gradient_accumulation_steps=accumulation
    )
    losses = train_slowly(slow, streams, num_epochs=2, accumulation=accumulation, learning_rate=1e-2)
    logged = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert logged == pytest.approx(losses, rel=1e-4)
    expected = dict(slow.named_parameters())
    for name, weight in weights_of(trainer).items():
        torch.testing.assert_close(weight, expected[name].detach(), rtol=1e-3, atol=1e-4)


def test_evaluation_between_steps_leaves_training_as_it_is(tmp_path):
    """Without dropout: starting an evaluation's loader draws one random number, with any model and Trainer."""
    streams, other = make_streams(), make_streams(num_tokens=50, num_streams=3)
    alone = train(tmp_path / "alone", streams, model=make_awd_lstm(2, **REGULARISERS))
    options = {"eval_streams": other, "per_device_eval_batch_size": 3, "eval_strategy": "steps", "eval_steps": 1}
    evaluated = train(tmp_path / "evaluated", streams, model=make_awd_lstm(2, **REGULARISERS), **options)
    assert_equal_weights(alone, evaluated)
    assert sum("eval_loss" in entry for entry in evaluated.state.log_history) == 10


# ------------------------------------------------------------------------------------------------------------ v0


@pytest.fixture(scope="module")
def plain_runs(tmp_path_factory):
    """Runs without a v0, by accumulation."""
    runs = {}
    for accumulation in (1, 2):
        streams = make_streams(num_tokens=440, segment_length=20, varies=True)
        folder = tmp_path_factory.mktemp("plain")
        runs[accumulation] = train(folder, streams, gradient_accumulation_steps=accumulation, num_train_epochs=1)
    return runs


@pytest.mark.parametrize(
    ("strategy", "accumulation"), [("data_driven", 1), ("per_sample", 1), ("random", 1), ("first_gradient", 2)]
)
def test_a_v0_thrown_away_leaves_the_run_bit_for_bit(tmp_path, plain_runs, strategy, accumulation):
    streams, recorder = make_streams(num_tokens=440, segment_length=20, varies=True), Recorder(erase=True)
    options = {"gradient_accumulation_steps": accumulation, "num_train_epochs": 1}
    options |= {"v0_init": strategy, "v0_decay": "beta2"}
    if strategy == "per_sample":
        options |= {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_num_samples": 12}
    erased = train(tmp_path, streams, callbacks=[recorder], **options)
    plain = plain_runs[accumulation]
    assert len(recorder.v0) > 0
    assert_equal_weights(plain, erased)
    losses = [[e["loss"] for e in t.state.log_history if "loss" in e] for t in (plain, erased)]
    assert losses[0] == losses[1] and len(losses[0]) == plain.state.global_step


def test_v0_sees_single_segments_with_the_state_of_their_context(tmp_path):
    """Eq. 10 over 7 segments, one a batch, from gradients of the slow loop, regularisers included."""
    streams = make_streams(num_tokens=101, num_streams=4, segment_length=5)
    model = make_awd_lstm(2, **REGULARISERS)
    recorder = Recorder()
    options = {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_num_samples": 7, "max_steps": 1}
    trainer = train(tmp_path, streams, model=make_awd_lstm(2, **REGULARISERS), callbacks=[recorder], **options)
    samples = choose_samples(len(streams), 7, seed=11)
    assert any(sample < 4 for sample in samples) and any(sample >= 4 for sample in samples)
    squares = {name: torch.zeros_like(parameter) for name, parameter in model.named_parameters()}
    losses = []
    for sample in samples:
        context, states = torch.as_tensor(streams.read_context(sample)).long()[None], None
        if context.numel():
            with torch.no_grad():
                _, _, _, states = run_slowly(model, context)
        model.zero_grad()
        loss, _, _ = compute_segment_loss_slowly(model, [streams[sample]], states)
        loss.backward()
        losses.append(loss.item())
        for name, parameter in model.named_parameters():
            squares[name] += parameter.grad.square() / 7
    assert set(recorder.v0) == {name for name, parameter in model.named_parameters() if parameter.dim() > 1}
    for name, v0 in recorder.v0.items():
        torch.testing.assert_close(v0, squares[name], rtol=1e-3, atol=1e-9)
    assert trainer.get_v0_report()["mean_loss"] == pytest.approx(sum(losses) / 7, rel=1e-5)


# ------------------------------------------------------------------------------- checkpoints and the learning rate


def test_a_resumed_run_goes_on_from_the_state(tmp_path):
    streams = make_streams(num_tokens=440, segment_length=20, varies=True)
    options = {"save_strategy": "steps", "save_steps": 1, "v0_init": "data_driven", "v0_decay": "beta2"}
    straight = train(tmp_path / "straight", streams, **options)
    steps_an_epoch = len(streams) // 4
    assert (tmp_path / "straight" / "checkpoint-2" / "stream_state.pt").is_file()
    for step in (2, steps_an_epoch):
        fresh = make_streams(num_tokens=440, segment_length=20, varies=True)
        checkpoint = str(tmp_path / "straight" / f"checkpoint-{step}")
        resumed = train(tmp_path / f"resumed{step}", fresh, resume=checkpoint, **options)
        assert_equal_weights(straight, resumed)


def test_resuming_with_other_streams_is_refused_and_without_their_state_said(tmp_path, caplog):
    train(tmp_path, make_streams(), save_strategy="steps", save_steps=2, max_steps=2)
    with pytest.raises(InputError, match=r"other streams than this run's 2 "):
        train(
            tmp_path / "next", make_streams(num_streams=2), resume=str(tmp_path / "checkpoint-2"),
            per_device_train_batch_size=2, max_steps=4,
        )  # fmt: skip
    Path(tmp_path, "checkpoint-2", "stream_state.pt").rename(tmp_path / "checkpoint-2" / "stream_state_0.pt")
    with pytest.raises(InputError, match=r"other streams than this run's 4 on each of 1 process"):
        train(tmp_path / "next", make_streams(), resume=str(tmp_path / "checkpoint-2"), max_steps=4)
    Path(tmp_path, "checkpoint-2", "stream_state_0.pt").unlink()
    train(tmp_path / "next", make_streams(), resume=str(tmp_path / "checkpoint-2"), max_steps=3)
    assert "taken to be zero" in caplog.text


class WatchLearningRate(TrainerCallback):
    """Notes the rate that the optimizer's own step finds, and the one left behind."""

    def __init__(self):
        self.in_step, self.after = [], []

    def on_train_begin(self, args, state, control, optimizer=None, **kwargs):
        inner = getattr(optimizer, "optimizer", optimizer)
        inner.register_step_pre_hook(lambda opt, *_: self.in_step.append(opt.param_groups[0]["lr"]))

    def on_step_end(self, args, state, control, optimizer=None, **kwargs):
        self.after.append(optimizer.param_groups[0]["lr"])


def test_varying_segments_scale_the_learning_rate_of_their_step(tmp_path):
    streams, watch = make_streams(num_tokens=880, segment_length=20, varies=True), WatchLearningRate()
    options = {
        "lr_scheduler_type": "constant",
        "gradient_accumulation_steps": 2,
        "v0_init": "data_driven",
        "v0_decay": "beta2",
    }
    train(tmp_path, streams, callbacks=[watch], learning_rate=0.01, **options)
    expected = []
    for epoch in range(2):
        streams.set_epoch(epoch)
        lengths = np.array([len(streams[i]["input_ids"]) for i in range(0, len(streams), streams.num_streams)])
        expected += [0.01 * lengths[i : i + 2].mean() / 20 for i in range(0, len(lengths), 2)]
    assert watch.in_step == pytest.approx(expected, rel=1e-12)
    assert watch.after == [0.01] * len(expected) and len(set(expected)) > 2


# ------------------------------------------------------------------------------------------------------- refusals

REFUSED = {
    "batch size finder": ({"auto_find_batch_size": True}, ["auto_find_batch_size", "set the batch size"]),
    "split batches": ({"accelerator_config": {"split_batches": True}}, ["split_batches", "leave it out"]),
    "dispatched batches": ({"accelerator_config": {"dispatch_batches": True}}, ["dispatch_batches"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_break_the_streams_is_refused(tmp_path, name):
    overrides, parts = REFUSED[name]
    with pytest.raises(InputError) as caught:
        make_trainer(tmp_path, make_streams(), **overrides)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
