"""Perplexity of a causal or masked language model, exactly: every target token counts once and counts the same."""

import math

import torch

from ..token_loss import ExactSumsMixin, sum_token_losses


def compute_perplexity(total_nll: float, num_tokens: float) -> float:
    """Return exp(total_nll / num_tokens): nats in, no unit out; NaN without tokens, inf beyond the floats."""
    if num_tokens == 0:
        return math.nan
    try:
        return math.exp(total_nll / num_tokens)
    except OverflowError:
        return math.inf


class ExactPerplexityMixin(ExactSumsMixin):
    """Put before a Trainer of a causal language model: its evaluations report exact numbers.

    `eval_loss` (nats per target token, without label smoothing), `eval_perplexity`, `eval_accuracy` (the share
    of target tokens that were the most likely one) and `eval_num_tokens`, over the whole set and all processes.
    """

    perplexity_name = "perplexity"
    labels_are_shifted = False  # whether position i of the labels is what position i of the logits forecasts

    def score(self, logits, labels, inputs) -> torch.Tensor:
        """Score each row by `sum_token_losses`; of contiguous streams the last position has a target, too."""
        shift_labels = inputs.get("shift_labels")
        if shift_labels is not None:
            return sum_token_losses(logits, shift_labels, is_shifted=True)
        return sum_token_losses(logits, labels, self.labels_are_shifted)

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute loss, perplexity, accuracy and the number of target tokens."""
        total_nll, num_tokens, num_correct = sums
        return {
            "loss": total_nll / num_tokens if num_tokens else math.nan,
            self.perplexity_name: compute_perplexity(total_nll, num_tokens),
            "accuracy": num_correct / num_tokens if num_tokens else math.nan,
            "num_tokens": int(num_tokens),
        }


class MaskedPerplexityMixin(ExactPerplexityMixin):
    """The same for a masked language model: over the masked tokens, each forecast where it stands.

    exp(loss) is called `eval_pseudo_perplexity`: it is no probability of a text, and compares only with that of another model
    whose masks are the same.
    """

    perplexity_name = "pseudo_perplexity"
    labels_are_shifted = True
