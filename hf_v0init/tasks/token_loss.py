"""Cross-entropy per target token: for training, over the whole step; for evaluation, over the whole set.

In training, transformers' encoder-decoder and masked models and image classifiers average over each micro-batch by themselves, although their
signature makes the Trainer believe that they divide by the tokens of the whole step. So k accumulated batches,
or k processes, give k times the gradient, which an optimizer state estimated beforehand (v0) does not match.
`TokenCrossEntropy` divides by the tokens of the whole step.

In evaluation, the Trainer averages the means of batches, which weighs a token by the batch that it happens to be in, and with
several processes the last batch is filled up with samples that have already been counted. `ExactSumsMixin` adds up the scores of
samples without the fill-up, and divides at the end; `ExactEvaluationMixin` does the same where text is generated, too.
"""

import math

import torch
from torch.nn import functional
from transformers import Seq2SeqTrainer, Trainer
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import EvalLoopOutput


class TokenCrossEntropy:
    """A Trainer's `compute_loss_func` for all but causal models: mean cross-entropy per target token, or image, in nats.

    Args:
        label_smoothing: epsilon in (1 - epsilon) * nll + epsilon * (mean nll over the vocabulary).
    """

    def __init__(self, label_smoothing: float = 0.0):
        self.label_smoothing = label_smoothing

    def __call__(self, outputs, labels, num_items_in_batch=None) -> torch.Tensor:
        """Returns a scalar: the summed loss of the labels that are not -100, divided by `num_items_in_batch`
        (target tokens of the whole optimizer step) or, without it, by their number.
        """
        logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        total = functional.cross_entropy(
            logits.float().flatten(0, -2),
            labels.flatten(),
            reduction="sum",
            label_smoothing=self.label_smoothing,
        )
        if num_items_in_batch is None:
            num_items_in_batch = labels.ne(-100).sum()
        # without a target the loss is 0, not 0 / 0
        return total / torch.as_tensor(num_items_in_batch, device=total.device).clamp(min=1)


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


class SumsMixin(Trainer):
    """Put before a Trainer: its evaluations add up scores of samples, each once, over the whole set and all processes."""

    _evaluation_sums: torch.Tensor | None = None

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute the figures of a set, by name without "eval_", from the sums over its samples."""
        raise NotImplementedError

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over samples in place of means over batches."""
        self._evaluation_sums = None
        output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        if self._evaluation_sums is not None:
            figures = self.compute_figures(self._evaluation_sums.tolist())
            output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def add_scores(self, scores: torch.Tensor) -> None:
        """Add the scores of a batch, shape (samples, numbers per sample), to the sums in float64.

        Those of all processes, without what was repeated to fill the last batch of each.
        """
        sums = self.accelerator.gather_for_metrics(scores).cpu().double().sum(dim=0)
        self._evaluation_sums = sums if self._evaluation_sums is None else self._evaluation_sums + sums


class ExactSumsMixin(SumsMixin):
    """Put before a Trainer: what is added up is made by `score` of the logits, which are not kept.

    So `compute_metrics` gets nothing and is not called.
    """

    def score(self, logits: torch.Tensor, labels: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Score the samples of a batch: float32 of shape (samples, numbers per sample)."""
        raise NotImplementedError

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch's scores to the sums."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        self.add_scores(self.score(logits, labels, inputs))
        return loss, None, None


class ExactEvaluationMixin(SumsMixin, Seq2SeqTrainer):
    """Put before a Seq2SeqTrainer: `eval_loss` is the exact negative log-likelihood per target token.

    It is summed in float64 over the whole set and all processes, each sample once, and divided by the number
    of target tokens, in nats; without label smoothing. It costs no forward pass more. What metrics are given
    under several processes holds each sample once, too, and of `predict(..., num_return_sequences=n)` all texts of a
    sample in one row, the best first: shape (samples, n * length).
    """

    def evaluation_loop(self, *args, **kwargs) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over target tokens in place of means over batches."""
        # as plain Trainers do; Seq2SeqTrainer keeps the samples that accelerate repeats to fill the last batches
        self.gather_function = self.accelerator.gather_for_metrics
        return super().evaluation_loop(*args, **kwargs)

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute the loss per target token, in nats; none without a target token."""
        total_nll, num_tokens = sums
        return {"loss": total_nll / num_tokens} if num_tokens > 0 else {}

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Add a batch's loss and target tokens to the sums; generate where that is asked for."""
        inputs = self._prepare_inputs({k: v for k, v in inputs.items() if v is not None})  # labels may be there as None
        loss, encoded, labels = None, None, inputs.get("labels")
        if labels is not None:
            # with decoder inputs at hand the labels would only have the model compute a loss of its own
            given = {k: v for k, v in inputs.items() if k != "labels"} if "decoder_input_ids" in inputs else inputs
            with torch.no_grad(), self.compute_loss_context_manager():
                outputs = model(**given)
            scores = sum_token_losses(outputs.logits, labels, is_shifted=True)[:, :2]
            self.add_scores(scores)
            total_nll, num_tokens = scores.sum(dim=0)
            loss = total_nll / num_tokens.clamp(min=1)
            if not (self.args.bf16 or self.args.fp16):  # `generate` runs the encoder without autocast
                encoded = getattr(outputs, "encoder_last_hidden_state", None)
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        # without labels the model generates freely; decoder inputs made from the labels would force it
        inputs = {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("decoder_")}
        if encoded is not None:
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        _, generated, _ = super().prediction_step(model, inputs, False, ignore_keys, **gen_kwargs)
        return loss, generated.reshape(len(inputs["input_ids"]), -1), labels


# ---- language models ---------------------------------------------------------------------------------------------------


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
