"""Training after v0 has been written, beside the stock optimizer and the stock Trainer: it must be the same training."""

import time

from transformers import PrinterCallback, Trainer, TrainerCallback

from benchmarks.measuring import Conditions, Row, measure_times
from benchmarks.tasks import make_arguments, make_gpt2, make_random_sequences
from hf_v0init.trainer.mixin import V0InitTrainer

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


def _train(conditions: Conditions, kind: type[Trainer], num_steps: int, **settings) -> float:
    """Train from scratch; return the processor seconds of `num_steps` steps."""
    clock = StepClock()
    arguments = make_arguments(
        conditions.work_dir,
        per_device_train_batch_size=BATCH_SIZE,
        max_steps=num_steps + FIRST_STEPS,
        learning_rate=1e-3,
        **settings,
    )
    data = make_random_sequences(BATCH_SIZE * (num_steps + FIRST_STEPS))
    trainer = kind(model=make_gpt2(), args=arguments, train_dataset=data, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return clock.seconds


def measure_trainer_steps(conditions: Conditions) -> list[Row]:
    """Steps of the Trainer after a v0 beside those of the stock Trainer."""
    num_steps = conditions.choose(10, 60)
    times = measure_times(
        [
            lambda: _train(conditions, V0InitTrainer, num_steps, v0_init="data_driven"),
            lambda: _train(conditions, Trainer, num_steps),
        ],
        conditions.choose(4, 8),
    )
    size = f"GPT-2, 4 layers of 128, {BATCH_SIZE} x 128 tokens"
    return [
        Row(
            "Trainer steps",
            "V0InitTrainer's steps after a v0",
            "the stock Trainer's",
            [ours / stock for ours, stock in times],
            aim=1.03,
            note=f"1 within noise; {num_steps} steps, {size}",
        ),
    ]
