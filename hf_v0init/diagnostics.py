"""Watches the first steps of a training: how large they are, how the second moment grows, and what factor v0 puts on them."""

import csv
import io
import logging
import math
from pathlib import Path

import torch
from transformers import TrainerCallback

from .errors import InputError
from .method.decay import compute_linear_factor
from .method.multiplier import compute_multiplier
from .records.run_files import write_whole
from .second_moment.state import SecondMoment, unwrap_optimizer
from .sharding.parts import ParamShard, get_local_part

logger = logging.getLogger("hf_v0init")

CSV_FILE, FIGURE_FILE = "v0_diagnostics.csv", "v0_diagnostics.png"
COLUMNS = ("step", "learning_rate", "update_rms", "update_rms_over_lr", "second_moment", "factor")
NUM_ELEMENTS = 4096  # looked at of each tensor


class V0DiagnosticsCallback(TrainerCallback):
    """Watches the first steps of any Trainer's run, with or without a v0, and leaves the run as it is.

        V0DiagnosticsCallback().attach(trainer)

    At each save and at the end of training the main process writes `v0_diagnostics.csv` into the output folder and, where matplotlib
    is installed, `v0_diagnostics.png`; trackers get the newest row under `v0/...` with each log of the loss.

    | column | what |
    | --- | --- |
    | `learning_rate` | of the first parameter group |
    | `update_rms` | root mean square, over all elements, of the change that the optimizer's step made (weight decay included) |
    | `update_rms_over_lr` | the same in units of each group's learning rate |
    | `second_moment` | mean of v over all elements; empty for optimizers without one |
    | `factor` | what v0 puts on the step in closed form: min(1, t / L) with `v0_decay=linear`, m(t) with `beta2`; empty without a v0 |

    All is estimated from up to 4,096 evenly spaced elements per tensor, of sharded ones from the main process's part. A resumed run is not
    watched.

    Args:
        num_steps: optimizer steps to watch.

    Attributes:
        rows: what has been recorded, by column.
    """

    def __init__(self, num_steps: int = 200) -> None:
        self.num_steps = num_steps
        self.rows: list[dict[str, float | None]] = []
        self._trainer, self._watches, self._num_logged = None, False, 0
        self._before: list[torch.Tensor] = []

    def attach(self, trainer) -> "V0DiagnosticsCallback":
        """Add this callback to a Trainer before all others, so that trackers get its numbers; returns the callback."""
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin a new record."""
        if self._trainer is None:
            raise InputError("write V0DiagnosticsCallback().attach(trainer) in place of add_callback")
        self.rows, self._num_logged = [], 0
        self._watches = args.process_index == 0 and state.global_step == 0
        if self._watches and self._trainer.is_deepspeed_enabled:
            self._watches = False
            logger.warning(f"{CSV_FILE} is not written under DeepSpeed, which keeps no tensors per parameter")

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Keep some elements of the weights."""
        if self._watches and state.global_step < self.num_steps:
            self._before = [_take(shard.param) for shard in _list_shards(optimizer)]

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Record what the optimizer's step did."""
        if self._before:
            self.rows.append({"step": state.global_step + 1} | _measure_step(optimizer, self._before))
            self._before = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Give the trackers the newest row, once."""
        if logs is not None and "loss" in logs and len(self.rows) > self._num_logged:
            self._num_logged = len(self.rows)
            row = self._complete_rows()[-1]
            logs.update({f"v0/{name}": value for name, value in row.items() if name != "step" and value is not None})

    def on_save(self, args, state, control, **kwargs):
        """Write what there is."""
        if self._watches:
            self._write(Path(args.output_dir))

    on_train_end = on_save

    # ---- how ---------------------------------------------------------------------------------------------------------

    def _complete_rows(self) -> list[dict[str, float | None]]:
        """Add the closed form, which is known once v0 stands."""
        records = [cb.get_record() for cb in self._trainer.callback_handler.callbacks if hasattr(cb, "get_record")]
        record = next((record for record in records if record is not None), {})
        for row in self.rows:
            row["factor"] = _compute_factor(record, int(row["step"]))
        return self.rows

    def _write(self, folder: Path) -> None:
        rows = self._complete_rows()
        folder.mkdir(parents=True, exist_ok=True)
        text = io.StringIO()
        writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_whole(folder / CSV_FILE, text.getvalue())
        try:
            from matplotlib.figure import Figure
        except ImportError:
            return
        figure = Figure(figsize=(8, 3), layout="constrained")
        panels = ("update_rms_over_lr", "factor"), ("second_moment",)
        for axes, names in zip(figure.subplots(1, 2), panels, strict=True):
            for name in names:
                values = [math.nan if row[name] is None else row[name] for row in rows]
                axes.plot([row["step"] for row in rows], values, label=name)
            axes.set_xlabel("optimizer step")
            axes.legend()
        figure.savefig(folder / FIGURE_FILE)


def _list_shards(optimizer) -> list[ParamShard]:
    groups = unwrap_optimizer(optimizer).param_groups
    return [
        ParamShard("", tuple(parameter.shape), parameter, group)
        for group in groups
        for parameter in group["params"]
        if parameter.requires_grad and parameter.is_floating_point()
    ]


def _take(tensor: torch.Tensor) -> torch.Tensor:
    """Copy evenly spaced elements of what this process holds of a tensor, in fp32."""
    local = get_local_part(tensor).detach().reshape(-1)
    return local[:: max(1, local.numel() // NUM_ELEMENTS)].float().clone()


def _measure_step(optimizer, before: list[torch.Tensor]) -> dict[str, float | None]:
    """Measure the step from `before` to the present weights, and the second moment after it."""
    shards = _list_shards(optimizer)
    try:
        moments = SecondMoment(optimizer)
    except InputError:
        moments = None
    num_elements, squares, relative, second = 0, 0.0, 0.0, 0.0
    for shard, old in zip(shards, before, strict=True):
        numel, rate = shard.param.numel(), float(shard.group["lr"])
        square = numel * float((_take(shard.param) - old).square().mean()) if old.numel() else 0.0
        num_elements, squares = num_elements + numel, squares + square
        relative += square / rate**2 if rate else 0.0
        moment = None if moments is None else moments.read(shard)
        second += 0.0 if moment is None else numel * float(_take(moment).mean())
    return {
        "learning_rate": float(shards[0].group["lr"]),
        "update_rms": math.sqrt(squares / num_elements),
        "update_rms_over_lr": math.sqrt(relative / num_elements),
        "second_moment": None if moments is None else second / num_elements,
    }


def _compute_factor(record: dict, step: int) -> float | None:
    """Compute what v0 puts on step t, from what `v0_init.json` says."""
    if record.get("strategy", "zeros") == "zeros" or not record.get("is_written", True):
        return None
    if record["decay"] == "linear":
        return compute_linear_factor(step, record["decay_steps"])
    ratio = record["scale"] if record["measured_ratio"] is None else record["measured_ratio"]
    known = ratio is not None and record["beta2"] is not None
    return compute_multiplier(step, ratio, record["beta2"]) if known else None
