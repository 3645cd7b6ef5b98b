"""The words of a grid: what a value of the axes `v0`, `warmup` and `optimizer` means in flags of the training script.

| axis | values |
| --- | --- |
| v0 | `zeros`; a strategy alone, with a scale (`random 100`), or with a decay and its length (`data_driven linear 0.33`) |
| warmup | `none`; optimizer steps, or below 1 a fraction of training; `trust_radius`, `untuned_linear`, `untuned_exponential` |
| optimizer | the keys of `OPTIMIZERS` |

Each also takes a mapping of any flags, `{flag: value, ...}`, and a `name` for it if wished. A name decides nothing: flags do.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from ..errors import InputError
from ..method.defaults import STRATEGIES
from .files import mask_secrets

NO_V0, NO_WARMUP = "zeros", "none"
DECAYS, ESTIMATORS, AUTO = ("linear", "beta2"), ("minibatch", "per_sample"), "auto"
UNTUNED = {"trust_radius": "trust_radius", "untuned_linear": "linear", "untuned_exponential": "exponential"}

# Flags that an axis sets. They are left out of a file of arguments and refused among the `arguments` of a comparison.
OWNERS = {flag: "v0" for flag in ("v0_init", "v0_scale", "v0_decay", "v0_decay_steps")}
OWNERS |= {flag: "warmup" for flag in ("warmup_steps", "warmup_ratio", "untuned_warmup")}
OWNERS |= {flag: "optimizer" for flag in ("optim", "v0_optimizer", "optim_args")}
# Flags that the comparison sets for each run.
OF_THE_RUN = ("output_dir", "overwrite_output_dir", "v0_record_run", "resume_from_checkpoint")
V0_EXAMPLES = "'random 100', 'data_driven 1', 'data_driven linear 0.33' or 'data_driven beta2 auto'"


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: its name in tables, and the flags it stands for."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)


def suggest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def format_value(value: Any) -> str:
    """Write a flag's value as people do: 10, 0.5, 0.0015, text."""
    return f"{value:.12g}" if is_number(value) else str(value)


def name_flags(flags: Mapping[str, Any]) -> list[str]:
    """Write flags as the names of settings have them, secrets masked."""
    return [f"{flag}={format_value(value)}" for flag, value in mask_secrets(dict(flags)).items()]


# ------------------------------------------------------------------------------------------------------------- v0


def parse_v0(value: Any) -> AxisValue:
    """Parse a value of the axis v0, such as `data_driven linear 0.33`.

    Raises:
        InputError: no such strategy, or words that do not go with it.
    """
    if isinstance(value, dict):
        return _parse_mapping("v0", value, parse_v0)
    words = str(value).split()
    strategy, rest = (words[0], words[1:]) if words else ("", [])
    if strategy not in STRATEGIES:
        raise InputError(
            f"v0: {str(value)!r} is no strategy{suggest(strategy, STRATEGIES)}; choose {', '.join(STRATEGIES)}, or a mapping "
            "of flags"
        )
    flags: dict[str, Any] = {"v0_init": strategy}
    if strategy == NO_V0 and rest:
        raise InputError(f"v0: {value!r}: zeros is no v0 and takes no further words")
    if rest and rest[0] in ESTIMATORS and strategy == "data_driven":
        flags["v0_estimator"] = rest.pop(0)
    if rest and rest[0] == "warmup":
        words = " ".join(rest[1:]) or "0.33"
        raise InputError(
            f"v0: {value!r}: 'warmup' is not a decay; write 'linear' or 'beta2' and the length, such as '{strategy} linear {words}'"
        )
    if rest and rest[0] in DECAYS:
        flags["v0_decay"] = rest.pop(0)
        if not rest:
            raise InputError(
                f"v0: {value!r}: the length after {flags['v0_decay']!r} is missing: optimizer steps, a fraction of training "
                f"such as 0.33, or {AUTO}"
            )
        flags["v0_decay_steps"] = _read_length(rest.pop(0), value)
    elif len(rest) == 1:
        scale = _read_number(rest.pop())
        if scale is None or scale <= 0:
            raise InputError(f"v0: {value!r}: the scale must be a number > 0; write {V0_EXAMPLES}, and zeros for no v0")
        flags |= {"v0_scale": scale, "v0_decay": "beta2"}  # a scale sets the length of beta2's own decay
    if rest:
        raise InputError(f"v0: {value!r} cannot be read; write {V0_EXAMPLES}")
    return AxisValue(name_v0(flags), flags)


def name_v0(flags: Mapping[str, Any]) -> str:
    """Name a v0 by its flags, as `parse_v0` reads it."""
    shown = dict(flags)
    words = [shown.pop("v0_init")]
    words += [shown.pop("v0_estimator")] if "v0_estimator" in shown else []
    if "v0_decay_steps" in shown and "v0_decay" in shown:
        words += [shown.pop("v0_decay"), format_value(shown.pop("v0_decay_steps"))]
    elif "v0_scale" in shown and shown.get("v0_decay") == "beta2":
        words.append(format_value(shown.pop("v0_scale")))
        del shown["v0_decay"]
    return " ".join([*words, *name_flags(shown)])


def _read_length(word: str, value: Any) -> float | str:
    number = _read_number(word)
    if word == AUTO:
        return AUTO
    if number is None or number <= 0 or (number >= 1 and not number.is_integer()):
        raise InputError(
            f"v0: {value!r}: the length must be whole optimizer steps >= 1, a fraction of training in (0, 1), or {AUTO}"
        )
    return int(number) if number >= 1 else number


def _read_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# ---------------------------------------------------------------------------------------------- warmup, optimizer


def parse_warmup(value: Any) -> AxisValue:
    """Parse a value of the axis warmup: none, the length of a linear warmup, one that needs no length, or a mapping.

    Raises:
        InputError: none of these.
    """
    if isinstance(value, dict):
        return _parse_mapping("warmup", value, parse_warmup)
    if value is None or value == NO_WARMUP or (is_number(value) and value == 0):
        return AxisValue(NO_WARMUP, {"warmup_steps": 0})
    if isinstance(value, str) and value in UNTUNED:
        return AxisValue(value, {"warmup_steps": 0, "untuned_warmup": UNTUNED[value]})
    if is_number(value) and value >= 1 and float(value).is_integer():
        return AxisValue(str(int(value)), {"warmup_steps": int(value)})
    if is_number(value) and 0 < value < 1:  # transformers reads it so too
        return AxisValue(format_value(value), {"warmup_steps": float(value)})
    raise InputError(
        f"warmup: {value!r} cannot be read; give none, a whole number of optimizer steps, a fraction of training such as 0.3, "
        f"{', '.join(UNTUNED)}, or a mapping of flags"
    )


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
_CLASSES = ("optim", "v0_optimizer")  # flags that say which optimizer it is
_WITHOUT_SECOND_MOMENT = re.compile(r"(^|[_:.])(sgd|lion)", re.IGNORECASE)


def parse_optimizer(value: Any) -> AxisValue:
    """Parse a value of the axis optimizer: a key of `OPTIMIZERS`, or a mapping of flags.

    Raises:
        InputError: neither.
    """
    if isinstance(value, dict):
        return _parse_mapping("optimizer", value, parse_optimizer)
    if value not in OPTIMIZERS:
        raise InputError(
            f"optimizer: {value!r} is unknown{suggest(str(value), OPTIMIZERS)}; choose {', '.join(OPTIMIZERS)}, or a mapping such as "
            "{name: mine, v0_optimizer: package:Class, optim_args: k=v}"
        )
    return AxisValue(value, dict(OPTIMIZERS[value]))


def _parse_mapping(axis: str, value: dict, parse_word: Callable[[Any], AxisValue]) -> AxisValue:
    """Read `{name: ..., flag: value}`; a name that is a word of the axis must mean what the word means."""
    flags = {str(key).lstrip("-").replace("-", "_"): given for key, given in value.items()}
    value = mask_secrets(value)  # as it is shown
    name = flags.pop("name", None)
    if name is not None and not str(name).strip():
        raise InputError(f"{axis}: {value}: the name is empty; write one, or leave it out")
    for flag in flags:
        if flag == "seed":
            raise InputError(f"{axis}: {value}: every setting is trained on the same seeds; write seed as an axis")
        if flag in OF_THE_RUN:
            raise InputError(f"{axis}: {value}: {flag} is set by the comparison for each run; leave it out")
    if not flags:
        raise InputError(f"{axis}: {value} needs at least one flag, {{flag: value}}")
    if axis == "v0":
        _require_v0(flags, value)
    if name is None:
        return AxisValue(name_v0(flags) if axis == "v0" else " ".join(name_flags(flags)), flags)
    number = _read_number(str(name)) if axis == "warmup" else None
    try:
        meant = parse_word(number or str(name))
    except InputError:
        return AxisValue(str(name), flags)
    # An optimizer's name stands for its class; settings of it may be others.
    wanted = {flag: of_word for flag, of_word in meant.flags.items() if axis != "optimizer" or flag in _CLASSES}
    if any(flags.get(flag) != of_word for flag, of_word in wanted.items()):
        raise InputError(
            f"{axis}: {value}: the name {name!r} stands for {' '.join(name_flags(wanted))}; give another name"
        )
    return AxisValue(str(name), flags)


def _require_v0(flags: Mapping[str, Any], value: dict) -> None:
    strategy = flags.get("v0_init")
    if strategy not in STRATEGIES:
        raise InputError(f"v0: v0_init={strategy!r} in {value}: choose one of {', '.join(STRATEGIES)}")
    size = [flag for flag in ("v0_scale", "v0_decay", "v0_decay_steps") if flag in flags]
    if strategy == NO_V0 and size:
        raise InputError(f"v0: {value}: zeros is no v0, so {', '.join(size)} cannot be used; leave it out")


# -------------------------------------------------------------------------------------------------------- together


def merge_axes(common: Mapping[str, Any], given: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Compute all flags of a run from the common ones and those that each axis of its grid sets.

    A linear warmup before a constant rate needs another schedule in transformers (`constant_with_warmup`); the schedule-free
    optimizer does its warmup itself, with the schedule `constant`.

    Args:
        common: the comparison's `arguments`.
        given: axis -> its flags; a flag that two axes set must have one value.

    Raises:
        InputError: two axes that set one flag to different values; values that do not go together.
    """
    setter: dict[str, str] = {}
    flags: dict[str, Any] = {}
    for axis, of_axis in given.items():
        for flag, value in of_axis.items():
            if flag in flags and flags[flag] != value:
                one, other = (format_value(mask_secrets({flag: given})[flag]) for given in (flags[flag], value))
                raise InputError(f"{flag} is {one} by the axis {setter[flag]} and {other} by {axis}: set it in one")
            flags.setdefault(flag, value)
            setter.setdefault(flag, axis)
    flags = {**common, **flags}
    flags.setdefault("v0_init", NO_V0)
    if not has_warmup(flags):
        flags.setdefault("warmup_steps", 0)
    if "v0_optimizer" not in flags:
        flags.setdefault("optim", OPTIMIZERS["adamw"]["optim"])
    _adapt_schedule(flags, "lr_scheduler_type" in setter and setter["lr_scheduler_type"] == "warmup")
    if has_v0(flags) and _WITHOUT_SECOND_MOMENT.search(str(flags.get("v0_optimizer") or flags.get("optim"))):
        raise InputError(
            f"v0_init={flags['v0_init']} with {flags.get('v0_optimizer') or flags.get('optim')}, which keeps no second moment: "
            "give the optimizer a grid of its own with v0: [zeros]"
        )
    if isinstance(flags.get("optim_args"), str):
        for name, beta in (("beta1", flags.get("adam_beta1", 0.9)), ("beta2", flags.get("adam_beta2", 0.999))):
            flags["optim_args"] = flags["optim_args"].replace(f"{{{name}}}", format_value(beta))
    return {flag: value for flag, value in flags.items() if value is not None}


def _adapt_schedule(flags: dict[str, Any], is_chosen: bool) -> None:
    """Take the schedule that can do the warmup, if it has one of optimizer steps, known or measured."""
    if not (_get_steps(flags) > 0 or flags.get("untuned_warmup") == UNTUNED["trust_radius"]):
        return
    schedule = str(flags.get("lr_scheduler_type", "linear"))
    if schedule in ("reduce_lr_on_plateau", "greedy"):
        raise InputError(f"a warmup with lr_scheduler_type={schedule}, which does no warmup: choose another schedule")
    if schedule == "constant" and not is_chosen and not str(flags.get("optim", "")).startswith("schedule_free"):
        flags["lr_scheduler_type"] = "constant_with_warmup"


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
