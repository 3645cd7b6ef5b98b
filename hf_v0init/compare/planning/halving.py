"""Successive halving over seeds: every arm and learning rate gets the first seed, the better half of them the second, and so on.

"Better" is by the mean loss over the seeds so far, and within a family: v0, warmup, v0 with warmup and the plain start, for each optimizer
and each setting of other flags. So every family keeps its best to the last seed, and what is compared in the end has had the same
search (Jamieson & Talwalkar, 2016, with seeds in the place of steps: a run is never cut short, since a v0 that is slow at first may
end lower).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from .axes import NO_V0, NO_WARMUP
from .plan import PlannedRun


@dataclass(frozen=True)
class Family:
    """What is halved together: arms that differ in how large a v0, or how long a warmup, and in the learning rate."""

    has_v0: bool
    has_warmup: bool
    optimizer: str
    further: str  # flags other than v0's own, `name=value`

    @property
    def name(self) -> str:
        """Such as 'v0', 'warmup, radam', 'no warmup, no v0, adam_beta2=0.999'."""
        kind = " + ".join(["v0"] * self.has_v0 + ["warmup"] * self.has_warmup) or "no warmup, no v0"
        return ", ".join(part for part in (kind, self.optimizer, self.further) if part)


@dataclass
class Selection:
    """What is to be trained by halving, as far as losses are known.

    Attributes:
        now: runs that can be started: those of the first seed that is not over.
        dropped: runs that will not be trained.
        over: runs that were wanted and are over.
    """

    now: list[PlannedRun] = field(default_factory=list)
    dropped: list[PlannedRun] = field(default_factory=list)
    over: list[PlannedRun] = field(default_factory=list)


def get_family(run: PlannedRun) -> Family:
    """Return the family of a run."""
    further = ", ".join(f"{name}={value}" for name, value in sorted(run.other.items()) if not name.startswith("v0_"))
    return Family(run.v0 != NO_V0, run.warmup != NO_WARMUP, run.optimizer, further)


def select_runs(runs: Sequence[PlannedRun], losses: Mapping[str, float]) -> Selection:
    """Choose the runs to train.

    Args:
        runs: of the plan, seed by seed. A seed that the plan does not have for an arm and rate is not asked for.
        losses: by name of those that are over; lower is better, infinite for one without a result.
    """
    selection, out, found = Selection(), set(), {}
    seeds = list(dict.fromkeys(run.seed for run in runs))
    for seed in seeds:
        mine = [run for run in runs if run.seed == seed]
        selection.dropped += [run for run in mine if _get_cell(run) in out]
        wanted = [run for run in mine if _get_cell(run) not in out]
        selection.over += [run for run in wanted if run.name in losses]
        selection.now = [run for run in wanted if run.name not in losses]
        if selection.now:
            break
        for run in wanted:
            found.setdefault(get_family(run), {}).setdefault(_get_cell(run), []).append(losses[run.name])
        for cells in found.values():
            alive = [cell for cell in cells if cell not in out]
            # Nothing is said by a seed that only some of them had.
            most = max((len(cells[cell]) for cell in alive), default=0)
            ranked = sorted((c for c in alive if len(cells[c]) == most), key=lambda cell: statistics.fmean(cells[cell]))
            keep = ranked[: math.ceil(len(alive) / 2)]
            out |= {cell for cell in alive if cell not in keep}
    return selection


def _get_cell(run: PlannedRun) -> tuple[str, float]:
    return run.arm, run.learning_rate
