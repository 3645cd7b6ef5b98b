"""What a look at a Trainer's loss must leave as it was."""

import contextlib
from collections.abc import Iterator

from torch import nn

from ..state_guard import preserve_attributes, preserve_generators, preserve_model, preserve_rng


@contextlib.contextmanager
def preserve_trainer(trainer) -> Iterator[None]:
    """Leave a Trainer's logs, counters and metric stores, its state, and all private and global generators as they were."""
    had_log, log = "log" in vars(trainer), vars(trainer).get("log")
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
        try:
            yield
        finally:
            if had_log:
                trainer.log = log
            else:
                del trainer.log
