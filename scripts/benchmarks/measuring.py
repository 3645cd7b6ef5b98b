"""Measures two things in turn, so that what disturbs one disturbs the other: ratios of pairs, their median and quartiles.

The clock is processor time of this process wherever nothing waits, so that other programs on the machine matter little.
"""

import gc
import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

PROCESSOR, WALL, BYTES = "processor time", "wall clock", "bytes"

DIGITS = 4  # of every figure
MET, MISSED, PRINTED, SKIPPED = "met", "MISSED", "-", "skipped"


@dataclass
class Row:
    """One line of the benchmark.

    Attributes:
        name: short and lasting; the record is compared by it.
        what, against: what was measured, and beside what.
        ratios: of the pairs, what over against; empty where there is nothing to compare.
        aim: the most the median should be (the least, if `at_least`); None if it is only printed.
        clock: of the ratios.
        note: why a miss stays, or what the number means.
        figures: further numbers by name.
    """

    name: str
    what: str
    against: str
    ratios: list[float] = field(default_factory=list)
    aim: float | None = None
    at_least: bool = False
    clock: str = PROCESSOR
    note: str = ""
    figures: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Round the ratios as the record keeps them, so that a row read from it has the verdict that it was written with."""
        self.ratios = [float(f"{ratio:.{DIGITS}g}") for ratio in self.ratios]

    @property
    def median(self) -> float:
        """Median of the ratios; NaN if there is none."""
        return statistics.median(self.ratios) if self.ratios else math.nan

    @property
    def quartiles(self) -> tuple[float, float]:
        """First and third quartile of the ratios."""
        if len(self.ratios) < 2:
            return self.median, self.median
        first, _, third = statistics.quantiles(self.ratios, n=4, method="inclusive")
        return first, third

    @property
    def verdict(self) -> str:
        """Whether the median reaches the aim, to two decimals as it is printed."""
        if not self.ratios:
            return SKIPPED
        if self.aim is None:
            return PRINTED
        median = round(self.median, 2)
        return MET if (median >= self.aim if self.at_least else median <= self.aim) else MISSED


@dataclass(frozen=True)
class Conditions:
    """What the rows are measured under.

    Attributes:
        quick: fewer pairs and samples.
        data_dir: where `multi30k/` and `ptb/` are, if they are; else the embedded corpus and random tokens serve.
        work_dir: an empty folder for whatever is written.
        translation_trainer: the Trainer class of scripts/run_translation.py.
    """

    quick: bool
    data_dir: Path
    work_dir: Path
    translation_trainer: type | None = None

    def choose(self, quick: int, full: int) -> int:
        """Return the first number for a quick run, else the second."""
        return quick if self.quick else full


def measure_pairs(
    ours: Callable[[], float | None],
    theirs: Callable[[], float | None],
    num_pairs: int,
    clock: Callable[[], float] = time.process_time,
) -> list[float]:
    """Run both in turn, `num_pairs` times after one warm-up, and return the ratios of their seconds.

    A function that returns a number has measured itself; else it is measured from call to return. Which comes first changes from
    pair to pair; garbage is collected before each and not during it.
    """
    return [a / b for a, b in measure_times([ours, theirs], num_pairs, clock)]


def measure_times(
    functions: Sequence[Callable[[], float | None]], num_rounds: int, clock: Callable[[], float] = time.process_time
) -> list[list[float]]:
    """Run all functions in turn, as `measure_pairs` does; return for each round the seconds of each."""
    rounds = []
    gc.collect()
    gc.freeze()  # what there is already need not be looked through before each measurement
    try:
        for number in range(-1, num_rounds):
            seconds = [0.0] * len(functions)
            order = range(len(functions)) if number % 2 else range(len(functions) - 1, -1, -1)
            for index in order:
                seconds[index] = _measure(functions[index], clock)
            if number >= 0:
                rounds.append(seconds)
    finally:
        gc.unfreeze()
    return rounds


def _measure(function: Callable[[], float | None], clock: Callable[[], float]) -> float:
    gc.collect()
    gc.disable()
    try:
        begin = clock()
        measured = function()
        end = clock()
    finally:
        gc.enable()
    return end - begin if measured is None else measured


@dataclass(frozen=True)
class MemoryUse:
    """Bytes that torch allocated on the CPU while a function ran, above what there was: at most at once, and left at the end."""

    peak: int
    left: int


def measure_memory(function: Callable[[], object]) -> MemoryUse:
    """Run a function and count every allocation and release of torch's CPU allocator, those inside kernels too.

    What the function returns is counted as left.
    """
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = function()
    events = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    del kept
    return MemoryUse(peak, now)


def use_one_thread() -> None:
    """Let torch compute in one thread, so that processor time is what the work takes."""
    torch.set_num_threads(1)
