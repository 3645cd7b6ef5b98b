"""A v0 for any `transformers.Trainer`, stock or someone else's: one callback, no subclass.

    trainer = SFTTrainer(...)                                    # TRL's, sentence-transformers', your own
    trainer.add_callback(V0InitCallback(v0_init="data_driven"))
    trainer.train()

| at `on_train_begin` | what happens |
| --- | --- |
| new run, optimizer without state | v0 is written at the first step, see `initialization.first_steps`; the paper's pass (`v0_estimator="per_sample"`) runs now |
| resumed while v0 was being measured | the measurement goes on |
| resumed, optimizer state loaded | the checkpoint's state stands; differing v0 settings are named in a warning |
| resumed from a `save_only_model` checkpoint (no optimizer state) | v0 is written anew at the loaded weights, with a warning |
| second `train()` on the same Trainer (state of the first call) | the state stands, as in the stock Trainer |

`v0_init.json` beside every checkpoint says what was done.
"""

import functools
import logging
import math
import os
import weakref

import torch
from transformers import TrainerCallback

from ..errors import InputError
from ..initialization.first_steps import FirstSteps
from ..initialization.plan import plan_v0
from ..initialization.writing import estimate_grad_sq_mean, write_v0
from ..method.length import LONGEST_SHARE, compute_relative_rate, compute_warmup_length
from ..method.untuned_warmup import UNTUNED_WARMUPS
from ..records.report import V0Report, read_report, write_report
from ..second_moment.schedules import lengthen_warmup
from ..second_moment.state import SecondMoments
from ..settings import MEASURED, V0InitArguments, read_v0_arguments
from ..state_guard import defer_interrupts
from .gradients import TrainerGradients
from .supported_runs import require_sole_warmup, require_supported_pass, require_supported_run
from .trust_radius import measure_run

logger = logging.getLogger("hf_v0init")

_unattached: weakref.WeakSet = weakref.WeakSet()  # callbacks whose Trainer is not known yet


def exists_unattached_callback() -> bool:
    """Whether a `V0InitCallback` is alive that may belong to a Trainer which has not begun its training."""
    return len(_unattached) > 0


class V0InitCallback(TrainerCallback):
    """Gives the optimizer of a Trainer a v0; see the top of the file.

    Args:
        settings: a `V0InitArguments`; or give its fields by name (`v0_init="data_driven", v0_scale=10`). With neither, the
            Trainer's arguments say what is wanted, if they have the flags.

    Attributes:
        report: what was done, as in `v0_init.json`; None before.
        length: where it was measured how long to hold back, what was measured and what follows; None otherwise.
        first_steps: the hook on the optimizer, once there is one.

    Raises:
        InputError: (a ValueError) on settings that cannot be used; at the beginning of the training on an optimizer that cannot.
    """

    def __init__(self, settings: V0InitArguments | None = None, **fields) -> None:
        if settings is not None and fields:
            raise InputError(
                f"V0InitCallback takes settings or their fields by name, and {', '.join(fields)} came with settings"
            )
        self._given = V0InitArguments(**fields) if fields else settings
        self.report: dict | None = None
        self.length: dict | None = None
        self._measured: V0InitArguments | None = None
        self.first_steps: FirstSteps | None = None
        self.resumed_from: str | None = None
        self._trainer, self._began_at = None, 0
        _unattached.add(self)

    def attach(self, trainer) -> "V0InitCallback":
        """Add this callback to a Trainer and let it know the Trainer, which the paper's pass and a measured length need.

        Returns:
            The callback.

        Raises:
            InputError: an untuned warmup beside another one.
        """
        self._trainer = trainer
        require_sole_warmup(self.get_settings(trainer.args), trainer)
        self._take(trainer.args)
        trainer.add_callback(self)
        return self

    def get_settings(self, args, max_steps: int = 0) -> V0InitArguments:
        """Return the settings in force; where the length of the run is known, shares of it are numbers of steps."""
        if self._measured is not None:
            return self._measured
        return (self._given or read_v0_arguments(args)).resolve(max_steps or args.max_steps)

    def get_record(self) -> dict | None:
        """Return what `v0_init.json` must hold now: the report, or how far the measurement is; None if there is nothing."""
        steps, length = self.first_steps, {} if self.length is None else {"length": self.length}
        if self.report is not None:
            return self.report | length
        if steps is not None and steps.num_measured:
            return {"strategy": steps.settings.v0_init, "measuring": steps.state_dict()} | length
        return {"strategy": "zeros"} | length if length else None

    def attach_to(self, optimizer, model, args) -> None:
        """Attach to an optimizer that was just made, or refuse it. Called by `V0InitMixin.create_optimizer`."""
        settings = self.get_settings(args)
        if settings.v0_estimator == "per_sample" and settings.v0_init == "data_driven":
            SecondMoments(optimizer)
            return
        self._attach(optimizer, model, args, settings, None)

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **kwargs):
        """Attach, run the paper's pass, or take over what a checkpoint holds; see the top of the file."""
        self._take(args)
        self._measured = None
        settings = self.get_settings(args, state.max_steps)
        self._began_at = state.global_step
        if settings.untuned_warmup in UNTUNED_WARMUPS and not hasattr(self._trainer, "_v0_callback"):
            raise InputError(
                f"untuned_warmup={settings.untuned_warmup} changes the schedule, which is V0InitTrainer's or V0InitMixin's to make: use "
                "one of these, untuned_warmup=measured, or warmup_steps"
            )
        if settings.wants_length:
            length = self._find_length(args, state, settings, optimizer, kwargs.get("train_dataloader"))
            if settings.untuned_warmup == MEASURED and length:
                scheduler = kwargs["lr_scheduler"]
                make_with_warmup = functools.partial(self._make_schedule, scheduler, length, args, state.max_steps)
                lengthen_warmup(scheduler, make_with_warmup, length, f"untuned_warmup={MEASURED}")
            settings = self._measured = settings.with_length(length)
            if settings.v0_init == "zeros" and self.first_steps is not None:
                self.first_steps.remove()
        if settings.v0_init == "zeros" or optimizer is None:
            return
        if self._trainer is not None:
            require_supported_run(self._trainer)
        by_pass = settings.v0_init == "data_driven" and settings.v0_estimator == "per_sample"
        moments = SecondMoments(optimizer)
        untouched, resumed = moments.is_untouched(), state.global_step > 0
        if resumed and not untouched and not self._take_over(args, state, settings, moments):
            if self.first_steps is not None:
                self.first_steps.remove()
            return
        if resumed and untouched:
            logger.warning(
                f"the checkpoint at step {state.global_step} holds no optimizer state (save_only_model?), so Adam starts "
                "anew: v0 is written at the loaded weights"
            )
        if (
            not resumed
            and not untouched
            and (self.first_steps is None or self.first_steps.num_measured == 0 or self.report)
        ):
            logger.info("v0 is not written: the optimizer keeps the state of an earlier train() call of this Trainer")
        if not by_pass:
            self._attach(optimizer, model, args, settings, state.max_steps)
        elif untouched:
            with defer_interrupts():
                report = self._run_pass(args, state, settings, moments, model)
            self._finish(report)

    def on_save(self, args, state, control, **kwargs):
        """Write `v0_init.json` into the checkpoint that was just saved."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        record = self.get_record()
        if record is not None and args.should_save and os.path.isdir(folder):
            write_report(record, folder)

    # ---- how long to hold back ---------------------------------------------------------------------------------------

    def _find_length(self, args, state, settings: V0InitArguments, optimizer, train_dataloader) -> int:
        """Measure how many steps this run must hold back, or take it from the checkpoint that it goes on from."""
        if state.global_step > 0:
            stored = read_report(self.resumed_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}"))
            self.length = (stored or {}).get("length")
            if self.length is None:
                raise InputError(
                    f"the checkpoint at step {state.global_step} was trained without a measured length: go on without "
                    "untuned_warmup=measured and v0_decay_steps=auto, or start anew"
                )
            return self.length["steps"]
        if self._trainer is None:
            raise InputError(
                "untuned_warmup=measured and v0_decay_steps=auto are measured through the Trainer: use "
                "V0InitCallback(...).attach(trainer)"
            )
        with defer_interrupts():
            radius = measure_run(self._trainer, train_dataloader)
        copied = ("d50", "reason", "has_batch_norm", "num_forwards", "num_backwards", "seconds")
        found = {"x": None} | {name: getattr(radius, name) for name in copied}
        if radius.d50 is None:
            beta2 = SecondMoments(optimizer).read_beta2() or 0.999
            steps = min(math.ceil(2 / (1 - beta2) - 1e-6), math.floor(LONGEST_SHARE * state.max_steps))
            logger.warning(
                f"how long to hold back cannot be measured ({radius.reason}): 2 / (1 - beta2) steps are taken, {steps:,}; to choose "
                "yourself, give --warmup_steps in place of --untuned_warmup, or a number for --v0_decay_steps"
            )
        else:
            found["x"] = compute_relative_rate(args.learning_rate, radius.d50)
            steps = compute_warmup_length(found["x"], state.max_steps, has_batch_norm=radius.has_batch_norm)
            what = f"hold back for {steps:,} steps" if steps else "nothing needed, so Adam is left alone"
            logger.info(f"trust radius d50 {radius.d50:.3g}, learning rate / d50 = {found['x']:.3g}: {what}")
        self.length = found | {"steps": steps}
        return steps

    def _make_schedule(self, scheduler, num_warmup_steps: int, args, max_steps: int):
        """Make the schedule that the Trainer would have made with `--warmup_steps num_warmup_steps`; the Trainer keeps its own."""
        groups = [{"params": [torch.zeros(1)], "lr": rate} for rate in scheduler.base_lrs]
        trainer, given = self._trainer, (args.warmup_steps, self._trainer.lr_scheduler)
        try:
            args.warmup_steps, trainer.lr_scheduler = num_warmup_steps, None
            return trainer.create_scheduler(num_training_steps=max_steps, optimizer=torch.optim.SGD(groups))
        finally:
            args.warmup_steps, trainer.lr_scheduler = given

    # ---- how -----------------------------------------------------------------------------------------------------------

    def _take(self, args) -> None:
        """Note that the flags of these arguments are heeded."""
        args._v0_is_taken = True
        _unattached.discard(self)

    def _get_seed(self, args, settings: V0InitArguments) -> int:
        return args.seed if settings.v0_seed is None else settings.v0_seed

    def _attach(self, optimizer, model, args, settings: V0InitArguments, max_steps: int | None) -> None:
        steps = self.first_steps
        moments = SecondMoments(optimizer)
        if steps is not None and steps.moments.inner is moments.inner:
            steps.settings, steps.model = settings, model
            if steps.is_attached:
                steps.bind(optimizer)
                steps.set_length(max_steps)
            return
        if steps is not None:
            steps.remove()
        if moments.is_untouched():
            self.report = None
        self.first_steps = FirstSteps(
            optimizer,
            model,
            settings,
            seed=self._get_seed(args, settings),
            max_steps=max_steps,
            on_written=self._finish,
        )

    def _finish(self, report: V0Report) -> None:
        report.global_step = self._began_at
        report.log()
        self.report = report.to_dict()

    def _take_over(self, args, state, settings: V0InitArguments, moments: SecondMoments) -> bool:
        """Keep the loaded state and its record; name the settings that differ. Returns whether v0 has anything more to do."""
        folder = self.resumed_from or os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        stored = read_report(folder)
        if stored is None:
            logger.warning(
                f"the checkpoint {folder} has no record of a v0 (v0_init.json): its optimizer state stands as it is, "
                f"and v0_init={settings.v0_init} has no effect on this resumed run"
            )
            return False
        if "measuring" in stored:
            self._require_attached(moments, args, settings, state.max_steps)
            self.first_steps.load_state_dict(stored["measuring"])
            return True
        self.report = stored
        now = V0Report(
            strategy=settings.v0_init,
            scale=stored["scale"] if settings.v0_decay_steps else settings.get_v0_scale(moments.read_beta2() or 0.0),
            seed=self._get_seed(args, settings),
            include_bias_and_norm=settings.v0_include_bias_and_norm,
        )
        if settings.v0_init == "data_driven":
            now.estimator = settings.v0_estimator
            if settings.v0_estimator == "per_sample":
                now.num_samples_requested = settings.v0_num_samples
                now.stats_batch_size = settings.v0_stats_batch_size or stored.get("stats_batch_size")
            else:
                now.estimation_steps = settings.v0_estimation_steps or stored.get("estimation_steps")
        differences = now.find_differences(stored)
        if differences:
            logger.warning(
                "v0 settings differ from the checkpoint's, whose optimizer state stands: " + "; ".join(differences)
            )
        return True

    def _require_attached(self, moments, args, settings, max_steps) -> None:
        if self.first_steps is None:
            self.first_steps = FirstSteps(
                moments.inner,
                None,
                settings,
                seed=self._get_seed(args, settings),
                max_steps=max_steps,
                on_written=self._finish,
            )

    def _run_pass(self, args, state, settings: V0InitArguments, moments: SecondMoments, model) -> V0Report:
        """Run the paper's pass over training samples and write v0 from it (eq. 10)."""
        if self._trainer is None:
            raise InputError(
                "v0_estimator=per_sample reads training samples through the Trainer: use V0InitCallback(...).attach(trainer), or "
                "v0_estimator=minibatch (the default), which needs no Trainer"
            )
        require_supported_pass(self._trainer)
        seed = self._get_seed(args, settings)
        plan = plan_v0(moments, model, settings.v0_include_bias_and_norm)
        gradients = TrainerGradients(self._trainer, settings, moments, seed)
        gradients.require_readable_data()
        settings.get_v0_scale(plan.beta2 or 0.0)  # one that is too large is refused before the pass
        gradients.require_independent_samples()
        step_size = float(self._trainer.get_total_train_batch_size(args))
        estimate = estimate_grad_sq_mean(plan, gradients.list_passes(), step_size)
        report = write_v0(
            plan,
            estimate,
            lambda beta2: settings.get_v0_scale(beta2 or 0.0),
            seed=seed,
            include_bias_and_norm=settings.v0_include_bias_and_norm,
            warmup_steps=settings.v0_decay_steps,
            num_samples_requested=settings.v0_num_samples,
            stats_batch_size=gradients.choose_batch_size(),
            effective_batch_size=step_size,
            global_step=state.global_step,
        )
        report.add_expectation(state.max_steps)
        return report
