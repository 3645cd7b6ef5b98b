"""What an optimizer steps, as the decays of v0 see it: which tensors get one, their second moments and their gradients."""

import logging
import math
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..initialization.plan import name_parameters
from ..initialization.strategies import is_eligible
from ..initialization.summary import describe_not_finite
from ..second_moment.state import Part, SecondMoments, StoredTensor
from ..sharding.draws import draw_standard_normal_
from ..sharding.parts import Piece, get_local_part, is_dtensor
from ..sharding.tensor_statistics import compute_figures

logger = logging.getLogger("hf_v0init")

MAX_ZERO_GRADIENTS = 100  # of a late parameter, before it is left at v0 = 0
ZERO, USABLE, NOT_FINITE = 0, 1, 2


class SteppedTensors:
    """The tensors of one optimizer, and which of them still wait for a v0.

    Args:
        moments: of the optimizer; replaced by `V0Hook.bind`.
        model: whose names the parameters have; None: they are named by their place in the optimizer.
        include_bias_and_norm: whether tensors of fewer than two dimensions get a v0.
        seed: of draws.

    Attributes:
        pending: what is still to get a v0.
        without_gradient: the names in it, for the report.
    """

    def __init__(self, moments: SecondMoments, model: nn.Module | None, include_bias_and_norm: bool, seed: int) -> None:
        self.moments, self.model, self.seed = moments, model, seed
        self.include_bias_and_norm = include_bias_and_norm
        self.pending: list[StoredTensor] = []
        self._stored: dict[torch.Tensor, StoredTensor] = {}
        self._num_parameters = 0
        self._zero_gradients: dict[torch.Tensor, int] = {}

    def list_stored(self) -> list[StoredTensor]:
        """List what the optimizer steps; what was added since the last call waits for its first gradient."""
        if sum(len(group["params"]) for group in self.moments.list_groups()) != self._num_parameters:
            self._num_parameters = sum(len(group["params"]) for group in self.moments.list_groups())
            known, was_empty = self._stored, not self._stored
            found = self.moments.list_tensors(name_parameters(self.model))
            self._stored = {one.tensor: known.get(one.tensor, one) for one in found}
            if not was_empty:
                added = [one for tensor, one in self._stored.items() if tensor not in known]
                self.pending += [one for one in added if self.is_eligible(one)]
        return list(self._stored.values())

    def eligible_parts(self, one: StoredTensor) -> list[Part]:
        """List the parts of a tensor that get a v0: all of it or nothing, but under ZeRO."""
        return [part for part in one.parts if is_eligible(part.full_shape, self.include_bias_and_norm)]

    def is_eligible(self, one: StoredTensor) -> bool:
        """Whether any of a tensor gets a v0."""
        return one.tensor.is_floating_point() and bool(self.eligible_parts(one))

    def read(self, one: StoredTensor) -> torch.Tensor:
        """Return a tensor's second moment, which must exist: the live tensor, or a copy in fp32 where it is quantised or a root."""
        return self.moments.layout.read(self.moments.find_state(one.tensor, one.group))

    def read_gradient(self, one: StoredTensor) -> torch.Tensor:
        """Return a tensor's gradient, placed as the tensor itself where it is sharded."""
        gradient = one.tensor.grad.detach()
        if is_dtensor(gradient) and gradient.placements != one.tensor.placements:
            gradient = gradient.redistribute(placements=one.tensor.placements)
        return gradient

    def is_sharded(self) -> bool:
        """Whether this process holds parts of tensors alone."""
        return self.moments.zero is not None or any(is_dtensor(one.tensor) for one in self.list_stored())

    def classify(self, tensors: list[torch.Tensor]) -> list[int]:
        """Say of each gradient, over all processes, whether it is zero, usable or not finite."""
        if any(tensor.is_sparse for tensor in tensors):
            raise InputError(
                "a parameter has a sparse gradient, of which no v0 is taken; build the embedding with sparse=False"
            )
        local = [get_local_part(tensor.detach()) for tensor in tensors]
        kinds = torch.zeros(len(tensors), dtype=torch.int64)
        by_device: dict[torch.device, list[int]] = {}
        for place, part in enumerate(local):
            if part.numel():
                by_device.setdefault(part.device, []).append(place)
        for places in by_device.values():
            extremes = [torch.stack(torch.aminmax(local[place])).float() for place in places]
            values = torch.stack(extremes).abs().amax(1).cpu()  # one wait per device
            kinds[places] = torch.where(values.isfinite(), (values > 0).long() * USABLE, NOT_FINITE)
        if self.is_sharded() and dist.is_initialized() and dist.get_world_size() > 1:
            on_device = kinds.to(local[0].device) if local else kinds
            dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
            kinds = on_device.cpu()
        return kinds.tolist()

    def find_ready(self, stored: list[StoredTensor]) -> list[StoredTensor]:
        """Find those with a gradient that is not zero; refuse one that is not finite."""
        stored = [one for one in stored if one.tensor.grad is not None]
        if not stored:
            return []
        kinds = self.classify([one.tensor.grad for one in stored])
        require_finite(stored, kinds)
        return [one for one, kind in zip(stored, kinds, strict=True) if kind == USABLE]

    def read_largest(self, stored: list[StoredTensor]) -> list[float]:
        """Read the largest element of each second moment; refuse those that are not finite."""
        named = [(one, part.name, part.cut(self.read(one))) for one in stored for part in one.parts]
        statistics = compute_figures([moment for _, _, moment in named], self.is_sharded())
        largest = dict.fromkeys((one.tensor for one in stored), 0.0)
        for (one, name, _), values in zip(named, statistics, strict=True):
            if not all(math.isfinite(value) for value in values[:3]):
                raise InputError(describe_not_finite(name))
            largest[one.tensor] = max(largest[one.tensor], values[2])
        return list(largest.values())

    def draw(self, part: Part, piece: Piece, mean: float) -> None:
        """Fill a piece of a parameter's second moment with mean * chi^2_1, drawn by the parameter's name."""
        draw_standard_normal_(
            piece.local,
            name=part.name,
            seed=self.seed,
            full_shape=piece.full_shape,
            offset=piece.offset,
            transform=lambda z: z.square_().mul_(mean),
        )

    def write_late(self, write: Callable[[StoredTensor], None]) -> list[str]:
        """Give a v0, by `write`, to what has its first gradient now; returns the parameters' names."""
        with_gradient = [one for one in self.pending if one.tensor.grad is not None]
        ready = self.find_ready(with_gradient)
        for one in with_gradient:
            if one in ready:
                write(one)
            else:
                self._zero_gradients[one.tensor] = self._zero_gradients.get(one.tensor, 0) + 1
        hopeless = [one for one in self.pending if self._zero_gradients.get(one.tensor, 0) >= MAX_ZERO_GRADIENTS]
        self.take_off_pending(ready + hopeless)
        names = [part.name for one in ready for part in self.eligible_parts(one)]
        if names:
            shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
            logger.info(f"v0 written at the first gradient of {len(names)} further tensors: {shown}")
        return names

    def take_off_pending(self, stored: list[StoredTensor]) -> None:
        """These have got a v0, or never will."""
        self.pending = [one for one in self.pending if one not in stored]

    @property
    def without_gradient(self) -> list[str]:
        """The names of the parameters that still wait."""
        return [part.name for one in self.pending for part in self.eligible_parts(one)]


def require_finite(stored: list[StoredTensor], kinds: list[int]) -> None:
    """Raise `InputError` if a gradient is not finite, naming its parameter."""
    for one, kind in zip(stored, kinds, strict=True):
        if kind == NOT_FINITE:
            raise InputError(describe_not_finite(one.parts[0].name))
