"""The flags. `V0InitArguments` alone for people with their own argument classes, or joined to transformers' own."""

from dataclasses import dataclass, field, fields
from typing import Any

from .errors import InputError
from .method.defaults import DEFAULT_SCALE, MAX_NUM_SAMPLES, PAPER_SCALE, STRATEGIES
from .method.multiplier import compute_scale_for_warmup, require_scale, require_warmup_steps, resolve_warmup_steps
from .method.untuned_warmup import UNTUNED_WARMUPS

STATISTICS = ("per_sample", "minibatch")
AUTO = "auto"  # of v0_init, v0_num_samples and v0_decay_steps
MEASURED = "measured"  # of untuned_warmup
# What each preset selects, by strategy; other flags must not contradict it.
_PASS = {"v0_estimator": "per_sample", "v0_num_samples": 5000, "v0_decay_steps": None}
PRESETS = {
    # arXiv 2412.02153: eq. 10 over 5,000 samples before training, eq. 11, tensors of two or more dimensions.
    "paper": {
        "data_driven": _PASS | {"v0_scale": PAPER_SCALE["data_driven"], "v0_include_bias_and_norm": False},
        "random": {"v0_scale": PAPER_SCALE["random"], "v0_decay_steps": None, "v0_include_bias_and_norm": False},
    },
    # What the authors' released code does instead: eq. 11 times 2 (a squared Xavier-normal draw), one-dimensional tensors in eq. 10.
    "authors_code": {
        "data_driven": _PASS | {"v0_scale": PAPER_SCALE["data_driven"], "v0_include_bias_and_norm": True},
        "random": {"v0_scale": 2 * PAPER_SCALE["random"], "v0_decay_steps": None, "v0_include_bias_and_norm": False},
    },
}


class SampleCount(int):
    """A number of samples or "auto", as the type of a flag: turns text into an int where it is one, else leaves it."""

    def __new__(cls, value):
        """Return an int or what was given, never an instance of this class."""
        return int(value) if isinstance(value, str) and value.isdecimal() else value


class StepCount(float):
    """A number of steps, a share of the run, or "auto", as the type of a flag: turns text into a number where it is one."""

    def __new__(cls, value):
        """Return a float or what was given, never an instance of this class."""
        return value if value == AUTO else float(value)


@dataclass
class V0InitArguments:
    """How Adam's second moment starts. Equations: Abuduweili & Liu, arXiv 2412.02153.

    Raises:
        InputError: (a ValueError) naming the value, what is allowed and the remedy.
    """

    v0_init: str = field(
        default="zeros",
        metadata={
            "help": "Start of Adam's second moment: 'zeros' (stock Adam), 'data_driven' (v0 = scale * E[g^2], see --v0_estimator; "
            "eq. 10), 'random' (v0 ~ scale / (fan_in + fan_out) * chi^2_1, eq. 11) or 'first_gradient' (v0 = scale * g1^2 of the run's "
            "first step, GI-Adam). 'auto': nothing to tune, the setting that did best over our tasks, which is no v0 but "
            "--untuned_warmup measured. Default: zeros.",
            "choices": [*STRATEGIES, AUTO],
        },
    )
    v0_scale: float | None = field(
        default=None,
        metadata={
            "help": "sigma in eqs. 10 and 11, dimensionless, > 0. Default: 100 for random, 1 for data_driven and "
            "first_gradient. Excludes --v0_decay_steps."
        },
    )
    v0_preset: str | None = field(
        default=None,
        metadata={
            "help": "'paper': the settings of arXiv 2412.02153, whatever the defaults of this version are: a pass over 5,000 samples "
            "before training (--v0_estimator per_sample), scale 1 for data_driven and 100 for random. 'authors_code': what their "
            "released code does instead (random twice as large, one-dimensional tensors too). Other flags must not contradict it. "
            "Default: none.",
            "choices": list(PRESETS),
        },
    )
    v0_estimation_steps: int | None = field(
        default=None,
        metadata={
            "help": "Optimizer steps K over which data_driven takes the mean of g^2 (--v0_estimator minibatch). The first K - 1 make no "
            "update; the schedule runs on. Default: a hundredth of the run, between 1 and 32."
        },
    )
    v0_num_samples: SampleCount = field(
        default=5000,
        metadata={
            "help": "Number of random training samples of the pass before training (--v0_estimator per_sample), counted over all "
            "processes. More than the data set has: all are used. 'auto': 128 and twice as many again until two halves of them "
            "agree within a tenth (median over elements), 5000 at most. Default: 5000 samples."
        },
    )
    v0_estimator: str | None = field(
        default=None,
        metadata={
            "help": "Whose square data_driven takes: 'minibatch', of the gradients of the run's own first steps as Adam sees them "
            "(accumulated, reduced, unscaled, clipped; --v0_estimation_steps), or 'per_sample', of single training samples by a pass "
            "before training (eq. 10; --v0_num_samples), for losses that are a mean over independent samples. Default: minibatch.",
            "choices": list(STATISTICS),
        },
    )
    v0_stats_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples per forward and backward of the pass before training. E[g^2] is mean^2 + b*Var over batches of size b, exact "
            "at 1. Default: 1; the training batch with batch norms and where parameters are sharded; with v0_num_samples auto at most 8."
        },
    )
    v0_seed: int | None = field(
        default=None,
        metadata={
            "help": "Seed of the random v0 (eq. 11) and of the choice of samples (eq. 10). Default: the value of --seed."
        },
    )
    v0_include_bias_and_norm: bool = field(
        default=False,
        metadata={
            "help": "Give biases and norm weights a v0 too, as the paper's Algorithm 2; by its text (default) only tensors of "
            "two or more dimensions get one. Default: False."
        },
    )
    v0_decay_steps: StepCount | None = field(
        default=None,
        metadata={
            "help": "Choose the scale so that the multiplier m(t) = 1 / sqrt(1 + r * beta2^t / (1 - beta2^t)) reaches 0.9 at this "
            "optimizer step: r = 0.2346 * (beta2^-t - 1), r the size of v0 beside g^2, which is the scale for data_driven and "
            "first_gradient and measured at the first step for random. Below 1, as with --warmup_steps, a share of the run's steps. "
            "'auto': the length that the trust radius at the initial weights asks for (`hf-v0init probe` prints it), and no v0 where "
            "none is needed. Excludes --v0_scale. Default: none."
        },
    )
    v0_optimizer: str | None = field(
        default=None,
        metadata={
            "help": "The optimizer as package:Class, such as pytorch_optimizer:AdaBelief, in place of --optim. It gets the Trainer's "
            "learning rate, betas and weight decay and, before these, --optim_args 'k=v,...'. `hf-v0init optimizers` lists which "
            "take a v0. Default: none, --optim decides."
        },
    )
    untuned_warmup: str | None = field(
        default=None,
        metadata={
            "help": "Multiply the schedule's learning rate by a warmup whose length follows from beta2 (Ma & Yarats, 2021), a baseline "
            "for v0: 'linear', min(1, (1 - beta2) / 2 * t), or 'exponential', 1 - exp(-(1 - beta2) * t). Or 'measured': train with "
            "--warmup_steps of the length that the trust radius at the initial weights asks for, none where none is needed. "
            "Excludes --warmup_steps. Default: none.",
            "choices": [*UNTUNED_WARMUPS, MEASURED],
        },
    )
    v0_record_run: bool = field(
        default=False,
        metadata={
            "help": "Write run_log.jsonl, fingerprint.json (initial weights, first batches, random state) and v0_diagnostics.json "
            "into the output folder, as `hf-v0init compare` needs them. The run is the same. Default: False."
        },
    )

    def __post_init__(self) -> None:
        """Check every value, then let the next class of the inheritance order check its own."""
        self._require_valid_v0()
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()

    def _require_valid_v0(self) -> None:
        self.v0_init = getattr(self.v0_init, "value", self.v0_init)
        if self.v0_init == AUTO:
            self._take_auto()
        if self.v0_init not in STRATEGIES:
            raise InputError(f"v0_init={self.v0_init!r}: choose one of {', '.join((*STRATEGIES, AUTO))}")
        if self.v0_preset is not None:
            self._take_preset()
        if self.v0_estimator is None:
            self.v0_estimator = "minibatch"
        if self.v0_estimator not in STATISTICS:
            raise InputError(f"v0_estimator={self.v0_estimator!r}: choose one of {', '.join(STATISTICS)}")
        if self.v0_scale is not None and self.v0_decay_steps is not None:
            raise InputError(
                f"v0_scale={self.v0_scale} and v0_decay_steps={self.v0_decay_steps} both set the size of v0: give one"
            )
        if self.v0_scale is not None:
            self.v0_scale = require_scale(_require_number("v0_scale", self.v0_scale))
        if self.v0_num_samples != AUTO:
            self._require_count("v0_num_samples", "5000 samples is the paper's number", f", or {AUTO}")
        if self.v0_stats_batch_size is not None:
            self._require_count("v0_stats_batch_size", "1 is exact")
        if self.v0_decay_steps is not None:
            if self.v0_decay_steps != AUTO:
                self.v0_decay_steps = require_warmup_steps(self.v0_decay_steps)
            if self.v0_init == "zeros":
                raise InputError(
                    f"v0_decay_steps={self.v0_decay_steps} with v0_init=zeros: there is no v0 to size; use --warmup_steps, or "
                    "v0_init=data_driven"
                )
        if self.v0_estimation_steps is not None:
            self._require_count("v0_estimation_steps", "leave it out for 1% of the run")
            if self.v0_init != "data_driven" or self.v0_estimator != "minibatch":
                raise InputError(
                    f"v0_estimation_steps={self.v0_estimation_steps} with v0_init={self.v0_init}, v0_estimator={self.v0_estimator}: only "
                    "data_driven minibatch takes the mean over steps; leave v0_estimation_steps out"
                )
        if self.untuned_warmup is not None and self.untuned_warmup not in (*UNTUNED_WARMUPS, MEASURED):
            allowed = ", ".join((*UNTUNED_WARMUPS, MEASURED))
            raise InputError(f"untuned_warmup={self.untuned_warmup!r}: choose one of {allowed}")
        if self.v0_seed is not None and not (isinstance(self.v0_seed, int) and 0 <= self.v0_seed < 2**63):
            raise InputError(f"v0_seed={self.v0_seed}: must be a whole number from 0 to 2^63 - 1")

    def _take_auto(self) -> None:
        """Take what `v0_init=auto` stands for; configs/compare/results/measured_length/README.md has the runs that chose it."""
        given = {
            name: getattr(self, name) for name in ("v0_scale", "v0_decay_steps", "v0_estimation_steps", "v0_preset")
        }
        for name, value in given.items():
            if value is not None:
                raise InputError(
                    f"v0_init=auto and {name}={value}: auto has no v0, but a warmup of a length that it measures; drop {name}, or "
                    "give v0_init=data_driven"
                )
        if self.untuned_warmup not in (None, MEASURED):
            raise InputError(f"v0_init=auto and untuned_warmup={self.untuned_warmup} are two warmups: give one")
        self.v0_init, self.untuned_warmup = "zeros", MEASURED

    def _take_preset(self) -> None:
        """Select what the preset has; a flag that says otherwise is refused."""
        if self.v0_preset not in PRESETS:
            raise InputError(f"v0_preset={self.v0_preset!r}: choose one of {', '.join(PRESETS)}, or leave it out")
        if self.v0_init == "zeros":
            return
        wanted = PRESETS[self.v0_preset].get(self.v0_init)
        if wanted is None:
            raise InputError(
                f"v0_preset={self.v0_preset} with v0_init={self.v0_init}, which the paper does not have: choose "
                f"{' or '.join(PAPER_SCALE)}, or drop v0_preset"
            )
        defaults = {f.name: f.default for f in fields(V0InitArguments)}
        for name, value in wanted.items():
            given = getattr(self, name)
            if given != value and given != defaults[name]:
                raise InputError(
                    f"v0_preset={self.v0_preset} has {name}={value}, and {given} was given: drop one of the two"
                )
            setattr(self, name, value)

    def _require_count(self, name: str, remedy: str, or_else: str = "") -> None:
        value = getattr(self, name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{name}={value}: must be a whole number >= 1{or_else}; {remedy}")

    def get_max_num_samples(self) -> int:
        """Return the most samples that the statistics may take: `v0_num_samples`, or 5,000 for "auto"."""
        return MAX_NUM_SAMPLES if self.v0_num_samples == AUTO else self.v0_num_samples

    def resolve(self, max_steps: int | None) -> "V0InitArguments":
        """Return these settings with `v0_decay_steps` in optimizer steps of a run of `max_steps`; as they are where that is not
        known (None, 0 or less), or where nothing is a share.
        """
        if self.v0_decay_steps in (None, AUTO) or self.v0_decay_steps >= 1 or not max_steps or max_steps < 1:
            return self
        settings = {f.name: getattr(self, f.name) for f in fields(V0InitArguments)}
        return V0InitArguments(**settings | {"v0_decay_steps": resolve_warmup_steps(self.v0_decay_steps, max_steps)})

    @property
    def wants_length(self) -> bool:
        """Whether the length of the warmup, or of v0, is to be measured at the initial weights."""
        return self.untuned_warmup == MEASURED or (self.v0_decay_steps == AUTO and self.v0_init != "zeros")

    def with_length(self, steps: int) -> "V0InitArguments":
        """Return these settings with a measured length in the place of `v0_decay_steps="auto"`; without a v0 if it is 0."""
        settings = {f.name: getattr(self, f.name) for f in fields(V0InitArguments)}
        if self.v0_decay_steps != AUTO:
            return self
        if steps == 0:
            return V0InitArguments(
                **settings | {"v0_init": "zeros", "v0_decay_steps": None, "v0_estimation_steps": None}
            )
        return V0InitArguments(**settings | {"v0_decay_steps": steps})

    def get_v0_scale(self, beta2: float) -> float:
        """Return the scale in force: `v0_scale`, or the one that `v0_decay_steps` asks for at `beta2`, or the default.

        Raises:
            InputError: `v0_decay_steps` is a share of a run whose length has not been given (`resolve`), or needs too large a scale.
        """
        if self.v0_decay_steps == AUTO:
            raise InputError(
                "v0_decay_steps=auto is measured when a Trainer begins its training; give a number of steps here"
            )
        if self.v0_decay_steps is not None and self.v0_decay_steps < 1:
            raise InputError(
                f"v0_decay_steps={self.v0_decay_steps} is a share of the run, whose length is not known here: give max_steps, or "
                "v0_decay_steps as a number of optimizer steps"
            )
        if self.v0_decay_steps is not None:
            return compute_scale_for_warmup(self.v0_decay_steps, beta2)
        if self.v0_scale is not None:
            return self.v0_scale
        return DEFAULT_SCALE[self.v0_init]


def _require_number(name: str, value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InputError(f"{name}={value!r}: must be a number")
    return float(value)


def read_v0_arguments(arguments: Any) -> V0InitArguments:
    """Take the v0 flags out of any object that has them as attributes; missing ones get their default."""
    if isinstance(arguments, V0InitArguments):
        return arguments
    names = V0InitArguments.__dataclass_fields__
    return V0InitArguments(**{name: getattr(arguments, name) for name in names if hasattr(arguments, name)})
