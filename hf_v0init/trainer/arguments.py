"""The flags joined to transformers' own: `TrainingArguments` and `Seq2SeqTrainingArguments` with a v0."""

import logging
from dataclasses import dataclass

from transformers import Seq2SeqTrainingArguments, TrainingArguments

from ..settings import V0InitArguments
from .callback import exists_unattached_callback

logger = logging.getLogger("hf_v0init")


class _NoticesStockTrainers:
    """Warns, once, where a Trainer that knows no v0 is given arguments that ask for one, or for an untuned warmup."""

    _v0_is_taken = False  # True: whoever trains heeds the flags

    def get_warmup_steps(self, num_training_steps: int):
        """Return the warmup's steps as transformers does, when the Trainer makes its schedule."""
        asked = [f"v0_init={self.v0_init}"] if self.v0_init != "zeros" else []
        asked += [f"untuned_warmup={self.untuned_warmup}"] if self.untuned_warmup is not None else []
        if asked and not self._v0_is_taken and not exists_unattached_callback():
            self._v0_is_taken = True
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
