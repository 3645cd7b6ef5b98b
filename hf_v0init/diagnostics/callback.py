"""Watches a training: how large the steps are, how far the second moment is from where it goes, what v0 does to the step.

    trainer = Trainer(...)                          # any Trainer, with or without a v0
    V0DiagnosticsCallback().attach(trainer)         # to the trackers of `report_to` as well
    Trainer(..., callbacks=[V0DiagnosticsCallback()])   # or: the file alone

It writes `v0_diagnostics.json` into the output folder (main process), which `read_diagnostics` reads back:

| entry | what |
| --- | --- |
| `updates` | by step, the first 200: learning rate, norm of the update, its root mean square over all elements, and that in units of the learning rate |
| `second_moment` | by step, ten to a decade: mean of v_hat, mean of abs(v_hat - v_hat_late) and the median over elements of its ratio to v_hat_late; late is the last step looked at |
| `multiplier` | by step: the factor that v0 puts on the step in closed form, under `v0_decay=beta2` beside quantiles over elements of the measured one |
| `cost` | seconds spent here, and their share of the time between the first and the last step that was watched |

An update is the change of the weights by the optimizer's step, so weight decay is part of it. Everything is measured on
evenly spaced elements (`element_samples`), up to 4,096 a tensor for updates and 65,536 in all for second moments, and nothing
is waited for on a GPU but at second moments and when the file is written. The run itself is not touched: its
weights, random states and logs are bit for bit those of a run without the callback (`attach` adds figures to what trackers
get, not to `log_history`).

The closed form is min(1, t / L) under `v0_decay=linear` (L is `v0_decay_steps`) and m(t) under `beta2`. There the measured
multiplier of an element with v0 > 0 is sqrt((v_t - beta2^t v0) / v_t): what is left of v_t without v0's share is what the same
gradients would have made from 0. Elements in which that remainder is within rounding of nothing are left out and counted as
`unresolved`: their multiplier is below what the state's precision can tell.

A resumed run is not watched: the file has the run's start, and stays as it was when the checkpoint was saved or later.
"""

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from transformers import TrainerCallback
from transformers.utils import logging

from ..errors import InputError
from ..hook import find_hook
from ..method.decay import compute_linear_factor
from ..method.defaults import SCALED_BY_GRADIENTS
from ..method.multiplier import compute_multiplier
from ..records.run_files import write_whole
from ..second_moment.state import SecondMoment
from ..settings import read_v0_arguments
from .element_samples import MAX_PER_TENSOR, ElementSamples, compute_weighted_quantiles

logger = logging.get_logger(__name__)

DIAGNOSTICS_FILE = "v0_diagnostics.json"
NUM_UPDATE_STEPS = 200
MOMENT_STEPS_PER_DECADE = 10
MAX_MOMENTS = 65536
MULTIPLIER_QUANTILES = (0.1, 0.5, 0.9)
SECONDS_BETWEEN_WRITES = 30.0


class V0DiagnosticsCallback(TrainerCallback):
    """Records the first updates, the second moment and the measured multiplier of any Trainer run; see the top of the file.

    Args:
        num_update_steps: optimizer steps whose update is measured.
        max_per_tensor: elements looked at of each tensor for the updates.
        file_name: of the file written into `output_dir`.
    """

    def __init__(
        self,
        num_update_steps: int = NUM_UPDATE_STEPS,
        max_per_tensor: int = MAX_PER_TENSOR,
        file_name: str = DIAGNOSTICS_FILE,
    ) -> None:
        for name, value, least in (("num_update_steps", num_update_steps, 0), ("max_per_tensor", max_per_tensor, 1)):
            if value < least:
                raise InputError(f"{name}={value}: must be a whole number >= {least}")
        self.num_update_steps, self.max_per_tensor, self.file_name = num_update_steps, max_per_tensor, file_name
        self._trainer = None
        self._clear()

    def attach(self, trainer) -> "V0DiagnosticsCallback":
        """Add this callback to the Trainer before all others, so that the trackers get its figures with the Trainer's own.

        They come under `v0/...` with each log of the training loss, if there are new ones. Returns the callback.
        """
        self._trainer = trainer
        trainer.callback_handler.callbacks.insert(0, self)
        return self

    def get_diagnostics(self) -> dict:
        """Return what has been recorded so far, as in the file; plain JSON types."""
        return {
            "settings": self._settings,
            "updates": self._compose_updates(self._rows),
            "second_moment": self._compose_drift(),
            "multiplier": self._multiplier,
            "cost": self._compose_cost(),
        }

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Begin a new record."""
        self._clear()
        if args.process_index != 0:
            return
        if state.global_step > 0:
            logger.info(f"{self.file_name} stays as it was: a resumed run is not watched")
            return
        if getattr(args, "deepspeed_plugin", None) is not None:
            logger.warning(
                f"{self.file_name} is not written: DeepSpeed's optimizers keep no per-parameter tensors to look at"
            )
            return
        self._watches = True
        settings = getattr(self._trainer, "v0_arguments", None) or read_v0_arguments(args)
        self._v0_init = settings.resolve(state.max_steps).init

    def on_pre_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Read weights, and the first time v0, before the optimizer's step."""
        if not self._watches:
            return
        with self._timing():
            if self._moment_samples is None:
                self._choose_elements(optimizer)
                self._hook = find_hook(optimizer)
                if self._hook is not None and self._hook.is_waiting and self._hook.plan.decay == "beta2":
                    self._hook.observers.append(self._read_v0)
                else:
                    self._read_v0()
            if state.global_step < self.num_update_steps:
                self._before = self._update_samples.read_parameters()

    def on_optimizer_step(self, args, state, control, optimizer=None, **kwargs):
        """Record what the optimizer's step did."""
        if not self._watches or self._moment_samples is None:
            return
        with self._timing():
            step = state.global_step + 1
            # fp16: the gradients had overflowed; or they were measured, for a v0
            skipped = bool(getattr(optimizer, "step_was_skipped", False))
            skipped = skipped or (self._hook is not None and self._hook.is_waiting)
            self._num_steps_taken += not skipped
            if self._before is not None:
                self._record_update(step)
            if _is_moment_step(step) and not skipped:
                self._record_moments(step)

    def on_log(self, args, state, control, logs=None, **kwargs):
        """Give the trackers the newest numbers, and write the file now and then."""
        if not self._watches or logs is None or "loss" not in logs:
            return
        with self._timing():
            if self._trainer is not None:
                logs.update(self._compose_log())
            if time.perf_counter() - self._written_at > SECONDS_BETWEEN_WRITES:
                self._write(args.output_dir)

    def on_save(self, args, state, control, **kwargs):
        """Write the file beside a checkpoint's time."""
        if self._watches:
            with self._timing():
                self._write(args.output_dir)

    def on_train_end(self, args, state, control, **kwargs):
        """Record the last step and write the file."""
        if not self._watches or self._moment_samples is None:
            return
        with self._timing():
            if state.global_step > 0 and (not self._moments or state.global_step != self._moments[-1][0]):
                self._record_moments(state.global_step)
        self._write(args.output_dir)
        self._update_samples = self._before = None  # views that would keep the model's memory alive

    # ---- measuring ---------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._watches, self._v0_init = False, "zeros"
        self._settings: dict = {}
        self._update_samples = self._moment_samples = self._before = None
        self._rows: list[tuple[int, list[float], list[torch.Tensor]]] = []
        self._moments: list[tuple[int, int, np.ndarray]] = []  # (global step, steps since v0, v)
        self._multiplier: dict[str, list] = {}
        self._v0: np.ndarray | None = None
        self._hook = None
        self._num_steps_taken, self._num_logged = 0, (0, 0)
        self._seconds, self._first_began, self._last_ended, self._written_at = 0.0, None, None, -math.inf

    def _choose_elements(self, optimizer) -> None:
        """Choose the elements to look at."""
        self._update_samples = ElementSamples(optimizer, self.max_per_tensor)
        self._moment_samples = ElementSamples(optimizer, self.max_per_tensor, MAX_MOMENTS)
        self._weights = self._moment_samples.weights
        self._settings = {
            "optimizer": type(self._moment_samples.optimizer).__name__,
            "v0_init": self._v0_init,
            "num_elements": self._update_samples.num_elements,
            "num_elements_for_updates": self._update_samples.num_looked_at,
            "num_elements_for_second_moments": self._moment_samples.num_looked_at,
            "num_tensors_left_out": self._update_samples.num_left_out,
        }
        self._reads_moments = False

    def _read_v0(self) -> None:
        """Read v0, once it has been written."""
        groups = self._moment_samples.optimizer.param_groups
        try:
            v0 = self._moment_samples.read_second_moments()
            moments = SecondMoment(self._moment_samples.optimizer)
            betas = [moments.read_beta2(group) for group in groups]
        except InputError as error:
            logger.info(f"{self.file_name} holds no second moments: {error}")
            return
        self._reads_moments = True
        self._settings["beta2"] = betas[0]
        # NaN where the closed form, and so the bias correction, does not hold
        by_group = np.array([math.nan if beta is None else beta for beta in betas])
        self._beta2 = by_group[self._moment_samples.groups]
        if bool((v0 > 0).any()) and betas[0] is not None:
            self._v0 = v0
            self._epsilon = max(
                torch.finfo(p.dtype).eps for group in groups for p in group["params"] if p.is_floating_point()
            )
            self._settings |= self._find_scales()

    def _find_scales(self) -> dict:
        """Find v0 / g^2 as it was asked for, and as it was measured."""
        report = self._hook.report if self._hook is not None else None
        if report is not None:
            found = {"scale": report.scale, "measured_ratio": report.measured_ratio}
        else:
            stored = getattr(self._trainer, "get_v0_report", lambda: None)() or {}
            found = {"scale": stored.get("scale"), "measured_ratio": stored.get("measured_ratio")}
        if self._v0_init not in SCALED_BY_GRADIENTS:
            found["scale"] = None
        return found

    def _record_update(self, step: int) -> None:
        after = self._update_samples.read_parameters()
        rates = [float(group["lr"]) for group in self._update_samples.optimizer.param_groups]
        self._rows.append((step, rates, self._update_samples.sum_squares(self._before, after)))
        self._before = None

    def _record_moments(self, step: int) -> None:
        if not self._reads_moments:
            return
        moments = self._moment_samples.read_second_moments()
        self._moments.append((step, self._num_steps_taken, moments.astype(np.float32)))
        if self._v0 is not None:
            self._record_multiplier(step, moments)
        elif self._hook is not None and self._hook.plan.decay == "linear":
            length = self._settings["decay_steps"] = self._hook.plan.decay_steps
            self._add_multiplier({"step": step, "closed_form": compute_linear_factor(self._num_steps_taken, length)})

    def _record_multiplier(self, step: int, moments: np.ndarray) -> None:
        taken = self._num_steps_taken
        has_v0 = self._v0 > 0
        share = self._v0 * self._beta2**taken
        remainder = moments - share
        # Each step rounds v once, and beta2 is rounded too: half an epsilon a step, with room.
        resolved = has_v0 & (remainder > 8.0 * (taken + 1) * self._epsilon / 2.0 * np.maximum(moments, share))
        measured = np.sqrt(remainder[resolved] / moments[resolved])
        values = compute_weighted_quantiles(measured, self._weights[resolved], MULTIPLIER_QUANTILES)
        unresolved = 1.0 - self._weights[resolved].sum() / self._weights[has_v0].sum()
        row = {"step": step, "unresolved": float(unresolved)}
        row |= {f"quantile_{q:g}": _null_if_not_finite(v) for q, v in zip(MULTIPLIER_QUANTILES, values, strict=True)}
        beta2 = self._settings["beta2"]
        for name, key in (("closed_form", "scale"), ("closed_form_of_measured_ratio", "measured_ratio")):
            scale = self._settings[key]
            row[name] = None if scale is None or taken < 1 else compute_multiplier(taken, scale, beta2)
        self._add_multiplier(row)

    def _add_multiplier(self, row: dict) -> None:
        for name, value in row.items():
            self._multiplier.setdefault(name, []).append(value)

    # ---- putting it together -----------------------------------------------------------------------------------------

    def _compose_updates(self, rows: list[tuple[int, list[float], list[torch.Tensor]]]) -> dict[str, list]:
        columns: dict[str, list] = {name: [] for name in ("step", "learning_rate", "norm", "rms", "rms_over_lr")}
        for step, rates, sums in rows:
            squares = np.sum([one.cpu().double().numpy() for one in sums], axis=0)  # by group
            relative = sum(square / rate**2 for square, rate in zip(squares, rates, strict=True) if rate > 0)
            known = all(rate > 0 or square == 0 for square, rate in zip(squares, rates, strict=True)) and any(rates)
            count = max(1, self._settings["num_elements"])
            columns["step"].append(step)
            columns["learning_rate"].append(rates[0])
            columns["norm"].append(_null_if_not_finite(math.sqrt(squares.sum())))
            columns["rms"].append(_null_if_not_finite(math.sqrt(squares.sum() / count)))
            columns["rms_over_lr"].append(_null_if_not_finite(math.sqrt(relative / count)) if known else None)
        return columns

    def _compose_drift(self) -> dict[str, list]:
        names = ("step", "mean", "drift", "relative_drift")
        columns: dict[str, list] = {name: [] for name in names}
        if not self._moments:
            return columns
        late = self._correct_bias(*self._moments[-1][1:])
        nonzero = late > 0
        for step, taken, moments in self._moments:
            corrected = self._correct_bias(taken, moments)
            distance = np.abs(corrected - late)
            relative = compute_weighted_quantiles(distance[nonzero] / late[nonzero], self._weights[nonzero], (0.5,))[0]
            mean, drift = (np.average(values, weights=self._weights) for values in (corrected, distance))
            for name, value in zip(names, (step, float(mean), float(drift), relative), strict=True):
                columns[name].append(_null_if_not_finite(value))
        return columns

    def _correct_bias(self, taken: int, moments: np.ndarray) -> np.ndarray:
        """v_hat; v itself where the optimizer has no bias correction that is known."""
        if taken < 1:
            return moments.astype(np.float64)
        return moments / np.where(np.isnan(self._beta2), 1.0, 1.0 - self._beta2**taken)

    def _compose_log(self) -> dict[str, float]:
        """The newest figures that no log has carried yet."""
        logs, now = {}, (len(self._rows), len(self._multiplier.get("step", [])))
        if now[0] > self._num_logged[0]:
            last = self._compose_updates(self._rows[-1:])
            logs |= {f"v0/update_{name}": last[name][0] for name in ("norm", "rms", "rms_over_lr")}
        if now[1] > self._num_logged[1]:
            logs["v0/multiplier"] = self._multiplier.get("quantile_0.5", [None])[-1]
            logs["v0/multiplier_closed_form"] = self._multiplier["closed_form"][-1]
        self._num_logged = now
        return {name: value for name, value in logs.items() if value is not None}

    def _compose_cost(self) -> dict[str, float | None]:
        watched = None if self._last_ended is None else self._last_ended - self._first_began
        return {"seconds": self._seconds, "share_of_time": self._seconds / watched if watched else None}

    @contextlib.contextmanager
    def _timing(self) -> Iterator[None]:
        """Count the time that is spent inside."""
        begin = time.perf_counter()
        self._first_began = begin if self._first_began is None else self._first_began
        try:
            yield
        finally:
            self._last_ended = time.perf_counter()
            self._seconds += self._last_ended - begin

    def _write(self, folder: str) -> None:
        """Write the file whole or not at all; a full disk costs the file, not the run."""
        if self._moment_samples is None:
            return
        path = Path(folder) / self.file_name
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(self.get_diagnostics()) + "\n")
        except OSError as error:
            logger.warning(f"{path} cannot be written: {error.strerror}")
        self._written_at = time.perf_counter()


def read_diagnostics(folder) -> dict | None:
    """Read `v0_diagnostics.json` from an output folder; None if there is none.

    Raises:
        InputError: the file is damaged.
    """
    path = Path(folder) / DIAGNOSTICS_FILE
    if not path.is_file():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(f"{path} is damaged ({error}); delete it or run again") from error


def _is_moment_step(step: int) -> bool:
    """Whether `step` is one of 1, 2, 3, 4, 5, 6, 8, 10, 13, 16, 20, ..., evenly spaced on a logarithmic scale."""
    power = MOMENT_STEPS_PER_DECADE * math.log10(step)
    return any(round(10 ** (p / MOMENT_STEPS_PER_DECADE)) == step for p in (math.floor(power), math.ceil(power)))


def _null_if_not_finite(value):
    return value if not isinstance(value, float) or math.isfinite(value) else None
