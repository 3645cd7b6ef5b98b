"""The loss of a Trainer's first step, computed again: what `compute_loss` was called with is kept while the step is being made.

No batch is fetched and nothing is generated: the same inputs go through the same `compute_loss`, with the random states of its own
call, so that dropout draws the same masks.
"""

import contextlib
import copy
from collections.abc import Iterator, Mapping

import torch
from torch import nn

from ..estimation.trust_radius import LossNotComputed
from ..state_guard import (
    preserve_attributes,
    preserve_generators,
    preserve_model,
    preserve_rng,
    read_rng_states,
    write_rng_states,
)


class LossRecorder:
    """Keeps the calls of a Trainer's `compute_loss` during one optimizer step, and repeats them.

    Args:
        trainer: any `transformers.Trainer`; its `compute_loss` is wrapped until `remove`.
    """

    def __init__(self, trainer) -> None:
        self.trainer = trainer
        self._calls: list[tuple] = []  # of the present step: model, inputs, further arguments, random states
        self._step = 0
        self._compute_loss = trainer.compute_loss
        self._own = vars(trainer).get("compute_loss")
        trainer.compute_loss = self._record

    def remove(self) -> None:
        """Give the Trainer its own `compute_loss` back, and let go of the batches."""
        self._calls = []
        vars(self.trainer).pop("compute_loss", None)
        if self._own is not None:
            self.trainer.compute_loss = self._own

    def compute_again(self) -> float:
        """Compute the loss of the step at the weights as they are: the sum over its micro-batches.

        Raises:
            LossNotComputed: `compute_loss` was not called in this step.
        """
        if not self._calls:
            raise LossNotComputed("compute_loss was not called in the first step")
        total = 0.0
        for model, inputs, args, kwargs, states in self._calls:
            with preserve_trainer(self.trainer), self.trainer.compute_loss_context_manager():
                write_rng_states(states)
                loss = self._compute_loss(model, _copy(inputs), *args, **kwargs)
            total += float(loss.detach().cpu().double().mean())
        return total

    def _record(self, model, inputs, *args, **kwargs):
        if torch.is_grad_enabled() and self.trainer.is_in_train:
            if self._step != self.trainer.state.global_step:  # the step before made no update
                self._step, self._calls = self.trainer.state.global_step, []
            plain = {key: value for key, value in kwargs.items() if key != "return_outputs"}
            self._calls.append((model, _copy(inputs), args, plain, read_rng_states()))
        try:
            return self._compute_loss(model, inputs, *args, **kwargs)
        except BaseException:
            self.remove()
            raise


def _copy(inputs):
    """Copy the containers, which `compute_loss` may take things out of, not the tensors."""
    if isinstance(inputs, Mapping):
        copied = copy.copy(inputs)
        for key in list(copied):
            copied[key] = _copy(copied[key])
        return copied
    if type(inputs) in (list, tuple):
        return type(inputs)(_copy(value) for value in inputs)
    return inputs


@contextlib.contextmanager
def preserve_trainer(trainer) -> Iterator[None]:
    """Leave a Trainer's logs, counters and metric stores, its state, and all private and global generators as they were."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(preserve_rng())
        stack.enter_context(preserve_generators(trainer.train_dataset, trainer.data_collator, trainer))
        stack.enter_context(preserve_attributes(trainer, trainer.state))
        for module in vars(trainer).values():  # a teacher, a loss with weights of its own
            if isinstance(module, nn.Module) and module not in (trainer.model, trainer.model_wrapped):
                stack.enter_context(preserve_model(module, copies_frozen=False))
        if hasattr(trainer, "_set_state_aside"):  # contiguous streams
            stack.enter_context(trainer._set_state_aside())
        trainer.log = lambda *_, **__: None
        yield
