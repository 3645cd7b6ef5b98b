"""A v0 that beta2 forgets, as the paper's: scale * E[g^2] of the first steps, or draws of eq. 11, in an optimizer's state."""

import torch

from ..method.strategies import compute_random_v0_mean
from ..sharding.parts import ParamShard, get_local_part
from ..sharding.processes import gather_objects
from .shards import MAX_ZERO_GRADIENTS, SteppedShards

RATIO_SAMPLES = 4096  # elements per tensor from which medians are taken


class Beta2Decay(SteppedShards):
    """Writes v0 in the first K steps; after that Adam's own update is all there is."""

    def __init__(self, *stepped) -> None:
        super().__init__(*stepped)
        self._is_finished = False
        self._num_frozen_steps = 0  # made while all that waits was frozen
        self._written: list[ParamShard] = []
        self._random_factors: dict[float | None, float] = {}  # by beta2, of draws that are sized by `decay_steps`

    def before_step(self, stepped: list[ParamShard], step: int, inverse_scale: float) -> list[str]:
        """Write v0 at step 1, refine it until step K, and write that of late parameters."""
        late: list[str] = []
        now = set(stepped)
        if step == 1:
            ready = self.find_ready([shard for shard in self.pending if shard in now])
            self._write(ready, inverse_scale)
            self.take_off_pending(ready)
            self._written += ready
            if self.estimation_steps == 1:
                self._finish(ready)
        else:
            if step <= self.estimation_steps:
                self._refine([shard for shard in self._written if shard in now], step, inverse_scale)
            elif step == self.estimation_steps + 1 and not self._is_finished:
                self._finish(self._written)
            late = self.write_late(lambda shard: self._write([shard], inverse_scale))
        is_frozen = not any(shard.param.requires_grad for shard in self.pending)
        self._num_frozen_steps = self._num_frozen_steps + 1 if is_frozen else 0
        waits = self.pending and self._num_frozen_steps < MAX_ZERO_GRADIENTS
        self.is_done = not waits and (step > self.estimation_steps or self.estimation_steps == 1)
        return late

    def load_state_dict(self, held: dict[str, dict], num_steps: int) -> list[ParamShard]:
        """Go on; the optimizer's own state has all."""
        self._written, self._is_finished = super().load_state_dict(held, num_steps), num_steps > self.estimation_steps
        return self._written

    def find_scale(self, group: dict) -> float:
        """The scale in force for a parameter group; of draws that are sized by `decay_steps` the factor on eq. 11."""
        beta2 = self.moments.read_beta2(group)
        if self.plan.init == "random" and self.plan.scale is None:
            return self._random_factors.get(beta2, 1.0)
        return self.plan.get_scale(beta2 or 0.0)

    def find_stored_scale(self, shard: ParamShard) -> float:
        """Find what leads from the second moment, as it is when v0 stands, to v0."""
        if self.estimation_steps == 1:
            return 1.0
        decayed, scale = self.moments.read_beta2(shard.group) ** self.estimation_steps, self.find_scale(shard.group)
        return scale / (1.0 - decayed + scale * decayed)  # v_K holds what K steps have added, too

    def _finish(self, written: list[ParamShard]) -> None:
        self._is_finished = True
        self.finish(written)

    def _write(self, shards: list[ParamShard], inverse_scale: float) -> None:
        """Write v0 = scale * g^2, or draws, into second moments, from the gradients of this step."""
        # A scale that is too large is refused here, before any state is made.
        scales = [self.find_scale(shard.group) for shard in shards]
        self.moments.prime(shards)
        if self.plan.init == "random":
            self._draw(shards, scales, inverse_scale)
            return
        for shard, scale in zip(shards, scales, strict=True):
            gradient, size = get_local_part(self.read_gradient(shard)), scale * inverse_scale**2
            self.moments.change(shard, lambda v, g=gradient, s=size: _add_square_(get_local_part(v).zero_(), g, s))

    def _draw(self, shards: list[ParamShard], scales: list[float], inverse_scale: float) -> None:
        """Write draws of eq. 11, and measure v0 / g^2 of the first, the median over elements; with `decay_steps`, size them by it."""
        ratios: dict[float | None, list[torch.Tensor]] = {}  # of v0 to g^2, by beta2
        for shard, scale in zip(shards, scales, strict=True):
            mean = compute_random_v0_mean(shard.full_shape, scale)
            self.moments.change(shard, lambda v, s=shard, mean=mean: self.draw(s, s.find_pieces(v), mean))
            ratio = self._sample_ratio(shard) / inverse_scale**2
            ratios.setdefault(self.moments.read_beta2(shard.group), []).append(ratio)
        if self.ratio is not None or not ratios:
            return
        if self.plan.scale is not None:
            joined = [ratio for of_beta2 in ratios.values() for ratio in of_beta2]
            self.ratio = compute_median(joined, self.is_sharded())
            return
        for beta2, of_beta2 in ratios.items():
            ratio, wanted = compute_median(of_beta2, self.is_sharded()), self.plan.get_scale(beta2)
            self._random_factors[beta2] = wanted / ratio if ratio else 1.0
            self.ratio = self.ratio or wanted
        for shard in shards:
            factor = self._random_factors[self.moments.read_beta2(shard.group)]
            self.moments.change(shard, lambda v, f=factor: get_local_part(v).mul_(f))

    def _sample_ratio(self, shard: ParamShard) -> torch.Tensor:
        """Return v0 / g^2 of about 4,096 elements that lie evenly over the whole, if here and of a gradient not zero; 1-D on the CPU."""
        v0, gradient = self.moments.read(shard), self.read_gradient(shard)
        spacing = max(1, shard.numel // RATIO_SAMPLES)
        taken, some = (get_local_part(tensor).detach().reshape(-1)[::spacing].float() for tensor in (v0, gradient))
        squared = some.square()
        nonzero = squared > 0
        return (taken[nonzero] / squared[nonzero]).cpu()

    def _refine(self, shards: list[ParamShard], step: int, inverse_scale: float) -> None:
        """Let second moments before step t be what they are after a start at scale * v_hat_t, v_hat_t being the mean of g^2 so far.

        With u the moment from a zero start, v_t = u_t + scale * beta2^t * u_t / (1 - beta2^t). So v_(t-1) gives u_(t-1), and
        v = (1 + r_t) u_(t-1) + scale * beta2^(t-1) (1 - beta2) / (1 - beta2^t) * g^2, r_t = scale * beta2^t / (1 - beta2^t), becomes v_t
        by Adam's own update.
        """
        for shard in shards:
            if shard.param.grad is None or self.moments.count_steps(shard) != step - 1:
                continue  # a step was left out
            beta2, scale = self.moments.read_beta2(shard.group), self.find_scale(shard.group)
            ratio, before = (scale * beta2**t / (1.0 - beta2**t) for t in (step, step - 1))
            of_square = scale * beta2 ** (step - 1) * (1.0 - beta2) / (1.0 - beta2**step) * inverse_scale**2
            factor, gradient = (1.0 + ratio) / (1.0 + before), get_local_part(self.read_gradient(shard))
            self.moments.change(
                shard, lambda v, f=factor, g=gradient, s=of_square: _add_square_(get_local_part(v).mul_(f), g, s)
            )


def compute_median(values: list[torch.Tensor], over_processes: bool) -> float | None:
    """Return the median of all values, of this process or over all of them; None if there is none."""
    joined = torch.cat(values) if values else torch.empty(0)
    if over_processes:
        joined = torch.cat(gather_objects(joined))
    return float(joined.median()) if joined.numel() else None


def _add_square_(out: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
    """Add factor * g^2 to `out`, in its dtype."""
    gradient = gradient.to(out.dtype)
    out.addcmul_(gradient, gradient, value=factor)
