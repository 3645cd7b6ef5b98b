"""The Trainer classes: `V0InitCallback`, attached from the start, with the flags, early refusals, the record and the model card.

Order in a run: `create_optimizer` refuses an optimizer without a second moment -> accelerate prepares model and optimizer -> a
checkpoint is loaded -> `on_train_begin` decides, and attaches the hook (see `callback`) -> first step, which writes v0.
"""

import copy
from pathlib import Path

from transformers import Seq2SeqTrainer, Trainer
from transformers.trainer_utils import HubStrategy

from ..errors import InputError
from ..records.model_card import add_v0_section, infer_task
from ..records.run_log import RunRecordCallback
from ..second_moment.choice import compute_optimizer_arguments, load_optimizer_class, require_sole_choice
from ..second_moment.state import SecondMoment
from ..settings import V0InitArguments
from .callback import V0InitCallback


class V0InitMixin:
    """Gives any `transformers.Trainer` subclass a v0: `class MyTrainer(V0InitMixin, TheirTrainer)`.

    The settings are read from `args` where it has the `v0_...` fields, or from `v0_arguments`.

    Args:
        v0_arguments: a `V0InitArguments`, for argument classes without the flags.

    Raises:
        InputError: (a ValueError) on settings or an optimizer that cannot be used, before any training.
    """

    def __init__(self, *args, v0_arguments: V0InitArguments | None = None, **kwargs) -> None:
        self._v0_callback = V0InitCallback(v0_arguments)
        super().__init__(*args, **kwargs)
        self._v0_callback._trainer = self
        self._choose_optimizer(was_passed=self.optimizer is not None or self.optimizer_cls_and_kwargs is not None)
        if self.optimizer is not None and self.v0_arguments.v0_init != "zeros":
            SecondMoment(self.optimizer)  # a resume would fill its state before it is looked at
        self._v0_callback.attach(self)
        self._run_record = None
        if self.v0_arguments.v0_record_run:
            self._run_record = RunRecordCallback(self._v0_callback.get_record)
            self.callback_handler.callbacks.insert(0, self._run_record)

    # ---- what users call -------------------------------------------------------------------------------------------

    @property
    def v0_arguments(self) -> V0InitArguments:
        """The v0 settings of this Trainer, as they were given."""
        return self._v0_callback.get_settings()

    def get_v0_report(self) -> dict | None:
        """Return what was done about v0 or the warmup, as in `v0_init.json`; None before the first step, and where nothing was."""
        return copy.deepcopy(self._v0_callback.get_record())

    def get_v0_effective_batch_size(self) -> float:
        """Return the samples of one optimizer step, over accumulation and processes; for Trainers with batches of their own to override."""
        return float(self.get_total_train_batch_size(self.args))

    # ---- what the Trainer calls --------------------------------------------------------------------------------------

    def create_optimizer(self, *args, **kwargs):
        """Create the optimizer as the Trainer does; refuse it now if no v0 could be written."""
        self._choose_optimizer()  # again, since a hyperparameter search changes the learning rate
        try:
            optimizer = super().create_optimizer(*args, **kwargs)
        except (TypeError, ValueError, AssertionError) as error:
            if self.v0_arguments.v0_optimizer is None or isinstance(error, InputError):
                raise
            raise InputError(
                f"v0_optimizer={self.v0_arguments.v0_optimizer!r} cannot be built with {self.optimizer_cls_and_kwargs[1]}: {error}"
            ) from error
        self._v0_callback.require_possible(optimizer)
        return optimizer

    def get_batch_samples(self, *args, **kwargs):
        """Fetch the batches of an optimizer step as the Trainer does."""
        batches = super().get_batch_samples(*args, **kwargs)
        if self._run_record is not None:
            self._run_record.record_batches(batches[0])
        return batches

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the model as the Trainer does, and `v0_init.json` beside it."""
        super().save_model(output_dir, _internal_call=_internal_call)
        if self.args.should_save:
            self._v0_callback.write_record(output_dir or self.args.output_dir, with_state=_internal_call)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Push as the Trainer does, which copies the model to the top of the output folder: `v0_init.json` goes along."""
        if self.args.hub_strategy != HubStrategy.END and self.args.should_save:
            self._v0_callback.write_record(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write the Trainer's model card with the v0 section, its tags and the task."""
        super().create_model_card(*args, **kwargs)
        path = Path(self.args.output_dir, "README.md")
        if self.is_world_process_zero() and path.is_file():
            task = kwargs.get("tasks") or infer_task(type(self.accelerator.unwrap_model(self.model)).__name__)
            text = add_v0_section(path.read_text(encoding="utf-8"), self._v0_callback.get_record(), task)
            path.write_text(text, encoding="utf-8")

    def _choose_optimizer(self, was_passed: bool = False) -> None:
        """Take the optimizer class and arguments from `v0_optimizer`, if it is set."""
        spec = self.v0_arguments.v0_optimizer
        if spec is None:
            return
        require_sole_choice(spec, self.args, was_passed)
        optimizer_class = load_optimizer_class(spec)
        self.optimizer_cls_and_kwargs = (optimizer_class, compute_optimizer_arguments(optimizer_class, self.args))


class V0InitTrainer(V0InitMixin, Trainer):
    """`transformers.Trainer` with a v0; takes `V0InitTrainingArguments`."""


class V0InitSeq2SeqTrainer(V0InitMixin, Seq2SeqTrainer):
    """`transformers.Seq2SeqTrainer` with a v0; takes `V0InitSeq2SeqTrainingArguments`."""
