"""A comparison as it is planned: what its file says, and its runs (see `comparison_file`). Starts nothing.

The file's grids are the first stage, `tune`. When its runs are over, the best setting of each family is trained on fresh seeds: the
second stage, `confirm` (see `stages`). A grid that leaves nothing to choose is its own confirmation.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from .files import mask_secrets

NONE, WARMUP, V0, V0_AND_WARMUP = "no warmup", "warmup", "v0", "v0 + warmup"  # the families of the main optimizer


@dataclass(frozen=True)
class PlannedRun:
    """One run: its folder name, its place in the grid, and all flags but the output folder.

    A setting is everything but learning rate and seed. `family` is what settings are chosen within, and `condition` the flags that
    are axes of their own (such as `adam_beta2=0.99`): families are compared under one condition.
    """

    name: str
    stage: str
    condition: str
    family: str
    setting: str
    v0: str
    warmup: str
    optimizer: str
    other: dict[str, Any]
    learning_rate: float
    seed: int
    arguments: dict[str, Any]

    @property
    def digest(self) -> str:
        """The end of the name: a hash of script, launcher and arguments."""
        return self.name.rsplit("_", 1)[-1]


@dataclass(frozen=True)
class Plan:
    """A comparison: what the file says, and the runs, seed by seed."""

    title: str
    script: str
    runs: tuple[PlannedRun, ...]
    confirm_seeds: tuple[int, ...] = ()
    extend: bool = False
    margin: float = 0.01  # how much worse counts as no worse
    margin_is_relative: bool = True  # a fraction of the warmup's mean, not in the metric's unit
    small: bool = False
    launch: str = "python"
    metric: str = "eval_loss"
    greater_is_better: bool = False
    test_metrics: tuple[str, ...] = ()
    arguments: dict[str, Any] = field(default_factory=dict)
    keep_models: bool = True
    slurm: dict[str, Any] = field(default_factory=dict)  # submitit's parameters
    command: str = ""

    def list_runs(self, *stages: str) -> list[PlannedRun]:
        """Return the runs of these stages, in order."""
        return [run for run in self.runs if run.stage in stages]

    def to_dict(self) -> dict[str, Any]:
        """Return the plan as plain JSON types, as in `plan.json`: secrets masked, of each run what the others have not."""
        content = asdict(self) | {
            **mask_secrets({"arguments": self.arguments, "slurm": self.slurm}),
            "runs": [self.describe_run(r) for r in self.runs],
        }
        return json.loads(json.dumps(content))

    def describe_run(self, run: PlannedRun) -> dict[str, Any]:
        """Return a run as plain JSON types; its `arguments` are those that differ from the plan's, null for one it lacks."""
        own = {key: value for key, value in run.arguments.items() if self.arguments.get(key) != value}
        own |= {key: None for key in self.arguments if key not in run.arguments}
        return json.loads(json.dumps(asdict(run) | {"arguments": mask_secrets(own)}))

    def add_run(self, like: PlannedRun, **changes: Any) -> Plan:
        """Return the plan with one more run: `like` another, but for these of its fields and, in `arguments`, flags."""
        arguments = {**like.arguments, **changes.pop("arguments", {})}
        run = replace(like, **changes, arguments=arguments)
        arguments |= {"learning_rate": run.learning_rate, "seed": run.seed}
        name = make_run_name(run.setting, run.learning_rate, run.seed, self.script, self.launch, arguments)
        if any(known.digest == name.rsplit("_", 1)[-1] for known in self.runs):
            return self
        return replace(self, runs=(*self.runs, replace(run, name=name, arguments=arguments)))


def make_run_name(setting: str, rate: float, seed: int, script: str, launch: str, arguments: Mapping[str, Any]) -> str:
    """Name a run's folder: its place in the grid, and a hash of script, launcher and flags, secrets left out."""
    content = json.dumps({"script": script, "launch": launch, "arguments": mask_secrets(dict(arguments))})
    normal = json.dumps(json.loads(content, parse_float=_read_float), sort_keys=True)
    slug = re.sub(r"[^\w.+=-]+", "-", setting.replace(" + ", "+"))[:60].strip("-")
    return f"{slug}_lr{rate:g}_seed{seed}_{hashlib.sha256(normal.encode()).hexdigest()[:8]}"


def _read_float(text: str) -> float:
    """10.0 is 10, so that runs with the same flags have one name."""
    number = float(text)
    return int(number) if number.is_integer() else number
