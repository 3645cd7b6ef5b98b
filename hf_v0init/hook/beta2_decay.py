"""A v0 that beta2 forgets, as the paper's: scale * E[g^2] of the first steps, or draws of eq. 11, in an optimizer's state."""

from collections.abc import Callable

import torch

from ..initialization.strategies import compute_random_v0_mean
from ..initialization.summary import compute_median, sample_ratio
from ..second_moment.state import Part, StoredTensor
from ..settings import V0Plan
from ..sharding.parts import Fragment, find_pieces, get_local_part, split_rows
from .tensors import SteppedTensors


class Beta2Decay:
    """Writes v0 in the first K steps; after that Adam's own update is all there is.

    Args:
        tensors: of the optimizer.
        plan: with `scale`, or `decay_steps` that asks for one.
        estimation_steps: K.
        finish: called with the tensors whose v0 stands.

    Attributes:
        is_done: whether nothing is left to do.
        ratio: v0 / g^2 of draws, the median over elements; None for others.
    """

    def __init__(
        self,
        tensors: SteppedTensors,
        plan: V0Plan,
        estimation_steps: int,
        finish: Callable[[list[StoredTensor]], None],
    ) -> None:
        self.tensors, self.plan, self.estimation_steps, self.finish = tensors, plan, estimation_steps, finish
        self.is_done, self.ratio = False, None
        self._is_finished = False
        self._written: list[StoredTensor] = []
        self._random_factors: dict[float | None, float] = {}  # by beta2, of draws that are sized by `decay_steps`

    @property
    def moments(self):
        """The optimizer's second moments."""
        return self.tensors.moments

    def before_step(self, optimizer, stepped: list[StoredTensor], step: int, inverse_scale: float) -> list[str]:
        """Prepare optimizer step t; returns the names of parameters that got their v0 late."""
        tensors, late = self.tensors, []
        if step > 1:
            if step <= self.estimation_steps:
                for one in self._written:
                    is_late = self.moments.count_steps(one) != step - 1
                    if one in stepped and one.tensor.grad is not None and not is_late:
                        self._refine(one, step, inverse_scale)
            elif step == self.estimation_steps + 1 and not self._is_finished:
                self._is_finished = True
                self.finish(self._written)
            late = tensors.write_late(lambda one: self._write([one], inverse_scale))
        else:
            ready = tensors.find_ready([one for one in tensors.pending if one in stepped])
            self._write(ready, inverse_scale)
            tensors.take_off_pending(ready)
            self._written += ready
            if self.estimation_steps == 1:
                self._is_finished = True
                self.finish(ready)
        self.is_done = not tensors.pending and (step > self.estimation_steps or self.estimation_steps == 1)
        return late

    def load(self, written: list[StoredTensor], num_steps: int) -> None:
        """Go on after `num_steps` steps, in which these tensors have got a v0."""
        self._written, self._is_finished = written, num_steps > self.estimation_steps

    def find_scale(self, group: dict) -> float:
        """The scale in force for a parameter group; of draws that are sized by `decay_steps` the factor on eq. 11."""
        beta2 = self.moments.read_beta2(group)
        if self.plan.init == "random" and self.plan.scale is None:
            return self._random_factors.get(beta2, 1.0)
        return self.plan.get_scale(beta2 or 0.0)

    def _write(self, stored: list[StoredTensor], inverse_scale: float) -> None:
        """Write v0 = scale * g^2, or draws, into second moments, from the gradients of this step."""
        if self.plan.init != "random":
            for one in stored:
                self._set_square(one, self.find_scale(one.group) * inverse_scale**2)
            return
        ratios: dict[float | None, list[torch.Tensor]] = {}  # of v0 to g^2, by beta2
        for one in stored:
            beta2 = self.moments.read_beta2(one.group)
            size = self.find_scale(one.group)
            self.moments.change(
                one,
                self.tensors.eligible_parts(one),
                lambda part, moment, size=size: self._draw_all(part, moment, size),
            )
            moment, gradient = self.tensors.read(one), self.tensors.read_gradient(one)
            for part in self.tensors.eligible_parts(one):
                ratio = sample_ratio(part.cut(moment), part.cut(gradient)) / inverse_scale**2
                ratios.setdefault(beta2, []).append(ratio)
        if self.ratio is None and ratios:
            self._size_draws(stored, ratios)

    def _size_draws(self, stored: list[StoredTensor], ratios: dict[float | None, list[torch.Tensor]]) -> None:
        """Measure v0 / g^2 of the first draws, the median over elements; with `decay_steps`, size them by it."""
        if self.plan.scale is not None:
            self.ratio = compute_median(
                [r for of_beta2 in ratios.values() for r in of_beta2], self.tensors.is_sharded()
            )
            return
        for beta2, of_beta2 in ratios.items():
            ratio, wanted = compute_median(of_beta2, self.tensors.is_sharded()), self.plan.get_scale(beta2)
            self._random_factors[beta2] = wanted / ratio if ratio else 1.0
            self.ratio = self.ratio or wanted
        for one in stored:
            factor = self._random_factors[self.moments.read_beta2(one.group)]
            self.moments.change(one, self.tensors.eligible_parts(one), lambda _, v, f=factor: get_local_part(v).mul_(f))

    def _refine(self, one: StoredTensor, step: int, inverse_scale: float) -> None:
        """Let the second moment before step t be what it is after a start at scale * v_hat_t, v_hat_t being the mean of g^2 so far.

        With u the moment from a zero start, v_t = u_t + scale * beta2^t * u_t / (1 - beta2^t). So v_(t-1) gives u_(t-1), and
        v = (1 + r_t) u_(t-1) + scale * beta2^(t-1) (1 - beta2) / (1 - beta2^t) * g^2, r_t = scale * beta2^t / (1 - beta2^t), becomes v_t
        by Adam's own update.
        """
        beta2, scale = self.moments.read_beta2(one.group), self.find_scale(one.group)
        ratio, before = (scale * beta2**t / (1.0 - beta2**t) for t in (step, step - 1))
        of_square = scale * beta2 ** (step - 1) * (1.0 - beta2) / (1.0 - beta2**step) * inverse_scale**2
        gradient = self.tensors.read_gradient(one)

        def add(part: Part, moment: torch.Tensor) -> None:
            own = get_local_part(moment).mul_((1.0 + ratio) / (1.0 + before))
            _add_square_(own, get_local_part(part.cut(gradient)), of_square)

        self.moments.change(one, self.tensors.eligible_parts(one), add)

    def _set_square(self, one: StoredTensor, size: float) -> None:
        """Set the second moment to size * g^2."""
        gradient = self.tensors.read_gradient(one)
        self.moments.change(
            one,
            self.tensors.eligible_parts(one),
            lambda part, v: _add_square_(get_local_part(v).zero_(), get_local_part(part.cut(gradient)), size),
        )

    def _draw_all(self, part: Part, moment: torch.Tensor | Fragment, scale: float) -> None:
        """Fill a second moment with draws of eq. 11."""
        for piece in find_pieces(moment):
            self.tensors.draw(part, piece, compute_random_v0_mean(part.full_shape, scale))


def _add_square_(out: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
    """Add factor * g^2 to `out`, in its dtype and without a temporary of its size."""
    for part, sums in zip(split_rows(gradient, 1 << 23), split_rows(out, 1 << 23), strict=True):
        part = part.to(sums.dtype)
        sums.addcmul_(part, part, value=factor)
