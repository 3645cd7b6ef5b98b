"""Reads what finished training runs left in their folders, to set them side by side. Trains nothing."""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..errors import InputError
from .report import read_report

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"


@dataclass
class FinishedRun:
    """One run: losses in nats a token against the optimizer step, final metrics by name, and what was done about v0."""

    name: str
    num_steps: int = 0
    train_steps: list[int] = field(default_factory=list)
    train_losses: list[float] = field(default_factory=list)
    eval_steps: list[int] = field(default_factory=list)
    eval_losses: list[float] = field(default_factory=list)
    metrics: dict[str, float | str] = field(default_factory=dict)
    v0: dict[str, float | str | int] = field(default_factory=dict)

    @property
    def final_eval_loss(self) -> float | None:
        """The validation loss at the end in nats a token, None if there was no evaluation."""
        loss = self.metrics.get("eval_loss")
        return loss if loss is not None else (self.eval_losses[-1] if self.eval_losses else None)

    def to_dict(self) -> dict:
        """Return the run as plain JSON types."""
        return asdict(self)


def read_run(folder: str | Path) -> FinishedRun:
    """Read `trainer_state.json`, `all_results.json` and `v0_init.json` of a run's output folder.

    Raises:
        InputError: there is no whole `trainer_state.json`, which a script writes when training has ended.
    """
    folder = Path(folder)
    try:
        state = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: no finished run there ({STATE_FILE} cannot be read: {error})") from error
    run = FinishedRun(folder.name, state.get("global_step", 0))
    for entry in state["log_history"]:
        if "loss" in entry:
            run.train_steps.append(entry["step"])
            run.train_losses.append(float(entry["loss"]))
        elif "eval_loss" in entry and entry["step"] not in run.eval_steps:
            run.eval_steps.append(entry["step"])
            run.eval_losses.append(float(entry["eval_loss"]))
    if (folder / RESULTS_FILE).is_file():
        results = json.loads((folder / RESULTS_FILE).read_text(encoding="utf-8"))
        run.metrics = {key: value for key, value in results.items() if not key.endswith(("_runtime", "_per_second"))}
    report = read_report(folder) or {}
    kept = (
        "strategy",
        "scale",
        "statistic",
        "num_samples",
        "measured_ratio",
        "num_zero_elements",
        "num_elements_with_v0",
    )
    run.v0 = {key: report[key] for key in kept if report.get(key) is not None}
    return run
