"""The flags. `V0InitArguments` alone for people with their own argument classes, or joined to transformers' own.

What the user wrote stays as it was written; `V0InitArguments.resolve` gives the frozen `V0Plan` that a run follows.
"""

import argparse
import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InputError
from .method.decay import DECAYS, DEFAULT_ESTIMATION_STEPS
from .method.length import LONGEST_FRACTION, UNTUNED_WARMUPS, compute_bounds
from .method.multiplier import STEP_COUNTS, compute_scale_for_warmup, require_decay_steps, require_scale
from .method.strategies import DEFAULT_SCALE, PAPER_SCALE, STRATEGIES

logger = logging.getLogger("hf_v0init")

ESTIMATORS = ("minibatch", "per_sample")
AUTO = "auto"  # of v0_decay_steps
TRUST_RADIUS = "trust_radius"  # of untuned_warmup
# What each preset selects, by strategy; other flags must not contradict it.
_PER_SAMPLE = {"v0_estimator": "per_sample", "v0_num_samples": 5000}
PRESETS = {
    # arXiv 2412.02153: eq. 10 over 5,000 samples before training, eq. 11, tensors of two or more dimensions.
    "paper": {
        "data_driven": _PER_SAMPLE | {"v0_scale": PAPER_SCALE["data_driven"], "v0_include_bias_and_norm": False},
        "random": {"v0_scale": PAPER_SCALE["random"], "v0_include_bias_and_norm": False},
    },
    # What the authors' released code does instead: eq. 11 times 2 (a squared Xavier-normal draw), one-dimensional tensors in eq. 10.
    "authors_code": {
        "data_driven": _PER_SAMPLE | {"v0_scale": PAPER_SCALE["data_driven"], "v0_include_bias_and_norm": True},
        "random": {"v0_scale": 2 * PAPER_SCALE["random"], "v0_include_bias_and_norm": False},
    },
}
DEFAULT_NUM_SAMPLES = 5000  # the paper's
MAX_ESTIMATION_STEPS = 32  # of the default with beta2
ESTIMATION_FRACTION = 0.01  # of training, by default with beta2


class StepCount(float):
    """A number of steps, a fraction of training, or "auto", as the type of a flag: turns text into a number where it is one."""

    def __new__(cls, value):
        """Return a float or what was given, never an instance of this class."""
        try:
            return value if value == AUTO else float(value)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{value!r}: give {STEP_COUNTS}") from None


@dataclass(frozen=True)
class V0Plan:
    """What a run does about v0, with nothing left open but what is measured in its first step.

    Attributes:
        init: one of `STRATEGIES`.
        decay: "linear" or "beta2"; None with zeros.
        decay_steps: optimizer steps over which v0 acts; AUTO until it has been measured; None where beta2 and the scale decide.
        scale: sigma of eqs. 10 and 11, dimensionless; None with `linear`, and where `decay_steps` gives it group by group.
        estimator: "minibatch" or "per_sample"; None for strategies without one.
        estimation_steps: K as the user gave it; None for the default.
        num_samples, stats_batch_size: of the per-sample estimation.
        include_bias_and_norm: whether tensors of fewer than two dimensions get a v0.
        seed: of random draws and of the choice of samples.
    """

    init: str = "zeros"
    decay: str | None = None
    decay_steps: int | float | str | None = None
    scale: float | None = None
    estimator: str | None = None
    estimation_steps: int | None = None
    num_samples: int | None = None
    stats_batch_size: int | None = None
    include_bias_and_norm: bool = False
    seed: int = 0

    @property
    def keeps_plateau(self) -> bool:
        """Whether the learning-rate schedule is to stay at its peak for `decay_steps`, as after a warmup of that length."""
        return self.decay_steps is not None

    def choose_estimation_steps(self, max_steps: int | None) -> int:
        """Choose K, the optimizer steps over which E[g^2] is estimated; 1 for strategies that take one gradient or none.

        Raises:
            InputError: as many as the run or a linear decay has steps, or more.
        """
        if self.init != "data_driven":
            return 1
        asked, length = self.estimation_steps, self.decay_steps if self.decay == "linear" else None
        length = length if isinstance(length, int) else None
        if asked is None and self.decay == "linear":
            return DEFAULT_ESTIMATION_STEPS if length is None else max(1, min(DEFAULT_ESTIMATION_STEPS, length - 1))
        if asked is None:
            return min(MAX_ESTIMATION_STEPS, max(1, math.floor(ESTIMATION_FRACTION * (max_steps or 0))))
        for limit, name in ((max_steps, "max_steps"), (length, "v0_decay_steps")):
            if limit and asked > 1 and asked >= limit:
                raise InputError(
                    f"v0_estimation_steps={asked} with {name}={limit}: give fewer, or leave it out for the default"
                )
        return asked

    def get_scale(self, beta2: float) -> float:
        """Return the scale of v0 that decays by beta2: as given, or the one that `decay_steps` asks for at `beta2`.

        Raises:
            InputError: `decay_steps` is not a number of optimizer steps yet, or needs too large a scale.
        """
        if self.decay_steps is None:
            return self.scale
        if self.decay_steps == AUTO or self.decay_steps < 1:
            raise InputError(
                f"v0_decay_steps={self.decay_steps} is not a number of optimizer steps yet: give max_steps, or a number"
            )
        return compute_scale_for_warmup(self.decay_steps, beta2)


def _flag(text: str, default: Any = None, choices: Sequence[str] = ()) -> Any:
    """Make a dataclass field that `HfArgumentParser` shows with this help."""
    return field(default=default, metadata={"help": text} | ({"choices": list(choices)} if choices else {}))


@dataclass
class V0InitArguments:
    """How Adam's second moment starts. Equations: Abuduweili & Liu, arXiv 2412.02153; the linear decay is `method.decay`.

    Raises:
        InputError: (a ValueError) naming the value, what is allowed and the remedy.
    """

    v0_init: str = _flag(
        "Start of Adam's second moment, in place of a learning-rate warmup: 'zeros' (stock Adam), 'data_driven' (from the "
        "mean of g^2, see --v0_estimator; eq. 10), 'random' (chi^2_1 draws, eq. 11) or 'first_gradient' (from g^2 of the first "
        "step). Default: zeros.",
        default="zeros",
        choices=STRATEGIES,
    )
    v0_decay: str | None = _flag(
        "How v0 leaves the second moment. 'linear': so that the step grows linearly over --v0_decay_steps, while the "
        "schedule stays at its peak; the size of v0 follows. 'beta2': forgotten by Adam's beta2 alone, as in the paper, with "
        "a size set by --v0_scale or --v0_decay_steps. Default: linear; beta2 where --v0_scale, --v0_preset or "
        "--v0_estimator per_sample is given.",
        choices=DECAYS,
    )
    v0_decay_steps: StepCount | None = _flag(  # noqa: RUF009 (no call that makes a shared default)
        "For how many optimizer steps v0 acts; below 1, as with --warmup_steps, a fraction of training. 'auto': measured "
        "in the first step, between a third and two thirds of training (--probe_only prints it). With --v0_decay beta2: v0 is "
        "sized so that its factor on the step reaches 0.9 then. The schedule stays at its peak for so long. Default: two thirds "
        "of training with linear, none with beta2.",
    )
    v0_scale: float | None = _flag(
        "With --v0_decay beta2: sigma in eqs. 10 and 11, dimensionless, > 0. Default: 100 for random, 1 for data_driven "
        "and first_gradient. Excludes --v0_decay_steps.",
    )
    v0_preset: str | None = _flag(
        "'paper': the settings of arXiv 2412.02153: --v0_decay beta2, --v0_estimator per_sample over 5,000 samples, scale "
        "1 for data_driven and 100 for random, the schedule as given. 'authors_code': what their released code does instead "
        "(random twice as large, one-dimensional tensors too). Other flags must not contradict it. Default: none.",
        choices=tuple(PRESETS),
    )
    v0_estimator: str | None = _flag(
        "Which gradients data_driven squares: 'minibatch', those of the run's own first steps as Adam sees them "
        "(accumulated, reduced, unscaled, clipped; --v0_estimation_steps), or 'per_sample', those of single training samples by a pass "
        "before training (eq. 10; --v0_num_samples), for losses that are a mean over independent samples. Default: minibatch.",
        choices=ESTIMATORS,
    )
    v0_estimation_steps: int | None = _flag(
        "Optimizer steps K over which data_driven estimates the mean of g^2 (--v0_estimator minibatch). With --v0_decay "
        "beta2 the first K - 1 make no update; with linear none is lost. Default: 6 with linear; a hundredth of training, "
        "between 1 and 32, with beta2.",
    )
    v0_num_samples: int | None = _flag(
        "Number of random training samples of --v0_estimator per_sample, counted over all processes. More than the data "
        "set has: all are used. Default: 5000 samples.",
    )
    v0_stats_batch_size: int | None = _flag(
        "Samples per forward and backward of --v0_estimator per_sample. E[g^2] is mean^2 + b*Var over batches of size b, "
        "exact at 1. Default: 1; the training batch with batch norms.",
    )
    v0_seed: int | None = _flag(
        "Seed of the random v0 (eq. 11) and of the choice of samples (eq. 10). Default: the value of --seed.",
    )
    v0_include_bias_and_norm: bool | None = _flag(
        "Give biases and norm weights a v0 too. By the paper's text only tensors of two or more dimensions get one, by its "
        "Algorithm 2 all do. Default: True with linear, False with beta2.",
    )
    v0_optimizer: str | None = _flag(
        "The optimizer as package:Class, such as pytorch_optimizer:AdaBelief, in place of --optim. It gets the Trainer's "
        "learning rate, betas and weight decay and, before these, --optim_args 'k=v,...'. `hf-v0init optimizers` lists which "
        "accept a v0. Default: none, --optim decides.",
    )
    untuned_warmup: str | None = _flag(
        "A learning-rate warmup without a length to tune, a baseline for v0. By beta2 (Ma & Yarats, 2021): 'linear', "
        "min(1, (1 - beta2) / 2 * t), or 'exponential', 1 - exp(-(1 - beta2) * t), times the schedule. 'trust_radius': "
        "--warmup_steps of the length that is measured in the first step, as --v0_decay_steps auto. Excludes --warmup_steps. "
        "Default: none.",
        choices=(*UNTUNED_WARMUPS, TRUST_RADIUS),
    )
    v0_record_run: bool = _flag(
        "Write run_log.jsonl and fingerprint.json (initial weights, first batches, random state) into the output folder, "
        "as `hf-v0init compare` needs them. The run is the same. Default: False.",
        default=False,
    )

    def __post_init__(self) -> None:
        """Check every value, then let the next class of the inheritance order check its own."""
        self.require_valid()
        if self.v0_preset is not None and self.v0_init == "zeros":
            logger.warning(
                f"v0_preset={self.v0_preset} has no effect with v0_init=zeros: add v0_init=data_driven or v0_init=random"
            )
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def require_valid(self) -> None:
        """Check every value and their combination; called again where settings were changed after construction.

        Raises:
            InputError: naming the value, what is allowed and the remedy.
        """
        for flag in fields(V0InitArguments):
            value, allowed = getattr(self, flag.name), flag.metadata.get("choices")
            if allowed and value not in (flag.default, *allowed):
                raise InputError(f"{flag.name}={value!r}: choose one of {', '.join(allowed)}")
        for name in ("v0_num_samples", "v0_stats_batch_size", "v0_estimation_steps"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be a whole number >= 1")
        if self.v0_scale is not None:
            require_scale(self.v0_scale)
        if self.v0_decay_steps not in (None, AUTO):
            require_decay_steps(self.v0_decay_steps)
        for conflict in self._find_conflicts():
            raise InputError(conflict)

    def _find_conflicts(self) -> Iterator[str]:
        """Find flags that contradict each other, or of which one makes another meaningless."""
        has_v0, is_linear = self.v0_init != "zeros", self.v0_decay == "linear"
        if self.v0_preset is not None and has_v0:
            wanted = PRESETS[self.v0_preset].get(self.v0_init)
            if wanted is None:
                yield (
                    f"v0_preset={self.v0_preset} with v0_init={self.v0_init}, which the paper does not have: choose "
                    f"{' or '.join(PAPER_SCALE)}, or drop v0_preset"
                )
            for name, value in ((wanted or {}) | {"v0_decay": "beta2", "v0_decay_steps": None}).items():
                if getattr(self, name) not in (None, value):
                    yield f"v0_preset={self.v0_preset} has {name}={value}, and {getattr(self, name)} was given: drop one of the two"
        by_gradients = self.v0_init == "data_driven"
        by_sample = by_gradients and self._get("v0_estimator") == "per_sample"
        follows = "with v0_decay=linear, whose size follows from the gradients of the first steps: drop it, or use v0_decay=beta2"
        of_samples = "counts for the per-sample estimation only: add --v0_estimator per_sample, or drop it"
        with_init = f"with v0_init={self.v0_init}:"
        # fmt: off
        table = (  # a flag, whether it is in the way, and why
            ("v0_decay_steps", not has_v0, f"{with_init} there is no v0; use --warmup_steps, or v0_init=data_driven"),
            ("v0_estimation_steps", not has_v0, f"{with_init} there is no v0; use v0_init=data_driven"),
            ("v0_scale", self.v0_decay_steps is not None, f"and v0_decay_steps={self.v0_decay_steps} both set the size of v0: give one"),
            ("v0_scale", has_v0 and is_linear, follows),
            ("v0_estimator", by_sample and is_linear, follows),
            ("v0_estimation_steps", not by_gradients or by_sample, f"{with_init} only v0_estimator=minibatch takes the mean over steps; drop it"),
            ("untuned_warmup", self.resolve().keeps_plateau, f"and v0_init={self.v0_init} are two warmups: drop one, or use v0_decay=beta2"),
            ("v0_num_samples", by_gradients and not by_sample, of_samples),
            ("v0_stats_batch_size", by_gradients and not by_sample, of_samples),
        )
        # fmt: on
        for name, is_in_the_way, why in table:
            if is_in_the_way and getattr(self, name) is not None:
                yield f"{name}={getattr(self, name)} {why}"

    def _get(self, name: str) -> Any:
        """Return a flag as the user gave it, or as the preset has it."""
        given = getattr(self, name)
        if given is None and self.v0_preset is not None:
            return PRESETS[self.v0_preset].get(self.v0_init, {}).get(name)
        return given

    @property
    def wants_length(self) -> bool:
        """Whether a length is to be measured in the first step: of v0, or of the warmup."""
        return self.untuned_warmup == TRUST_RADIUS or self.resolve().decay_steps == AUTO

    def resolve(self, max_steps: int | None = None, seed: int = 0) -> V0Plan:
        """Return the plan of a run of `max_steps` optimizer steps (None or less: not known, and fractions stay fractions) and of this seed."""
        if self.v0_init == "zeros":
            return V0Plan()
        per_sample = self.v0_init == "data_driven" and self._get("v0_estimator") == "per_sample"
        is_sized = self.v0_scale is not None or self.v0_preset is not None or per_sample
        decay = self.v0_decay or ("beta2" if is_sized else "linear")
        steps, is_known = self.v0_decay_steps, max_steps is not None and max_steps > 0
        if steps is None and decay == "linear":
            steps = compute_bounds(max_steps)[1] if is_known else LONGEST_FRACTION
        elif steps not in (None, AUTO):
            steps = require_decay_steps(steps)
            if steps < 1 and is_known:
                steps = math.ceil(steps * max_steps)
        scale = None
        if decay == "beta2" and steps is None:
            given = self._get("v0_scale")
            scale = DEFAULT_SCALE[self.v0_init] if given is None else float(given)
        include = self._get("v0_include_bias_and_norm")
        estimator = ("per_sample" if per_sample else "minibatch") if self.v0_init == "data_driven" else None
        return V0Plan(
            init=self.v0_init,
            decay=decay,
            decay_steps=steps,
            scale=scale,
            estimator=estimator,
            estimation_steps=self.v0_estimation_steps,
            num_samples=(self._get("v0_num_samples") or DEFAULT_NUM_SAMPLES) if per_sample else None,
            stats_batch_size=self.v0_stats_batch_size if per_sample else None,
            include_bias_and_norm=decay == "linear" if include is None else include,
            seed=seed if self.v0_seed is None else self.v0_seed,
        )


def read_v0_arguments(arguments: Any) -> V0InitArguments:
    """Take the v0 flags out of any object that has them as attributes; missing ones get their default.

    Raises:
        InputError: a value that was changed after construction (a hyperparameter search, `setattr`) and cannot be used.
    """
    if isinstance(arguments, V0InitArguments):
        arguments.require_valid()
        return arguments
    names = [f.name for f in fields(V0InitArguments)]
    return V0InitArguments(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
