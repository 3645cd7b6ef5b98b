"""The linear decay of v0 in an optimizer's state: `method.decay`, step by step.

In the first K steps Adam's own step is multiplied by t / L. Then the mean of g^2 that it has made is kept as rows x columns, and before
each step c_t of it is added to the second moment, so that Adam's own update gives the decay exactly, until step L takes the rest out.
"""

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from ..estimation.spread import Elements, RowsAndColumns, factor_into_rows_and_columns
from ..method.decay import compute_addend
from ..second_moment.state import Part, StoredTensor
from ..settings import V0Plan
from ..sharding.parts import Fragment, find_pieces, get_local_part, is_dtensor
from ..sharding.tensor_statistics import compute_figures
from .tensors import SteppedTensors

logger = logging.getLogger("hf_v0init")


class LinearDecay:
    """What a linear decay keeps between steps, and what it does before each.

    Args:
        tensors: of the optimizer.
        plan: with `decay_steps` L a number.
        estimation_steps: K < L.
        lend: sets a value of a parameter group for one step.
        finish: called with the tensors whose v0 stands, at step K + 1.

    Attributes:
        is_done: whether nothing is left to do.
    """

    def __init__(
        self,
        tensors: SteppedTensors,
        plan: V0Plan,
        estimation_steps: int,
        lend: Callable[[dict, str, Any], None],
        finish: Callable[[list[StoredTensor]], None],
    ) -> None:
        self.tensors, self.plan, self.estimation_steps = tensors, plan, estimation_steps
        self.lend, self.finish = lend, finish
        self.is_done = False
        # how E[g^2] is spread, updates made, and how much of it the second moment holds
        self._held: dict[torch.Tensor, tuple[dict[str, RowsAndColumns | Elements], int, float]] = {}

    @property
    def moments(self):
        """The optimizer's second moments."""
        return self.tensors.moments

    def before_step(self, optimizer, stepped: list[StoredTensor], step: int, inverse_scale: float) -> list[str]:
        """Prepare optimizer step t; returns the names of parameters that got their v0 late."""
        length, first = self.plan.decay_steps, self.estimation_steps
        if length == 1:
            logger.info("v0_decay_steps=1: a linear decay over one step is stock Adam")
            self.is_done = True
            return []
        late: list[str] = []
        if step <= first:
            for group in optimizer.param_groups:
                self.lend(group, "lr", group["lr"] * (step / length))
        if step == first + 1:
            self._freeze([one for one in stepped if self.tensors.is_eligible(one)])
        if first < step <= length:
            late = self.tensors.write_late(lambda one: self._freeze_late(one, inverse_scale))
            for one in stepped:
                if one.tensor in self._held:
                    self._add_extra(one, step, length)
        if step >= length and (self.moments.zero is None or step > length):
            self.is_done, self._held = True, {}
        return late

    def state_dict(self) -> dict[str, dict]:
        """Return what is kept, by parameter: "num_updates", "amount", and "rows" with "columns" (fp32, 1-D) or "mean" of draws."""
        held = {}
        for one in self.tensors.list_stored():
            spread, num_updates, amount = self._held.get(one.tensor, ({}, 0, 0.0))
            for name in spread:
                held[name] = {"num_updates": num_updates, "amount": amount} | spread[name].state_dict()
        return held

    def load_state_dict(self, held: dict[str, dict]) -> None:
        """Take over what `state_dict` returned. The optimizer has loaded its own state."""
        self._held = {}
        for one in self.tensors.list_stored():
            own = {part.name: held[part.name] for part in one.parts if part.name in held}
            if own and self.moments.find_state(one.tensor, one.group) is not None:
                first = next(iter(own.values()))
                spread = {name: self._load_spread(one, name, entry) for name, entry in own.items()}
                self._held[one.tensor] = spread, first["num_updates"], first["amount"]

    def _load_spread(self, one: StoredTensor, name: str, entry: dict) -> RowsAndColumns | Elements:
        if "mean" not in entry:
            return RowsAndColumns(entry["rows"].to(one.tensor.device), entry["columns"].to(one.tensor.device))
        part = next(part for part in one.parts if part.name == name)
        return self._draw_elements(part, part.cut(self.tensors.read(one)), entry["mean"])

    def _add_extra(self, one: StoredTensor, step: int, length: int) -> None:
        """Let the second moment hold what the linear decay asks for after this step's update."""
        spread, num_updates, held = self._held[one.tensor]
        if one.tensor.grad is not None:
            num_updates += 1
            beta2 = one.group["betas"][1]
            addend, held = compute_addend(step, length, beta2, num_updates=num_updates, held=held)
        elif step == length:  # no update will take the rest out
            addend, held = -held, 0.0
        else:
            return
        moment = self.tensors.read(one)
        for part in self.tensors.eligible_parts(one):
            spread[part.name].add_(part.cut(moment), addend)
        self._held[one.tensor] = spread, num_updates, held

    def _freeze(self, stored: list[StoredTensor]) -> None:
        """Take the mean of g^2 that the second moments hold before step K + 1 as what v0 is made of."""
        stepped = [one for one in stored if self.moments.count_steps(one)]
        ready = [one for one, largest in zip(stepped, self.tensors.read_largest(stepped), strict=True) if largest > 0.0]
        for one, spread in zip(ready, self._spread(ready), strict=True):
            self._held[one.tensor] = spread, self.moments.count_steps(one), 0.0
        self.tensors.take_off_pending(ready)
        self.finish(ready)

    def _spread(self, stored: list[StoredTensor]) -> list[dict[str, RowsAndColumns | Elements]]:
        """Make of each second moment v its s = v / (1 - beta2^n), part by part, in the form in which it is kept."""
        corrections = {one.tensor: 1.0 - one.group["betas"][1] ** self.moments.count_steps(one) for one in stored}
        named = [
            (one, part, part.cut(self.tensors.read(one))) for one in stored for part in self.tensors.eligible_parts(one)
        ]
        spread: dict[torch.Tensor, dict] = {one.tensor: {} for one in stored}
        if self.plan.init == "random":
            means = compute_figures([moment for _, _, moment in named], self.tensors.is_sharded())
            for (one, part, moment), (mean, *_) in zip(named, means, strict=True):
                spread[one.tensor][part.name] = self._draw_elements(part, moment, mean / corrections[one.tensor])
        else:
            factored = factor_into_rows_and_columns(
                [(moment, part.full_shape) for _, part, moment in named], self.tensors.is_sharded()
            )
            for (one, part, _), own in zip(named, factored, strict=True):
                own.columns /= corrections[one.tensor]
                spread[one.tensor][part.name] = own
        return [spread[one.tensor] for one in stored]

    def _draw_elements(self, part: Part, moment: torch.Tensor, mean: float) -> Elements:
        """Draw mean * chi^2_1 for each element, by the parameter's name."""
        drawn = [torch.empty_like(piece.local, dtype=torch.float32) for piece in find_pieces(moment)]
        for piece, own in zip(find_pieces(moment), drawn, strict=True):
            self.tensors.draw(part, replace(piece, local=own), mean)
        return Elements([own.to(torch.bfloat16) for own in drawn], mean)

    def _freeze_late(self, one: StoredTensor, inverse_scale: float) -> None:
        """Take the first gradient of a parameter that had none, or zeros alone, in the first K steps: s is its square."""
        gradient = self.tensors.read_gradient(one)
        self.moments.change(one, [], lambda part, moment: None)  # creates its state, which stays zero
        spread: dict[str, RowsAndColumns | Elements] = {}
        for part in self.tensors.eligible_parts(one):
            square = part.cut(gradient)
            square = get_local_part(square).float().square().mul_(inverse_scale**2)
            held = _with_local(part.cut(gradient), square)
            if self.plan.init == "random":
                ((mean, *_),) = compute_figures([held], self.tensors.is_sharded())
                spread[part.name] = self._draw_elements(part, held, mean)
            else:
                (spread[part.name],) = factor_into_rows_and_columns(
                    [(held, part.full_shape)], self.tensors.is_sharded()
                )
        self._held[one.tensor] = spread, self.moments.count_steps(one) or 0, 0.0


def _with_local(held: torch.Tensor | Fragment, local: torch.Tensor) -> torch.Tensor | Fragment:
    """Return other values that lie as `held` does: whole, a DTensor or a fragment."""
    if isinstance(held, Fragment):
        return replace(held, local=local)
    if not is_dtensor(held):
        return local
    return type(held).from_local(
        local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )
