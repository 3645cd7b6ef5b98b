"""Perplexity of a causal language model, exactly: every target token counts once and counts the same.

The Trainer averages the means of batches, which weighs a token by the batch that it happens to be in, and with
several processes the last batch is filled up with samples that have already been counted. Here the sums of the
rows are gathered without the fill-up and divided at the end.
"""

import math

import torch
from torch.nn import functional
from transformers.trainer_utils import EvalLoopOutput


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


class ExactPerplexityMixin:
    """Put before a Trainer of a causal language model: its evaluations report exact numbers.

    `eval_loss` (nats per target token, without label smoothing), `eval_perplexity`, `eval_accuracy` (the share
    of target tokens that were the most likely one) and `eval_num_tokens`, over the whole set and all
    processes. The logits are not kept, so `compute_metrics` gets nothing and is not called.
    """

    perplexity_name = "perplexity"
    labels_are_shifted = False  # whether position i of the labels is what position i of the logits forecasts

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over target tokens in place of means over batches."""
        self._evaluation_sums = torch.zeros(3, dtype=torch.float64)
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total_nll, num_tokens, num_correct = self._evaluation_sums.tolist()
        figures = {
            "loss": total_nll / num_tokens if num_tokens else math.nan,
            self.perplexity_name: compute_perplexity(total_nll, num_tokens),
            "accuracy": num_correct / num_tokens if num_tokens else math.nan,
            "num_tokens": int(num_tokens),
        }
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch's loss and target tokens to the sums."""
        # of contiguous streams, where the last position has a target, too
        shift_labels = inputs.get("shift_labels")
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        if shift_labels is not None:
            labels = shift_labels
        sums = sum_token_losses(logits, labels, shift_labels is not None or self.labels_are_shifted)
        sums = self.accelerator.gather_for_metrics(sums)
        self._evaluation_sums += sums.double().sum(dim=0).cpu()
        return loss, None, None


class MaskedPerplexityMixin(ExactPerplexityMixin):
    """The same for a masked language model: over the masked tokens, each forecast where it stands.

    exp(loss) is called `eval_pseudo_perplexity`: it is no probability of a text, and compares only with that of another model
    whose masks are the same.
    """

    perplexity_name = "pseudo_perplexity"
    labels_are_shifted = True
