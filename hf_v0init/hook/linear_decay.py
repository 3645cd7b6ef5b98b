"""The linear decay of v0 in an optimizer's state: `method.decay`, step by step.

In the first K steps Adam's own step is multiplied by t / L. Then the mean of g^2 that it has made is kept as rows x columns, and before
each step c_t of it is added to the second moment, so that Adam's own update gives the decay exactly, until step L takes the rest out.
"""

import logging
from dataclasses import replace

import torch

from ..estimation.spread import Elements, RowsAndColumns, add_spreads_, factor_into_rows_and_columns
from ..method.decay import compute_addend
from ..sharding.parts import ParamShard, get_local_part, with_local_part
from ..sharding.processes import compute_figures
from .shards import SteppedShards

logger = logging.getLogger("hf_v0init")

Spread = RowsAndColumns | Elements


class LinearDecay(SteppedShards):
    """A linear decay over `decay_steps` L > K; in the first K steps the hook multiplies the learning rate by t / L."""

    def __init__(self, *stepped) -> None:
        super().__init__(*stepped)
        # how E[g^2] is spread, updates made, and how much of it the second moment holds
        self._held: dict[ParamShard, tuple[Spread, int, float]] = {}

    def before_step(self, stepped: list[ParamShard], step: int, inverse_scale: float) -> list[str]:
        """Add to the second moments what the decay asks for."""
        length, first = self.plan.decay_steps, self.estimation_steps
        if length == 1:
            logger.info("v0_decay_steps=1: a linear decay over one step is stock Adam")
            self.is_done = True
            return []
        late: list[str] = []
        if step == first + 1:
            self._freeze([shard for shard in stepped if self.is_eligible(shard)])
        if first < step <= length:
            late = self.write_late(lambda shard: self._freeze_late(shard, inverse_scale))
            self._add_extra([shard for shard in stepped if shard in self._held], step, length)
        if step >= length and (self.moments.zero is None or step > length):
            self.is_done, self._held = True, {}
        return late

    def state_dict(self) -> dict[str, dict]:
        """Return what is kept, by parameter: "num_updates", "amount", and "rows" with "columns" (fp32, 1-D) or "mean" of draws."""
        return {
            shard.name: {"num_updates": num_updates, "amount": amount} | spread.state_dict()
            for shard, (spread, num_updates, amount) in self._held.items()
        }

    def load_state_dict(self, held: dict[str, dict], num_steps: int) -> list[ParamShard]:
        """Go on with what `state_dict` returned."""
        written = super().load_state_dict(held, num_steps)
        for shard in written:
            moment, entry = self.moments.read(shard), held.get(shard.name)
            if entry is None:
                continue
            if "mean" in entry:
                spread: Spread = self._draw_elements(shard, moment, entry["mean"])
            else:
                device = shard.param.device
                spread = RowsAndColumns(shard, entry["rows"].to(device), entry["columns"].to(device))
            self._held[shard] = spread, entry["num_updates"], entry["amount"]
        return written

    def find_scale(self, group: dict) -> None:
        """None: v0 is no multiple of E[g^2] that stays."""

    def find_stored_scale(self, shard: ParamShard) -> float:
        """Find what leads from the second moment, as it is when v0 stands, to E[g^2]."""
        return 1.0 / (1.0 - shard.group["betas"][1] ** self.moments.count_steps(shard))

    def _add_extra(self, shards: list[ParamShard], step: int, length: int) -> None:
        """Let second moments hold what the linear decay asks for after this step's update."""
        together: dict[float, list[ParamShard]] = {}  # what is added, as a multiple of s, to whom
        for shard in shards:
            spread, num_updates, held = self._held[shard]
            if shard.param.grad is not None:
                num_updates += 1
                beta2 = shard.group["betas"][1]
                addend, held = compute_addend(step, length, beta2, num_updates=num_updates, held=held)
            elif step == length:  # no update will take the rest out
                addend, held = -held, 0.0
            else:
                continue
            together.setdefault(addend, []).append(shard)
            self._held[shard] = spread, num_updates, held
        for addend, alike in together.items():
            add_spreads_(
                [self._held[shard][0] for shard in alike], [self.moments.read(shard) for shard in alike], addend
            )

    def _freeze(self, shards: list[ParamShard]) -> None:
        """Take the mean of g^2 that the second moments hold before step K + 1 as what v0 is made of."""
        ready = self.find_with_moment([shard for shard in shards if self.moments.count_steps(shard)])
        moments = [self.moments.read(shard) for shard in ready]
        num_updates = [self.moments.count_steps(shard) for shard in ready]
        corrections = [1.0 - shard.group["betas"][1] ** n for shard, n in zip(ready, num_updates, strict=True)]
        for shard, spread, n in zip(ready, self._spread(ready, moments, corrections), num_updates, strict=True):
            self._held[shard] = spread, n, 0.0
        self.take_off_pending(ready)
        self.finish(ready)

    def _freeze_late(self, shard: ParamShard, inverse_scale: float) -> None:
        """Take the first gradient of a parameter that had none, or zeros alone, in the first K steps: s is its square."""
        self.moments.prime([shard])  # its state stays zero
        gradient = self.read_gradient(shard)
        square = get_local_part(gradient).float().square().mul_(inverse_scale**2)
        (spread,) = self._spread([shard], [with_local_part(gradient, square)], [1.0])
        self._held[shard] = spread, self.moments.count_steps(shard) or 0, 0.0

    def _spread(self, shards: list[ParamShard], moments: list[torch.Tensor], corrections: list[float]) -> list[Spread]:
        """Make of each moment v its s = v / correction, in the form in which it is kept."""
        is_sharded = self.is_sharded()
        if self.plan.init == "random":
            means = [figures[0] for figures in compute_figures(shards, moments, is_sharded)]
            return [
                self._draw_elements(shard, moment, mean / correction)
                for shard, moment, mean, correction in zip(shards, moments, means, corrections, strict=True)
            ]
        factored = factor_into_rows_and_columns(shards, moments, is_sharded)
        for spread, correction in zip(factored, corrections, strict=True):
            spread.columns /= correction
        return factored

    def _draw_elements(self, shard: ParamShard, moment: torch.Tensor, mean: float) -> Elements:
        """Draw mean * chi^2_1 for each element, by the parameter's name."""
        pieces = shard.find_pieces(moment)
        drawn = [replace(piece, local=torch.empty_like(piece.local, dtype=torch.float32)) for piece in pieces]
        self.draw(shard, drawn, mean)
        return Elements(shard, [piece.local.to(torch.bfloat16) for piece in drawn], mean)
