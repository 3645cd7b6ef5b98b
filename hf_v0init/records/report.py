"""What a run did about v0: the report kept in memory, in `v0_init.json` beside every checkpoint, and in words."""

import contextlib
import functools
import io
import json
import logging
import math
import os
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from ..errors import InputError
from ..method.decay import compute_linear_factor
from ..method.multiplier import compute_multiplier_table, compute_washout_warning
from ..second_moment.state import SecondMoment
from ..settings import AUTO, V0Plan
from ..sharding.parts import ParamShard
from ..sharding.processes import compute_figures, get_rank_and_world_size
from .run_files import write_whole

REPORT_FILE = "v0_init.json"
DECAY_FILE = "v0_decay.pt"  # in checkpoints that are saved while the hook has work to do
_IN_BOTH = ("decay", "decay_steps", "scale", "estimator", "include_bias_and_norm", "seed")  # a record and a plan

logger = logging.getLogger("hf_v0init")


@dataclass
class V0Report:
    """What was written, and from what.

    v0's statistics are in units of gradient squared and taken over all elements that got a v0; `seconds` is wall-clock time of
    measuring and writing, after a resume that of this call alone; `num_samples`, `num_batches` and `num_skipped` (samples without
    a loss) are of the pass before training, over all processes. `measured_ratio` is v0 over the g^2 of an optimizer step, the median
    over elements; `multiplier` is m(t) of that ratio, by step.
    """

    strategy: str
    scale: float | None
    seed: int
    decay: str = "beta2"
    decay_steps: int | None = None
    estimator: str | None = None
    estimation_steps: int | None = None
    num_samples_requested: int | str | None = None
    num_samples: int = 0
    num_batches: int = 0
    num_skipped: int = 0
    stats_batch_size: int | None = None
    effective_batch_size: float | None = None
    include_bias_and_norm: bool = False
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
    parameters: dict[str, dict] = field(default_factory=dict)
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def begin(
        cls,
        plan: V0Plan,
        moments: SecondMoment,
        chosen: list[ParamShard],
        without: list[ParamShard],
        *,
        scale: float | None,
    ) -> "V0Report":
        """Begin a report: what was asked for, and of what; `chosen` get a v0, `without` do not."""
        return cls(
            **_describe_plan(plan) | {"scale": scale},
            num_samples_requested=plan.num_samples,
            optimizer=moments.name,
            beta2=moments.read_beta2(chosen[0].group),
            num_processes=get_rank_and_world_size()[1],
            num_parameters_without_v0=len(without),
            num_elements_without_v0=sum(shard.numel for shard in without),
            versions=dict(collect_versions()),
        )

    def to_dict(self) -> dict:
        """Return the report as plain JSON types."""
        return asdict(self)

    @property
    def ratio(self) -> float | None:
        """The size of v0 beside the g^2 of an optimizer step, as measured; the scale where it was not. None with linear."""
        return self.scale if self.measured_ratio is None else self.measured_ratio

    @property
    def is_all_zero(self) -> bool:
        """Whether no element has a v0 above zero, so that the run is one without a v0."""
        return self.v0_max == 0.0

    def add_parameters(
        self,
        shards: list[ParamShard],
        moments: list[torch.Tensor],
        scales: list[float],
        over_processes: bool,
    ) -> None:
        """Add the statistics of v0.

        Args:
            shards: that have got one.
            moments: what it is a multiple of, for each: what `ParamShard.cut` returns.
            scales: from these to v0, one for each.
            over_processes: whether any is sharded; then all processes must call this.

        Raises:
            InputError: a v0 that is not finite.
        """
        total = (self.v0_mean or 0.0) * self.num_elements_with_v0
        figures = compute_figures(shards, moments, over_processes)
        for shard, (*found, zeros), scale in zip(shards, figures, scales, strict=True):
            if not all(map(math.isfinite, found)):
                raise InputError(describe_not_finite(shard.name))
            numbers = dict(zip(("mean", "min", "max"), (value * scale for value in found), strict=True))
            self.parameters[shard.name] = numbers | {"zeros": zeros, "shape": list(shard.full_shape)}
            self.num_zero_elements += zeros
            self.num_parameters_with_v0 += 1
            total += numbers["mean"] * shard.numel
            self.num_elements_with_v0 += shard.numel
        self.v0_mean = total / max(1, self.num_elements_with_v0)
        self.v0_min = min((entry["min"] for entry in self.parameters.values()), default=0.0)
        self.v0_max = max((entry["max"] for entry in self.parameters.values()), default=0.0)

    def add_expectation(self, max_steps: int) -> None:
        """Fill in the multiplier m(t) over a run of `max_steps` optimizer steps, where the closed form holds."""
        self.max_steps = max_steps
        if self.is_all_zero:
            return
        if self.decay == "linear":
            first = self.estimation_steps or 1
            steps = {1, first, self.decay_steps // 2, self.decay_steps, max_steps}
            table = {
                step: compute_linear_factor(step, self.decay_steps) for step in sorted(steps) if 1 <= step <= max_steps
            }
        elif self.beta2 is not None:
            table = compute_multiplier_table(self.ratio, self.beta2, max_steps)
        else:
            return
        self.multiplier = {str(step): value for step, value in table.items()}

    def log(self) -> None:
        """Log what was written and from what, what it will do on this run, and a warning if the run needs one."""
        if self.strategy == "random":
            source = "drawn, sized tensor by tensor by g^2 of the first step" if self.decay == "linear" else "drawn"
        elif self.estimator == "per_sample":
            skipped = f", {self.num_skipped:,} without a loss skipped" if self.num_skipped else ""
            source = f"from {self.num_samples:,} samples in {self.num_batches:,} batches, {self.seconds:.1f} s{skipped}"
        else:
            steps = self.estimation_steps or 1
            steps = f"gradients of the first {steps} steps" if steps > 1 else "gradient of the first step"
            source = f"from the {steps}"
        later = ""
        if self.without_gradient:
            what = "start at 0" if self.estimator == "per_sample" else "get theirs at their first gradient"
            later = f"; {len(self.without_gradient)} without a gradient so far {what}: {', '.join(self.without_gradient[:3])}"
        decay = f"linear decay over {self.decay_steps:,} steps" if self.decay == "linear" else f"scale {self.scale:g}"
        logger.info(
            f"v0 ({self.strategy}, {decay}) {source}: mean {self.v0_mean:.3g}; {self.num_parameters_with_v0} tensors with v0, "
            f"{self.num_parameters_without_v0} without{later}"
        )
        if self.is_all_zero:
            remedy = "check that the loss depends on the optimizer's parameters"
            if self.estimator == "per_sample":
                remedy = "use --v0_estimator minibatch, which takes v0 from the run's own first steps"
            logger.warning(
                f"v0 is zero in all {self.num_parameters_with_v0} tensors, so this run starts as stock Adam does: {remedy}"
            )
        elif self.multiplier:
            factors = ", ".join(f"{value:.3g} at step {int(step):,}" for step, value in self.multiplier.items())
            if self.decay == "linear":
                logger.info(f"effective learning-rate factor, where g^2 keeps its size: {factors}")
                return
            logger.info(
                f"v0 is {self.ratio:.3g} times g^2 (median over elements), which multiplies the step by {factors}"
            )
            warning = compute_washout_warning(self.ratio, self.beta2, self.max_steps, asked_for=self.decay_steps)
            if warning is not None:
                logger.warning(warning)


def describe_not_finite(name: str) -> str:
    """Say that a gradient is not finite, and what to do."""
    return (
        f"the gradient of parameter {name!r} is not finite, so no v0 can be taken from it. Look at the data and the precision (bf16 "
        "rather than fp16); v0_init=zeros trains without a v0"
    )


def write_report(report: dict, folder: str | os.PathLike) -> Path:
    """Write `v0_init.json` into `folder`, whole or not at all."""
    path = Path(folder) / REPORT_FILE
    write_whole(path, json.dumps(report, indent=1) + "\n")
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


def _describe_plan(plan: V0Plan) -> dict:
    return {"strategy": plan.init} | {name: getattr(plan, name) for name in _IN_BOTH}


def describe_under_way(plan: V0Plan, estimation_steps: int, global_step: int) -> dict:
    """Say in a record what is under way before v0 stands, in a run that began at a step."""
    under_way = {"estimation_steps": estimation_steps, "is_written": False, "global_step": global_step}
    return _describe_plan(plan) | under_way


def find_differences(stored: dict, plan: V0Plan) -> list[str]:
    """Name the settings that a plan gives and that differ from a stored record, as 'name: stored -> now'."""
    now = _describe_plan(plan) | {
        "estimation_steps": plan.estimation_steps,
        "num_samples_requested": plan.num_samples,
        "stats_batch_size": plan.stats_batch_size,
    }
    given = {name: value for name, value in now.items() if value not in (None, AUTO)}
    return [f"{name}: {stored.get(name)} -> {value}" for name, value in given.items() if stored.get(name) != value]


def write_hook_state(plan: V0Plan, state: dict, folder: str | os.PathLike) -> None:
    """Write what a hook does and keeps (`V0Hook.state_dict`) as `v0_decay.pt` into `folder`, whole or not at all."""
    content = io.BytesIO()
    torch.save({"plan": asdict(plan), "state": state}, content)
    write_whole(Path(folder) / DECAY_FILE, content.getvalue())


def read_hook_state(folder: str | os.PathLike) -> tuple[V0Plan, dict] | None:
    """Read what `write_hook_state` wrote; None if there is none.

    Raises:
        InputError: the file is there but is not whole.
    """
    path = Path(folder) / DECAY_FILE
    if not path.is_file():
        return None
    try:
        stored = torch.load(path, map_location="cpu", weights_only=True)
        return V0Plan(**stored["plan"]), stored["state"]
    except Exception as error:  # of damaged bytes torch raises many kinds
        raise InputError(f"{path} is damaged: resume from another checkpoint") from error


@functools.cache  # reading the packages' metadata takes milliseconds
def collect_versions() -> dict[str, str]:
    """Return the versions of the packages that decide the numbers."""
    versions = {}
    for package in ("hf_v0init", "torch", "transformers", "accelerate", "datasets"):
        with contextlib.suppress(PackageNotFoundError):
            versions[package] = version(package)
    return versions
