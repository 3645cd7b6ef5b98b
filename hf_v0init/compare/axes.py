"""The words of a grid: what a value of the axes `v0`, `warmup` and `optimizer` means in flags of the training script.

Each has words of its own (`WORDS`) and takes a mapping of any flags, `{flag: value, ...}`, with a `name` if wished. A name decides
nothing: flags do.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from ..errors import InputError
from ..method.strategies import STRATEGIES
from .files import mask_secrets

NO_V0, NO_WARMUP, MAIN_OPTIMIZER = "zeros", "none", "adamw"
UNTUNED = {"trust_radius": "trust_radius", "untuned_linear": "linear", "untuned_exponential": "exponential"}

# Flags that an axis sets. They are left out of a file of arguments and refused among the `arguments` of a comparison.
OWNERS = {flag: "v0" for flag in ("v0_init", "v0_scale", "v0_decay", "v0_decay_steps")}
OWNERS |= {flag: "warmup" for flag in ("warmup_steps", "warmup_ratio", "untuned_warmup")}
OWNERS |= {flag: "optimizer" for flag in ("optim", "v0_optimizer", "optim_args")}
# Flags that the comparison sets for each run.
OF_THE_RUN = ("output_dir", "overwrite_output_dir", "v0_record_run", "resume_from_checkpoint")

_NUMBER = r"(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_V0_WORDS = re.compile(
    rf"(?P<v0_init>{'|'.join(STRATEGIES)})(?: (?P<v0_estimator>minibatch|per_sample))?"
    rf"(?: (?P<v0_decay>linear|beta2) (?P<v0_decay_steps>{_NUMBER}|auto)| (?P<v0_scale>{_NUMBER}))?"
)


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: its name in tables, and the flags it stands for."""

    name: str
    flags: dict[str, Any]


def suggest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' for a misspelt name, or nothing."""
    known = list(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {close[0]}?" if close and name not in known else ""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: Any) -> str:
    """Write a flag's value as people do: 10, 0.5, 0.0015, text."""
    return f"{value:.12g}" if is_number(value) else str(value)


def name_flags(flags: Mapping[str, Any]) -> list[str]:
    """Write flags as the names of settings have them, secrets masked."""
    return [f"{flag}={format_value(value)}" for flag, value in mask_secrets(dict(flags)).items()]


# ------------------------------------------------------------------------------------------------------- the words


def _use(spec: str, optim_args: str | None = None) -> dict[str, Any]:
    return {"v0_optimizer": spec} | ({"optim_args": optim_args} if optim_args else {})


# Weight decay is decoupled where the class offers it, so that the optimizers differ in the step alone; adam has coupled L2.
# {beta1} and {beta2} are adam_beta1 and adam_beta2 of the run.
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "adamw": {"optim": "adamw_torch"},
    "adam": _use("torch.optim:Adam"),
    "amsgrad": _use("torch.optim:AdamW", "amsgrad=true"),
    "nadam": _use("torch.optim:NAdam", "decoupled_weight_decay=true"),
    "radam": _use("torch.optim:RAdam", "decoupled_weight_decay=true"),
    "rmsprop": _use("torch.optim:RMSprop", "alpha={beta2}"),
    "sgd": _use("torch.optim:SGD", "momentum={beta1}"),
    "schedule_free": {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"},
    "adabelief": _use("pytorch_optimizer:AdaBelief"),
    "adabound": _use("pytorch_optimizer:AdaBound"),
    "adopt": _use("pytorch_optimizer:ADOPT", "weight_decouple=true"),
    "yogi": _use("pytorch_optimizer:Yogi"),
}
WORDS = {  # of an axis, for whoever wrote another
    "v0": f"{NO_V0}; a strategy ({', '.join(STRATEGIES[1:])}) alone, with its scale ('random 100'), or with a decay and its length in "
    "steps, as a fraction of training or 'auto' ('data_driven linear 0.33'); or a mapping of flags",
    "warmup": "none, a whole number of optimizer steps, a fraction of training such as 0.3, "
    f"{', '.join(UNTUNED)}, or a mapping of flags",
    "optimizer": f"{', '.join(OPTIMIZERS)}, or a mapping such as {{name: mine, v0_optimizer: package:Class, optim_args: k=v}}",
}


def parse_value(axis: str, value: Any) -> AxisValue:
    """Parse a value of the axis v0, warmup or optimizer: one of its words, such as `data_driven linear 0.33`, or a mapping.

    Raises:
        InputError: it cannot be read.
    """
    if isinstance(value, dict):
        return _parse_mapping(axis, value)
    if axis == "optimizer":
        parsed = AxisValue(value, dict(OPTIMIZERS[value])) if value in OPTIMIZERS else None
    else:
        parsed = (_parse_v0 if axis == "v0" else _parse_warmup)(value)
    if parsed is None:
        meant = suggest(str(value).split(" ")[0], [*STRATEGIES, *UNTUNED, *OPTIMIZERS])
        raise InputError(f"{axis}: {value!r} cannot be read{meant}; choose {WORDS[axis]}")
    return parsed


def _parse_v0(value: Any) -> AxisValue | None:
    found = _V0_WORDS.fullmatch(" ".join(str(value).split()))
    flags: dict[str, Any] = {} if found is None else {k: v for k, v in found.groupdict().items() if v is not None}
    if not flags or (flags["v0_init"] == NO_V0 and len(flags) > 1):
        return None
    if "v0_scale" in flags:
        flags |= {"v0_scale": float(flags["v0_scale"]), "v0_decay": "beta2"}  # it sets the length of beta2's own decay
    if flags.get("v0_decay_steps", "auto") != "auto":
        length = float(flags["v0_decay_steps"])
        flags["v0_decay_steps"] = int(length) if length.is_integer() else length
    return AxisValue(_name_v0(flags), flags)


def _name_v0(flags: Mapping[str, Any]) -> str:
    """Name a v0 by its flags, as `parse_value` reads it."""
    shown = dict(flags)
    words = [shown.pop("v0_init")]
    words += [shown.pop("v0_estimator")] if "v0_estimator" in shown else []
    if "v0_decay_steps" in shown and "v0_decay" in shown:
        words += [shown.pop("v0_decay"), format_value(shown.pop("v0_decay_steps"))]
    elif "v0_scale" in shown and shown.get("v0_decay") == "beta2":
        words.append(format_value(shown.pop("v0_scale")))
        del shown["v0_decay"]
    return " ".join([*words, *name_flags(shown)])


def _parse_warmup(value: Any) -> AxisValue | None:
    if value in (None, NO_WARMUP, 0) and value is not False:
        return AxisValue(NO_WARMUP, {"warmup_steps": 0})
    if isinstance(value, str) and value in UNTUNED:
        return AxisValue(value, {"warmup_steps": 0, "untuned_warmup": UNTUNED[value]})
    if is_number(value) and (0 < value < 1 or (value >= 1 and float(value).is_integer())):  # as transformers reads it
        return AxisValue(format_value(value), {"warmup_steps": int(value) if value >= 1 else float(value)})
    return None


def _parse_mapping(axis: str, value: dict) -> AxisValue:
    """Read `{name: ..., flag: value}`."""
    flags = clean_flags(value)
    name = flags.pop("name", None)
    if not flags or (axis == "v0" and flags.get("v0_init") not in STRATEGIES):
        needed = "at least one flag" if axis != "v0" else f"v0_init, one of {', '.join(STRATEGIES)}"
        raise InputError(f"{axis}: {mask_secrets(value)} needs {needed}")
    return AxisValue(str(name or (_name_v0(flags) if axis == "v0" else " ".join(name_flags(flags)))), flags)


def clean_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """Write flags with underscores; `no` of a strategy, which YAML reads as false, is "no" again."""
    named = {str(key).lstrip("-").replace("-", "_"): value for key, value in flags.items()}
    return {key: "no" if value is False and key.endswith("_strategy") else value for key, value in named.items()}


# -------------------------------------------------------------------------------------------------------- together


def merge_axes(common: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute all flags of a run from the common ones and those that each axis of its grid sets.

    A linear warmup before a constant rate needs another schedule in transformers (`constant_with_warmup`); the schedule-free
    optimizer does its warmup itself, with the schedule `constant`.

    Raises:
        InputError: two axes that set one flag to different values; values that do not go together.
    """
    setter: dict[str, str] = {}
    flags: dict[str, Any] = {}
    for axis, of_axis in given.items():
        for flag, value in of_axis.items():
            if flag in OF_THE_RUN:
                raise InputError(f"{axis}: {flag} is set by the comparison for each run; leave it out")
            if flags.setdefault(flag, value) != value:
                one, other = (format_value(mask_secrets({flag: given})[flag]) for given in (flags[flag], value))
                raise InputError(f"{flag} is {one} by the axis {setter[flag]} and {other} by {axis}: set it in one")
            setter.setdefault(flag, axis)
    flags = {"v0_init": NO_V0, **common, **flags}
    if not has_warmup(flags):
        flags.setdefault("warmup_steps", 0)
    if "v0_optimizer" not in flags:
        flags.setdefault("optim", OPTIMIZERS[MAIN_OPTIMIZER]["optim"])
    if _get_steps(flags) > 0 or flags.get("untuned_warmup") == UNTUNED["trust_radius"]:
        schedule = str(flags.get("lr_scheduler_type", "linear"))
        if schedule in ("reduce_lr_on_plateau", "greedy"):
            raise InputError(
                f"a warmup with lr_scheduler_type={schedule}, which does no warmup: choose another schedule"
            )
        is_chosen = setter.get("lr_scheduler_type") == "warmup"
        if schedule == "constant" and not is_chosen and not str(flags.get("optim", "")).startswith("schedule_free"):
            flags["lr_scheduler_type"] = "constant_with_warmup"
    optimizer = str(flags.get("v0_optimizer") or flags.get("optim"))
    if has_v0(flags) and re.search(r"(^|[_:.])(sgd|lion)", optimizer, re.IGNORECASE):
        raise InputError(
            f"v0_init={flags['v0_init']} with {optimizer}, which keeps no second moment: give the optimizer a grid of its own with "
            "v0: [zeros]"
        )
    if isinstance(flags.get("optim_args"), str):
        for name, beta in (("beta1", flags.get("adam_beta1", 0.9)), ("beta2", flags.get("adam_beta2", 0.999))):
            flags["optim_args"] = flags["optim_args"].replace(f"{{{name}}}", format_value(beta))
    return {flag: value for flag, value in flags.items() if value is not None}


def has_v0(flags: Mapping[str, Any]) -> bool:
    """Whether a run with these flags has a v0."""
    return flags.get("v0_init", NO_V0) != NO_V0


def has_warmup(flags: Mapping[str, Any]) -> bool:
    """Whether a run with these flags has a warmup of the learning rate."""
    return _get_steps(flags) > 0 or flags.get("untuned_warmup") is not None


def _get_steps(flags: Mapping[str, Any]) -> float:
    steps = [flags.get(flag) for flag in ("warmup_steps", "warmup_ratio")]
    return max((value for value in steps if is_number(value)), default=0.0)


def get_optimizer(flags: Mapping[str, Any]) -> str:
    """Return what the optimizer is known by, whatever it is called: class or word, and its arguments."""
    parts = (flags.get("v0_optimizer") or flags.get("optim"), flags.get("optim_args"))
    return " ".join(str(part) for part in parts if part is not None)
