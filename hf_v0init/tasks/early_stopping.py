"""Early stopping, as flags of the training scripts: end when evaluations get no better, and keep the best model."""

import math
from dataclasses import dataclass

from transformers import EarlyStoppingCallback, TrainerCallback, TrainingArguments

from ..errors import InputError
from .script_stages import flag


@dataclass
class EarlyStoppingArguments:
    """When training ends early.

    Raises:
        InputError: numbers out of range, or a threshold without a patience.
    """

    early_stopping_patience: int | None = flag(
        None,
        "End when --metric_for_best_model (default: loss) has not become better in so many evaluations one after the other, and "
        "keep the best model. Needs --eval_strategy and --load_best_model_at_end.",
    )
    early_stopping_threshold: float = flag(0.0, "By how much a metric must be better to count as better.")

    def __post_init__(self) -> None:
        """Check the values, then let the next class of the inheritance order check its own."""
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise InputError(f"--early_stopping_patience={self.early_stopping_patience}: must be 1 or more")
        threshold = self.early_stopping_threshold
        if not (math.isfinite(threshold) and threshold >= 0):
            raise InputError(f"--early_stopping_threshold={threshold}: must be a number of at least 0")
        if threshold and self.early_stopping_patience is None:
            raise InputError(f"--early_stopping_threshold={threshold}: needs --early_stopping_patience")
        parent = getattr(super(), "__post_init__", None)
        if parent is not None:
            parent()


def make_early_stopping(run: EarlyStoppingArguments, training: TrainingArguments) -> list[TrainerCallback]:
    """Make the Trainer's callbacks for it: one, or none where no patience is given. Call it before any data is read.

    A resumed run goes on with the count of its checkpoint (`restore_callback_states_from_checkpoint` is switched on).

    Raises:
        InputError: the run does not train, does not evaluate while it trains, or does not keep its best model.
    """
    patience = run.early_stopping_patience
    if patience is None:
        return []
    name = f"--early_stopping_patience={patience}"
    if not training.do_train:
        raise InputError(f"{name}: is for training; add --do_train, or drop it")
    if training.eval_strategy == "no":
        raise InputError(f"{name}: compares evaluations during training; add --eval_strategy steps, or epoch")
    if not training.load_best_model_at_end:
        raise InputError(f"{name}: ends with the best model; add --load_best_model_at_end")
    training.restore_callback_states_from_checkpoint = True
    return [EarlyStoppingCallback(patience, run.early_stopping_threshold)]
