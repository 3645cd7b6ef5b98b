"""Cross-entropy per target token: for training, over the whole step; for evaluation, over the whole set.

In training, transformers' encoder-decoder and masked models average over each micro-batch by themselves, although their
signature makes the Trainer believe that they divide by the tokens of the whole step. So k accumulated batches,
or k processes, give k times the gradient, which an optimizer state estimated beforehand (v0) does not match.
`TokenCrossEntropy` divides by the tokens of the whole step.

In evaluation, the Trainer averages the means of batches, which weighs a token by the batch that it happens to be in, and with
several processes the last batch is filled up with samples that have already been counted. `ExactSumsMixin` adds up the scores of
samples without the fill-up, and divides at the end; `ExactEvaluationMixin` does the same where text is generated, too.
"""

import torch
from torch.nn import functional
from transformers import Seq2SeqTrainer
from transformers.modeling_outputs import BaseModelOutput
from transformers.trainer_utils import EvalLoopOutput


class TokenCrossEntropy:
    """A Trainer's `compute_loss_func` for encoder-decoder and masked models: mean cross-entropy per target token, in nats.

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


def compute_row_nll(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The negative log-likelihood of each row of a batch; labels of -100 do not count.

    Returns:
        The rows' sums in nats and their numbers of tokens, both float32 of shape (batch,).
    """
    token_nll = functional.cross_entropy(logits.float().flatten(0, 1), labels.flatten(), reduction="none")
    return token_nll.view_as(labels).sum(dim=1), labels.ne(-100).sum(dim=1).float()


class ExactSumsMixin:
    """Put before a Trainer: its evaluations add up what `score` makes of the samples, over the whole set and all processes.

    The logits are not kept, so `compute_metrics` gets nothing and is not called.
    """

    def score(self, logits: torch.Tensor, labels: torch.Tensor, inputs: dict) -> torch.Tensor:
        """Score the samples of a batch: float32 of shape (samples, numbers per sample)."""
        raise NotImplementedError

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute the figures of a set, by name without "eval_", from the sums over its samples."""
        raise NotImplementedError

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over samples in place of means over batches."""
        self._evaluation_sums: torch.Tensor | float = 0.0
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        figures = self.compute_figures(self._evaluation_sums.tolist())
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch's scores to the sums."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        scores = self.accelerator.gather_for_metrics(self.score(logits, labels, inputs))
        self._evaluation_sums += scores.double().sum(dim=0).cpu()
        return loss, None, None


class ExactEvaluationMixin(Seq2SeqTrainer):
    """Put before a Seq2SeqTrainer: `eval_loss` is the exact negative log-likelihood per target token.

    It is summed in float64 over the whole set and all processes, each sample once, and divided by the number
    of target tokens, in nats; without label smoothing. It costs no forward pass more. What metrics are given
    under several processes holds each sample once, too.
    """

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over target tokens in place of means over batches."""
        self._evaluation_totals = torch.zeros(2, dtype=torch.float64)
        # as plain Trainers do; Seq2SeqTrainer keeps the samples that accelerate repeats to fill the last batches
        self.gather_function = self.accelerator.gather_for_metrics
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        total_nll, num_tokens = self._evaluation_totals.tolist()
        if num_tokens > 0:
            output.metrics[f"{metric_key_prefix}_loss"] = total_nll / num_tokens
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None, **gen_kwargs):
        """Add a batch's loss and target tokens to the sums."""
        if inputs.get("labels") is None:
            inputs = {k: v for k, v in inputs.items() if v is not None}  # transformers' collator leaves an entry None
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys, **gen_kwargs)
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        # with decoder inputs at hand the labels would only have the model compute a loss of its own
        given = {k: v for k, v in inputs.items() if k != "labels"} if "decoder_input_ids" in inputs else inputs
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**given)
        row_nll, row_tokens = compute_row_nll(outputs.logits, labels)
        # gather_for_metrics leaves out what was repeated to fill the last batch of every process
        gathered = self.accelerator.gather_for_metrics(torch.stack((row_nll, row_tokens), dim=1))
        self._evaluation_totals += gathered.cpu().double().sum(dim=0)
        loss = (row_nll.sum() / row_tokens.sum().clamp(min=1)).float()
        if prediction_loss_only or not self.args.predict_with_generate:
            return loss, None, None
        # without labels the model generates freely; decoder inputs made from the labels would force it
        inputs = {k: v for k, v in inputs.items() if k != "labels" and not k.startswith("decoder_")}
        encoded = getattr(outputs, "encoder_last_hidden_state", None)
        if encoded is not None and not (
            self.args.bf16 or self.args.fp16
        ):  # `generate` runs the encoder without autocast
            inputs["encoder_outputs"] = BaseModelOutput(last_hidden_state=encoded)
        _, generated, _ = super().prediction_step(model, inputs, False, ignore_keys, **gen_kwargs)
        return loss, generated, labels
