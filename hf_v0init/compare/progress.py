"""Shows how a comparison goes on: what is ahead, a line for each run that is over, and in a terminal a bar for each of the others."""

from __future__ import annotations

import time
from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.console import Console
from rich.progress import Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text

from . import files
from .plan import Plan, PlannedRun
from .process import LossTrace, RunProcess
from .summary import format_number, format_seconds

STYLES = {files.FAILED: "red", files.DIVERGED: "yellow"}
SHARE_OF_PACE = 0.1  # of the first run, after which the time of the others is estimated by its pace


def count_steps(active: RunProcess) -> int | None:
    """Count the optimizer steps of a whole run; estimated from the epochs if `max_steps` is not set, None if unknown."""
    flags, trace = active.run.arguments, active.trace
    if flags.get("max_steps", -1) > 0:
        return int(flags["max_steps"])
    return round(trace.step / trace.epoch * float(flags.get("num_train_epochs", 3))) if trace.epoch else None


class ProgressDisplay:
    """Tells on a rich console how runs go on, `jobs` of them side by side; a context manager."""

    def __init__(self, console: Console, jobs: int) -> None:
        self.console, self.jobs = console, jobs
        self.num_runs, self.num_over, self.num_later = 1, 0, 0
        self.has_announced = False
        columns = (
            *Progress.get_default_columns()[:2],
            TextColumn("{task.fields[state]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        options = {"transient": True, "disable": not console.is_terminal, "speed_estimate_period": 3600}
        self.bars = Progress(*columns, console=console, **options)
        self.all = self.bars.add_task("all runs", state="")
        self.of_run: dict[str, TaskID] = {}
        self.first_seen: dict[str, tuple[float, float]] = {}  # by run: its seconds and fraction of steps

    def __enter__(self) -> ProgressDisplay:
        self.bars.start()
        return self

    def __exit__(self, *exception) -> None:
        self.bars.stop()

    def begin_stage(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Say what a stage has to train, and what may come after it."""
        is_second = runs[0].stage == files.CONFIRM
        of_stage = plan.list_runs(runs[0].stage)
        num_families = len({(run.condition, run.family) for run in of_stage})
        self.num_later = 0 if is_second else num_families * len(plan.confirm_seeds)
        self.num_runs, self.num_over = len(of_stage), len(of_stage) - len(runs)
        text = f"Stage {1 + is_second} of 2, {runs[0].stage}: " if plan.confirm_seeds else ""
        text += f"{len(of_stage)} runs" + (f", of which {self.num_over} are over" if self.num_over else "")
        if self.num_later:
            text += f"; then at most {num_families} chosen settings on {len(plan.confirm_seeds)} fresh seeds, {self.num_later} runs"
        self.tell(text + ".")

    def update(self, active: Sequence[RunProcess], num_waiting: int) -> None:
        """Say by the first run's pace what is ahead, once; draw the bars anew, in a terminal."""
        shares = 0.0
        for run in active:
            total, trace = count_steps(run), run.trace
            if total:
                share = min(1.0, trace.step / total)
                shares += share
                if share > 0:
                    begun, share_then = self.first_seen.setdefault(run.run.name, (run.seconds, share))
                    if share - share_then >= SHARE_OF_PACE:  # loading, before the first step that is seen, counts once
                        self._announce(run.seconds + (1 - share) * (run.seconds - begun) / (share - share_then))
            losses = f"train {format_number(trace.train_loss)}, val. {format_number(trace.eval_loss)}"
            if run.run.name not in self.of_run:
                self.of_run[run.run.name] = self.bars.add_task(run.run.name, state="")
            bar = self.of_run[run.run.name]
            self.bars.update(bar, total=total, completed=trace.step, state=f"step {trace.step:,}, {losses}")
        state = f"{self.num_over} of {self.num_runs} over, {num_waiting} waiting"
        self.bars.update(self.all, total=self.num_runs, completed=self.num_over + shares, state=state)

    def _announce(self, seconds: float) -> None:
        """Say how long a run takes, and until when the stages do."""
        num_left = self.num_runs - self.num_over
        if self.has_announced or not num_left + self.num_later:
            return
        self.has_announced = True
        end, later = (
            datetime.now() + timedelta(seconds=seconds * -(-n // self.jobs))
            for n in (num_left, num_left + self.num_later)
        )
        text = f"By the first run's pace a run takes {format_seconds(seconds)}: {num_left} runs with {self.jobs} at a time until "
        self.tell(f"{text}{end:%a %H:%M}" + (f", the second stage until {later:%a %H:%M}." if self.num_later else "."))

    def report_end(
        self, run: PlannedRun, state: str, reason: str | None, trace: LossTrace | None, seconds: float
    ) -> None:
        """Print a line for a run that is over; `trace` is None if another worker has trained it."""
        self.num_over += state != files.INTERRUPTED
        if state == files.FINISHED:
            self._announce(seconds)
        if run.name in self.of_run:
            self.bars.remove_task(self.of_run.pop(run.name))
        text = f"{time.strftime('%H:%M')} [{self.num_over}/{self.num_runs}] {run.name}: {state}, "
        if trace is not None:
            text += f"step {trace.step:,}, validation loss {format_number(trace.eval_loss)}, {format_seconds(seconds)}"
        else:
            text += "by another worker"
        self.tell(text + (f"; {reason}" if reason else ""), STYLES.get(state, ""))

    def tell(self, message: str, style: str = "") -> None:
        """Print a message."""
        self.console.print(Text(message, style=style), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.tell(f"Warning: {message}", "yellow")
