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
  The hook stays until every parameter has had one (`linear`: until step L), and gives up on gradients that were zero 100 times and, after
  100 steps in which nothing but frozen parameters is waited for, on these.
- Every process must make the same steps. Nothing is communicated but, where parameters are sharded, one flag per tensor at
  the first step and the statistics of the report.
"""

import logging
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..errors import InputError
from ..method.length import WarmupLength
from ..records.report import V0Report
from ..second_moment.state import SecondMoment, unwrap_optimizer
from ..settings import AUTO, V0Plan
from ..sharding.parts import ParamShard
from .beta2_decay import Beta2Decay
from .linear_decay import LinearDecay
from .step_hooks import StepHooks, read_inverse_scale

logger = logging.getLogger("hf_v0init")

NARROW_DTYPES, SLOW_BETA2 = (torch.bfloat16, torch.float16), 0.99  # beyond which 16 bits round the decay away

# innermost optimizer -> weak reference to its V0Hook
_attached: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()


def find_hook(optimizer) -> "V0Hook | None":
    """Return what `attach_v0` has attached to an optimizer, also when it has done its work; None if nothing."""
    reference = _attached.get(unwrap_optimizer(optimizer))
    return None if reference is None else reference()


class V0Hook:
    """The hook of one optimizer; made by `attach_v0`, whose arguments it has but for two.

    Args:
        find_length: measures for how long v0 decays where the plan leaves it open; called in the first step, gradients in hand.
        on_written: gets the report once v0 stands. Default: it is logged.

    Its states: not written, before the first gradient (`is_waiting`); measuring, for `estimation_steps` steps; decaying; done, when it is
    no longer attached (`is_attached`).

    Attributes:
        report: what was done, once v0 stands; None before.
        length: what was measured where `decay_steps` was "auto"; None otherwise.
        num_steps: optimizer steps made; None before the first.
    """

    def __init__(
        self,
        optimizer,
        model: nn.Module | None,
        plan: V0Plan,
        *,
        max_steps: int | None = None,
        find_length: Callable[[], WarmupLength] | None = None,
        on_written: Callable[[V0Report], None] | None = None,
    ) -> None:
        self.max_steps = max_steps if max_steps and max_steps > 0 else None
        self.find_length, self.on_written = find_length, on_written
        self.report: V0Report | None = None
        self.length: WarmupLength | None = None
        self.num_steps: int | None = None
        self._draft: V0Report | None = None  # under ZeRO, until its last flat tensor
        self._unreported: list[ParamShard] = []  # resumed, and not in the draft yet
        self._lent: list[tuple[dict, Any]] = []  # groups and their own learning rates
        self._makes_step = False
        self._seconds = 0.0
        self.moments = SecondMoment(optimizer)
        self.decay = self._make_decay(model, plan)
        self.decay.require_possible(self.max_steps)
        self._warn_of_a_late_end()
        other = find_hook(optimizer)
        if other is not None and other.is_attached:
            raise InputError("attach_v0 was called twice for this optimizer: call it once, before the first step")
        self._hooks = StepHooks(self.moments.inner, self._prepare, self._end_step)
        _attached[self.moments.inner] = weakref.ref(self)

    # ---- what users call ---------------------------------------------------------------------------------------------

    @property
    def plan(self) -> V0Plan:
        """What is done; its `decay_steps` is a number from the first step on."""
        return self.decay.plan

    @property
    def estimation_steps(self) -> int:
        """K, the steps over which E[g^2] is estimated."""
        return self.decay.estimation_steps

    @property
    def is_waiting(self) -> bool:
        """Whether the first step is still to come."""
        return self.is_attached and self.num_steps is None

    @property
    def is_attached(self) -> bool:
        """Whether the hook still has work to do."""
        return self._hooks.are_attached

    def remove(self) -> None:
        """Take the hook off the optimizer; what was written stays."""
        self._give_back()
        self._hooks.remove()

    def state_dict(self) -> dict:
        """Return what a checkpoint keeps beside the optimizer's own state, to resume before v0 has gone; the same on every process.

        Returns:
            "num_steps", "decay_steps", "estimation_steps": numbers; "held": see `LinearDecay.state_dict`.
        """
        return {
            "num_steps": self.num_steps or 0,
            "decay_steps": self.plan.decay_steps,
            "estimation_steps": self.estimation_steps,
            "held": self.decay.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Go on where `state_dict` was taken. Call it when the optimizer has loaded its own state."""
        plan = replace(self.plan, decay_steps=state["decay_steps"])
        self.decay = self._make_decay(self.decay.model, plan)  # what was loaded came with groups of its own
        self.decay.estimation_steps, self.num_steps = state["estimation_steps"], int(state["num_steps"]) or None
        if self.num_steps is not None:
            self._unreported = self.decay.load_state_dict(state["held"], self.num_steps)

    # ---- around each step --------------------------------------------------------------------------------------------

    def _prepare(self, optimizer) -> None:
        """Do what this step needs, its gradients in hand."""
        self._give_back()  # of a step that was cut off
        inverse_scale = read_inverse_scale(optimizer)
        if inverse_scale is None:
            return  # a gradient has overflowed: the kernel will skip this step
        start = time.perf_counter()
        if self.num_steps is None and not self._begin():
            return
        if self.plan.decay_steps == AUTO:
            self.length = self.find_length()
            self.decay.plan = replace(self.plan, decay_steps=self.length.steps)
            self.decay.estimation_steps = max(1, min(self.estimation_steps, self.length.steps - 1))
        stepped = self.decay.list_all()
        if self.moments.zero is not None:  # one flat tensor after the other
            inside = {id(p) for group in optimizer.param_groups for p in group["params"]}
            stepped = [shard for shard in stepped if id(shard.param) in inside]
        step = self._count(stepped) + 1
        self._makes_step = True
        with torch.no_grad():
            late = self.decay.before_step(stepped, step, inverse_scale)
        if self.plan.decay == "linear" and step <= self.estimation_steps:
            self._lent = [(group, group["lr"]) for group in optimizer.param_groups]
            for group in optimizer.param_groups:
                group["lr"] = group["lr"] * (step / self.plan.decay_steps)
        if late and self.report is not None:
            self.report.without_gradient = [name for name in self.report.without_gradient if name not in late]
        if self.decay.is_done:
            self._hooks.retire()
        self._seconds += time.perf_counter() - start

    def _end_step(self, optimizer) -> None:
        """Count the step that was made, and put its learning rate back."""
        self._give_back()
        if self._makes_step:
            self._makes_step = False
            self.num_steps += 1

    def _begin(self) -> bool:
        """Look at the first gradients; returns whether this is a step to count."""
        every = self.decay.list_all()
        if not self.decay.find_ready(every):
            return False
        if not self.moments.is_untouched() and any(self.moments.count_steps(shard) for shard in every):
            self._hooks.retire()  # stepped before the hook came: that state stands
            return False
        self.num_steps = 0
        self.decay.pending = self.decay.list_eligible()
        return True

    def _make_decay(self, model: nn.Module | None, plan: V0Plan) -> LinearDecay | Beta2Decay:
        """Begin with what the optimizer steps now."""
        decay = (LinearDecay if plan.decay == "linear" else Beta2Decay)(self.moments, model, plan)
        decay.finish = self._finish
        return decay

    def _count(self, stepped: list[ParamShard]) -> int:
        """Return the steps made so far; ZeRO steps one flat tensor after the other, each with a count of its own."""
        if self.moments.zero is None:
            return self.num_steps
        return max((self.moments.count_steps(shard) or 0 for shard in stepped), default=0)

    def _finish(self, written: list[ParamShard]) -> None:
        """Make the report, once all parameters that had a gradient have a v0 (ZeRO: after its last flat tensor)."""
        if self._draft is None:
            self._draft = self._begin_report()
        report, moments = self._draft, [self.moments.read(shard) for shard in written]
        scales = [self.decay.find_stored_scale(shard) for shard in written]
        report.add_parameters(written, moments, scales, self.decay.is_sharded())
        self._unreported = [shard for shard in self._unreported if shard not in written]
        if self.moments.zero is not None and (self.decay.pending or self._unreported):
            return
        self.report, self._draft = report, None
        report.seconds = self._seconds
        report.measured_ratio = report.scale if self.decay.ratio is None else self.decay.ratio
        report.without_gradient = [shard.name for shard in self.decay.pending]
        if self.max_steps:
            report.add_expectation(self.max_steps)
        if self.on_written is not None:
            self.on_written(report)
        else:
            report.log()

    def _begin_report(self) -> V0Report:
        chosen = self.decay.list_eligible()
        without = [shard for shard in self.decay.list_all() if not self.decay.is_eligible(shard)]
        scale = self.decay.find_scale(chosen[0].group)
        report = V0Report.begin(self.plan, self.moments, chosen, without, scale=scale)
        report.estimation_steps = self.decay.estimation_steps if self.plan.init == "data_driven" else None
        return report

    # ---- small things ------------------------------------------------------------------------------------------------

    def _warn_of_a_late_end(self) -> None:
        """Say where v0 will not have left in time."""
        if self.plan.decay != "linear":
            return
        length = self.plan.decay_steps
        if isinstance(length, int) and self.max_steps and length > self.max_steps:
            logger.warning(
                f"v0_decay_steps={length} is longer than the run ({self.max_steps:,} steps), so v0 never leaves: give "
                "--v0_decay_steps 0.33, or leave it out for two thirds of training"
            )
        narrow = [shard for shard in self.decay.list_all() if shard.param.dtype in NARROW_DTYPES]
        slow = max((shard.group["betas"][1] for shard in narrow), default=0.0)
        if slow > SLOW_BETA2:
            logger.warning(
                f"the second moment is kept in 16 bits with beta2 {slow:g}, whose rounding lets v0 leave late (a fifth of the step is "
                "missing at the end of the decay): keep the weights in fp32 (--bf16 does), or use --adam_beta2 0.98"
            )

    def _give_back(self) -> None:
        """Put the learning rates back that a step was lent others for."""
        for group, rate in self._lent:
            group["lr"] = rate
        self._lent = []
