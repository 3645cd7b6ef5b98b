"""The public names, used as people use them; `make types` holds this file, and what it calls, to mypy's strict rules.

Nothing here is run.
"""

from collections.abc import Callable

import torch
from torch import nn
from transformers import Seq2SeqTrainer, Trainer, TrainingArguments

from hf_v0init import (
    InputError,
    SafeCheckpointsMixin,
    TrustRadius,
    V0DiagnosticsCallback,
    V0InitArguments,
    V0InitCallback,
    V0InitMixin,
    V0InitSeq2SeqTrainer,
    V0InitSeq2SeqTrainingArguments,
    V0InitTrainer,
    V0InitTrainingArguments,
    attach_v0,
    compute_multiplier,
    compute_scale_for_warmup,
    compute_steps_to_multiplier,
    compute_warmup_length,
    initialize_v0,
    measure_trust_radius,
    read_second_moment,
)


def train_with_our_trainer(model: nn.Module) -> dict[str, object] | None:
    arguments = V0InitTrainingArguments(output_dir="out", learning_rate=1e-3, v0_init="data_driven")
    trainer: Trainer = V0InitTrainer(model=model, args=arguments)
    trainer.train()
    report: dict[str, object] | None = V0InitTrainer(model=model, args=arguments).get_v0_report()
    return report


def train_sequences(model: nn.Module) -> Seq2SeqTrainer:
    arguments = V0InitSeq2SeqTrainingArguments(output_dir="out", predict_with_generate=True, v0_scale=10.0)
    trainer = V0InitSeq2SeqTrainer(model=model, args=arguments)
    V0DiagnosticsCallback().attach(trainer)
    return trainer


def train_with_anybodys_trainer(model: nn.Module) -> Trainer:
    trainer = Trainer(model=model, args=TrainingArguments(output_dir="out"))
    trainer.add_callback(V0InitCallback(v0_init="data_driven"))
    trainer.add_callback(V0InitCallback(V0InitArguments(v0_init="random", v0_scale=100.0)))
    return trainer


class MixedTrainer(SafeCheckpointsMixin, V0InitMixin, Trainer):
    """The mixins in front of a Trainer."""


def train_in_a_loop(
    model: nn.Module, batches: list[torch.Tensor], loss_fn: Callable[[nn.Module, torch.Tensor], torch.Tensor]
) -> float:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    attach_v0(optimizer, model, v0_init="data_driven", max_steps=len(batches))
    initialize_v0(optimizer, model=model, batches=batches, loss_fn=loss_fn)
    read_second_moment(optimizer, next(iter(model.parameters())))
    scale: float = compute_scale_for_warmup(100, 0.999)
    multiplier: float = compute_multiplier(10, scale, 0.999)
    steps: float = compute_steps_to_multiplier(0.9, scale, 0.999)
    return multiplier + steps


def measure(model: nn.Module, loss_fn: Callable[[], torch.Tensor]) -> int:  # behind a backward
    radius: TrustRadius = measure_trust_radius(torch.optim.AdamW(model.parameters()), model, loss_fn)
    return compute_warmup_length(1e-3 / (radius.d50 or 1.0), num_steps=1000)


def refuse() -> ValueError:
    return InputError("a message")


class SafeTrainer(SafeCheckpointsMixin, Trainer):
    """Checkpoints that are whole, in front of a Trainer."""
