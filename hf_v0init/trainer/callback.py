"""A v0 for any `transformers.Trainer`, stock or someone else's: one callback, no subclass.

    trainer = SFTTrainer(...)                                    # TRL's, sentence-transformers', your own
    V0InitCallback(v0_init="data_driven").attach(trainer)
    trainer.train()

| at `on_train_begin` | what happens |
| --- | --- |
| new run, optimizer without state | v0 is written in the first steps, see `hook`; the per-sample estimation runs now |
| resumed, optimizer state loaded | the run goes on with the checkpoint's v0, its length and its schedule; differing v0 settings are named in a warning |
| resumed from a `save_only_model` checkpoint (no optimizer state) | v0 is written anew at the loaded weights, with a warning |
| second `train()` on the same Trainer (state of the first call) | the state stands, as in the stock Trainer |

`v0_init.json` beside every checkpoint says what was done.
"""

import contextlib
import logging
import os
from dataclasses import replace
from pathlib import Path

from transformers import TrainerCallback

from ..errors import InputError
from ..estimation.trust_radius import LossNotComputed
from ..hook import V0Hook, call_before_first_update, measure_length
from ..hook.shards import SteppedShards
from ..hook.step_hooks import StepHooks
from ..method.length import UNTUNED_WARMUPS, WarmupLength
from ..records.report import (
    DECAY_FILE,
    REPORT_FILE,
    V0Report,
    describe_under_way,
    find_differences,
    read_hook_state,
    read_report,
    write_hook_state,
    write_report,
)
from ..second_moment.state import SecondMoment, unwrap_optimizer
from ..settings import TRUST_RADIUS, V0InitArguments, V0Plan, read_v0_arguments
from ..state_guard import defer_interrupts
from .first_loss import LossRecorder
from .per_sample import write_trainers_v0
from .schedule import add_untuned_warmup, find_what_warms_up, keep_plateau, require_no_warmup, warm_up
from .supported_runs import require_supported_run

logger = logging.getLogger("hf_v0init")


class V0InitCallback(TrainerCallback):
    """Gives the optimizer of a Trainer a v0, or its schedule a warmup of measured length; see the top of the file.

    Args:
        settings: a `V0InitArguments`; its fields may be given by name (`v0_init="data_driven", v0_decay_steps=0.1`). With neither, the
            Trainer's arguments say what is wanted, if they have the flags.

    Attributes:
        report: what was done, as in `v0_init.json`; None before.
        length: where it was measured for how long to warm up, what was measured and what follows; None otherwise.
        hook: the hook on the optimizer, once there is one.

    Raises:
        InputError: (a ValueError) on settings that cannot be used; at the beginning of the training on an optimizer that cannot.
    """

    def __init__(self, settings: V0InitArguments | None = None, **fields) -> None:
        if not isinstance(settings, V0InitArguments | None):
            raise InputError(f"V0InitCallback({settings!r}): write V0InitCallback(v0_init={settings!r})")
        self._given = settings if not fields else replace(settings or V0InitArguments(), **fields)
        self.report: dict | None = None
        self.length: dict | None = None
        self.hook: V0Hook | None = None
        self.resumed_from: str | None = None
        self._trainer, self._began_at = None, 0
        self._length_handle: StepHooks | None = None
        self._recorder: LossRecorder | None = None
        self._has_own_schedule = False

    def attach(self, trainer) -> "V0InitCallback":
        """Add this callback to a Trainer and let it know the Trainer, which the schedule and all measurements need.

        Returns:
            The callback.
        """
        show_messages(trainer.args)
        self._trainer = trainer
        self._has_own_schedule = trainer.lr_scheduler is not None
        trainer.add_callback(self)
        load = trainer._load_optimizer_and_scheduler

        def load_and_note(checkpoint):
            self.resumed_from = checkpoint
            return load(checkpoint)

        trainer._load_optimizer_and_scheduler = load_and_note
        return self

    def get_settings(self) -> V0InitArguments:
        """Return the settings as the user gave them, checked again: a hyperparameter search or `setattr` may have changed them."""
        if self._given is not None:
            self._given.require_valid()
            return self._given
        return read_v0_arguments(self._trainer.args)

    def get_record(self) -> dict | None:
        """Return what `v0_init.json` must hold now: what was done, and what is under way; None if there is nothing."""
        length = {} if self.length is None else {"length": self.length}
        if self.report is not None:
            return self.report | length
        hook = self.hook
        if hook is not None and hook.num_steps:
            return describe_under_way(hook.plan, hook.estimation_steps, self._began_at) | length
        if not length:
            return None
        is_warmup = self.get_settings().untuned_warmup == TRUST_RADIUS
        return {"strategy": "zeros"} | ({"warmup_steps": self.length["steps"]} if is_warmup else {}) | length

    def require_possible(self, optimizer) -> None:
        """Raise `InputError` if an optimizer that was just made cannot get the v0 that is asked for, or the run is of another kind."""
        plan = self.get_settings().resolve(self._trainer.args.max_steps)
        if plan.init == "zeros":
            return
        require_supported_run(self._trainer)
        if type(optimizer).__name__ == "DummyOptim":
            return  # DeepSpeed builds its own instead, of a type that was looked at
        SteppedShards(SecondMoment(optimizer), self._trainer.model, plan).require_possible(None)

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def on_train_begin(self, args, state, control, **kwargs):
        """Attach, estimate sample by sample, or go on where a checkpoint left off; see the top of the file."""
        if self._trainer is None:
            raise InputError(
                "V0InitCallback does not know its Trainer: write V0InitCallback(...).attach(trainer) in place of add_callback"
            )
        trainer, settings = self._trainer, self.get_settings()
        self._began_at = step = trainer.state.global_step
        plan = settings.resolve(trainer.state.max_steps, trainer.args.seed)
        what = find_what_warms_up(settings, plan)
        if settings.untuned_warmup is not None and self._has_own_schedule:
            raise InputError(f"{what} and a schedule that was passed in: give one")
        if what is not None:
            require_no_warmup(what, trainer, trainer.lr_scheduler if step == 0 else None)
        if settings.untuned_warmup in UNTUNED_WARMUPS:
            add_untuned_warmup(trainer.lr_scheduler, trainer.optimizer, settings.untuned_warmup)
        situation = self._find_situation(settings, plan)
        self._let_go()
        if situation == "resumed":
            self._go_on(plan)
        elif situation == "second call":
            logger.info("v0 is not written: the optimizer keeps the state of an earlier train() call of this Trainer")
        elif situation == "new":
            if step > 0:
                logger.warning(
                    f"the checkpoint at step {step} holds no optimizer state (save_only_model?), so Adam starts from scratch: v0 is "
                    "written at the loaded weights"
                )
            self._begin(settings, plan)
        elif step > 0:
            self._keep_record_of_another_start()

    def _find_situation(self, settings: V0InitArguments, plan: V0Plan) -> str:
        """Find which row of the table at the top of the file holds, "new", "resumed" or "second call"; "stock" if nothing is to be done."""
        optimizer, is_resumed = self._trainer.optimizer, self._began_at > 0
        if optimizer is None or (plan.init == "zeros" and settings.untuned_warmup != TRUST_RADIUS):
            return "stock"
        if plan.init == "zeros":
            inner = unwrap_optimizer(optimizer)
            if not any("betas" in group or "beta2" in group for group in inner.param_groups):
                raise InputError(
                    f"untuned_warmup=trust_radius measures how far Adam's first update may go, and {type(inner).__name__} is no optimizer "
                    "of its kind (no beta2): give --warmup_steps"
                )
            return "resumed" if is_resumed else "new"
        require_supported_run(self._trainer)
        moments = SecondMoment(optimizer)
        if moments.is_untouched():
            return "new"
        if is_resumed:
            return "resumed"
        has_stepped = any(moments.count_steps(shard) for shard in moments.list_shards({}))
        is_first = plan.estimator != "per_sample" and (self.hook is None or self.hook.is_waiting) and not has_stepped
        return "new" if is_first else "second call"

    def on_step_end(self, args, state, control, **kwargs):
        """Give the Trainer its `compute_loss` back, whatever became of the first step."""
        self._remove_recorder()

    on_train_end = on_step_end

    def on_save(self, args, state, control, **kwargs):
        """Write `v0_init.json` into the checkpoint that was just saved."""
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        if args.should_save and os.path.isdir(folder):
            self.write_record(folder, with_state=True)

    def write_record(self, folder: str, *, with_state: bool = False) -> None:
        """Write `v0_init.json` into a folder if there is anything to say, and what a hook with work to do keeps."""
        record, hook = self.get_record(), self.hook
        keeps = with_state and hook is not None and hook.is_attached and record is not None
        for name, is_written in ((DECAY_FILE, keeps), (REPORT_FILE, record is not None)):
            if with_state and not is_written:  # what an earlier run left in a checkpoint of this name
                Path(folder, name).unlink(missing_ok=True)
        if record is not None:
            os.makedirs(folder, exist_ok=True)
            write_report(record, folder)
        if keeps:
            write_hook_state(hook.plan, hook.state_dict(), folder)

    # ---- the situations at the beginning -----------------------------------------------------------------------------

    def _begin(self, settings: V0InitArguments, plan: V0Plan) -> None:
        """A new run, or one from a checkpoint without optimizer state."""
        self.report = self.length = None
        trainer = self._trainer
        if plan.estimator == "per_sample":
            if isinstance(plan.decay_steps, int):
                keep_plateau(trainer, trainer.lr_scheduler, plan.decay_steps)
            with defer_interrupts():
                self._finish(self._run_pass(plan))
            return
        if settings.wants_length:
            self._recorder = LossRecorder(trainer)
        if plan.init != "zeros":
            self._attach(plan)
        else:
            self._length_handle = call_before_first_update(trainer.optimizer, self._find_length)
        if isinstance(plan.decay_steps, int):
            self._keep_plateau(plan.decay_steps)

    def _go_on(self, plan: V0Plan) -> None:
        """Keep the loaded state and its record; name the settings that differ."""
        self.report = None
        folder, trainer = self._find_checkpoint(), self._trainer
        step, stored = trainer.state.global_step, read_report(folder)
        if plan.init == "zeros":  # a warmup that was measured
            self.length = (stored or {}).get("length")
            if self.length is None:
                raise InputError(
                    f"the checkpoint at step {step} was trained without a measured warmup: go on without "
                    "--untuned_warmup trust_radius, or start a new run"
                )
            self._warm_up(self.length["steps"])
            return
        if stored is None or stored["strategy"] == "zeros":
            logger.warning(
                f"the checkpoint {folder} was trained without a v0 (v0_init.json): its optimizer state stands as it is, "
                f"and v0_init={plan.init} has no effect on this resumed run"
            )
            return
        self.length, self._began_at = stored.get("length"), stored.get("global_step", 0)
        if stored.get("is_written", True):
            self.report = {key: value for key, value in stored.items() if key != "length"}
        differences = find_differences(stored, plan)
        if differences:
            logger.warning("v0 settings differ from the checkpoint's, which stand: " + "; ".join(differences))
        if stored.get("decay_steps") is not None:
            self._keep_plateau(stored["decay_steps"])
        kept, num_steps = read_hook_state(folder), step - self._began_at
        if kept is not None:
            self._attach(kept[0])
            self.hook.load_state_dict(kept[1] | {"num_steps": num_steps})
        elif self.report is None or (stored.get("decay") == "linear" and num_steps < stored["decay_steps"]):
            raise InputError(
                f"the checkpoint {folder} was saved before v0 was done and lacks {DECAY_FILE}, without which its second moment cannot be "
                "gone on with: resume from another checkpoint"
            )

    def _find_checkpoint(self) -> str:
        trainer = self._trainer
        return self.resumed_from or os.path.join(trainer.args.output_dir, f"checkpoint-{trainer.state.global_step}")

    def _keep_record_of_another_start(self) -> None:
        """Resumed with `v0_init=zeros` a run that was begun with a v0: say so, and let the record go along."""
        stored = None
        with contextlib.suppress(InputError):  # a damaged record is no reason not to resume the stock run
            stored = read_report(self._find_checkpoint())
        if stored is not None and stored["strategy"] != "zeros":
            self.length, self.report = stored.get("length"), {k: v for k, v in stored.items() if k != "length"}
            logger.warning(
                f"this run was begun with v0_init={stored['strategy']} and goes on with v0_init=zeros: what its second moment holds of v0 is "
                "forgotten by beta2; give the same v0 flags to go on as it was begun"
            )

    # ---- how -----------------------------------------------------------------------------------------------------------

    def _attach(self, plan: V0Plan) -> None:
        trainer = self._trainer
        self.hook = V0Hook(
            trainer.optimizer,
            trainer.model,
            plan,
            max_steps=trainer.state.max_steps,
            find_length=self._find_length,
            on_written=self._finish,
        )

    def _find_length(self) -> WarmupLength:
        """Measure for how long to warm up, and let the schedule follow, before the first update."""
        trainer = self._trainer

        def compute_loss() -> float:
            if self._recorder is None:
                raise LossNotComputed("compute_loss is kept for the first step alone")
            return self._recorder.compute_again()

        try:
            length = measure_length(trainer.optimizer, trainer.model, compute_loss, trainer.state.max_steps)
        except BaseException:  # Ctrl-C, too
            self._remove_recorder()
            raise
        self.length = length.to_dict()
        is_warmup = self.get_settings().untuned_warmup == TRUST_RADIUS
        length.log("the schedule warms up over" if is_warmup else "v0 decays over")
        (self._warm_up if is_warmup else self._keep_plateau)(length.steps)
        return length

    def _warm_up(self, steps: int) -> None:
        warm_up(self._trainer, self._trainer.lr_scheduler, steps, "untuned_warmup=trust_radius")

    def _keep_plateau(self, steps: int) -> None:
        if self._has_own_schedule:
            logger.info(
                f"the schedule was passed in, and stays as it is: v0 expects it at its peak for {steps:,} steps"
            )
        else:
            keep_plateau(self._trainer, self._trainer.lr_scheduler, steps)

    def _finish(self, report: V0Report) -> None:
        report.global_step = self._began_at
        self.report = report.to_dict()
        report.log()

    def _let_go(self) -> None:
        """Take off what an earlier call of `train` may have left, so that nothing of it acts or is told."""
        for hook in (self.hook, self._length_handle):
            if hook is not None:
                hook.remove()
        self.hook = self._length_handle = None
        self._remove_recorder()

    def _remove_recorder(self) -> None:
        if self._recorder is not None:
            self._recorder.remove()
            self._recorder = None

    def _run_pass(self, plan: V0Plan) -> V0Report:
        """Estimate E[g^2] sample by sample and write v0 from it (eq. 10)."""
        report = write_trainers_v0(self._trainer, plan, self._trainer.optimizer)
        report.add_expectation(self._trainer.state.max_steps)
        return report


def show_messages(args) -> None:
    """Let this package's messages be seen on the main process, without touching a logging set-up the user made.

    Args:
        args: a Trainer's; of Trainers that have others (setfit) the level stays at INFO.
    """
    is_main = getattr(args, "process_index", 0) == 0
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    if is_main and getattr(args, "log_level", "passive") != "passive":
        logger.setLevel(args.get_process_log_level())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
