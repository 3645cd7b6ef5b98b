"""The flags joined to transformers' own: `TrainingArguments` and `Seq2SeqTrainingArguments` with a v0."""

import logging
import sys
from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, Trainer, TrainingArguments

from ..settings import V0InitArguments
from .callback import V0InitCallback

logger = logging.getLogger("hf_v0init")


class _NoticesStockTrainers:
    """Warns where a Trainer that knows no v0 makes its schedule from arguments that ask for one, or for an untuned warmup."""

    def get_warmup_steps(self, num_training_steps: int):
        """Return the warmup's steps as transformers does."""
        asker = sys._getframe(1).f_locals.get("self")
        if isinstance(asker, Trainer) and not any(
            isinstance(callback, V0InitCallback) for callback in asker.callback_handler.callbacks
        ):
            asked = [f"v0_init={self.v0_init}"] if self.v0_init != "zeros" else []
            asked += [f"untuned_warmup={self.untuned_warmup}"] if self.untuned_warmup is not None else []
            if asked and not getattr(self, "_has_warned_of_no_effect", False):
                self._has_warned_of_no_effect = True
                logger.warning(
                    f"{' and '.join(asked)} has no effect: this Trainer knows neither v0 nor its warmups. Use V0InitTrainer, or "
                    "V0InitCallback().attach(trainer) before train()"
                )
        return super().get_warmup_steps(num_training_steps)


@dataclass
class V0InitTrainingArguments(V0InitArguments, _NoticesStockTrainers, TrainingArguments):
    """`transformers.TrainingArguments` with the v0 flags of `V0InitArguments`."""


@dataclass
class V0InitSeq2SeqTrainingArguments(V0InitArguments, _NoticesStockTrainers, Seq2SeqTrainingArguments):
    """`transformers.Seq2SeqTrainingArguments` with the v0 flags of `V0InitArguments`."""
