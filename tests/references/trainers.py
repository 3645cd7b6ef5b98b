"""Builds the small Trainer runs that the tests compare."""

import torch
from conftest import make_gpt2, make_sequences
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_v0init import InputError, SafeCheckpointsMixin, V0InitTrainer, V0InitTrainingArguments, read_second_moment
from hf_v0init.hook import find_hook
from hf_v0init.second_moment.state import SecondMoment, unwrap_optimizer


def is_untouched(optimizer) -> bool:
    """Whether an optimizer has made no step, loaded no state and got no v0; also of one that could not get a v0."""
    try:
        return SecondMoment(optimizer).is_untouched()
    except InputError:
        return not any(unwrap_optimizer(optimizer).state.values())


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


def read_logs(trainer) -> list[dict]:
    """The log without its clocks."""
    clocks = ("runtime", "per_second")
    return [{k: v for k, v in entry.items() if not k.endswith(clocks)} for entry in trainer.state.log_history]


def assert_recurrence(recorder, beta2: float = 0.999, rtol: float = 1e-6) -> None:
    """v1 = beta2 * v0 + (1 - beta2) * g^2 where there is a v0, (1 - beta2) * g^2 elsewhere."""
    for name, v1 in recorder.moments[0].items():
        g = recorder.gradients[0][name].double()
        v0 = recorder.v0[name].double() if name in recorder.v0 else torch.zeros_like(g)
        torch.testing.assert_close(v1.double(), beta2 * v0 + (1 - beta2) * g.square(), rtol=rtol, atol=1e-20)


class Rates(TrainerCallback):
    """The learning rates of each step, one for each group."""

    def __init__(self):
        self.of_groups = []

    @property
    def rates(self) -> list[float]:
        """Those of the first group."""
        return [of_groups[0] for of_groups in self.of_groups]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        self.of_groups.append([float(group["lr"]) for group in optimizer.param_groups])


def call_before_update(look):
    """Make a step pre-hook that calls look(optimizer) when all others have acted, also those that act in the step's closure."""

    def hook(optimizer, args, kwargs):
        closure = kwargs.get("closure", args[1] if len(args) > 1 else None)
        if closure is None and not type(optimizer).__module__.startswith("torch.optim."):
            look(optimizer)  # may ignore a closure; ours, which came first, has not waited for one then
            return None

        def close_and_look():
            loss = None if closure is None else closure()
            look(optimizer)
            return loss

        return args[:1], kwargs | {"closure": close_and_look}

    return hook


class Recorder(TrainerCallback):
    """Records gradients and second moments of each step, and v0 as the first real step sees it: written, before Adam moves."""

    def __init__(self, erase: bool = False):
        self.trainer, self.erase, self.hooked = None, erase, None
        self.v0, self.gradients, self.moments = None, [], []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = self.trainer.model.named_parameters()
        self.gradients.append({name: p.grad.detach().clone() for name, p in named if p.grad is not None})
        inner = unwrap_optimizer(self.trainer.optimizer)
        if self.hooked is not inner:
            self.hooked = inner
            inner.register_step_pre_hook(call_before_update(self.look))

    def look(self, optimizer):
        steps = find_hook(optimizer)
        if self.v0 is not None or (steps is not None and steps.is_waiting):
            return
        self.v0 = second_moments_of(self.trainer)
        if self.erase:
            optimizer.state.clear()

    def on_optimizer_step(self, args, state, control, **kwargs):
        self.moments.append(second_moments_of(self.trainer))


def record(output_dir, erase: bool = False, callbacks=(), **kwargs):
    """Train and return (trainer, recorder); with `erase`, v0 is thrown away before the first step."""
    recorder = Recorder(erase)
    trainer = make_trainer(output_dir, callbacks=[*callbacks, recorder], **kwargs)
    recorder.trainer = trainer
    trainer.train()
    return trainer, recorder
