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

from ..errors import InputError
from ..initialization.plan import NOTHING_TO_WRITE
from ..initialization.summary import add_parameters
from ..method.decay import DEFAULT_ESTIMATION_STEPS
from ..method.length import WarmupLength
from ..records.report import V0Report, collect_versions
from ..second_moment.state import SecondMoments, StoredTensor, unwrap_optimizer
from ..settings import AUTO, V0InitArguments, V0Plan
from .beta2_decay import Beta2Decay
from .length import call_if_cut_off, measure_length
from .linear_decay import LinearDecay
from .tensors import SteppedTensors, require_finite

logger = logging.getLogger("hf_v0init")

MAX_ESTIMATION_STEPS = 32  # of the default with beta2
ESTIMATION_FRACTION = 0.01  # of training, by default with beta2
NARROW_DTYPES, SLOW_BETA2 = (torch.bfloat16, torch.float16), 0.99  # beyond which 16 bits round the decay away

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
        on_failed: Callable[[], None] | None = None,
        on_written: Callable[[V0Report], None] | None = None,
    ) -> None:
        self.model, self.plan, self.seed = model, plan, seed
        self.loss_fn, self.on_length, self.on_failed, self.on_written = loss_fn, on_length, on_failed, on_written
        self.report: V0Report | None = None
        self.length: WarmupLength | None = None
        self.num_steps: int | None = None
        self.observers: list[Callable[[], None]] = []  # called when v0 stands, before the step is made
        self._decay: LinearDecay | Beta2Decay | None = None
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
        """Return what a checkpoint keeps beside the optimizer's own state, to resume before v0 has gone; the same on every process.

        Returns:
            "num_steps", "decay_steps", "estimation_steps": numbers; "held": see `LinearDecay.state_dict`.
        """
        return {
            "num_steps": self.num_steps or 0,
            "decay_steps": self.plan.decay_steps,
            "estimation_steps": self.estimation_steps,
            "held": self._decay.state_dict() if isinstance(self._decay, LinearDecay) else {},
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. Call it when the optimizer has loaded its own state."""
        self.plan = replace(self.plan, decay_steps=state["decay_steps"])
        self.estimation_steps, self.num_steps = state["estimation_steps"], int(state["num_steps"]) or None
        if self.num_steps is None:
            return
        stored = [one for one in self.tensors.list_stored() if self.tensors.is_eligible(one)]
        written = [one for one in stored if self.moments.find_state(one.tensor, one.group) is not None]
        self.tensors.pending = [one for one in stored if one not in written]
        self._decay = self._make_decay()
        if isinstance(self._decay, LinearDecay):
            self._decay.load_state_dict(state["held"])
        else:
            self._decay.load(written, self.num_steps)

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def bind(self, optimizer) -> None:
        """Take another view of the same optimizer, such as ZeRO's after accelerate has prepared it; hooks stay where they are."""
        self._optimizer, self.moments = optimizer, SecondMoments(optimizer)
        self.tensors = SteppedTensors(self.moments, self.model, self.plan.include_bias_and_norm, self.seed)
        self._decay = None
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
        self.tensors.include_bias_and_norm = self.plan.include_bias_and_norm
        steps = self.plan.decay_steps
        if isinstance(steps, float) and self.max_steps:
            self.plan = replace(self.plan, decay_steps=math.ceil(steps * self.max_steps))
        length = self.plan.decay_steps if self.plan.decay == "linear" else None
        if isinstance(length, int) and self.max_steps and length > self.max_steps:
            logger.warning(
                f"v0_decay_steps={length} is longer than the run ({self.max_steps:,} steps), so v0 never leaves: give "
                "--v0_decay_steps 0.33, or leave it out to have it measured"
            )
        self.estimation_steps = choose_estimation_steps(self.plan, self.max_steps)
        if self.plan.estimation_steps is None and self.moments.read_beta2() is None:
            self.estimation_steps = 1
        self._fit_estimation_steps()

    # ---- the hooks ---------------------------------------------------------------------------------------------------

    def _before_step(self, optimizer, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        if self._is_done:
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")  # args[0] is the optimizer itself
        is_last = next(reversed(optimizer._optimizer_step_pre_hooks)) == self._handles[0].id
        calls_closure = type(optimizer).__module__.startswith("torch.optim.")  # others may ignore one
        if closure is None and (is_last or not calls_closure):
            self._prepare(optimizer)
            return None
        if closure is None:  # hooks that came later, and may change the gradients, go first
            return args[:1], kwargs | {"closure": lambda: self._prepare(optimizer)}
        # The gradients are made inside the step (Lightning): look at them there, after the first call.
        is_prepared = False

        def prepare_after(*inner_args, **inner_kwargs):
            nonlocal is_prepared
            loss = closure(*inner_args, **inner_kwargs)
            if not is_prepared:
                is_prepared = True
                self._prepare(optimizer)
            return loss

        return args[:1], kwargs | {"closure": prepare_after}

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
        if self._decay is None:
            self._decay = self._make_decay()
        inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
        stepped = [one for one in self.tensors.list_stored() if id(one.tensor) in inside]  # all, but under ZeRO
        step = self._count(stepped) + 1
        self._is_counted = True
        with torch.no_grad():
            late = self._decay.before_step(optimizer, stepped, step, inverse_scale)
        if late and self.report is not None:
            self.report.without_gradient = [name for name in self.report.without_gradient if name not in late]
        self._is_done = self._decay.is_done
        self._seconds += time.perf_counter() - start

    def _make_decay(self) -> LinearDecay | Beta2Decay:
        if self.plan.decay == "linear":
            return LinearDecay(self.tensors, self.plan, self.estimation_steps, self._lend, self._finish)
        return Beta2Decay(self.tensors, self.plan, self.estimation_steps, self._finish)

    def _begin(self) -> bool:
        """Look at the first gradients; returns whether this is a step to count."""
        tensors = self.tensors
        stored = [one for one in tensors.list_stored() if one.tensor.grad is not None]
        kinds = tensors.classify([one.tensor.grad for one in stored])
        if not any(kinds):
            return False
        require_finite(stored, kinds)
        if not self.moments.is_untouched() and any(self.moments.count_steps(one) for one in tensors.list_stored()):
            self._is_done = True  # stepped before the hook came, whose state stands
            return False
        self.num_steps = 0
        tensors.pending = [one for one in tensors.list_stored() if tensors.is_eligible(one)]
        return True

    def _count(self, stepped: list[StoredTensor]) -> int:
        """Return the steps made so far; ZeRO steps one flat tensor after the other, each with a count of its own."""
        if self.moments.zero is None:
            return self.num_steps
        return max((self.moments.count_steps(one) or 0 for one in stepped), default=0)

    def _set_measured_length(self) -> bool:
        """Measure L at the gradients in hand; returns whether a v0 is needed."""
        with call_if_cut_off(self.on_failed):
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

    # ---- the report ----------------------------------------------------------------------------------------------------

    def _finish(self, written: list[StoredTensor]) -> None:
        """Make the report, once all parameters that had a gradient have a v0 (ZeRO: after its last flat tensor)."""
        report = self._draft_report() if self._draft is None else self._draft
        named = [
            (part.name, part.full_shape, part.cut(self.tensors.read(one)))
            for one in written
            for part in self.tensors.eligible_parts(one)
        ]
        scales = [self._find_stored_scale(one) for one in written for _ in self.tensors.eligible_parts(one)]
        add_parameters(report, named, self.tensors.is_sharded(), scales)
        self._draft = report
        if self.moments.zero is not None and self.tensors.pending:
            return
        self.report, self._draft = report, None
        report.seconds = self._seconds
        ratio = getattr(self._decay, "ratio", None)
        report.measured_ratio = report.scale if ratio is None else ratio
        report.without_gradient = self.tensors.without_gradient
        if self.max_steps:
            report.add_expectation(self.max_steps)
        for observe in self.observers:
            observe()
        self.observers = []
        if self.on_written is not None:
            self.on_written(report)
        else:
            report.log()

    def _find_stored_scale(self, one: StoredTensor) -> float:
        """Find what leads from the second moment of a tensor, as it is when the report is made, to v0; with linear to E[g^2]."""
        if self.plan.decay == "linear":
            return 1.0 / (1.0 - one.group["betas"][1] ** self.moments.count_steps(one))
        if self.estimation_steps == 1:
            return 1.0
        decayed, scale = self.moments.read_beta2(one.group) ** self.estimation_steps, self._decay.find_scale(one.group)
        return scale / (1.0 - decayed + scale * decayed)  # v_K holds what K steps have added, too

    def _draft_report(self) -> V0Report:
        plan, stored = self.plan, self.tensors.list_stored()
        eligible = [one for one in stored if self.tensors.is_eligible(one)]
        without = [part for one in stored for part in one.parts if part not in self.tensors.eligible_parts(one)]
        first = eligible[0].group
        return V0Report(
            strategy=plan.init,
            decay=plan.decay,
            decay_steps=plan.decay_steps,
            scale=None if plan.decay == "linear" else self._decay.find_scale(first),
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

    def _require_possible(self) -> None:
        """Refuse what cannot get a v0, before any step."""
        stored = self.tensors.list_stored()
        is_known = self.model is not None and self.moments.zero is None
        if (
            is_known
            and not any(one.tensor.is_meta for one in stored)
            and not any(map(self.tensors.is_eligible, stored))
        ):
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

    # ---- learning rate of a step ---------------------------------------------------------------------------------------

    def _lend(self, group: dict, key: str, value: Any) -> None:
        self._lent.append((group, key, group[key]))
        group[key] = value

    def _give_back(self) -> None:
        for group, key, value in self._lent:
            group[key] = value
        self._lent = []


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
