"""What the report says of a v0 that was written in the first steps, and what is refused or warned of before them."""

import logging

import torch

from ..errors import InputError
from ..initialization.per_sample import NOTHING_TO_WRITE
from ..initialization.summary import add_parameters, begin_report
from ..records.report import V0Report
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.parts import ParamShard
from .beta2_decay import Beta2Decay
from .linear_decay import LinearDecay
from .shards import SteppedShards

logger = logging.getLogger("hf_v0init")

NARROW_DTYPES, SLOW_BETA2 = (torch.bfloat16, torch.float16), 0.99  # beyond which 16 bits round the decay away


def begin_decays_report(shards: SteppedShards, plan: V0Plan, decay: LinearDecay | Beta2Decay) -> V0Report:
    """Begin the report of a decay: what was asked for, of how many parameters."""
    chosen = shards.list_eligible()
    without = [shard for shard in shards.list_all() if not shards.is_eligible(shard)]
    scale = None if plan.decay == "linear" else decay.find_scale(chosen[0].group)
    report = begin_report(plan, shards.moments, chosen, without, scale=scale, seed=shards.seed)
    report.estimation_steps = decay.estimation_steps if plan.init == "data_driven" else None
    return report


def add_written(
    report: V0Report, written: list[ParamShard], shards: SteppedShards, decay: LinearDecay | Beta2Decay
) -> None:
    """Add the statistics of what stands in the second moments."""
    moments = shards.moments
    named = [(shard.name, shard.full_shape, moments.read(shard)) for shard in written]
    scales = [_find_stored_scale(shard, moments, decay) for shard in written]
    add_parameters(report, named, shards.is_sharded(), scales)


def _find_stored_scale(shard: ParamShard, moments: SecondMoment, decay: LinearDecay | Beta2Decay) -> float:
    """Find what leads from the second moment, as it is when the report is made, to v0; with a linear decay to E[g^2]."""
    if isinstance(decay, LinearDecay):
        return 1.0 / (1.0 - shard.group["betas"][1] ** moments.count_steps(shard))
    if decay.estimation_steps == 1:
        return 1.0
    decayed, scale = moments.read_beta2(shard.group) ** decay.estimation_steps, decay.find_scale(shard.group)
    return scale / (1.0 - decayed + scale * decayed)  # v_K holds what K steps have added, too


def require_possible(shards: SteppedShards, plan: V0Plan, estimation_steps: int) -> None:
    """Raise `InputError` for what cannot get a v0, before any step; warn where a linear one would leave late."""
    moments, every = shards.moments, shards.list_all()
    is_known = shards.model is not None and moments.zero is None
    if is_known and not any(shard.param.is_meta for shard in every) and not shards.list_eligible():
        raise InputError(NOTHING_TO_WRITE)
    if plan.decay == "linear":
        moments.require_linear_decay()
        _warn_of_narrow_states(every)
        return
    for group in moments.list_groups():
        beta2 = moments.read_beta2(group)
        needs_beta2 = plan.decay_steps is not None or (plan.init == "data_driven" and estimation_steps > 1)
        if needs_beta2 and beta2 is None:
            asked = "v0_decay_steps" if plan.decay_steps is not None else "v0_estimation_steps above 1"
            raise InputError(
                f"{asked} with {moments.name}: its second moment is no decaying mean of g^2; use v0_scale, and "
                "v0_estimation_steps=1"
            )
        if isinstance(plan.decay_steps, int):
            plan.get_scale(beta2)  # too large a scale is refused now


def _warn_of_narrow_states(shards: list[ParamShard]) -> None:
    """Say where the second moment's own rounding keeps v0 from leaving on time."""
    slow = max((shard.group["betas"][1] for shard in shards if shard.param.dtype in NARROW_DTYPES), default=0.0)
    if slow > SLOW_BETA2:
        logger.warning(
            f"the second moment is kept in 16 bits with beta2 {slow:g}, whose rounding lets v0 leave late (a fifth of the step is missing "
            "at the end of the decay): keep the weights in fp32 (--bf16 does), or use --adam_beta2 0.98"
        )
