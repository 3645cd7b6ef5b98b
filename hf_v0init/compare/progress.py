"""Shows how a comparison goes on: what is ahead, a line for each run that is over, and in a terminal a live table of the others."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime, timedelta

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from . import files
from .outcome import LossTrace
from .plan import Plan, PlannedRun
from .process import RunProcess
from .tables import format_seconds

STYLES = {files.FAILED: "red", files.DIVERGED: "yellow"}
STAGES = {True: "stage 2 of 2, confirm", False: "stage 1 of 2, tune"}


def format_loss(loss: float | None) -> str:
    """Write a loss with three decimals, `-` for none."""
    return "-" if loss is None else f"{loss:.3f}"


def format_end(seconds: float) -> str:
    """Write when something that takes so long from now will be over: 14:35, or with its day."""
    now = datetime.now()
    end = now + timedelta(seconds=seconds)
    return f"{end:%H:%M}" if end.date() == now.date() else f"{end:%a %d %b %H:%M}"


class ProgressDisplay:
    """Tells on a rich console how runs go on; a context manager.

    Args:
        console: where to.
        jobs: runs side by side.
    """

    def __init__(self, console: Console, jobs: int) -> None:
        self.console, self.jobs = console, jobs
        self.states: Counter[str] = Counter()
        self.stage, self.num_runs, self.num_over, self.num_later = "", 0, 0, 0
        self.durations: list[float] = []
        self.has_announced = False
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def begin_stage(self, plan: Plan, runs: Sequence[PlannedRun]) -> None:
        """Say what a stage has to train, and what may come after it."""
        is_second = runs[0].stage == files.CONFIRM
        of_stage = plan.list_runs(runs[0].stage)
        num_families = len({(run.condition, run.family) for run in of_stage})
        self.num_later = 0 if is_second else num_families * len(plan.confirm_seeds)
        self.stage = STAGES[is_second] if plan.confirm_seeds else ""
        self.states.clear()
        self.num_runs, self.num_over = len(of_stage), len(of_stage) - len(runs)
        text = f"{self.stage.capitalize()}: " if self.stage else ""
        text += f"{len(of_stage)} runs" + (f", of which {self.num_over} are over" if self.num_over else "")
        if self.num_later:
            text += f"; then at most {num_families} chosen settings on {len(plan.confirm_seeds)} fresh seeds, {self.num_later} runs"
        self.tell(text + ".")

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def update(self, active: Sequence[RunProcess], num_waiting: int) -> None:
        """Say by the first run's pace what is ahead, once; draw the table anew, in a terminal."""
        per_run = self._estimate_run(active)
        if per_run is not None and not self.has_announced:
            self.has_announced = True
            left = self._estimate_left(active, num_waiting, per_run)
            total = left + per_run * self.num_later / self.jobs
            text = f"By the first run's pace a run takes {format_seconds(per_run)}: {self.num_runs - self.num_over} runs with {self.jobs} "
            text += f"at a time until {format_end(left)}"
            self.tell(f"{text}, the second stage until {format_end(total)}." if self.num_later else f"{text}.")
        if self.live is None:
            return
        table = Table("run", "step", "train loss", "val. loss", "elapsed", "until", expand=False)
        for run in active:
            left = run.seconds_left
            progress = f"{run.trace.step:,}" + (f" of {run.num_steps:,}" if run.num_steps else "")
            state = "stopping" if run.stop_as else ("-" if left is None else format_end(left))
            losses = (format_loss(run.trace.train_loss), format_loss(run.trace.eval_loss))
            table.add_row(run.run.name, progress, *losses, format_seconds(run.seconds), state)
        states = ", ".join(f"{count} {state}" for state, count in self.states.items())
        over = self.num_over + sum(self.states.values())
        text = f"{self.stage}{': ' if self.stage else ''}{over} of {self.num_runs} runs are over"
        text += (f" ({states})" if states else "") + f", {num_waiting} waiting"
        if per_run is not None:
            text += f"; until {format_end(self._estimate_left(active, num_waiting, per_run))}"
        self.live.update(Group(table, Text(text)), refresh=True)

    def _estimate_run(self, active: Sequence[RunProcess]) -> float | None:
        """Seconds of a run: of those that are over, or else by the pace of the first."""
        if self.durations:
            return sum(self.durations) / len(self.durations)
        known = [run.seconds + run.seconds_left for run in active if run.seconds_left is not None]
        return known[0] if known else None

    def _estimate_left(self, active: Sequence[RunProcess], num_waiting: int, per_run: float) -> float:
        of_active = [per_run - run.seconds if run.seconds_left is None else run.seconds_left for run in active]
        return max([(per_run * num_waiting + sum(max(0.0, left) for left in of_active)) / self.jobs, *of_active])

    def report_end(
        self, run: PlannedRun, state: str, reason: str | None, trace: LossTrace | None, seconds: float
    ) -> None:
        """Print a line for a run that is over."""
        if state != files.INTERRUPTED:
            self.states[state] += 1
        if state == files.FINISHED:
            self.durations.append(seconds)
        over = self.num_over + sum(self.states.values())
        text = f"{time.strftime('%H:%M')} [{over}/{self.num_runs}] {run.name}: {state}"
        if trace is not None:
            text += f", step {trace.step:,}, validation loss {format_loss(trace.eval_loss)}, {format_seconds(seconds)}"
        else:
            text += ", by another worker"
        self.console.print(Text(text + (f"; {reason}" if reason else ""), style=STYLES.get(state, "")), soft_wrap=True)

    def tell(self, message: str) -> None:
        """Print a message."""
        self.console.print(Text(message), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(Text(f"Warning: {message}", style="yellow"), soft_wrap=True)
