"""Training after v0 has been written, beside the stock optimizer and the stock Trainer: it must be the same training."""

import time

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback

from ..arguments import V0InitArguments
from ..diagnostics import V0DiagnosticsCallback
from ..initialization import plan_v0, write_random_v0
from ..trainer import V0InitTrainer
from .measuring import Conditions, Row, measure_pairs, measure_times
from .tasks import make_arguments, make_gpt2, make_random_sequences

BATCH_SIZE = 8
FIRST_STEPS = 3  # not measured


class StepClock(TrainerCallback):
    """Takes the processor time from the end of step `FIRST_STEPS` to the end of the last."""

    def __init__(self) -> None:
        self.begin = self.end = 0.0

    def on_step_end(self, args, state, control, **kwargs):
        self.end = time.process_time()
        if state.global_step == FIRST_STEPS:
            self.begin = self.end

    @property
    def seconds(self) -> float:
        """Processor time between the two."""
        return self.end - self.begin


def measure_optimizer_steps(conditions: Conditions) -> Row:
    """`optimizer.step()` from a written v0, beside that from nothing."""
    steps = []
    for with_v0 in (True, False):
        model = make_gpt2(4, 256)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        if with_v0:
            write_random_v0(optimizer, plan_v0(optimizer, model), V0InitArguments(v0_init="random"), 0)
        for parameter in model.parameters():
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        steps.append(lambda optimizer=optimizer: [optimizer.step() for _ in range(5)] and None)
    ratios = measure_pairs(*steps, conditions.choose(15, 50))
    return Row("optimizer steps", "AdamW's step after a v0", "AdamW's step", ratios, aim=1.03, note="1 within noise")


def measure_trainer_steps(conditions: Conditions) -> list[Row]:
    """Steps of the Trainer after a v0, without and with the diagnostics, beside those of the stock Trainer."""
    num_steps, rounds = conditions.choose(15, 60), conditions.choose(3, 8)
    data = make_random_sequences(BATCH_SIZE * (num_steps + FIRST_STEPS))

    def train(stock: bool, watch: bool = False) -> float:
        clock, settings = StepClock(), {} if stock else {"v0_init": "data_driven", "v0_num_samples": 64}
        arguments = make_arguments(
            conditions.work_dir,
            per_device_train_batch_size=BATCH_SIZE,
            max_steps=num_steps + FIRST_STEPS,
            learning_rate=1e-3,
            **settings,
        )
        callbacks = [clock, *([V0DiagnosticsCallback()] if watch else [])]
        kind = Trainer if stock else V0InitTrainer
        trainer = kind(model=make_gpt2(), args=arguments, train_dataset=data, callbacks=callbacks)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        return clock.seconds

    times = measure_times([lambda: train(True), lambda: train(False), lambda: train(False, watch=True)], rounds)
    size = f"{num_steps} steps, GPT-2, 4 layers of 128, {BATCH_SIZE} x 128 tokens"
    return [
        Row(
            "Trainer steps",
            "V0InitTrainer's steps after a v0",
            "the stock Trainer's",
            [v0 / stock for stock, v0, _ in times],
            aim=1.03,
            note=f"1 within noise; {size}",
        ),
        Row(
            "diagnostics",
            "steps with V0DiagnosticsCallback",
            "without",
            [watched / v0 for _, v0, watched in times],
            aim=1.02,
            note=f"the first steps, which it looks at most; {size}",
        ),
    ]
