"""`--probe_only`: a training script builds its run, measures how far it may step, says so and ends without an update.

The Trainer prepares everything as for training (device, precision, sharding, loader); in the first optimizer step the trust radius
is measured, and the run is left. Nothing is written.
"""

import os
import shutil
import tempfile
import uuid

from rich.console import Console
from rich.table import Table
from transformers import TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..method.length import (
    compute_largest_rate_with_room,
    compute_relative_rate,
    compute_warmup_length,
    describe_bound,
)
from ..settings import V0InitArguments
from ..trainer.probe import measure_run


def turn_into_probe(training: TrainingArguments) -> None:
    """Change the arguments of a run, in place, so that it is built as for training and leaves nothing behind."""
    training.output_dir = os.path.join(tempfile.gettempdir(), f"probe-{uuid.uuid4().hex}")
    training.do_train, training.do_eval, training.do_predict = True, False, False
    training.eval_strategy, training.eval_on_start, training.save_strategy = IntervalStrategy.NO, False, SaveStrategy.NO
    training.load_best_model_at_end, training.push_to_hub, training.report_to = False, False, []
    training.resume_from_checkpoint = None
    for name, field in V0InitArguments.__dataclass_fields__.items():
        if name != "v0_optimizer":
            setattr(training, name, field.default)
    training.disable_tqdm = True
    if training.log_level == "passive":
        training.log_level = "warning"


def probe_and_print(trainer) -> None:
    """Prepare the run as for training, measure, print what follows for it."""
    try:
        radius, learning_rate = measure_run(trainer)
    finally:
        shutil.rmtree(trainer.args.output_dir, ignore_errors=True)
    if not trainer.is_world_process_zero():
        return
    console = Console(highlight=False, markup=False, soft_wrap=True)
    if radius.rho:
        table = Table(title="rho(d): decrease of the loss over the decrease that the gradient predicts")
        table.add_column("displacement d", justify="right")
        table.add_column("rho", justify="right")
        for displacement, rho in zip(radius.displacements, radius.rho, strict=True):
            table.add_row(f"{displacement:.3g}", f"{rho:.3f}")
        console.print(table)
    if radius.d50 is None:
        console.print(f"the trust radius could not be measured: {radius.reason}.")
        return
    d50, num_steps = radius.d50, trainer.state.max_steps
    x = compute_relative_rate(learning_rate, d50)
    length = compute_warmup_length(x, num_steps)
    for line in (
        f"trust radius (d50, where rho is 0.5): {d50:.3g}",
        f"relative learning rate = learning rate / trust radius = {learning_rate:g} / {d50:.3g} = {x:.3g}",
        f"Warm up for {length:,} of {num_steps:,} steps{describe_bound(x, length)}: --v0_init data_driven --v0_decay_steps {length}, "
        f"or without v0 --warmup_steps {length}",
        f"A learning rate above {compute_largest_rate_with_room(d50, num_steps):.3g} would need a warmup of more than two thirds of "
        "these steps",
    ):
        console.print(line)
