"""v0 in the run's own first steps: a step pre-hook on the optimizer, which sees the gradients that Adam sees.

They have been accumulated over micro-batches, reduced over processes, unscaled and clipped, whatever Trainer or loop did it and
whatever its loss and its data are. No step is lost:

| decay, strategy | steps 1 to K | then |
| --- | --- | --- |
| `linear` | Adam's own, times t / L | the mean of g^2 so far, s, is kept as rows x columns; `method.decay` is added before each step |
| `beta2`, `data_driven`, `first_gradient` | as from a start at scale * the mean of g^2 so far (K = 1: GI-Adam) | Adam's own |
| `beta2`, `random` | - | drawn before step 1 (eq. 11) |

K is `v0_estimation_steps`: 6 with `linear`, 1 for `random` and `first_gradient`.

The contract:

- What is kept beside the optimizer's state is two vectors per matrix, for L steps (`random`: its draws, two bytes per element);
  `state_dict` has them. The learning rate is lent to a step and put back after it, so that a checkpoint holds the user's.
- Nothing happens in a step without any gradient, nor where all gradients are zero: loading a distributed checkpoint makes such a
  step to create state.
- A parameter whose first gradient comes later (unfrozen, a rare expert, a group added later) gets its v0 from that gradient.
  The hook stays until every parameter has had one, and gives up on gradients that were zero 100 times.
- Every process must make the same steps. Nothing is communicated but, where parameters are sharded, one flag per tensor at
  the first step and the statistics of the report.
"""

import logging
import math
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from .errors import InputError
from .estimation.spread import Elements, RowsAndColumns, factor_into_rows_and_columns
from .estimation.trust_radius import LossNotComputed, TrustRadius, measure_in_step
from .initialization.plan import NOTHING_TO_WRITE, name_parameters
from .initialization.strategies import compute_random_v0_mean, is_eligible
from .initialization.summary import add_parameters, compute_median, describe_not_finite, sample_ratio
from .method.decay import DEFAULT_ESTIMATION_STEPS, compute_addend
from .method.length import WarmupLength, choose_length
from .records.report import V0Report, collect_versions
from .second_moment.deepspeed import find_partitions
from .second_moment.state import Part, SecondMoments, StoredTensor, unwrap_optimizer
from .settings import AUTO, V0InitArguments, V0Plan
from .sharding.draws import draw_standard_normal_
from .sharding.parts import Fragment, Piece, find_pieces, get_local_part, is_dtensor, split_rows
from .sharding.tensor_statistics import compute_figures

logger = logging.getLogger("hf_v0init")

MAX_ESTIMATION_STEPS = 32  # of the default with beta2
ESTIMATION_FRACTION = 0.01  # of training, by default with beta2
NARROW_DTYPES, SLOW_BETA2 = (torch.bfloat16, torch.float16), 0.99  # beyond which 16 bits round the decay away
MAX_ZERO_GRADIENTS = 100  # of a late parameter, before it is left at v0 = 0
ZERO, USABLE, NOT_FINITE = 0, 1, 2

# innermost optimizer -> weak reference to its V0Hook
_attached: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def find_hook(optimizer) -> "V0Hook | None":
    """Return what `attach_v0` has attached to an optimizer, also when it has done its work; None if nothing."""
    reference = _attached.get(unwrap_optimizer(optimizer))
    return None if reference is None else reference()


def choose_estimation_steps(plan: V0Plan, max_steps: int | None) -> int:
    """Return K, the optimizer steps over which E[g^2] is estimated; 1 for strategies that take one gradient or none.

    Raises:
        InputError: as many as the run or the decay has steps, or more.
    """
    if plan.init != "data_driven":
        return 1
    asked, length = plan.estimation_steps, plan.decay_steps if plan.decay == "linear" else None
    if asked is None:
        return (
            DEFAULT_ESTIMATION_STEPS
            if plan.decay == "linear"
            else min(MAX_ESTIMATION_STEPS, max(1, math.floor(ESTIMATION_FRACTION * (max_steps or 0))))
        )
    for limit, name in ((max_steps, "max_steps"), (length if isinstance(length, int) else None, "v0_decay_steps")):
        if limit and asked > 1 and asked >= limit:
            raise InputError(
                f"v0_estimation_steps={asked} with {name}={limit}: give fewer, or leave it out for the default"
            )
    return asked


class V0Hook:
    """The hook of one optimizer; made by `attach_v0`.

    Attributes:
        plan: what is done; its `decay_steps` is a number from the first step on.
        report: what was done, once v0 stands; None before.
        length: what was measured where `decay_steps` was "auto"; None otherwise.
        num_steps: optimizer steps made; None before the first.
        estimation_steps: K.
    """

    def __init__(
        self,
        optimizer,
        model: nn.Module | None,
        plan: V0Plan,
        *,
        seed: int = 0,
        max_steps: int | None = None,
        loss_fn: Callable[[], Any] | None = None,
        on_length: Callable[[WarmupLength], None] | None = None,
        on_written: Callable[[V0Report], None] | None = None,
    ) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self.loss_fn, self.on_length, self.on_written = loss_fn, on_length, on_written
        self.report: V0Report | None = None
        self.length: WarmupLength | None = None
        self.num_steps: int | None = None
        self.observers: list[Callable[[], None]] = []  # called when v0 stands, before the step is made
        self._stored: dict[torch.Tensor, StoredTensor] = {}  # what the optimizer steps
        self._num_parameters = 0
        self._pending: list[StoredTensor] = []  # of these, what is still to get a v0
        self._written: list[StoredTensor] = []  # what has got one in the first K steps
        # linear decay: how E[g^2] is spread, updates made, and how much of it the second moment holds
        self._held: dict[torch.Tensor, tuple[dict[str, RowsAndColumns | Elements], int, float]] = {}
        self._zero_gradients: dict[torch.Tensor, int] = {}
        self._random_factors: dict[float | None, float] = {}  # by beta2, of draws that are sized by `decay_steps`
        self._ratio: float | None = None  # v0 / g^2 of draws, the median over elements
        self._draft: V0Report | None = None
        self._lent: list[tuple[dict, str, Any]] = []
        self._is_counted = False
        self._seconds = 0.0
        self._handles: list[Any] = []
        self._is_done = True
        self.bind(optimizer)
        try:
            self.set_length(max_steps)
            self._require_possible()
        except InputError:
            self.remove()
            raise

    # ---- what users call ---------------------------------------------------------------------------------------------

    @property
    def is_waiting(self) -> bool:
        """Whether the first step is still to come."""
        return self.is_attached and self.num_steps is None

    @property
    def is_attached(self) -> bool:
        """Whether the hook still has work to do."""
        return bool(self._handles) and not self._is_done

    def remove(self) -> None:
        """Take the hook off the optimizer; what was written stays."""
        self._give_back()
        for handle in self._handles:
            handle.remove()
        self._handles, self._is_done = [], True

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps beside the optimizer's own state, to resume before v0 has gone.

        Returns:
            "num_steps", "decay_steps", "estimation_steps": numbers. "held", by parameter while v0 decays linearly: "num_updates", "amount"
            and "rows" with "columns" (fp32, 1-D), or "mean" of draws, which are drawn again. The same on every process.
        """
        held = {}
        for tensor, (spread, num_updates, amount) in self._held.items():
            for name in (part.name for part in self._stored[tensor].parts if part.name in spread):
                held[name] = {"num_updates": num_updates, "amount": amount} | spread[name].state_dict()
        return {
            "num_steps": self.num_steps or 0,
            "decay_steps": self.plan.decay_steps,
            "estimation_steps": self.estimation_steps,
            "held": held,
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. Call it when the optimizer has loaded its own state."""
        self.plan = replace(self.plan, decay_steps=state["decay_steps"])
        self.estimation_steps, self.num_steps = state["estimation_steps"], int(state["num_steps"]) or None
        if self.num_steps is None:
            return
        stored = [one for one in self._list() if self._is_eligible(one)]
        has_state = {one.tensor for one in stored if self.moments.find_state(one.tensor, one.group) is not None}
        self._written = [one for one in stored if one.tensor in has_state]
        self._pending = [one for one in stored if one.tensor not in has_state]
        self._held = {}
        for one in self._written:
            own = {part.name: state["held"][part.name] for part in one.parts if part.name in state["held"]}
            if own:
                first = next(iter(own.values()))
                spread = {name: self._load_spread(one, name, entry) for name, entry in own.items()}
                self._held[one.tensor] = spread, first["num_updates"], first["amount"]

    def _load_spread(self, one: StoredTensor, name: str, entry: dict) -> "RowsAndColumns | Elements":
        if "mean" not in entry:
            return RowsAndColumns(entry["rows"].to(one.tensor.device), entry["columns"].to(one.tensor.device))
        part = next(part for part in one.parts if part.name == name)
        return self._draw_elements(part, part.cut(self._read(one)), entry["mean"])

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def bind(self, optimizer) -> None:
        """Take another view of the same optimizer, such as ZeRO's after accelerate has prepared it; hooks stay where they are."""
        self._optimizer, self.moments = optimizer, SecondMoments(optimizer)
        inner, other = self.moments.inner, find_hook(optimizer)
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

    def set_length(self, max_steps: int | None, plan: V0Plan | None = None) -> None:
        """Say how many optimizer steps the run has, before the first of them.

        Raises:
            InputError: `v0_estimation_steps` or `v0_decay_steps` do not fit.
        """
        self.max_steps = max_steps if max_steps and max_steps > 0 else None
        self.plan = self.plan if plan is None else plan
        steps = self.plan.decay_steps
        if isinstance(steps, float) and self.max_steps:
            self.plan = replace(self.plan, decay_steps=math.ceil(steps * self.max_steps))
        self.estimation_steps = choose_estimation_steps(self.plan, self.max_steps)
        self._fit_estimation_steps()

    # ---- the hooks ---------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._is_done:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        if closure is None and next(reversed(optimizer._optimizer_step_pre_hooks)) == self._handles[0].id:
            self._prepare(optimizer)
            return None
        if closure is None:  # hooks that came later, and may change the gradients, go first
            return args, kwargs | {"closure": lambda: self._prepare(optimizer)}
        # The gradients are made inside the step (Lightning): look at them there, after the first call.
        is_prepared = False

        def prepare_after(*inner_args, **inner_kwargs):
            nonlocal is_prepared
            loss = closure(*inner_args, **inner_kwargs)
            if not is_prepared:
                is_prepared = True
                self._prepare(optimizer)
            return loss

        if len(args) > 1:
            return (args[0], prepare_after, *args[2:]), kwargs
        return args, kwargs | {"closure": prepare_after}

    def _after_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        self._give_back()
        if self._is_counted:
            self._is_counted = False
            self.num_steps += 1
        if self._is_done and self._handles:
            # Hooks may not be taken off while torch goes through them: the one before the step goes now, this one once it is
            # the last of its kind.
            before, after = self._handles
            before.remove()
            if next(reversed(optimizer._optimizer_step_post_hooks)) == after.id:
                after.remove()
                self._handles = []

    def _prepare(self, optimizer) -> None:
        """Do what this step needs, its gradients in hand."""
        self._give_back()  # of a step that was cut off
        inverse_scale = _read_inverse_scale(optimizer)
        if inverse_scale is None:
            return  # a gradient has overflowed: the kernel will skip this step
        start = time.perf_counter()
        if self.num_steps is None and not self._begin():
            return
        if self.plan.decay_steps == AUTO and not self._set_measured_length():
            self._is_done = True
            return
        inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stepped = [one for one in self._list() if id(one.tensor) in inside]  # all, but under ZeRO
        step = self._count(stepped) + 1
        self._is_counted = True
        with torch.no_grad():
            if self.plan.decay == "linear":
                self._decay_linearly(optimizer, stepped, step, inverse_scale)
            else:
                self._start_by_beta2(stepped, step, inverse_scale)
        self._seconds += time.perf_counter() - start

    def _begin(self) -> bool:
        """Look at the first gradients; returns whether this is a step to count."""
        stored = [one for one in self._list() if one.tensor.grad is not None]
        kinds = self._classify([one.tensor.grad for one in stored])
        if not any(kinds):
            return False
        _require_finite(stored, kinds)
        if not self.moments.is_untouched() and any(self.moments.count_steps(one) for one in self._list()):
            self._is_done = True  # stepped before the hook came, whose state stands
            return False
        self.num_steps = 0
        self._pending = [one for one in self._list() if self._is_eligible(one)]
        return True

    def _count(self, stepped: list[StoredTensor]) -> int:
        """Return the steps made so far; ZeRO steps one flat tensor after the other, each with a count of its own."""
        if self.moments.zero is None:
            return self.num_steps
        return max((self.moments.count_steps(one) or 0 for one in stepped), default=0)

    def _set_measured_length(self) -> bool:
        """Measure L at the gradients in hand; returns whether a v0 is needed."""
        self.length = measure_length(self._optimizer, self.model, self.loss_fn, self.max_steps)
        steps = self.length.steps
        self.plan = replace(self.plan, decay_steps=steps) if steps else V0Plan()
        self._fit_estimation_steps()
        if self.on_length is not None:
            self.on_length(self.length)
        else:
            self.length.log("v0 decays over")
        return steps > 0

    def _fit_estimation_steps(self) -> None:
        if self.plan.decay == "linear" and isinstance(self.plan.decay_steps, int):
            self.estimation_steps = max(1, min(self.estimation_steps, self.plan.decay_steps - 1))

    # ---- linear decay --------------------------------------------------------------------------------------------------

    def _decay_linearly(self, optimizer, stepped: list[StoredTensor], step: int, inverse_scale: float) -> None:
        length, first = self.plan.decay_steps, self.estimation_steps
        if length == 1:
            logger.info("v0_decay_steps=1: a linear decay over one step is stock Adam")
            self._is_done = True
            return
        if step <= first:
            for group in optimizer.param_groups:
                self._lend(group, "lr", group["lr"] * (step / length))
        if step == first + 1:
            self._freeze([one for one in stepped if self._is_eligible(one)])
        if first < step <= length:
            self._write_late(lambda one: self._freeze_late(one, inverse_scale))
            for one in stepped:
                if one.tensor in self._held:
                    self._add_extra(one, step, length)
        if step >= length and (self.moments.zero is None or step > length):
            self._is_done, self._held = True, {}

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
        moment = self._read(one)
        for part in self._eligible_parts(one):
            spread[part.name].add_(part.cut(moment), addend)
        self._held[one.tensor] = spread, num_updates, held

    def _freeze(self, stored: list[StoredTensor]) -> None:
        """Take the mean of g^2 that the second moments hold before step K + 1 as what v0 is made of."""
        stepped = [one for one in stored if self.moments.count_steps(one)]
        ready = [one for one, largest in zip(stepped, self._read_largest(stepped), strict=True) if largest > 0.0]
        for one, spread in zip(ready, self._spread(ready), strict=True):
            self._held[one.tensor] = spread, self.moments.count_steps(one), 0.0
        self._take_off_pending(ready)
        self._written += ready
        self._finish(ready)

    def _spread(self, stored: list[StoredTensor]) -> list[dict[str, RowsAndColumns | Elements]]:
        """Make of each second moment v its s = v / (1 - beta2^n), part by part, in the form in which it is kept."""
        corrections = {one.tensor: 1.0 - one.group["betas"][1] ** self.moments.count_steps(one) for one in stored}
        named = [(one, part, part.cut(self._read(one))) for one in stored for part in self._eligible_parts(one)]
        spread: dict[torch.Tensor, dict] = {one.tensor: {} for one in stored}
        if self.plan.init == "random":
            means = compute_figures([moment for _, _, moment in named], self._is_sharded())
            for (one, part, moment), (mean, *_) in zip(named, means, strict=True):
                spread[one.tensor][part.name] = self._draw_elements(part, moment, mean / corrections[one.tensor])
        else:
            factored = factor_into_rows_and_columns(
                [(moment, part.full_shape) for _, part, moment in named], self._is_sharded()
            )
            for (one, part, _), own in zip(named, factored, strict=True):
                own.columns /= corrections[one.tensor]
                spread[one.tensor][part.name] = own
        return [spread[one.tensor] for one in stored]

    def _draw_elements(self, part: Part, moment: torch.Tensor, mean: float) -> Elements:
        """Draw mean * chi^2_1 for each element, by the parameter's name."""
        drawn = [torch.empty_like(piece.local, dtype=torch.float32) for piece in find_pieces(moment)]
        for piece, own in zip(find_pieces(moment), drawn, strict=True):
            self._draw(part, replace(piece, local=own), mean)
        return Elements([own.to(torch.bfloat16) for own in drawn], mean)

    def _freeze_late(self, one: StoredTensor, inverse_scale: float) -> None:
        """Take the first gradient of a parameter that had none, or zeros alone, in the first K steps: s is its square."""
        gradient = self._read_gradient(one)
        self.moments.change(one, [], lambda part, moment: None)  # creates its state, which stays zero
        spread: dict[str, RowsAndColumns | Elements] = {}
        for part in self._eligible_parts(one):
            square = part.cut(gradient)
            square = get_local_part(square).float().square().mul_(inverse_scale**2)
            held = _with_local(part.cut(gradient), square)
            if self.plan.init == "random":
                ((mean, *_),) = compute_figures([held], self._is_sharded())
                spread[part.name] = self._draw_elements(part, held, mean)
            else:
                (spread[part.name],) = factor_into_rows_and_columns([(held, part.full_shape)], self._is_sharded())
        self._held[one.tensor] = spread, self.moments.count_steps(one) or 0, 0.0

    def _read_largest(self, stored: list[StoredTensor]) -> list[float]:
        """Read the largest element of each second moment; refuse those that are not finite."""
        named = [(one, part.name, part.cut(self._read(one))) for one in stored for part in one.parts]
        statistics = compute_figures([moment for _, _, moment in named], self._is_sharded())
        largest = dict.fromkeys((one.tensor for one in stored), 0.0)
        for (one, name, _), values in zip(named, statistics, strict=True):
            if not all(math.isfinite(value) for value in values[:3]):
                raise InputError(describe_not_finite(name))
            largest[one.tensor] = max(largest[one.tensor], values[2])
        return list(largest.values())

    # ---- decay by beta2 ----------------------------------------------------------------------------------------------

    def _start_by_beta2(self, stepped: list[StoredTensor], step: int, inverse_scale: float) -> None:
        if step > 1:
            if step <= self.estimation_steps:
                for one in self._written:
                    is_late = self.moments.count_steps(one) != step - 1
                    if one in stepped and one.tensor.grad is not None and not is_late:
                        self._refine(one, step, inverse_scale)
            elif step == self.estimation_steps + 1 and self.report is None:
                self._finish(self._written)
            self._write_late(lambda one: self._write_by_beta2([one], inverse_scale))
        else:
            ready = self._find_ready([one for one in self._pending if one in stepped])
            self._write_by_beta2(ready, inverse_scale)
            self._take_off_pending(ready)
            self._written += ready
            if self.estimation_steps == 1:
                self._finish(ready)
        self._is_done = not self._pending and (step > self.estimation_steps or self.estimation_steps == 1)

    def _write_by_beta2(self, stored: list[StoredTensor], inverse_scale: float) -> None:
        """Write v0 = scale * g^2, or draws, into second moments, from the gradients of this step."""
        if self.plan.init != "random":
            for one in stored:
                self._set_square(one, self._find_scale(one.group) * inverse_scale**2)
            return
        ratios: dict[float | None, list[torch.Tensor]] = {}  # of v0 to g^2, by beta2
        for one in stored:
            beta2 = self.moments.read_beta2(one.group)
            size = self._random_factors.get(beta2, 1.0) if self.plan.scale is None else self.plan.scale
            self.moments.change(
                one,
                self._eligible_parts(one),
                lambda part, moment, size=size: self._draw_all(part, moment, size),
            )
            moment, gradient = self._read(one), self._read_gradient(one)
            for part in self._eligible_parts(one):
                ratio = sample_ratio(part.cut(moment), part.cut(gradient)) / inverse_scale**2
                ratios.setdefault(beta2, []).append(ratio)
        if self._ratio is None and ratios:
            self._size_draws(stored, ratios)

    def _size_draws(self, stored: list[StoredTensor], ratios: dict[float | None, list[torch.Tensor]]) -> None:
        """Measure v0 / g^2 of the first draws, the median over elements; with `decay_steps`, size them by it."""
        if self.plan.scale is not None:
            self._ratio = compute_median([r for of_beta2 in ratios.values() for r in of_beta2], self._is_sharded())
            return
        for beta2, of_beta2 in ratios.items():
            ratio, wanted = compute_median(of_beta2, self._is_sharded()), self.plan.get_scale(beta2)
            self._random_factors[beta2] = wanted / ratio if ratio else 1.0
            self._ratio = self._ratio or wanted
        for one in stored:
            factor = self._random_factors[self.moments.read_beta2(one.group)]
            self.moments.change(one, self._eligible_parts(one), lambda _, v, f=factor: get_local_part(v).mul_(f))

    def _refine(self, one: StoredTensor, step: int, inverse_scale: float) -> None:
        """Let the second moment before step t be what it is after a start at scale * v_hat_t, v_hat_t being the mean of g^2 so far.

        With u the moment from a zero start, v_t = u_t + scale * beta2^t * u_t / (1 - beta2^t). So v_(t-1) gives u_(t-1), and
        v = (1 + r_t) u_(t-1) + scale * beta2^(t-1) (1 - beta2) / (1 - beta2^t) * g^2, r_t = scale * beta2^t / (1 - beta2^t), becomes v_t
        by Adam's own update.
        """
        beta2, scale = one.group["betas"][1], self._find_scale(one.group)
        ratio, before = (scale * beta2**t / (1.0 - beta2**t) for t in (step, step - 1))
        of_square = scale * beta2 ** (step - 1) * (1.0 - beta2) / (1.0 - beta2**step) * inverse_scale**2
        gradient = self._read_gradient(one)

        def add(part: Part, moment: torch.Tensor) -> None:
            own = get_local_part(moment).mul_((1.0 + ratio) / (1.0 + before))
            _add_square_(own, get_local_part(part.cut(gradient)), of_square)

        self.moments.change(one, self._eligible_parts(one), add)

    def _find_scale(self, group: dict) -> float:
        return self.plan.get_scale(self.moments.read_beta2(group) or 0.0)

    # ---- both ----------------------------------------------------------------------------------------------------------

    def _set_square(self, one: StoredTensor, size: float) -> None:
        """Set the second moment to size * g^2."""
        gradient = self._read_gradient(one)
        self.moments.change(
            one,
            self._eligible_parts(one),
            lambda part, v: _add_square_(get_local_part(v).zero_(), get_local_part(part.cut(gradient)), size),
        )

    def _draw_all(self, part: Part, moment: torch.Tensor | Fragment, scale: float) -> None:
        """Fill a second moment with draws of eq. 11."""
        for piece in find_pieces(moment):
            self._draw(part, piece, compute_random_v0_mean(part.full_shape, scale))

    def _draw(self, part: Part, piece: Piece, mean: float) -> None:
        """Fill a piece of a parameter's second moment with mean * chi^2_1, drawn by the parameter's name."""
        draw_standard_normal_(
            piece.local,
            name=part.name,
            seed=self.seed,
            full_shape=piece.full_shape,
            offset=piece.offset,
            transform=lambda z: z.square_().mul_(mean),
        )

    def _write_late(self, write: Callable[[StoredTensor], None]) -> None:
        """Give a v0 to the parameters that have their first gradient now."""
        with_gradient = [one for one in self._pending if one.tensor.grad is not None]
        ready = self._find_ready(with_gradient)
        for one in with_gradient:
            if one in ready:
                write(one)
            else:
                self._zero_gradients[one.tensor] = self._zero_gradients.get(one.tensor, 0) + 1
        hopeless = [one for one in self._pending if self._zero_gradients.get(one.tensor, 0) >= MAX_ZERO_GRADIENTS]
        self._take_off_pending(ready + hopeless)
        if ready:
            names = [part.name for one in ready for part in self._eligible_parts(one)]
            logger.info(f"v0 written at the first gradient of {len(names)} further tensors: {_shorten(names)}")
            if self.report is not None:
                self.report.without_gradient = [n for n in self.report.without_gradient if n not in names]

    def _find_ready(self, stored: list[StoredTensor]) -> list[StoredTensor]:
        """Find those with a gradient that is not zero; refuse one that is not finite."""
        stored = [one for one in stored if one.tensor.grad is not None]
        if not stored:
            return []
        kinds = self._classify([one.tensor.grad for one in stored])
        _require_finite(stored, kinds)
        return [one for one, kind in zip(stored, kinds, strict=True) if kind == USABLE]

    def _take_off_pending(self, stored: list[StoredTensor]) -> None:
        self._pending = [one for one in self._pending if one not in stored]

    def _finish(self, written: list[StoredTensor]) -> None:
        """Make the report, once all parameters that had a gradient have a v0 (ZeRO: after its last flat tensor)."""
        report = self._draft_report() if self._draft is None else self._draft
        scale = 1.0
        if self.plan.decay == "linear" and written:
            scale = 1.0 / (1.0 - report.beta2 ** self.moments.count_steps(written[0]))
        elif self.plan.decay == "beta2" and self.estimation_steps > 1:
            decayed, sigma = report.beta2**self.estimation_steps, report.scale
            scale = sigma / (1.0 - decayed + sigma * decayed)  # of v_K, which holds what K steps have added, to v0
        named = [
            (part.name, part.full_shape, part.cut(self._read(one)))
            for one in written
            for part in self._eligible_parts(one)
        ]
        add_parameters(report, named, self._is_sharded(), scale)
        self._draft = report
        if self.moments.zero is not None and self._pending:
            return
        self.report, self._draft = report, None
        report.seconds = self._seconds
        report.measured_ratio = report.scale if self._ratio is None else self._ratio
        report.without_gradient = [part.name for one in self._pending for part in self._eligible_parts(one)]
        if self.max_steps:
            report.add_expectation(self.max_steps)
        for observe in self.observers:
            observe()
        self.observers = []
        if self.on_written is not None:
            self.on_written(report)
        else:
            report.log()

    def _draft_report(self) -> V0Report:
        plan, stored = self.plan, self._list()
        eligible = [one for one in stored if self._is_eligible(one)]
        without = [part for one in stored for part in one.parts if part not in self._eligible_parts(one)]
        first = eligible[0].group
        return V0Report(
            strategy=plan.init,
            decay=plan.decay,
            decay_steps=plan.decay_steps,
            scale=None if plan.decay == "linear" else self._find_report_scale(first),
            seed=self.seed,
            estimator=plan.estimator,
            estimation_steps=self.estimation_steps if plan.init == "data_driven" else None,
            include_bias_and_norm=plan.include_bias_and_norm,
            optimizer=self.moments.name,
            beta2=self.moments.read_beta2(first),
            num_processes=dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1,
            num_parameters_without_v0=len(without),
            num_elements_without_v0=sum(math.prod(part.full_shape) for part in without),
            versions=collect_versions(),
        )

    def _find_report_scale(self, group: dict) -> float:
        if self.plan.init == "random" and self.plan.scale is None:
            return self._random_factors.get(self.moments.read_beta2(group), 1.0)
        return self._find_scale(group)

    # ---- looking -----------------------------------------------------------------------------------------------------

    def _list(self) -> list[StoredTensor]:
        """List what the optimizer steps; what was added since the last call waits for its first gradient."""
        if sum(len(group["params"]) for group in self.moments.list_groups()) != self._num_parameters:
            self._num_parameters = sum(len(group["params"]) for group in self.moments.list_groups())
            known, was_empty = self._stored, not self._stored
            found = self.moments.list_tensors(name_parameters(self.model))
            self._stored = {one.tensor: known.get(one.tensor, one) for one in found}
            if not was_empty:
                added = [one for tensor, one in self._stored.items() if tensor not in known]
                self._pending += [one for one in added if self._is_eligible(one)]
        return list(self._stored.values())

    def _eligible_parts(self, one: StoredTensor) -> list[Part]:
        return [part for part in one.parts if is_eligible(part.full_shape, self.plan.include_bias_and_norm)]

    def _is_eligible(self, one: StoredTensor) -> bool:
        return one.tensor.is_floating_point() and bool(self._eligible_parts(one))

    def _read(self, one: StoredTensor) -> torch.Tensor:
        return self.moments.layout.read(self.moments.find_state(one.tensor, one.group))

    def _read_gradient(self, one: StoredTensor) -> torch.Tensor:
        """Return a tensor's gradient, placed as the tensor itself where it is sharded."""
        gradient = one.tensor.grad.detach()
        if is_dtensor(gradient) and gradient.placements != one.tensor.placements:
            gradient = gradient.redistribute(placements=one.tensor.placements)
        return gradient

    def _is_sharded(self) -> bool:
        return self.moments.zero is not None or any(is_dtensor(one.tensor) for one in self._list())

    def _classify(self, tensors: list[torch.Tensor]) -> list[int]:
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
        if self._is_sharded() and dist.is_initialized() and dist.get_world_size() > 1:
            on_device = kinds.to(local[0].device) if local else kinds
            dist.all_reduce(on_device, op=dist.ReduceOp.MAX)
            kinds = on_device.cpu()
        return kinds.tolist()

    def _require_possible(self) -> None:
        """Refuse what cannot get a v0, before any step."""
        stored = self._list()
        is_known = self.model is not None and self.moments.zero is None
        if is_known and not any(one.tensor.is_meta for one in stored) and not any(map(self._is_eligible, stored)):
            raise InputError(NOTHING_TO_WRITE)
        if self.plan.decay == "linear":
            self.moments.require_linear_decay()
            self._warn_of_narrow_states(stored)
            return
        for group in self.moments.list_groups():
            beta2 = self.moments.read_beta2(group)
            needs_beta2 = self.plan.decay_steps is not None or (
                self.plan.init == "data_driven" and self.estimation_steps > 1
            )
            if needs_beta2 and beta2 is None:
                asked = "v0_decay_steps" if self.plan.decay_steps is not None else "v0_estimation_steps above 1"
                raise InputError(
                    f"{asked} with {self.moments.name}: its second moment is no decaying mean of g^2; use v0_scale, and "
                    "v0_estimation_steps=1"
                )
            if isinstance(self.plan.decay_steps, int):
                self.plan.get_scale(beta2)  # too large a scale is refused now

    def _warn_of_narrow_states(self, stored: list[StoredTensor]) -> None:
        """Say where the second moment's own rounding keeps v0 from leaving on time."""
        slow = max((one.group["betas"][1] for one in stored if one.tensor.dtype in NARROW_DTYPES), default=0.0)
        if slow > SLOW_BETA2:
            logger.warning(
                f"the second moment is kept in 16 bits with beta2 {slow:g}, whose rounding lets v0 leave late (a fifth of the step is missing "
                "at the end of the decay): keep the weights in fp32 (--bf16 does), or use --adam_beta2 0.98"
            )

    # ---- learning rate and betas of a step -----------------------------------------------------------------------------

    def _lend(self, group: dict, key: str, value: Any) -> None:
        self._lent.append((group, key, group[key]))
        group[key] = value

    def _give_back(self) -> None:
        for group, key, value in self._lent:
            group[key] = value
        self._lent = []


class LengthHook:
    """Measures in an optimizer's first step how long a warmup its run needs, hands it on before the update, and is gone.

    Args:
        optimizer: any that steps its own gradients; needs no second moment.
        on_length: gets what was measured.
    """

    def __init__(
        self,
        optimizer,
        model: nn.Module | None,
        *,
        max_steps: int,
        loss_fn: Callable[[], Any],
        on_length: Callable[[WarmupLength], None],
    ) -> None:
        self.model, self.max_steps, self.loss_fn, self.on_length = model, max_steps, loss_fn, on_length
        self.inner = unwrap_optimizer(optimizer)
        self._optimizer = optimizer
        self._handle = self.inner.register_step_pre_hook(torch.compiler.disable(self._before_step))

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> None:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.on_length is None or not any(bool(get_local_part(g).any()) for g in gradients):
            return  # measured already, or the step by which a distributed checkpoint is loaded
        on_length, self.on_length = self.on_length, None
        on_length(measure_length(self._optimizer, self.model, self.loss_fn, self.max_steps))


def measure_radius(optimizer, model: nn.Module | None, loss_fn: Callable[[], Any] | None) -> TrustRadius:
    """Measure the trust radius at the gradients in hand, along the update that each group's learning rate would make.

    Args:
        optimizer: whose present gradients are those of the step.
        loss_fn: computes the loss of the present step's batch at the weights as they are; None where it cannot be had.
    """
    groups = unwrap_optimizer(optimizer).param_groups
    largest = find_largest_rate(optimizer)
    if find_partitions(optimizer) is not None:
        return TrustRadius(reason="DeepSpeed's engine keeps the gradients")
    if loss_fn is None:
        return TrustRadius(reason="there is no loss_fn")
    if largest == 0.0:
        return TrustRadius(reason="every learning rate is 0")
    stepped = [(p, _read_rate(group) / largest) for group in groups for p in group["params"] if p.grad is not None]
    try:
        return measure_in_step(stepped, loss_fn, model)
    except LossNotComputed as error:
        return TrustRadius(reason=str(error))


def measure_length(
    optimizer, model: nn.Module | None, loss_fn: Callable[[], Any] | None, max_steps: int | None
) -> WarmupLength:
    """Measure how long a warmup this run needs, at the gradients in hand; arguments as of `measure_radius`."""
    radius = measure_radius(optimizer, model, loss_fn)
    groups = unwrap_optimizer(optimizer).param_groups
    betas = groups[0].get("betas") if groups else None
    return choose_length(
        radius.d50,
        find_largest_rate(optimizer),
        max_steps,
        beta2=float(betas[1]) if betas else 0.999,
        has_batch_norm=radius.has_batch_norm,
        reason=radius.reason,
        num_forwards=radius.num_forwards,
        seconds=radius.seconds,
    )


def find_largest_rate(optimizer) -> float:
    """Return the largest peak learning rate of an optimizer's groups."""
    return max((_read_rate(group) for group in unwrap_optimizer(optimizer).param_groups), default=0.0)


def _read_rate(group: dict) -> float:
    return float(group.get("initial_lr", group["lr"]))


def attach_v0(
    optimizer,
    model: nn.Module | None = None,
    v0_init: str = "data_driven",
    *,
    v0_decay: str | None = None,
    v0_decay_steps: int | float | str | None = None,
    v0_scale: float | None = None,
    v0_estimation_steps: int | None = None,
    v0_seed: int = 0,
    v0_include_bias_and_norm: bool | None = None,
    max_steps: int | None = None,
    loss_fn: Callable[[], Any] | None = None,
) -> V0Hook | None:
    """Give an optimizer's second moment a v0 in the run's own first steps. One call, before them, in any loop.

        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        attach_v0(optimizer, model, v0_decay_steps=1_000)
        ...                                          # the loop as it was, prepared by accelerate, Fabric or nobody

    Keep the learning rate at its peak for `v0_decay_steps` (`keep_plateau` does it to a schedule): v0 is the warmup. See the head
    of this file for what happens when.

    Args:
        optimizer: torch's or another's with a second moment, plain, prepared by accelerate, or ZeRO's.
        model: whose names the parameters have in the report, and by which a random v0 is drawn; without it they are named by
            their place in the optimizer. Plain, compiled, inside DDP, or sharded by FSDP2 or tensor parallelism.
        v0_init: "data_driven", "random" or "first_gradient"; "zeros" attaches nothing.
        v0_decay, v0_decay_steps, v0_scale, v0_estimation_steps, v0_include_bias_and_norm: as the flags of these names.
        v0_seed: of a random v0.
        max_steps: optimizer steps of the whole run, which fractions of training, a measured length and the log's outlook need.
        loss_fn: takes nothing and returns the loss (a scalar tensor) of the batch of the first step; with it
            `v0_decay_steps` may be left out, and is measured in that step: some ten forward passes, which leave everything as it was.

    Returns:
        The hook: `report` says what was done once it is, `plan.decay_steps` for how long, `remove()` takes it off; `state_dict()`
        and `load_state_dict()` let a run resume before v0 has gone. None for "zeros".

    Raises:
        InputError: (a ValueError) bad settings; an optimizer without a second moment.
    """
    settings = V0InitArguments(
        v0_init=v0_init,
        v0_decay=v0_decay,
        v0_decay_steps=v0_decay_steps,
        v0_scale=v0_scale,
        v0_estimation_steps=v0_estimation_steps,
        v0_include_bias_and_norm=v0_include_bias_and_norm,
        v0_seed=v0_seed,
    )
    plan = settings.resolve(max_steps)
    if plan.init == "zeros":
        return None
    if plan.decay_steps == AUTO and (loss_fn is None or not max_steps):
        raise InputError(
            f"v0_decay_steps=auto needs {'loss_fn' if loss_fn is None else 'max_steps'}: give attach_v0 loss_fn=lambda: LOSS of the first "
            "batch and max_steps, or v0_decay_steps as a number of optimizer steps"
        )
    if isinstance(plan.decay_steps, float):
        raise InputError(
            f"v0_decay_steps={plan.decay_steps} is a fraction of training: give max_steps too, or a number of steps"
        )
    return V0Hook(optimizer, model, plan, seed=v0_seed, max_steps=max_steps, loss_fn=loss_fn)


def _read_inverse_scale(optimizer) -> float | None:
    """Return what a gradient must be multiplied by; None if this step will not be made.

    A GradScaler leaves unscaling to optimizers that can do it inside their kernel (fused Adam): then `grad_scale` holds the factor
    and `found_inf` whether a gradient has overflowed.
    """
    found_inf, scale = getattr(optimizer, "found_inf", None), getattr(optimizer, "grad_scale", None)
    if found_inf is not None and float(found_inf) > 0:
        return None
    return 1.0 if scale is None else 1.0 / float(scale)


def _add_square_(out: torch.Tensor, gradient: torch.Tensor, factor: float) -> None:
    """Add factor * g^2 to `out`, in its dtype and without a temporary of its size."""
    for part, sums in zip(split_rows(gradient, 1 << 23), split_rows(out, 1 << 23), strict=True):
        part = part.to(sums.dtype)
        sums.addcmul_(part, part, value=factor)


def _with_local(held: torch.Tensor | Fragment, local: torch.Tensor) -> torch.Tensor | Fragment:
    """Return other values that lie as `held` does: whole, a DTensor or a fragment."""
    if isinstance(held, Fragment):
        return replace(held, local=local)
    if not is_dtensor(held):
        return local
    return type(held).from_local(
        local, held.device_mesh, held.placements, run_check=False, shape=held.shape, stride=held.stride()
    )


def _require_finite(stored: list[StoredTensor], kinds: list[int]) -> None:
    for one, kind in zip(stored, kinds, strict=True):
        if kind == NOT_FINITE:
            raise InputError(describe_not_finite(one.parts[0].name))


def _shorten(names: list[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
