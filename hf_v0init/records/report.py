"""What a run did about v0: the report kept in memory, in `v0_init.json` beside every checkpoint, and in words."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path

from ..closed_form.multiplier import compute_multiplier_table, compute_washout_warning, describe_multiplier
from ..errors import InputError

REPORT_FILE = "v0_init.json"

MUCH_WITHOUT_DECAY = 10.0  # v0 over g^2 beyond which a second moment that does not decay is worth a warning

# The settings that must be the same for a resumed run to be the run that was begun.
SETTINGS = (
    "strategy", "scale", "statistic", "num_samples_requested", "stats_batch_size", "seed", "one_dimensional", "fan_factor", "floor",
)  # fmt: skip


@dataclass
class V0Report:
    """What was written, and from what.

    v0 figures are in units of gradient squared and taken over all elements that got a v0; `seconds` is wall-clock time of
    the pass and the write; `num_samples` and `num_batches` are over all processes.
    """

    strategy: str
    scale: float
    seed: int
    statistic: str | None = None
    num_samples_requested: int | str | None = None
    num_samples: int = 0
    num_batches: int = 0
    stats_batch_size: int | None = None
    effective_batch_size: float | None = None
    one_dimensional: bool = False
    fan_factor: float = 1.0
    floor: float = 0.0
    warmup_steps: int | None = None
    optimizer: str | None = None
    beta2: float | None = None
    max_steps: int | None = None
    global_step: int = 0
    num_processes: int = 1
    seconds: float = 0.0
    mean_loss: float | None = None
    num_parameters_with_v0: int = 0
    num_parameters_without_v0: int = 0
    num_elements_with_v0: int = 0
    num_elements_without_v0: int = 0
    num_zero_elements: int = 0
    without_gradient: list[str] = field(default_factory=list)
    v0_mean: float | None = None
    v0_min: float | None = None
    v0_max: float | None = None
    measured_ratio: float | None = None
    multiplier: dict[str, float] = field(default_factory=dict)
    multiplier_measured: dict[str, float] = field(default_factory=dict)
    parameters: dict[str, dict] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict:
        """Return the report as plain JSON types."""
        return asdict(self)

    def add_expectation(self, max_steps: int) -> None:
        """Fill in the multiplier m(t) that the closed form expects over a run of `max_steps` optimizer steps."""
        self.max_steps = max_steps
        if self.beta2 is None:
            return
        if self.strategy != "random":
            table = compute_multiplier_table(self.scale, self.beta2, max_steps)
            self.multiplier = {str(step): value for step, value in table.items()}
        if self.measured_ratio is not None:
            table = compute_multiplier_table(self.measured_ratio, self.beta2, max_steps)
            self.multiplier_measured = {str(step): value for step, value in table.items()}

    def describe(self) -> list[str]:
        """Return the summary: what was done, and what it will do on this run."""
        seen = f" from {self.num_samples:,} samples in {self.num_batches:,} batches" if self.num_samples else ""
        lines = [
            f"v0 ({self.strategy}, scale {self.scale:g}) written in {self.seconds:.1f} s{seen}: "
            f"mean {self.v0_mean:.3g}, min {self.v0_min:.3g}, max {self.v0_max:.3g}; {self.num_parameters_with_v0} parameter "
            f"tensors with v0, {self.num_parameters_without_v0} without"
        ]
        if self.num_zero_elements:
            share = self.num_zero_elements / max(1, self.num_elements_with_v0)
            lines.append(
                f"{self.num_zero_elements:,} elements ({share:.2%}) had no gradient on any sample: v0 = 0, as in stock Adam"
            )
        if self.without_gradient:
            shown = ", ".join(self.without_gradient[:3]) + (", ..." if len(self.without_gradient) > 3 else "")
            lines.append(
                f"{len(self.without_gradient)} tensors got no gradient in the pass and start at v0 = 0: {shown}"
            )
        if self.beta2 is not None and self.max_steps:
            if self.strategy != "random":
                lines.append(
                    f"expected multiplier of the step, closed form (beta2 {self.beta2:g}, scale {self.scale:g}): "
                    + describe_multiplier(self.scale, self.beta2, self.max_steps)
                )
            if self.measured_ratio is not None:
                against = "one batch's g^2" if self.strategy == "random" else "E[g^2] of one step"
                lines.append(
                    f"measured: v0 is {self.measured_ratio:.3g} times {against} (median over elements), which gives "
                    + describe_multiplier(self.measured_ratio, self.beta2, self.max_steps)
                )
        return lines

    def find_warning(self) -> str | None:
        """Return the warning that v0 will not wash out within this run, with its remedy, or None."""
        if not self.max_steps:
            return None
        ratio = self.scale if self.measured_ratio is None else self.measured_ratio
        if self.beta2 is None:
            if ratio <= MUCH_WITHOUT_DECAY:
                return None
            return (
                f"v0 is {ratio:.3g} times the gradients' square (median over elements), and this optimizer's second moment does not "
                "decay as Adam's does: v0 may hold the steps back for the whole run. Remedy: a smaller v0_scale, or "
                "v0_init=data_driven, whose v0 has the gradients' own size"
            )
        return compute_washout_warning(ratio, self.beta2, self.max_steps)

    def find_differences(self, other: dict) -> list[str]:
        """Name the settings in which this report and the stored one `other` differ, as 'name: stored -> now'."""
        mine = self.to_dict()
        return [f"{name}: {other.get(name)} -> {mine[name]}" for name in SETTINGS if other.get(name) != mine[name]]


def write_report(report: dict, folder: str | os.PathLike) -> Path:
    """Write `v0_init.json` into `folder`, whole or not at all (written aside, then renamed)."""
    path = Path(folder) / REPORT_FILE
    aside = path.with_name(f"_{REPORT_FILE}.{os.getpid()}")  # a push leaves out names that begin with _
    aside.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    os.replace(aside, path)
    return path


def read_report(folder: str | os.PathLike) -> dict | None:
    """Read `v0_init.json` from `folder`; None if there is none.

    Raises:
        InputError: the file is there but is not a whole report.
    """
    path = Path(folder) / REPORT_FILE
    if not path.is_file():
        return None
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise InputError(
            f"{path} is damaged ({error}); delete it to resume without the record of v0, or resume from another checkpoint"
        ) from error
    if not isinstance(report, dict) or "strategy" not in report:
        raise InputError(f"{path} is no v0 report; delete it to resume without the record of v0")
    return report


def collect_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    from importlib.metadata import PackageNotFoundError, version

    versions = {}
    for package in ("hf_v0init", "torch", "transformers", "accelerate", "datasets"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
