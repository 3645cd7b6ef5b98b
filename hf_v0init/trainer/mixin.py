"""The Trainer integration: when v0 is written and when it is not. How it is computed and stored lives elsewhere.

Order in a run: `create_optimizer` checks that the optimizer has a second moment -> accelerate prepares model and optimizer
-> a checkpoint is loaded -> `on_train_begin` writes v0, once, if this run starts from nothing -> first step.

| at `on_train_begin` | what happens |
| --- | --- |
| new run, optimizer without state | v0 is written |
| resumed, optimizer state loaded | the checkpoint's state stands; differing v0 settings are named in a warning |
| resumed from a `save_only_model` checkpoint (no optimizer state) | v0 is written anew at the loaded weights, with a warning |
| second `train()` on the same Trainer (state of the first call) | the state stands, as in the stock Trainer |
"""

import contextlib
import copy
import functools
import inspect
import logging
import os
from collections.abc import Iterator

from transformers import Seq2SeqTrainer, Trainer, TrainerCallback

from ..diagnostics.callback import V0DiagnosticsCallback
from ..errors import InputError
from ..gradients.stopping import list_stages
from ..initialization.writing import (
    measure_ratio_to_gradients,
    plan_v0,
    write_data_driven_v0,
    write_first_gradient_v0,
    write_random_v0,
)
from ..optimizers.choice import compute_optimizer_arguments, load_optimizer_class, require_sole_choice
from ..optimizers.deepspeed import adapt_optimizer
from ..optimizers.schedules import add_untuned_warmup
from ..optimizers.state import find_layout, is_untouched, read_beta2, unwrap_optimizer
from ..records.model_card import V0_TAGS, add_task_and_metrics, add_v0_section, infer_metrics, infer_task
from ..records.report import V0Report, read_report, write_report
from ..records.run_log import RunRecordCallback
from ..settings import AUTO, V0InitArguments
from .gradients import TrainerGradientsMixin
from .safe_checkpoints import SafeResumeMixin
from .supported_runs import require_supported_run

logger = logging.getLogger("hf_v0init")


class _WriteV0(TrainerCallback):
    """Calls back into its Trainer when everything is prepared and loaded and no step has been made."""

    def __init__(self, trainer: "V0InitMixin") -> None:
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._begin_with_v0(kwargs.get("train_dataloader"))


class V0InitMixin(TrainerGradientsMixin, SafeResumeMixin):
    """Gives any `transformers.Trainer` subclass a v0: `class MyTrainer(V0InitMixin, TheirTrainer)`.

    The settings are read from `args` where it has the `v0_...` fields, or from `v0_arguments`.

    Args:
        v0_arguments: a `V0InitArguments`, for argument classes without the flags.

    Raises:
        InputError: (a ValueError) on settings or an optimizer that cannot be used, before any training.
    """

    def __init__(self, *args, v0_arguments: V0InitArguments | None = None, **kwargs) -> None:
        self._v0_report: dict | None = None
        self._v0_resumed_from: str | None = None
        self._v0_given_arguments = v0_arguments
        super().__init__(*args, **kwargs)
        self._choose_optimizer(was_passed=self.optimizer is not None or self.optimizer_cls_and_kwargs is not None)
        if self.optimizer is not None and self.v0_arguments.v0_init != "zeros":
            find_layout(self.optimizer)  # create_optimizer is not called for it, and a resume fills its state first
        self._require_sole_warmup()
        _show_messages(self.args)
        self.add_callback(_WriteV0(self))
        self._run_record = None
        if self.v0_arguments.v0_record_run:
            V0DiagnosticsCallback().attach(self)
            self._run_record = RunRecordCallback(self.get_v0_report)
            self.callback_handler.callbacks.insert(0, self._run_record)

    # ---- what users call -------------------------------------------------------------------------------------------

    def get_v0_report(self) -> dict | None:
        """Return what was done about v0, as in `v0_init.json`; None before training and for `v0_init=zeros`."""
        return copy.deepcopy(self._v0_report)

    def get_v0_effective_batch_size(self) -> float:
        """Return the samples of one optimizer step: per-device batch x accumulation x data-parallel processes."""
        return float(self.get_total_train_batch_size(self.args))

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer as the Trainer does, and refuse it now if no v0 could be written into it later."""
        self._choose_optimizer()  # again, since a hyperparameter search changes the learning rate
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (TypeError, ValueError, AssertionError) as error:
            if self.v0_arguments.v0_optimizer is None or isinstance(error, InputError):
                raise
            raise InputError(
                f"v0_optimizer={self.v0_arguments.v0_optimizer!r} cannot be built with {self.optimizer_cls_and_kwargs[1]}: {error}"
            ) from error
        if self.v0_arguments.v0_init != "zeros":
            require_supported_run(self)
            if self.is_deepspeed_enabled and type(optimizer).__name__ == "DummyOptim":
                return optimizer  # DeepSpeed builds its own, of a type that was looked at above
            if self.is_fsdp_enabled or self.is_deepspeed_enabled:
                find_layout(optimizer)  # weights may still be on their way to this process
            else:
                plan_v0(optimizer, self.model, self.v0_arguments.v0_one_dimensional)
            self._require_beta2(optimizer)
            if self.v0_arguments.v0_init != "random":
                self._require_readable_data()
        return optimizer

    def create_scheduler(self, *args, **kwargs):
        """Create the schedule as the Trainer does, times the untuned warmup if one is asked for."""
        exists = self.lr_scheduler is not None
        scheduler = super().create_scheduler(*args, **kwargs)
        shape = self.v0_arguments.untuned_warmup
        if shape is not None and not exists:
            beta2 = None
            with contextlib.suppress(InputError):
                beta2 = read_beta2(self.optimizer)
            if beta2 is None:
                name = type(unwrap_optimizer(self.optimizer)).__name__
                raise InputError(
                    f"untuned_warmup={shape} takes its length from beta2, and {name} has none; use --warmup_steps"
                )
            add_untuned_warmup(scheduler, beta2, shape)
        return scheduler

    def get_batch_samples(self, *args, **kwargs):
        """Fetch the batches of an optimizer step as the Trainer does."""
        batches = super().get_batch_samples(*args, **kwargs)
        if self._run_record is not None and not self._v0_looks_ahead:
            self._run_record.record_batches(batches[0])
        return batches

    def train(self, resume_from_checkpoint=None, *args, **kwargs):
        """Train as the Trainer does; v0 is written once before the first step of a new run, and never on resume."""
        self._v0_resumed_from = self.choose_checkpoint(resume_from_checkpoint)
        if self._v0_resumed_from is not None:
            read_report(self._v0_resumed_from)  # a damaged record is an error before any time is spent
        return super().train(self._v0_resumed_from, *args, **kwargs)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, and `v0_init.json` beside it."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self._v0_report is not None and self.args.should_save:
            # Beside a checkpoint and at the top: a push during training takes the top folder.
            for folder in {self.args.output_dir, output_dir or self.args.output_dir}:
                os.makedirs(folder, exist_ok=True)
                write_report(self._v0_report, folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the Trainer's model card with the v0 section, the tags `hf_v0init` and `arxiv:2412.02153`, task and metrics."""
        write_card = super().create_model_card
        given = inspect.signature(write_card).bind_partial(*args, **kwargs).arguments
        tags = [given["tags"]] if isinstance(given.get("tags"), str) else list(given.get("tags") or [])
        write_card(**given | {"tags": tags + [tag for tag in V0_TAGS if tag not in tags]})
        path = os.path.join(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and os.path.isfile(path):
            with open(path, encoding="utf-8") as file:
                text = file.read()
            task = given.get("tasks") or infer_task(type(self.accelerator.unwrap_model(self.model)).__name__)
            text = add_task_and_metrics(text, task, infer_metrics(self.state.log_history))
            with open(path, "w", encoding="utf-8") as file:
                file.write(add_v0_section(text, self._v0_report))

    def _choose_optimizer(self, was_passed: bool = False) -> None:
        """Take the optimizer class and arguments from `v0_optimizer`, if it is set."""
        spec = self.v0_arguments.v0_optimizer
        if spec is None:
            return
        require_sole_choice(spec, self.args, was_passed)
        optimizer_class = load_optimizer_class(spec)
        self.optimizer_cls_and_kwargs = (optimizer_class, compute_optimizer_arguments(optimizer_class, self.args))

    # ---- when v0 is written ------------------------------------------------------------------------------------------

    def _begin_with_v0(self, train_dataloader) -> None:
        """Decide at `on_train_begin`; see the table at the top of this file."""
        if self.v0_arguments.v0_init == "zeros":
            return
        require_supported_run(self)
        resumed = self.state.global_step > 0
        optimizer = adapt_optimizer(self.optimizer)
        if resumed and not is_untouched(optimizer):
            self._take_over_checkpoint()
            return
        if not is_untouched(optimizer):
            logger.info("v0 is not written: the optimizer keeps the state of an earlier train() call of this Trainer")
            return
        if resumed:
            logger.warning(
                f"the checkpoint at step {self.state.global_step} holds no optimizer state (save_only_model?), so Adam starts "
                "anew: v0 is written at the loaded weights"
            )
        report = self._write_v0(optimizer, train_dataloader)
        report.global_step = self.state.global_step
        report.num_processes = self.args.world_size
        report.add_expectation(self.state.max_steps)
        self._v0_report = report.to_dict()
        for line in report.describe():
            logger.info(line)
        warning = report.find_warning()
        if warning is not None:
            logger.warning(warning)

    def _take_over_checkpoint(self) -> None:
        """Keep the loaded state; carry its record along and name the settings that differ from this run's."""
        stored = read_report(self._v0_resumed_from) if self._v0_resumed_from else None
        if stored is None:
            logger.warning(
                f"the checkpoint {self._v0_resumed_from} has no record of a v0 (v0_init.json): its optimizer state stands as it is, "
                f"and v0_init={self.v0_arguments.v0_init} has no effect on this resumed run"
            )
            return
        self._v0_report = stored
        arguments = self.v0_arguments
        scale = arguments.get_v0_scale(read_beta2(adapt_optimizer(self.optimizer)) or 0.0)
        now = V0Report(
            strategy=arguments.v0_init,
            scale=scale,
            seed=self._get_v0_seed(),
            one_dimensional=arguments.v0_one_dimensional,
            fan_factor=arguments.v0_fan_factor if arguments.v0_init == "random" else 1.0,
        )
        if arguments.v0_init == "data_driven":
            now.statistic, now.num_samples_requested = arguments.v0_statistic, arguments.v0_num_samples
            now.floor = arguments.v0_floor
            now.stats_batch_size = arguments.v0_stats_batch_size or stored.get("stats_batch_size")
        differences = now.find_differences(stored)
        if differences:
            logger.warning(
                "v0 settings differ from the checkpoint's, whose optimizer state stands: " + "; ".join(differences)
            )

    def _write_v0(self, optimizer, train_dataloader) -> V0Report:
        arguments, seed = self.v0_arguments, self._get_v0_seed()
        plan = plan_v0(optimizer, self.model, arguments.v0_one_dimensional)
        with self._preserve_bookkeeping():
            if arguments.v0_init == "random":
                report = write_random_v0(optimizer, plan, arguments, seed)
                if self._can_measure():
                    report.measured_ratio = measure_ratio_to_gradients(
                        optimizer,
                        plan,
                        functools.partial(
                            self._run_statistics_pass, batch_range=(0, self._count_parts()), show_progress=False
                        ),
                    )
                return report
            if arguments.v0_init == "first_gradient":
                return write_first_gradient_v0(
                    optimizer,
                    plan,
                    arguments,
                    seed,
                    lambda named, visit: self._run_first_step(named, visit, train_dataloader),
                    num_processes=self.args.world_size,
                )
            run_pass, batch_size = self._run_statistics_pass, self._choose_stats_batch_size()
            if arguments.v0_num_samples == AUTO:
                stages = list_stages(batch_size, self._count_statistics_samples())
                run_pass = [functools.partial(self._run_statistics_pass, batch_range=stage) for stage in stages]
            report = write_data_driven_v0(
                optimizer, plan, arguments, seed, run_pass, self.get_v0_effective_batch_size()
            )
            report.stats_batch_size = batch_size
            return report

    def _can_measure(self) -> bool:
        try:
            self._require_readable_data()
        except InputError:
            return False
        return True

    @contextlib.contextmanager
    def _preserve_bookkeeping(self) -> Iterator[None]:
        """Put back the counters and metric lists that a `compute_loss` of a subclass keeps on the Trainer."""
        numbers = {k: v for k, v in vars(self).items() if isinstance(v, (int, float)) and not k.startswith("_v0")}
        metrics = copy.deepcopy(getattr(self, "_metrics", None))
        try:
            yield
        finally:
            for name, value in numbers.items():
                setattr(self, name, value)
            if metrics is not None:
                self._metrics = metrics

    # ---- refusals ----------------------------------------------------------------------------------------------------

    def _require_sole_warmup(self) -> None:
        shape = self.v0_arguments.untuned_warmup
        if shape is None:
            return
        num_steps = self.args.get_warmup_steps(1000)
        if num_steps:
            raise InputError(
                f"untuned_warmup={shape} and warmup_steps={self.args.warmup_steps} are two warmups: give one"
            )
        if self.lr_scheduler is not None:
            raise InputError(f"untuned_warmup={shape} and a schedule that was passed in: give one")

    def _require_beta2(self, optimizer) -> None:
        arguments = self.v0_arguments
        if arguments.v0_warmup_steps is None:
            return
        beta2 = read_beta2(optimizer)
        if beta2 is None:
            raise InputError(
                f"v0_warmup_steps={arguments.v0_warmup_steps} with {type(unwrap_optimizer(optimizer)).__name__}: its second moment "
                "is no decaying mean of g^2, so the closed form gives no scale; use v0_scale"
            )
        if arguments.v0_warmup_steps >= 1:  # a share of a number of epochs is known when the training begins
            arguments.get_v0_scale(beta2)


class V0InitTrainer(V0InitMixin, Trainer):
    """`transformers.Trainer` with a v0; takes `V0InitTrainingArguments`."""


class V0InitSeq2SeqTrainer(V0InitMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with a v0; takes `V0InitSeq2SeqTrainingArguments`."""


def _show_messages(args) -> None:
    """Let this package's messages be seen on the main process, without touching a logging set-up the user made."""
    logger.setLevel(logging.INFO if args.process_index == 0 else logging.ERROR)
    if args.log_level != "passive" and args.process_index == 0:
        logger.setLevel(args.get_process_log_level())
    if not logger.handlers and not logging.getLogger().handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("%(name)s: %(message)s"))
        logger.addHandler(handler)
