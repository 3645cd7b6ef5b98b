"""Builds the small Trainer runs that the tests compare."""

import torch
from conftest import make_gpt2, make_sequences
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_v0init import SafeCheckpointsMixin, V0InitTrainer, V0InitTrainingArguments, read_second_moment


class SafeTrainer(SafeCheckpointsMixin, V0InitTrainer):
    """As the scripts' Trainers."""


def make_arguments(output_dir, v0: bool = True, **overrides):
    options = {
        "output_dir": str(output_dir),
        "per_device_train_batch_size": 4,
        "max_steps": 5,
        "learning_rate": 1e-2,
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 11,
    } | overrides
    if not v0:
        options = {k: value for k, value in options.items() if not k.startswith("v0_")}
    return (V0InitTrainingArguments if v0 else TrainingArguments)(**options)


def make_trainer(
    output_dir,
    *,
    stock: bool = False,
    model=None,
    data=None,
    callbacks=(),
    trainer_class=None,
    kwargs=None,
    **overrides,
):
    cls = trainer_class or (Trainer if stock else V0InitTrainer)
    return cls(
        model=make_gpt2() if model is None else model,
        args=make_arguments(output_dir, v0=not stock, **overrides),
        train_dataset=make_sequences() if data is None else data,
        callbacks=list(callbacks),
        **(kwargs or {}),
    )


def train(output_dir, **kwargs):
    """Build and train at once, so that every run starts from the random state that its seed gives."""
    trainer = make_trainer(output_dir, **kwargs)
    trainer.train()
    return trainer


def weights_of(trainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def second_moments_of(trainer) -> dict[str, torch.Tensor]:
    moments = {name: read_second_moment(trainer.optimizer, p) for name, p in trainer.model.named_parameters()}
    return {name: v.detach().clone() for name, v in moments.items() if v is not None}


def assert_equal_weights(a, b) -> None:
    a, b = weights_of(a), weights_of(b)
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


class Recorder(TrainerCallback):
    """Records what the run is made of: second moments before the first step, gradients and random states at each step."""

    def __init__(self, trainer_of=None):
        self.trainer = None
        self.v0, self.gradients, self.rng, self.moments = None, [], [], []

    def on_step_begin(self, args, state, control, **kwargs):
        self.rng.append(torch.get_rng_state())
        if self.v0 is None:
            self.v0 = second_moments_of(self.trainer)

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        self.gradients.append(
            {n: p.grad.detach().clone() for n, p in self.trainer.model.named_parameters() if p.grad is not None}
        )

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moments.append(second_moments_of(self.trainer))


class EraseV0(TrainerCallback):
    """Throws the written state away, so that what remains of v0 is its side effects."""

    def __init__(self):
        self.erased = 0

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 0 and not self.erased:
            self.erased = len(self.trainer.optimizer.state)
            (getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)).state.clear()


def record(output_dir, **kwargs):
    """Train and return (trainer, recorder)."""
    recorder = Recorder()
    trainer = make_trainer(output_dir, callbacks=[recorder], **kwargs)
    recorder.trainer = trainer
    trainer.train()
    return trainer, recorder
