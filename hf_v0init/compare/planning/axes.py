"""The words of a grid: what a value of the axes `v0`, `warmup` and `optimizer` means in flags of the training script.

| axis | values |
| --- | --- |
| v0 | `zeros`; `random`, `first_gradient`, `data_driven`, `data_driven minibatch`, `data_driven per_sample`, each with a SCALE or `warmup STEPS` after it; `warmup auto` for the measured length |
| warmup | `none`; a number of optimizer steps (linear), or below 1 a share of the run; `measured`; `untuned_linear`, `untuned_exponential` (Ma & Yarats) |
| optimizer | the keys of `OPTIMIZERS` |

Each axis also takes a mapping `{name: ..., flag: value, ...}`; for v0 the name may be left out.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from ...errors import InputError
from ...method.defaults import DEFAULT_SCALE, STRATEGIES
from ...method.multiplier import require_decay_steps
from ...settings import AUTO, TRUST_RADIUS as MEASURED

UNTUNED = {"measured": MEASURED, "untuned_linear": "linear", "untuned_exponential": "exponential"}
NO_WARMUP, DEFAULT_OPTIMIZER, NO_V0 = "none", "adamw", "zeros"

# Flags that an axis sets. They are left out of a file of arguments and refused among the `arguments` of a comparison.
OWNERS = {
    "v0_init": "v0",
    "v0_scale": "v0",
    "v0_decay_steps": "v0",
    "warmup_steps": "warmup",
    "warmup_ratio": "warmup",
    "untuned_warmup": "warmup",
    "optim": "optimizer",
    "v0_optimizer": "optimizer",
    "optim_args": "optimizer",
}


@dataclass(frozen=True)
class AxisValue:
    """One value of an axis: its name in tables, and the flags it stands for."""

    name: str
    flags: dict[str, Any] = field(default_factory=dict)


def name_number(value: float) -> str:
    """Write a number as people do: 10, 0.5, 0.0015."""
    return f"{value:.12g}"


def suggest(name: str, known: Iterable[str]) -> str:
    """Return '; did you mean ...?' for a misspelt name, or nothing."""
    close = difflib.get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]}?" if close else ""


def is_number(value: Any) -> bool:
    """Whether `value` is a finite int or float; booleans are none."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


# ------------------------------------------------------------------------------------------------------------- v0


def parse_v0(value: Any) -> AxisValue:
    """Parse a value of the axis v0, such as `data_driven minibatch 10`; scales are written out.

    Raises:
        InputError: no such strategy, or words that do not go with it.
    """
    if isinstance(value, dict):
        return _parse_v0_mapping(value)
    words = str(value).split()
    strategy, rest = (words[0], words[1:]) if words else ("", [])
    if strategy not in STRATEGIES:
        if strategy == AUTO:
            raise InputError("v0: auto has no v0 but a warmup of measured length: write it as `warmup: [measured]`")
        raise InputError(
            f"v0: {str(value)!r} is no strategy{suggest(strategy, STRATEGIES)}; choose {', '.join(STRATEGIES)}, or a mapping of "
            "flags"
        )
    flags: dict[str, Any] = {"v0_init": strategy}
    if rest[:1] in (["minibatch"], ["per_sample"]) and strategy == "data_driven":
        flags["v0_estimator"] = rest[0]
        rest = rest[1:]
    if rest[:1] == ["warmup"] and len(rest) == 2 and strategy != NO_V0:
        flags["v0_decay_steps"] = _read_length(rest[1], value)
    elif len(rest) == 1 and strategy != NO_V0:
        scale = _read_number(rest[0])
        if scale is None or scale <= 0:
            raise InputError(f"v0: {value!r}: the scale {rest[0]!r} must be a number > 0; for no v0 write zeros")
        flags["v0_scale"] = scale
    elif rest:
        raise InputError(
            f"v0: {value!r} cannot be read; write a strategy and a scale, such as 'random 100', 'data_driven minibatch 10' or "
            "'data_driven warmup 200'"
        )
    return _name_v0(flags)


def _read_length(word: str, value: Any) -> float | str:
    if word == AUTO:
        return AUTO
    try:
        return require_decay_steps(_read_number(word))
    except InputError as error:
        raise InputError(
            f"v0: {value!r}: the steps after 'warmup' must be a whole number >= 1, a share of the run in (0, 1), or {AUTO}"
        ) from error


def _parse_v0_mapping(value: dict) -> AxisValue:
    flags = dict(value)
    name = flags.pop("name", None)
    strategy = flags.get("v0_init")
    if strategy not in STRATEGIES:
        raise InputError(f"v0: v0_init={strategy!r} in {value}: choose one of {', '.join(STRATEGIES)}")
    if strategy == NO_V0 and len(flags) > 1:
        raise InputError(f"v0: {value}: zeros takes no further flags")
    named = _name_v0(flags)
    return AxisValue(str(name), named.flags) if name is not None else named


def _name_v0(flags: dict[str, Any]) -> AxisValue:
    """Name a v0 by its flags, after writing out the default scale."""
    flags, strategy = dict(flags), flags["v0_init"]
    words = [strategy]
    if "v0_estimator" in flags:
        words.append(str(flags["v0_estimator"]))
    if "v0_decay_steps" in flags:
        steps = flags["v0_decay_steps"]
        words.append(f"warmup {name_number(steps) if is_number(steps) else steps}")
    elif strategy != NO_V0:
        scale = flags.setdefault("v0_scale", DEFAULT_SCALE[strategy])
        if not is_number(scale) or scale <= 0:
            raise InputError(f"v0: v0_scale={scale!r}: must be a number > 0")
        flags["v0_scale"] = float(scale)
        words.append(name_number(scale))
    named = {"v0_init", "v0_estimator", "v0_decay_steps", "v0_scale"}
    words += [name_flag(flag, value) for flag, value in flags.items() if flag not in named]
    return AxisValue(" ".join(words), flags)


def name_flag(flag: str, value: Any) -> str:
    """Name a flag and its value, `flag=value`."""
    return f"{flag}={name_number(value) if is_number(value) else str(value)}"


def _read_number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) else None


# --------------------------------------------------------------------------------------------------------- warmup


def parse_warmup(value: Any) -> AxisValue:
    """Parse a value of the axis warmup: none, steps or share of the run of a linear warmup, an untuned warmup, or a named mapping.

    Raises:
        InputError: none of these.
    """
    if isinstance(value, dict):
        return _parse_named_mapping("warmup", value)
    if value is None or value == NO_WARMUP or (is_number(value) and value == 0):
        return AxisValue(NO_WARMUP, {"warmup_steps": 0})
    if isinstance(value, str) and value in UNTUNED:
        return AxisValue(value, {"warmup_steps": 0, "untuned_warmup": UNTUNED[value]})
    if is_number(value) and value >= 1 and float(value).is_integer():
        return AxisValue(str(int(value)), {"warmup_steps": int(value)})
    if is_number(value) and 0 < value < 1:  # transformers reads it so too
        return AxisValue(name_number(value), {"warmup_steps": float(value)})
    raise InputError(
        f"warmup: {value!r} cannot be read; give none, a whole number of optimizer steps, a share of the run below 1 such as "
        f"0.3, {', '.join(UNTUNED)}, or a mapping with a name and flags"
    )


# ------------------------------------------------------------------------------------------------------ optimizer


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
WITHOUT_SECOND_MOMENT = ("sgd",)


def parse_optimizer(value: Any) -> AxisValue:
    """Parse a value of the axis optimizer: a key of `OPTIMIZERS`, or a named mapping of flags.

    Raises:
        InputError: neither.
    """
    if isinstance(value, dict):
        return _parse_named_mapping("optimizer", value)
    if value not in OPTIMIZERS:
        raise InputError(
            f"optimizer: {value!r} is unknown{suggest(str(value), OPTIMIZERS)}; choose {', '.join(OPTIMIZERS)}, or a mapping such as "
            "{name: mine, v0_optimizer: package:Class, optim_args: k=v}"
        )
    return AxisValue(value, dict(OPTIMIZERS[value]))


def _parse_named_mapping(axis: str, value: dict) -> AxisValue:
    flags = dict(value)
    name = flags.pop("name", None)
    if not name or not flags:
        raise InputError(f"{axis}: {value} needs a name and at least one flag, {{name: ..., flag: value}}")
    return AxisValue(str(name), flags)


# -------------------------------------------------------------------------------------------------------- together


def combine_axes(common: dict[str, Any], v0: AxisValue, warmup: AxisValue, optimizer: AxisValue) -> dict[str, Any]:
    """Compute all flags of a run from the common ones and its place in the grid.

    A linear warmup before a constant rate needs another schedule in transformers (`constant_with_warmup`); the schedule-free
    optimizer does its warmup itself, with the schedule `constant`.

    Raises:
        InputError: values that do not go together.
    """
    flags = {**common, **optimizer.flags, **warmup.flags, **v0.flags}
    if v0.name != NO_V0 and optimizer.name in WITHOUT_SECOND_MOMENT:
        raise InputError(
            f"v0 {v0.name!r} with optimizer {optimizer.name!r}, which keeps no second moment: give it a grid of its own with "
            "v0: [zeros]"
        )
    schedule = str(flags.get("lr_scheduler_type", "linear"))
    if is_number(flags.get("warmup_steps")) and flags["warmup_steps"] > 0 and "lr_scheduler_type" not in warmup.flags:
        if schedule == "constant" and not str(flags.get("optim", "")).startswith("schedule_free"):
            flags["lr_scheduler_type"] = "constant_with_warmup"
        elif schedule in ("reduce_lr_on_plateau", "greedy"):
            raise InputError(
                f"warmup: {warmup.name} with lr_scheduler_type {schedule}, which does no warmup: choose another"
            )
    if isinstance(flags.get("optim_args"), str):
        betas = {"beta1": flags.get("adam_beta1", 0.9), "beta2": flags.get("adam_beta2", 0.999)}
        for name, beta in betas.items():
            flags["optim_args"] = flags["optim_args"].replace(
                f"{{{name}}}", name_number(beta) if is_number(beta) else str(beta)
            )
    return flags


def name_arm(v0: AxisValue, warmup: AxisValue, optimizer: AxisValue, other: dict[str, Any]) -> str:
    """Name everything but learning rate and seed: `zeros`, `warmup 200`, `data_driven 1 + warmup 200`, `radam`."""
    parts = [v0.name] if v0.name != NO_V0 else []
    parts += [f"warmup {warmup.name}"] if warmup.name != NO_WARMUP else []
    parts += [optimizer.name] if optimizer.name != DEFAULT_OPTIMIZER else []
    parts += [name_flag(flag, value) for flag, value in other.items()]
    return " + ".join(parts) or NO_V0
