"""Perplexity of a causal or masked language model, exactly: every target token counts once and counts the same."""

import math

import torch
from torch.nn import functional

from ..token_loss import ExactSumsMixin


def sum_token_losses(logits: torch.Tensor, labels: torch.Tensor, is_shifted: bool = False) -> torch.Tensor:
    """Sum over each row what its tokens cost: position i of `logits` is the forecast of token i + 1 of `labels`.

    Args:
        logits: shape (rows, positions, vocabulary), any floating dtype.
        labels: shape (rows, positions), the tokens; -100 where a token is no target.
        is_shifted: position i of `labels` is already the token after i.

    Returns:
        Shape (rows, 3), float32: the sum of negative log-likelihoods in nats, the number of target tokens,
        and how many of them were the most likely token.
    """
    sums = torch.zeros(labels.shape[0], 3, dtype=torch.float32, device=logits.device)
    if not is_shifted:
        logits, labels = logits[:, :-1], labels[:, 1:]
    # Row by row: a float32 copy of a whole batch's logits is the largest tensor of many an evaluation.
    for row, (row_logits, row_labels) in enumerate(zip(logits, labels, strict=True)):
        row_labels = row_labels.to(logits.device)
        is_target = row_labels != -100
        sums[row, 0] = functional.cross_entropy(row_logits.float(), row_labels, reduction="sum")
        sums[row, 1] = is_target.sum()
        sums[row, 2] = ((row_logits.argmax(dim=-1) == row_labels) & is_target).sum()
    return sums


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
