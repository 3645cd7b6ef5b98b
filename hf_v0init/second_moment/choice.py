"""The optimizer that `--v0_optimizer package:Class` names, and the arguments it is built with. Knows no Trainer.

`--optim_args "k=v,..."` wins. Else lr, betas and weight decay (in the Trainer's groups) are the Trainer's, as for its own
optimizers; eps is the Trainer's only if it was changed, since optimizers use it in ways that ask for other sizes (AdaBelief's
1e-16 is added to the second moment at each step) and the Trainer's default would replace theirs.
"""

import ast
import contextlib
import dataclasses
import inspect
import pkgutil
import re
from typing import Any

import torch

from ..errors import InputError


def load_optimizer_class(spec: str) -> type[torch.optim.Optimizer]:
    """Load the class that `package:Class` names, such as `pytorch_optimizer:AdaBelief`.

    Raises:
        InputError: no such package or class, or no torch optimizer.
    """
    try:
        found = pkgutil.resolve_name(spec)
    except (ImportError, ValueError, AttributeError) as error:
        raise InputError(
            f"v0_optimizer={spec!r}: {error}; give package:Class, such as pytorch_optimizer:AdaBelief"
        ) from error
    if not (isinstance(found, type) and issubclass(found, torch.optim.Optimizer)):
        raise InputError(f"v0_optimizer={spec!r}: is no torch.optim.Optimizer")
    return found


def parse_optimizer_arguments(text: str | None) -> dict[str, Any]:
    """Parse `k=v,...`, where values are numbers, true, false, none, (tuples, of, numbers) or else words.

    Raises:
        InputError: a part that is not k=v.
    """
    parsed: dict[str, Any] = {}
    for part in re.split(r",(?![^(\[]*[)\]])", text or ""):  # at commas outside of brackets
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not text or not (equals and key and value):
            if part.strip():
                raise InputError(f"optim_args={text!r}: {part.strip()!r} is not of the form name=value")
            continue
        parsed[key] = value
        with contextlib.suppress(ValueError, SyntaxError):
            parsed[key] = ast.literal_eval(value.capitalize() if value.lower() in ("true", "false", "none") else value)
    return parsed


def compute_optimizer_arguments(optimizer_class: type[torch.optim.Optimizer], arguments) -> dict[str, Any]:
    """Compute the keyword arguments to build `optimizer_class` with, from `TrainingArguments`.

    Raises:
        InputError: optim_args names weight_decay; weight_decay is set and the class takes none.
    """
    parameters = inspect.signature(optimizer_class.__init__).parameters
    given = parse_optimizer_arguments(arguments.optim_args)
    if "weight_decay" in given:
        raise InputError(
            f"optim_args={arguments.optim_args!r}: weight_decay here would be overruled by the Trainer's parameter groups; "
            f"use --weight_decay {given['weight_decay']}"
        )
    if arguments.weight_decay and "weight_decay" not in parameters:
        raise InputError(
            f"weight_decay={arguments.weight_decay}: {optimizer_class.__name__} takes no weight_decay; set it to 0"
        )
    computed: dict[str, Any] = {}
    if "lr" in parameters:
        computed["lr"] = arguments.learning_rate
    if "betas" in parameters:
        own = parameters["betas"].default
        further = tuple(own[2:]) if isinstance(own, (tuple, list)) else ()
        computed["betas"] = (arguments.adam_beta1, arguments.adam_beta2, *further)
    if "eps" in parameters and arguments.adam_epsilon != _read_default(arguments, "adam_epsilon"):
        computed["eps"] = arguments.adam_epsilon
    return computed | given


def require_sole_choice(spec: str, arguments, was_passed: bool) -> None:
    """Raise `InputError` if the optimizer is also named by `optim` or was passed to the Trainer (`was_passed`)."""
    if was_passed:
        raise InputError(f"v0_optimizer={spec!r} and an optimizer passed to the Trainer: give one")
    if arguments.optim != _read_default(arguments, "optim"):
        optim = getattr(arguments.optim, "value", arguments.optim)
        raise InputError(f"v0_optimizer={spec!r} and optim={optim} both name the optimizer: give one")


def _read_default(arguments, name: str) -> Any:
    return next(field.default for field in dataclasses.fields(arguments) if field.name == name)
