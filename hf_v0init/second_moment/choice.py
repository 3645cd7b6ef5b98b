"""The optimizer that `--v0_optimizer package:Class` names, and the arguments it is built with. Knows no Trainer.

`--optim_args "k=v,..."` wins. Else lr, betas and weight decay (in the Trainer's groups) are the Trainer's, as for its own
optimizers; eps is the Trainer's only if it was changed, since optimizers use it in ways that ask for other sizes (AdaBelief's
1e-16 is added to the second moment at each step) and the Trainer's default would replace theirs.
"""

import ast
import dataclasses
import difflib
import importlib
import inspect
from typing import Any

import torch

from ..errors import InputError

_WORDS = {"true": True, "false": False, "none": None}


def load_optimizer_class(spec: str) -> type[torch.optim.Optimizer]:
    """Load the class that `package:Class` names, such as `pytorch_optimizer:AdaBelief`.

    Raises:
        InputError: not of that form, no such package or class, or no torch optimizer.
    """
    module_name, _, class_name = spec.partition(":")
    if not (module_name and class_name.isidentifier()):
        raise InputError(f"v0_optimizer={spec!r}: give package:Class, such as pytorch_optimizer:AdaBelief")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise InputError(f"v0_optimizer={spec!r}: {module_name} cannot be imported ({error}); install it") from error
    found = getattr(module, class_name, None)
    if isinstance(found, type) and issubclass(found, torch.optim.Optimizer):
        return found
    names = [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, torch.optim.Optimizer)]
    close = difflib.get_close_matches(class_name, names, n=3, cutoff=0.4) or sorted(names)[:5]
    known = f"; it has {', '.join(close)}" if close else ""
    raise InputError(f"v0_optimizer={spec!r}: {module_name} has no optimizer class {class_name}{known}")


def parse_optimizer_arguments(text: str | None) -> dict[str, Any]:
    """Parse `k=v,...`, where values are numbers, true, false, none, (tuples, of, numbers) or else words.

    Raises:
        InputError: a part that is not k=v.
    """
    parsed = {}
    for part in _split_outside_brackets(text or ""):
        key, equals, value = (piece.strip() for piece in part.partition("="))
        if not (equals and key.isidentifier() and value):
            raise InputError(
                f"optim_args={text!r}: {part.strip()!r} is not of the form name=value; separate them by commas"
            )
        if value.lower() in _WORDS:
            parsed[key] = _WORDS[value.lower()]
            continue
        try:
            parsed[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed[key] = value
    return parsed


def _split_outside_brackets(text: str) -> list[str]:
    parts, depth = [""], 0
    for character in text:
        depth += (character in "([") - (character in ")]")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part for part in parts if part.strip()]


def compute_optimizer_arguments(optimizer_class: type[torch.optim.Optimizer], arguments) -> dict[str, Any]:
    """Compute the keyword arguments to build `optimizer_class` with, from `TrainingArguments`.

    Raises:
        InputError: optim_args names what the class does not take, or weight_decay; weight_decay is set and the class takes
            none.
    """
    parameters = inspect.signature(optimizer_class.__init__).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    names = [name for name, p in parameters.items() if p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)][2:]
    given = parse_optimizer_arguments(arguments.optim_args)
    for key in given:
        close = difflib.get_close_matches(key, names, n=1)
        if key not in names and (close or not takes_any):
            raise InputError(
                f"optim_args={arguments.optim_args!r}: {optimizer_class.__name__} takes no argument {key!r}; "
                + (f"did you mean {close[0]}?" if close else f"it takes {', '.join(names)}")
            )
    if "weight_decay" in given:
        raise InputError(
            f"optim_args={arguments.optim_args!r}: weight_decay here would be overruled by the Trainer's parameter groups; "
            f"use --weight_decay {given['weight_decay']}"
        )
    if arguments.weight_decay and "weight_decay" not in names:
        raise InputError(
            f"weight_decay={arguments.weight_decay}: {optimizer_class.__name__} takes no weight_decay; set it to 0"
        )
    computed: dict[str, Any] = {}
    if "lr" in names:
        computed["lr"] = arguments.learning_rate
    if "betas" in names:
        own = parameters["betas"].default
        further = tuple(own[2:]) if isinstance(own, (tuple, list)) else ()
        computed["betas"] = (arguments.adam_beta1, arguments.adam_beta2, *further)
    default_eps = {f.name: f.default for f in dataclasses.fields(arguments)}["adam_epsilon"]
    if "eps" in names and arguments.adam_epsilon != default_eps:
        computed["eps"] = arguments.adam_epsilon
    return computed | given


def require_sole_choice(spec: str, arguments, was_passed: bool) -> None:
    """Raise `InputError` if the optimizer is also named by `optim` or was passed to the Trainer (`was_passed`)."""
    if was_passed:
        raise InputError(f"v0_optimizer={spec!r} and an optimizer passed to the Trainer: give one")
    fields = {f.name: f.default for f in dataclasses.fields(arguments)}
    optim = getattr(arguments.optim, "value", arguments.optim)
    if optim != getattr(fields["optim"], "value", fields["optim"]):
        raise InputError(f"v0_optimizer={spec!r} and optim={optim} both name the optimizer: give one")
