"""Which parameters get a v0, under which names."""

import math
from dataclasses import dataclass, field

from torch import nn

from ..errors import InputError
from ..second_moment.state import SecondMoments
from ..sharding.parts import clean_parameter_name, get_full_shape, is_sharded
from .strategies import is_eligible


def name_parameters(model: nn.Module | None) -> dict[int, str]:
    """Return id of a parameter -> its name without the prefixes of wrappers; of a shared one the first name."""
    return {} if model is None else {id(p): clean_parameter_name(name) for name, p in model.named_parameters()}


@dataclass
class V0Plan:
    """What a pass before training will write.

    Attributes:
        moments: of the optimizer.
        named_parameters: those that get a v0, as (clean name, parameter).
        skipped: the names of those that do not, and how many elements they have.
        is_sharded: this process holds only parts of the parameters.
        beta2: of the first group that gets a v0; None where the closed form does not hold.
    """

    moments: SecondMoments
    named_parameters: list[tuple[str, nn.Parameter]] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    skipped_elements: int = 0
    is_sharded: bool = False
    beta2: float | None = None


def plan_v0(optimizer, model: nn.Module, include_bias_and_norm: bool = False) -> V0Plan:
    """Decide which of a model's parameters, held by an optimizer, get a v0.

    Raises:
        InputError: the optimizer has no second moment that is known here, a parameter is on the meta device, or no parameter
            is left to initialise.
    """
    moments = optimizer if isinstance(optimizer, SecondMoments) else SecondMoments(optimizer)
    groups = {id(p): group for group in moments.list_groups() for p in group["params"]}
    plan = V0Plan(moments)
    for name, parameter in model.named_parameters():
        name = clean_parameter_name(name)
        group = groups.get(id(parameter))
        if group is None or not parameter.requires_grad:
            continue
        _require_memory(name, parameter)
        shape = get_full_shape(parameter)
        if is_eligible(shape, include_bias_and_norm) and parameter.is_floating_point():
            if not plan.named_parameters:
                plan.beta2 = moments.read_beta2(group)
            plan.named_parameters.append((name, parameter))
        else:
            plan.skipped.append(name)
            plan.skipped_elements += math.prod(shape)
    if not plan.named_parameters:
        raise InputError(NOTHING_TO_WRITE)
    plan.is_sharded = is_sharded(model) or moments.zero is not None
    return plan


def require_materialised(model: nn.Module) -> None:
    """Raise `InputError` if any trained parameter is on the meta device, where nothing can be written."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            _require_memory(clean_parameter_name(name), parameter)


def _require_memory(name: str, parameter: nn.Parameter) -> None:
    if parameter.is_meta:
        raise InputError(
            f"parameter {name!r} is on the meta device, where a v0 would be lost; load or materialise the weights before building "
            "the Trainer"
        )


NOTHING_TO_WRITE = (
    "the optimizer holds no trainable parameter of two or more dimensions of this model, so there is nothing to give a v0 to; "
    "set v0_include_bias_and_norm=True to include vectors, or v0_init=zeros"
)
