"""Which parameters get a v0 from the per-sample estimation, under which names."""

import math
from dataclasses import dataclass, field

from torch import nn

from ..errors import InputError
from ..second_moment.state import SecondMoment
from ..sharding.parts import ParamShard, clean_parameter_name, is_sharded
from .strategies import is_eligible

USE_MINIBATCH = "use v0_estimator=minibatch (the default; attach_v0 in a loop of your own), which takes v0 from the run's own first steps"
NOTHING_TO_WRITE = (
    "the optimizer holds no trainable parameter of two or more dimensions of this model, so there is nothing to give a v0 to; "
    "set v0_include_bias_and_norm=True to include vectors, or v0_init=zeros"
)


def name_parameters(model: nn.Module | None) -> dict[int, str]:
    """Return id of a parameter -> its name without the prefixes of wrappers; of a shared one the first name."""
    return {} if model is None else {id(p): clean_parameter_name(name) for name, p in model.named_parameters()}


@dataclass
class PerSamplePlan:
    """What a pass before training will write.

    Attributes:
        moments: of the optimizer.
        chosen: what gets a v0: parameters of the model, each whole on this process.
        skipped: the names of those that do not, and how many elements they have.
    """

    moments: SecondMoment
    chosen: list[ParamShard] = field(default_factory=list)
    skipped: list[str] = field(default_factory=list)
    skipped_elements: int = 0

    @property
    def named_parameters(self) -> list[tuple[str, nn.Parameter]]:
        """What gets a v0, as (clean name, parameter)."""
        return [(shard.name, shard.param) for shard in self.chosen]

    @property
    def beta2(self) -> float | None:
        """Of the first group that gets a v0; None where the closed form does not hold."""
        return self.moments.read_beta2(self.chosen[0].group)


def plan_v0(optimizer, model: nn.Module, include_bias_and_norm: bool = False) -> PerSamplePlan:
    """Decide which of a model's parameters, held by an optimizer, get a v0.

    Raises:
        InputError: the optimizer has no second moment that is known here, or has state already; the model is sharded; a parameter is on
            the meta device; no parameter is left to initialise.
    """
    moments = optimizer if isinstance(optimizer, SecondMoment) else SecondMoment(optimizer)
    if moments.zero is not None or is_sharded(model):
        kind = "FSDP2 or tensor parallelism" if moments.zero is None else "DeepSpeed ZeRO"
        raise InputError(
            f"v0_estimator=per_sample under {kind} is not supported, since no process has whole gradients there: {USE_MINIBATCH}"
        )
    require_untouched(moments)
    require_materialised(model)
    names = name_parameters(model)
    plan = PerSamplePlan(moments)
    for shard in moments.list_shards(names):
        if id(shard.param) not in names or not shard.param.requires_grad:
            continue
        if is_eligible(shard.full_shape, include_bias_and_norm) and shard.param.is_floating_point():
            plan.chosen.append(shard)
        else:
            plan.skipped.append(shard.name)
            plan.skipped_elements += math.prod(shard.full_shape)
    if not plan.chosen:
        raise InputError(NOTHING_TO_WRITE)
    return plan


def require_untouched(moments: SecondMoment) -> None:
    """Raise `InputError` if an optimizer has state already."""
    if not moments.is_untouched():
        raise InputError(
            "parameters already have optimizer state: v0 is written only before the first step, and after a resume the checkpoint's state "
            "stands; build a new optimizer to start again"
        )


def require_materialised(model: nn.Module) -> None:
    """Raise `InputError` if any trained parameter is on the meta device, where nothing can be written."""
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and parameter.is_meta:
            raise InputError(
                f"parameter {clean_parameter_name(name)!r} is on the meta device, where a v0 would be lost; load or materialise the weights "
                "before building the Trainer"
            )
