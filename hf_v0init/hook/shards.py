"""What an optimizer steps, as the decays of v0 see it: which shards get one, their second moments and their gradients."""

import logging
from collections.abc import Callable, Iterable

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..method.strategies import is_eligible
from ..records.report import describe_not_finite
from ..second_moment.state import SecondMoment
from ..settings import V0Plan
from ..sharding.draws import draw_standard_normal_
from ..sharding.parts import ParamShard, Piece, get_local_part, is_dtensor, name_parameters, read_gradient
from ..sharding.processes import get_rank_and_world_size

logger = logging.getLogger("hf_v0init")

MAX_ZERO_GRADIENTS = 100  # of a late parameter, or steps in which it is frozen, before it is left at v0 = 0
ZERO, USABLE, NOT_FINITE = 0, 1, 2
NOTHING_TO_WRITE = (
    "the optimizer holds no trainable parameter of two or more dimensions of this model, so there is nothing to give a v0 to; "
    "set v0_include_bias_and_norm=True to include vectors, or v0_init=zeros"
)


class SteppedShards:
    """The shards that one optimizer steps, and which of them still wait for a v0; the two decays write it and let it go.

    Args:
        moments: of the optimizer.
        model: whose names the parameters have; None: they are named by their place in the optimizer.
        plan: which tensors get a v0, and the seed of draws.

    Attributes:
        estimation_steps: K, as `require_possible` has found it.
        pending: what is still to get a v0.
        is_done: whether nothing is left to do.
        ratio: v0 / g^2 of draws, the median over elements; None for others.
        finish: called with the shards whose v0 stands.
    """

    is_done, ratio = False, None
    finish: Callable[[list[ParamShard]], None]

    def __init__(self, moments: SecondMoment, model: nn.Module | None, plan: V0Plan) -> None:
        self.moments, self.model, self.plan = moments, model, plan
        self.estimation_steps = 1
        self.pending: list[ParamShard] = []
        self._known: dict[tuple, ParamShard] = {}  # by tensor and name
        self._num_parameters = 0
        self._num_zero_gradients: dict[ParamShard, int] = {}

    def list_all(self) -> list[ParamShard]:
        """List what the optimizer steps; what was added since the last call waits for its first gradient."""
        num_parameters = sum(len(group["params"]) for group in self.moments.list_groups())
        if num_parameters != self._num_parameters:
            self._num_parameters, known = num_parameters, self._known
            found = self.moments.list_shards(name_parameters(self.model))
            self._known = {key: known.get(key, shard) for shard in found for key in [(shard.param, shard.name)]}
            if known:
                added = [shard for key, shard in self._known.items() if key not in known]
                self.pending += [shard for shard in added if self.is_eligible(shard)]
        return list(self._known.values())

    def list_eligible(self) -> list[ParamShard]:
        """List the shards that get a v0."""
        return [shard for shard in self.list_all() if self.is_eligible(shard)]

    def is_eligible(self, shard: ParamShard) -> bool:
        """Whether a shard gets a v0."""
        return shard.param.is_floating_point() and is_eligible(shard.full_shape, self.plan.include_bias_and_norm)

    def require_possible(self, max_steps: int | None) -> None:
        """Choose K, the steps over which E[g^2] is estimated, if the plan can be followed.

        Raises:
            InputError: nothing can get a v0; the optimizer does not allow this one; K does not fit.
        """
        plan, moments, every = self.plan, self.moments, self.list_all()
        self.estimation_steps = plan.choose_estimation_steps(max_steps)
        if plan.estimation_steps is None and moments.read_beta2() is None:
            self.estimation_steps = 1
        is_known = self.model is not None and moments.zero is None
        if is_known and not any(shard.param.is_meta for shard in every) and not self.list_eligible():
            raise InputError(NOTHING_TO_WRITE)
        if plan.decay == "linear":
            moments.require_linear_decay()
            return
        for group in moments.list_groups():
            beta2 = moments.read_beta2(group)
            needs_beta2 = plan.decay_steps is not None or (plan.init == "data_driven" and self.estimation_steps > 1)
            if needs_beta2 and beta2 is None:
                asked = "v0_decay_steps" if plan.decay_steps is not None else "v0_estimation_steps above 1"
                remedy = "v0_scale" if plan.estimator == "per_sample" else "v0_scale, and v0_estimation_steps=1"
                raise InputError(
                    f"{asked} with {moments.name}: its second moment is no decaying mean of g^2; use {remedy}"
                )
            if isinstance(plan.decay_steps, int):
                plan.get_scale(beta2)  # too large a scale is refused now

    def read_gradient(self, shard: ParamShard) -> torch.Tensor:
        """Return a shard's gradient, placed as the parameter itself where it is a DTensor."""
        return shard.cut(read_gradient(shard.param))

    def is_sharded(self) -> bool:
        """Whether this process holds parts of tensors alone."""
        return self.moments.zero is not None or any(is_dtensor(shard.param) for shard in self.list_all())

    def find_ready(self, shards: list[ParamShard]) -> list[ParamShard]:
        """Find those whose tensor has, over all processes, a gradient that is not zero; refuse one that is not finite."""
        gradients = {shard.param: shard.param.grad.detach() for shard in shards if shard.param.grad is not None}
        if any(gradient.is_sparse for gradient in gradients.values()):
            raise InputError(
                "a parameter has a sparse gradient, of which no v0 is taken; build the embedding with sparse=False"
            )
        return self._find_usable(shards, gradients)

    def find_with_moment(self, shards: list[ParamShard]) -> list[ParamShard]:
        """Find those whose tensor has a second moment that is not zero; refuse one that is not finite."""
        return self._find_usable(shards, {shard.param: self.moments.read_whole(shard) for shard in shards})

    def _find_usable(self, shards: list[ParamShard], tensors: dict[torch.Tensor, torch.Tensor]) -> list[ParamShard]:
        """Find the shards of whose parameters there is a tensor that is not zero; refuse one that is not finite."""
        if not tensors:
            return []
        local = [get_local_part(tensor) for tensor in tensors.values()]
        kinds = torch.zeros(len(local), dtype=torch.int64)
        places = [place for place, part in enumerate(local) if part.numel()]
        if places:
            device = local[places[0]].device  # one that is waited for once
            extremes = [torch.stack(torch.aminmax(local[place])).float().to(device) for place in places]
            values = torch.stack(extremes).abs().amax(1).cpu()
            kinds[places] = torch.where(values.isfinite(), (values > 0).long() * USABLE, NOT_FINITE)
        if self.is_sharded() and get_rank_and_world_size()[1] > 1:
            on_device = kinds.to(local[0].device)
            dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
            kinds = on_device.cpu()
        found = dict(zip(tensors, kinds.tolist(), strict=True))
        for shard in shards:
            if found.get(shard.param) == NOT_FINITE:
                raise InputError(describe_not_finite(shard.name))
        return [shard for shard in shards if found.get(shard.param) == USABLE]

    def draw(self, shard: ParamShard, pieces: list[Piece], mean: float) -> None:
        """Fill the pieces of a shard with mean * chi^2_1, drawn by the parameter's name."""
        for piece in pieces:
            draw_standard_normal_(
                piece.local,
                name=shard.name,
                seed=self.plan.seed,
                full_shape=piece.full_shape,
                offset=piece.offset,
                transform=lambda z: z.square_().mul_(mean),
            )

    def write_late(self, write: Callable[[ParamShard], None]) -> list[str]:
        """Give a v0, by `write`, to what has its first gradient now; returns the parameters' names."""
        with_gradient = [shard for shard in self.pending if shard.param.grad is not None]
        ready = self.find_ready(with_gradient)
        are_ready = set(ready)
        for shard in with_gradient:
            if shard in are_ready:
                write(shard)
            else:
                self._num_zero_gradients[shard] = self._num_zero_gradients.get(shard, 0) + 1
        given_up = [shard for shard, number in self._num_zero_gradients.items() if number >= MAX_ZERO_GRADIENTS]
        self.take_off_pending(ready + given_up)
        names = [shard.name for shard in ready]
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            logger.info(f"v0 written at the first gradient of {len(names)} further tensors: {shown}")
        return names

    def take_off_pending(self, shards: Iterable[ParamShard]) -> None:
        """These have got a v0, or never will."""
        done = set(shards)
        self.pending = [shard for shard in self.pending if shard not in done]

    def state_dict(self) -> dict[str, dict]:
        """Return what is kept beside the optimizer's own state, by parameter."""
        return {}

    def load_state_dict(self, held: dict[str, dict], num_steps: int) -> list[ParamShard]:
        """Go on after `num_steps` steps, the optimizer's own state loaded; returns the shards that have got a v0."""
        eligible = self.list_eligible()
        written = [shard for shard in eligible if self.moments.read(shard) is not None]
        self.pending = [shard for shard in eligible if shard not in written]
        return written
