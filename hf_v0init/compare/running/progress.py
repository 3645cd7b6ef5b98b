"""Shows how a comparison goes on: a line for each run that is over, and in a terminal a live table of those in progress."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from ..planning.plan import PlannedRun
from ..reading.results import DIVERGED, FAILED, FINISHED, INTERRUPTED
from .run_state import LossTrace
from .runs import ActiveRun

STYLES = {FAILED: "red", DIVERGED: "yellow"}


def format_seconds(seconds: float) -> str:
    """Write a duration: 42 s, 3:20 min, 2:05 h."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60}:{whole % 60:02d} min" if whole < 3600 else f"{whole // 3600}:{whole % 3600 // 60:02d} h"


def format_loss(loss: float | None) -> str:
    """Write a loss with three decimals, `-` for none."""
    return "-" if loss is None else f"{loss:.3f}"


class ProgressDisplay:
    """Implements `runs.Progress` on a rich console; a context manager.

    Args:
        console: where to.
        num_runs: of the plan.
        num_over: those that an earlier call has finished.
        jobs: runs side by side.
    """

    def __init__(self, console: Console, num_runs: int, num_over: int, jobs: int) -> None:
        self.console, self.num_runs, self.num_over, self.jobs = console, num_runs, num_over, jobs
        self.states: Counter[str] = Counter()
        self.durations: list[float] = []
        self.started = time.monotonic()
        self.live = Live(console=console, auto_refresh=False, transient=True) if console.is_terminal else None

    def __enter__(self) -> ProgressDisplay:
        if self.live:
            self.live.start()
        return self

    def __exit__(self, *exception) -> None:
        if self.live:
            self.live.stop()

    def update(self, active: Sequence[ActiveRun], num_waiting: int) -> None:
        """Draw the table anew, in a terminal."""
        if self.live is None:
            return
        table = Table("run", "step", "train loss", "val. loss", "elapsed", "remaining", expand=False)
        for run in active:
            total, step = run.num_steps, run.trace.step
            left = run.seconds / step * (total - step) if total and step else None
            progress = f"{step:,}" + (f" of {total:,}" if total else "")
            state = "stopping" if run.stop_as else (format_seconds(left) if left is not None else "-")
            losses = (format_loss(run.trace.train_loss), format_loss(run.trace.eval_loss))
            table.add_row(run.run.name, progress, *losses, format_seconds(run.seconds), state)
        self.live.update(Group(table, self._summarize(active, num_waiting)), refresh=True)

    def _summarize(self, active: Sequence[ActiveRun], num_waiting: int) -> Text:
        over = self.num_over + sum(self.states.values())
        states = ", ".join(f"{count} {state}" for state, count in self.states.items())
        text = f"{over} of {self.num_runs} runs over" + (f" ({states})" if states else "") + f", {num_waiting} waiting"
        text += f"; {format_seconds(time.monotonic() - self.started)}"
        if self.durations:
            mean = sum(self.durations) / len(self.durations)
            left = mean * num_waiting + sum(max(0.0, mean - run.seconds) for run in active)
            text += f", about {format_seconds(left / self.jobs)} left"
        return Text(text)

    def report_end(self, run: PlannedRun, state: str, reason: str | None, trace: LossTrace, seconds: float) -> None:
        """Print a line for a run that is over."""
        if state != INTERRUPTED:
            self.states[state] += 1
        if state == FINISHED:
            self.durations.append(seconds)
        over = self.num_over + sum(self.states.values())
        text = f"[{over}/{self.num_runs}] {run.name}: {state}, step {trace.step:,}, validation loss "
        text += f"{format_loss(trace.eval_loss)}, {format_seconds(seconds)}" + (f"; {reason}" if reason else "")
        self.console.print(Text(text, style=STYLES.get(state, "")), soft_wrap=True)

    def report_elsewhere(self, run: PlannedRun, state: str) -> None:
        """Print a line for a run that another call has brought to its end."""
        self.num_over += 1
        over = self.num_over + sum(self.states.values())
        text = f"[{over}/{self.num_runs}] {run.name}: {state}, by another call"
        self.console.print(Text(text, style=STYLES.get(state, "")), soft_wrap=True)

    def warn(self, message: str) -> None:
        """Print a warning."""
        self.console.print(Text(f"Warning: {message}", style="yellow"), soft_wrap=True)
