"""v0 at the run's own first step: a step pre-hook on the optimizer, which sees the gradients that Adam sees.

They have been accumulated over micro-batches, reduced over processes, unscaled and clipped, whatever Trainer or loop did it and
whatever its loss and its data are. At the first step with gradients the hook writes whole, correct state and removes itself:

| strategy | at the first step(s) |
| --- | --- |
| `random` | drawn by name (eq. 11); the ratio v0 / g^2 of the report comes from this very gradient |
| `first_gradient` | v0 = scale * g1^2, then the step goes on with g1: GI-Adam |
| `data_driven`, `minibatch` | v0 = scale * the mean of g^2 over the first K steps. The first K - 1 make no update (their gradients are set to None, so Adam neither moves a parameter nor counts); the K-th writes v0 and steps. Schedule and counters run on |

The contract:

- Nothing happens in a step without any gradient, nor where all gradients are zero: loading a distributed checkpoint makes such a
  step to create state.
- A parameter that has state keeps it. A parameter whose first gradient comes later (unfrozen, a rare expert, LoRA's A, whose
  gradient is exactly zero at step 1) gets its v0 by the same strategy, from its own first gradient, at that step; the
  hook stays until every parameter has had one, and gives up on gradients that were zero 100 times.
- During the K steps the sums of g^2 lie where v0 will, in the optimizer's own state (in bf16 as a pair of numbers), so that
  they take no further memory and are saved with it; `num_measured` says how many steps they hold. Quantised states hold no
  sums: there a resumed run measures the steps that are left.
- Optimizers that count in the parameter group (schedule-free, ADOPT) find it after a measuring step as it was before.
- Every process must make the same steps. Nothing is communicated but, where parameters are sharded, one flag per tensor at
  the first step and the statistics of the report.
"""

import copy
import logging
import math
import time
import weakref
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..errors import InputError
from ..method.multiplier import compute_scale_for_warmup
from ..records.report import V0Report, collect_versions
from ..second_moment.layouts import State
from ..second_moment.state import SecondMoments, StateDraft, StoredTensor, draft_state, unwrap_optimizer
from ..settings import AUTO, V0InitArguments
from ..sharding.draws import draw_standard_normal_
from ..sharding.parts import find_pieces, get_local_part, is_dtensor, split_rows
from .plan import NOTHING_TO_WRITE, name_parameters
from .strategies import compute_random_v0_, takes_v0
from .summary import add_parameters, compute_median, describe_not_finite, sample_ratio

logger = logging.getLogger("hf_v0init")

MAX_MEASURE_STEPS = 32  # of the default
MEASURED_SHARE = 0.01  # of the run's steps, by default
LOOKS_AT_ZERO = 100  # gradients of a late parameter that were all zero, before it is left at v0 = 0

NO_COUNTERS = ("params", "param_names", "state")  # of a parameter group: all else may be counted in

ZERO, USABLE, NOT_FINITE = 0, 1, 2

# innermost optimizer -> weak reference to its FirstSteps
_attached: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def find_first_steps(optimizer) -> "FirstSteps | None":
    """Return what `attach_v0` has attached to an optimizer, also when it has done its work; None if nothing."""
    reference = _attached.get(unwrap_optimizer(optimizer))
    return None if reference is None else reference()


def choose_measure_steps(settings: V0InitArguments, max_steps: int | None) -> int:
    """Return K, over how many steps the mean of g^2 is taken: as asked for, else 1% of the run between 1 and 32; 1 where the
    strategy takes none, or the length of the run is not known.

    Raises:
        InputError: as many as the run has steps, or more.
    """
    if settings.v0_init != "data_driven":
        return 1
    asked = settings.v0_estimation_steps
    if asked is None:
        return min(MAX_MEASURE_STEPS, max(1, math.floor(MEASURED_SHARE * (max_steps or 0))))
    if max_steps and asked > 1 and asked >= max_steps:
        raise InputError(
            f"v0_estimation_steps={asked}: the run has {max_steps} steps, of which these would make no update; give fewer, or leave it out "
            "for 1% of the run"
        )
    return asked


class FirstSteps:
    """The hook of one optimizer; made by `attach_v0`.

    Attributes:
        report: what was done, from the step on that wrote v0; None before.
        num_measured: optimizer steps measured so far.
        num_measure_steps: K.
    """

    def __init__(
        self,
        optimizer,
        model: nn.Module | None,
        settings: V0InitArguments,
        *,
        seed: int = 0,
        max_steps: int | None = None,
        on_written: Callable[[V0Report], None] | None = None,
    ) -> None:
        self.model, self.settings, self.seed, self.on_written = model, settings, seed, on_written
        self.report: V0Report | None = None
        self.num_measured = 0
        self.observers: list[Callable[[], None]] = []  # called when v0 has been written, before the step is made
        self._seconds = 0.0
        self._sums: dict[torch.Tensor, StateDraft] = {}
        self._pending: list[StoredTensor] | None = None  # None: v0 has not been written
        self._looks: dict[torch.Tensor, int] = {}
        self._counters: list[dict] | None = None
        self._this_step: set[torch.Tensor] = set()
        self._resumed = False
        self._handles: list[Any] = []
        self._is_done = True
        self.bind(optimizer)
        try:
            self.set_length(max_steps)
        except InputError:
            self.remove()
            raise
        stored = self._list()
        is_known = model is not None and self.moments.zero is None and not any(one.tensor.is_meta for one in stored)
        if is_known and not any(map(self._takes, stored)):
            self.remove()
            raise InputError(NOTHING_TO_WRITE)

    # ---- what users call ---------------------------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether no step has been made yet, since v0 is still to be written."""
        return self.is_attached and self._pending is None

    @property
    def is_attached(self) -> bool:
        """Whether the hook is still on the optimizer, since v0 or some parameter's v0 is still to come."""
        return bool(self._handles) and not self._is_done

    def remove(self) -> None:
        """Take the hook off the optimizer; what was written stays."""
        for handle in self._handles:
            handle.remove()
        self._handles, self._sums, self._is_done = [], {}, True

    def state_dict(self) -> dict:
        """Return what a checkpoint must keep beside the optimizer's own state, while v0 is being measured."""
        return {"num_measured": self.num_measured, "num_measure_steps": self.num_measure_steps}

    def load_state_dict(self, state: dict) -> None:
        """Go on measuring where a checkpoint left off: the loaded optimizer state holds the sums of `num_measured` steps, or, once
        all K have been made, what v0 has become, which stands.
        """
        measured, self.num_measure_steps = int(state["num_measured"]), int(state["num_measure_steps"])
        self._resumed = 0 < measured < self.num_measure_steps
        self.num_measured = measured if self._resumed else 0

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def bind(self, optimizer) -> None:
        """Take another view of the same optimizer, such as ZeRO's after accelerate has prepared it; hooks stay where they are."""
        self.moments = SecondMoments(optimizer)
        inner, other = self.moments.inner, find_first_steps(optimizer)
        if self.is_attached and other is self:
            return
        self.remove()
        if other is not None and other.is_attached:
            raise InputError("attach_v0 was called twice for this optimizer: call it once, before the first step")
        self._handles = [
            inner.register_step_pre_hook(torch.compiler.disable(self._before_step)),
            inner.register_step_post_hook(torch.compiler.disable(self._after_step)),
        ]
        self._is_done = False
        _attached[inner] = weakref.ref(self)

    def set_length(self, max_steps: int | None) -> None:
        """Say how many optimizer steps the run has, before the first of them.

        Raises:
            InputError: `v0_estimation_steps` or `v0_decay_steps` do not fit.
        """
        self.max_steps = max_steps if max_steps and max_steps > 0 else None
        self.settings = self.settings.resolve(self.max_steps)
        self.num_measure_steps = choose_measure_steps(self.settings, self.max_steps)
        if self.settings.v0_decay_steps in (None, AUTO):
            return
        for group in self.moments.list_groups():
            beta2 = self.moments.read_beta2(group)
            if beta2 is None:
                raise InputError(
                    f"v0_decay_steps={self.settings.v0_decay_steps} with {self.moments.name}: its second moment is no decaying mean of "
                    "g^2, so the closed form gives no scale; use v0_scale"
                )
            if self.settings.v0_decay_steps >= 1:  # a share of the run is known when the training begins
                compute_scale_for_warmup(self.settings.v0_decay_steps, beta2)

    # ---- the hooks ---------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._is_done:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        if closure is None:
            self._look(optimizer)
            return None
        # The gradients are made inside the step (Lightning): look at them there, after the first call.
        state = {"looked": False}

        def look_after(*inner_args, **inner_kwargs):
            loss = closure(*inner_args, **inner_kwargs)
            if not state["looked"]:
                state["looked"] = True
                self._look(optimizer)
            return loss

        return ((args[0], look_after, *args[2:]), kwargs) if len(args) > 1 else (args, kwargs | {"closure": look_after})

    def _after_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        if self._counters is not None:
            for group, saved in zip(optimizer.param_groups, self._counters, strict=True):
                _restore_counters(group, saved)
            self._counters = None
        if self._is_done and self._handles:
            # Hooks may not be taken off while torch goes through them: the one before the step goes now, this one once it is
            # the last of its kind.
            before, after = self._handles
            before.remove()
            if next(reversed(optimizer._optimizer_step_post_hooks)) == after.id:
                after.remove()
                self._handles = []

    def _look(self, optimizer) -> None:
        """Look at the gradients of this step."""
        if self._pending is not None:
            self._look_for_late_ones(optimizer)
            return
        inverse_scale = _read_inverse_scale(optimizer)
        if inverse_scale is None:
            # Overflowed: the fused kernel will skip this step, but not before it has made state, which v0 must come before.
            if not self.num_measured and not self._has_been_stepped():
                _drop_gradients(optimizer)
            return
        start = time.perf_counter()
        stored = [one for one in self._list() if one.tensor.grad is not None]
        kinds = self._judge(stored)
        if not any(kinds):
            return
        self._require_finite(stored, kinds)
        if not self._resumed and not self.num_measured and self._has_been_stepped():
            self._begin_late(stored)
            self._look_for_late_ones(optimizer)
            return
        with torch.no_grad():
            self._measure(optimizer, stored, kinds, inverse_scale, start)

    def _measure(
        self, optimizer, stored: list[StoredTensor], kinds: list[int], inverse_scale: float, start: float
    ) -> None:
        """Take this step's gradients in; write v0 if it is the last of the K, else let the step pass without an update."""
        if self.moments.zero is None or not self._this_step or any(one.tensor in self._this_step for one in stored):
            self.num_measured += 1
            self._this_step = set()
        self._this_step |= {one.tensor for one in stored}
        is_last = self.num_measured >= self.num_measure_steps
        if self.num_measure_steps > 1:
            for one in stored:
                if self._takes(one):
                    self._add_square(one, inverse_scale)
        if not is_last:
            self._counters = [_copy_counters(group) for group in optimizer.param_groups]
            _drop_gradients(optimizer)
            self._seconds += time.perf_counter() - start
            return
        expected = self._list()
        chosen = [
            one for one in expected if self._takes(one) and (one.tensor.grad is not None or one.tensor in self._sums)
        ]
        if self.moments.zero is not None:  # ZeRO steps one flat tensor after the other
            chosen = [one for one in chosen if one.tensor in self._this_step and one.tensor.grad is not None]
        kinds_now = {one.tensor: kind for one, kind in zip(stored, kinds, strict=True)}
        written = self._write(chosen, inverse_scale, kinds_now)
        self._seconds += time.perf_counter() - start
        late = [one for one in expected if self._takes(one) and self._is_missing(one, written)]
        if self.moments.zero is not None and late:
            return
        self._finish(late)

    def _is_missing(self, stored: StoredTensor, written: set[torch.Tensor]) -> bool:
        if self.moments.zero is None:
            return stored.tensor not in written
        return self.moments.find_state(stored.tensor, stored.group) is None

    def _finish(self, late: list[StoredTensor]) -> None:
        report = self.report
        report.seconds = self._seconds
        report.without_gradient = [part.name for one in late for part in self._parts_with_v0(one)]
        report.estimation_steps = self.num_measure_steps if self.settings.v0_init == "data_driven" else None
        if self.settings.v0_init != "random":
            report.measured_ratio = report.scale
        if self.max_steps:
            report.add_expectation(self.max_steps)
        self._pending, self._sums, self._this_step = late, {}, set()
        if not late:
            self._is_done = True
        for observe in self.observers:
            observe()
        self.observers = []
        if self.on_written is not None:
            self.on_written(report)
        else:
            report.log()

    # ---- parameters whose first gradient comes later -----------------------------------------------------------------

    def _begin_late(self, stored: list[StoredTensor]) -> None:
        """The optimizer has made steps or loaded state: only what has no state is looked at from now on."""
        self._pending = [
            one for one in self._list() if self._takes(one) and self.moments.find_state(one.tensor, one.group) is None
        ]
        if self.moments.zero is not None or not self._pending:
            self._pending = []
            self._is_done = True

    def _look_for_late_ones(self, optimizer) -> None:
        """Give a v0 to the parameters that have their first gradient now."""
        stored = [one for one in self._pending if one.tensor.grad is not None]
        if not stored:
            return
        inverse_scale = _read_inverse_scale(optimizer)
        if inverse_scale is None:
            return
        kinds = self._judge(stored)
        self._require_finite(stored, kinds)
        ready = [one for one, kind in zip(stored, kinds, strict=True) if kind == USABLE]
        left = []
        for one in self._pending:
            if one.tensor.grad is not None and not any(one is other for other in ready):
                self._looks[one.tensor] = self._looks.get(one.tensor, 0) + 1
            if not any(one is other for other in ready) and self._looks.get(one.tensor, 0) < LOOKS_AT_ZERO:
                left.append(one)
        self._pending = left
        if ready:
            with torch.no_grad():
                self._write(ready, inverse_scale)
            names = [part.name for one in ready for part in self._parts_with_v0(one)]
            logger.info(f"v0 written at the first gradient of {len(names)} further tensors: {_shorten(names)}")
            if self.report is not None:
                self.report.without_gradient = [n for n in self.report.without_gradient if n not in names]
        if not self._pending:
            self._is_done = True

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _write(
        self, chosen: list[StoredTensor], inverse_scale: float, kinds: dict[torch.Tensor, int] | None = None
    ) -> set[torch.Tensor]:
        """Write v0 into the states of these tensors, and its statistics into the report. Returns those written.

        Args:
            kinds: what this step's gradients are; a tensor whose gradients have been zero at every step so far is left for
                later. None for those that come later.
        """
        is_late = kinds is None
        if not is_late and self.settings.v0_init != "random":
            if self.num_measure_steps > 1:
                sums = self._classify([self._sums[one.tensor].tensors[-1] for one in chosen])
                kinds = {one.tensor: kind for one, kind in zip(chosen, sums, strict=True)}
            chosen = [one for one in chosen if kinds[one.tensor] == USABLE]
        ratios: dict[float | None, list[torch.Tensor]] = {}  # by beta2, which decides how large they must be
        states: dict[torch.Tensor, State] = {}
        measures_ratio = self.settings.v0_init == "random"
        factors = {}
        report = self._make_report() if self.report is None else self.report
        for one in chosen:
            group = id(one.group)
            if group not in factors:
                factors[group] = self._find_scale(one.group)
            draft = self._sums.pop(one.tensor, None) or self._draft(one)
            v0 = draft.tensors[-1]
            if measures_ratio:
                self._draw(one, v0, factors[group])
                for part in self._parts_with_v0(one):
                    ratios.setdefault(self.moments.read_beta2(one.group), []).append(
                        sample_ratio(part.cut(v0), part.cut(_match(one.tensor, inverse_scale)))
                    )
            elif self.num_measure_steps > 1 and not is_late:
                self._join_sum(draft).mul_(factors[group] / self.num_measured)
            else:
                _add_square_(v0, one.tensor, inverse_scale, factors[group])
            self._clear_others(one, v0)
            states[one.tensor] = draft
        if measures_ratio and not is_late:
            self._scale_random(report, chosen, states, ratios)
        named = []
        for one in chosen:
            state = self._put(one, states.pop(one.tensor))
            moment = self.moments.layout.read(state)
            named += [(part.name, part.full_shape, part.cut(moment)) for part in self._parts_with_v0(one)]
        if not is_late:
            add_parameters(report, named, self._is_sharded())
            self.report = report
        return {one.tensor for one in chosen}

    def _scale_random(self, report, chosen, states, ratios) -> None:
        """Measure v0 / g^2; with `v0_decay_steps`, scale v0 so that its multiplier is 0.9 at that step."""
        steps = self.settings.v0_decay_steps
        if steps is None:
            joined = [ratio for of_beta2 in ratios.values() for ratio in of_beta2]
            report.measured_ratio = compute_median(joined, self._is_sharded())
            return
        factors, first = {}, None
        for beta2, of_beta2 in ratios.items():
            ratio, wanted = compute_median(of_beta2, self._is_sharded()), compute_scale_for_warmup(steps, beta2)
            factors[beta2] = wanted / ratio if ratio else 1.0
            first = first or (factors[beta2], wanted if ratio else ratio)
        for one in chosen:
            states[one.tensor].tensors[-1].mul_(factors[self.moments.read_beta2(one.group)])
        if first is not None:
            report.scale *= first[0]
            report.measured_ratio = first[1]

    def _draw(self, stored: StoredTensor, v0: torch.Tensor, scale: float) -> None:
        for part in self._parts_with_v0(stored):
            for piece in find_pieces(part.cut(v0)):
                draw_standard_normal_(
                    piece.local,
                    name=part.name,
                    seed=self.seed,
                    full_shape=piece.full_shape,
                    offset=piece.offset,
                    transform=lambda z, shape=part.full_shape: compute_random_v0_(z, shape, scale),
                )

    def _find_scale(self, group: dict) -> float:
        """The scale in force for a parameter group: with `v0_decay_steps` it follows from the group's own beta2."""
        if self.settings.v0_init == "random" and self.settings.v0_decay_steps is not None:
            return 1.0  # the ratio to g^2, measured now, decides
        return self.settings.get_v0_scale(self.moments.read_beta2(group) or 0.0)

    def _clear_others(self, stored: StoredTensor, v0: torch.Tensor) -> None:
        """Set v0 to zero in the parts of a flat tensor that get none."""
        if len(stored.parts) > 1:
            with_v0 = self._parts_with_v0(stored)
            for part in stored.parts:
                if part not in with_v0:
                    get_local_part(part.cut(v0)).zero_()

    def _put(self, stored: StoredTensor, draft: StateDraft) -> State:
        present = self.moments.find_state(stored.tensor, stored.group)
        if present is not None:  # it holds the sums, or steps with zero gradients have made it and left it at zero
            with torch.no_grad():
                for lent in draft.lent:
                    lent.zero_()
                self.moments.layout.write_(present, draft.tensors[-1])
            return present
        return draft.finish()

    # ---- sums of g^2 over the K steps --------------------------------------------------------------------------------

    def _draft(self, stored: StoredTensor) -> StateDraft:
        if self.moments.find_state(stored.tensor, stored.group) is not None:
            dtype = stored.tensor.dtype
            with torch.no_grad():
                return StateDraft(self.moments, stored, None, (torch.zeros_like(stored.tensor, dtype=dtype),))
        return draft_state(self.moments, stored)

    def _add_square(self, stored: StoredTensor, inverse_scale: float) -> None:
        """Add g^2 to the running sum."""
        draft = self._sums.get(stored.tensor)
        if draft is None:
            draft = self._sums[stored.tensor] = self._begin_sum(stored)
        total = draft.tensors[-1]
        if not draft.lent:
            _add_square_(total, stored.tensor, inverse_scale)
            return
        high, low = get_local_part(total), get_local_part(draft.lent[0])
        gradient = get_local_part(_match(stored.tensor, 1.0))
        for g, h, rest in zip(*(split_rows(t, 1 << 23) for t in (gradient, high, low)), strict=True):
            exact = h.float() + rest.float() + (g.float() * inverse_scale).square()
            h.copy_(exact)
            rest.copy_(exact - h.float())

    def _begin_sum(self, stored: StoredTensor) -> StateDraft:
        """Let the sum lie in the optimizer's own state where that can hold it, so that checkpoints take it along."""
        present = self.moments.find_state(stored.tensor, stored.group)  # of a run that is resumed while it measured
        state = self.moments.create_state(stored.tensor, stored.group) if present is None else present
        scratch, own = self.moments.layout.find_sum_tensors(state, 2)
        is_wide = own is not None and own.dtype in (torch.float32, torch.float64)
        if own is None or not (is_wide or scratch is not None):
            return draft_state(self.moments, stored, for_sums=True)
        if present is None:
            self.moments.put_state(stored.tensor, stored.group, state)
        return StateDraft(self.moments, stored, state, (own,), () if is_wide else (scratch,))

    def _join_sum(self, draft: StateDraft) -> torch.Tensor:
        total = draft.tensors[-1]
        if draft.lent:  # the second number of each pair is within rounding of the first: v0 has the state's precision
            draft.lent[0].zero_()
        return total

    # ---- looking -----------------------------------------------------------------------------------------------------

    def _list(self) -> list[StoredTensor]:
        return self.moments.list_tensors(name_parameters(self.model))

    def _takes(self, stored: StoredTensor) -> bool:
        return bool(self._parts_with_v0(stored)) and stored.tensor.is_floating_point()

    def _parts_with_v0(self, stored: StoredTensor) -> list:
        include_bias_and_norm = self.settings.v0_include_bias_and_norm
        return [part for part in stored.parts if takes_v0(part.full_shape, include_bias_and_norm)]

    def _is_sharded(self) -> bool:
        return self.moments.zero is not None or any(is_dtensor(one.tensor) for one in self._list())

    def _has_been_stepped(self) -> bool:
        return any(self.moments.find_state(one.tensor, one.group) is not None for one in self._list())

    def _judge(self, stored: list[StoredTensor]) -> list[int]:
        """Say of each gradient, over all processes, whether it is zero, usable or not finite."""
        for one in stored:
            if one.tensor.grad.is_sparse:
                raise InputError(
                    f"parameter {one.parts[0].name!r} has a sparse gradient, of which no v0 is taken; build the embedding with "
                    "sparse=False"
                )
        return self._classify([one.tensor.grad for one in stored])

    def _classify(self, tensors: list[torch.Tensor]) -> list[int]:
        local = [get_local_part(tensor.detach()) for tensor in tensors]
        largest = [
            torch.linalg.vector_norm(part, ord=math.inf, dtype=torch.float32)
            if part.numel()
            else torch.zeros((), device=part.device)
            for part in local
        ]
        by_device: dict[torch.device, list[int]] = {}
        for place, value in enumerate(largest):
            by_device.setdefault(value.device, []).append(place)
        kinds = torch.zeros(len(tensors), dtype=torch.int64)
        for places in by_device.values():
            values = torch.stack([largest[place] for place in places]).cpu()  # one wait per device
            kinds[places] = torch.where(values.isfinite(), (values > 0).long() * USABLE, NOT_FINITE)
        if self._is_sharded() and dist.is_initialized() and dist.get_world_size() > 1:
            on_device = kinds.to(local[0].device) if local else kinds
            dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
            kinds = on_device.cpu()
        return kinds.tolist()

    def _require_finite(self, stored: list[StoredTensor], kinds: list[int]) -> None:
        for one, kind in zip(stored, kinds, strict=True):
            if kind == NOT_FINITE:
                raise InputError(describe_not_finite(one.parts[0].name))

    def _make_report(self) -> V0Report:
        settings, stored = self.settings, self._list()
        with_v0 = [one for one in stored if self._takes(one)]
        without = [part for one in stored for part in one.parts if part not in self._parts_with_v0(one)]
        first = with_v0[0].group
        return V0Report(
            strategy=settings.v0_init,
            scale=self._find_scale(first),
            seed=self.seed,
            estimator="minibatch" if settings.v0_init == "data_driven" else None,
            include_bias_and_norm=settings.v0_include_bias_and_norm,
            warmup_steps=settings.v0_decay_steps,
            optimizer=self.moments.name,
            beta2=self.moments.read_beta2(first),
            num_processes=dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            num_parameters_without_v0=len(without),
            num_elements_without_v0=sum(math.prod(part.full_shape) for part in without),
            versions=collect_versions(),
        )


def attach_v0(
    optimizer,
    model: nn.Module | None = None,
    v0_init: str = "data_driven",
    *,
    v0_scale: float | None = None,
    v0_decay_steps: float | None = None,
    v0_estimation_steps: int | None = None,
    v0_seed: int = 0,
    v0_include_bias_and_norm: bool = False,
    max_steps: int | None = None,
) -> FirstSteps | None:
    """Give an optimizer's second moment a v0 at the run's own first step. One call, before that step, in any loop.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        attach_v0(optimizer, model, v0_init="data_driven", max_steps=10_000)
        ...                                          # the loop as it was, prepared by accelerate, Fabric or nobody

    Nothing else changes: no data are read, no forward is made. See the head of this file for what happens when.

    Args:
        optimizer: torch's or another's with a second moment, plain, prepared by accelerate, or ZeRO's.
        model: whose names the parameters have in the report, and by which a random v0 is drawn; without it they are named by
            their place in the optimizer. Plain, compiled, inside DDP, or sharded by FSDP2 or tensor parallelism.
        v0_init: "data_driven", "random" or "first_gradient"; "zeros" attaches nothing.
        v0_scale, v0_decay_steps, v0_estimation_steps, v0_include_bias_and_norm: as the flags of these names.
        v0_seed: of a random v0.
        max_steps: optimizer steps of the whole run, which the default of `v0_estimation_steps`, shares of the run and the log's
            outlook need.

    Returns:
        The hook: `report` says what was done once it is, `remove()` takes it off; `state_dict()` and `load_state_dict()` let a
        run resume while it is being measured. None for "zeros".

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment.
    """
    settings = V0InitArguments(
        v0_init=v0_init,
        v0_scale=v0_scale,
        v0_decay_steps=v0_decay_steps,
        v0_estimation_steps=v0_estimation_steps,
        v0_include_bias_and_norm=v0_include_bias_and_norm,
        v0_seed=v0_seed,
    )
    if v0_init == "zeros":
        return None
    if AUTO in (v0_init, settings.v0_decay_steps):
        name = "v0_init" if v0_init == AUTO else "v0_decay_steps"
        raise InputError(
            f"attach_v0 cannot measure {name}=auto, which takes the loop's own batches and loss: warm up for as long as "
            "compute_warmup_length says of measure_trust_radius(model, batches, loss_fn).d50, or give it as v0_decay_steps"
        )
    return FirstSteps(optimizer, model, settings, seed=v0_seed, max_steps=max_steps)


def _read_inverse_scale(optimizer) -> float | None:
    """Return what a gradient must be multiplied by; None if this step will not be made.

    A GradScaler leaves unscaling to optimizers that can do it inside their kernel (fused Adam): then `grad_scale` holds the factor
    and `found_inf` whether a gradient has overflowed.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and float(found_inf) > 0:
        return None
    return 1.0 if scale is None else 1.0 / float(scale)


def _drop_gradients(optimizer) -> None:
    """Let this step make no update: an optimizer neither moves a tensor without a gradient nor makes state for it."""
    for group in optimizer.param_groups:
        for tensor in group["params"]:
            tensor.grad = None


def _match(tensor: torch.Tensor, inverse_scale: float) -> torch.Tensor:
    """Return a tensor's gradient, placed as the tensor itself where it is sharded, unscaled."""
    gradient = tensor.grad.detach()
    if is_dtensor(gradient) and gradient.placements != tensor.placements:
        gradient = gradient.redistribute(placements=tensor.placements)
    return gradient if inverse_scale == 1.0 else gradient * inverse_scale


def _add_square_(out: torch.Tensor, tensor: torch.Tensor, inverse_scale: float, factor: float = 1.0) -> None:
    """Add factor * g^2 to `out`, in its dtype and without a temporary of its size."""
    total, gradient = get_local_part(out), get_local_part(_match(tensor, 1.0))
    value = factor * inverse_scale**2
    for part, sums in zip(split_rows(gradient, 1 << 23), split_rows(total, 1 << 23), strict=True):
        part = part.to(sums.dtype)
        sums.addcmul_(part, part, value=value)


def _copy_counters(group: dict) -> dict:
    """Copy what an optimizer may count in a parameter group: all but the tensors to step and states kept there."""
    return {key: copy.deepcopy(value) for key, value in group.items() if key not in NO_COUNTERS}


def _restore_counters(group: dict, saved: dict) -> None:
    """Put back what a step without gradients has counted; tensors in place, since a compiled step may hold them."""
    for key in [key for key in group if key not in saved and key not in NO_COUNTERS]:
        del group[key]  # a count that begins with the first step
    for key, value in saved.items():
        if isinstance(value, torch.Tensor):
            group[key].copy_(value)
        elif group[key] != value:
            group[key] = value


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
