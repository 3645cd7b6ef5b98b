"""Loss and accuracy of an image classifier, exactly: every image of the set counts once and counts the same.

As in `perplexity`: the Trainer averages the means of batches, and with several processes the last batch is filled up with
images that have already been counted. Here the images' figures are gathered without the fill-up and divided at the end.
"""

import math

import torch
from torch.nn import functional
from transformers.trainer_utils import EvalLoopOutput

TOP = 5


def score_images(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Score each image.

    Args:
        logits: shape (images, classes), any floating dtype.
        labels: shape (images,), int64.

    Returns:
        Shape (images, 3), float32: the negative log-likelihood in nats, whether the class is the most likely one, whether it
        is among the five most likely (all classes, if there are fewer).
    """
    logits = logits.float()
    nll = functional.cross_entropy(logits, labels, reduction="none")
    best = logits.topk(min(TOP, logits.shape[1]), dim=1).indices
    hits = best == labels[:, None]
    return torch.stack((nll, hits[:, 0].float(), hits.any(dim=1).float()), dim=1)


class ExactAccuracyMixin:
    """Put before a Trainer of an image classifier: its evaluations report exact figures.

    `eval_loss` (nats an image, without label smoothing), `eval_accuracy` (the share of images whose class is the most likely
    one), with more than five classes `eval_top5_accuracy`, and `eval_num_images`, over the whole set and all processes. The
    logits are not kept, so `compute_metrics` gets nothing and is not called.
    """

    def evaluation_loop(
        self, dataloader, description, prediction_loss_only=None, ignore_keys=None, metric_key_prefix="eval"
    ) -> EvalLoopOutput:
        """Evaluate as the Trainer does, with sums over images in place of means over batches."""
        self._evaluation_sums = torch.zeros(4, dtype=torch.float64)
        self._has_top5 = False
        output = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        nll, top1, top5, num_images = self._evaluation_sums.tolist()
        figures = {"loss": nll, "accuracy": top1} | ({"top5_accuracy": top5} if self._has_top5 else {})
        figures = {name: total / num_images if num_images else math.nan for name, total in figures.items()}
        figures["num_images"] = int(num_images)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in figures.items()})
        return output

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Add a batch's loss and hits to the sums."""
        loss, logits, labels = super().prediction_step(model, inputs, False, ignore_keys)
        logits = logits[0] if isinstance(logits, tuple | list) else logits
        self._has_top5 = logits.shape[1] > TOP
        scores = self.accelerator.gather_for_metrics(score_images(logits, labels)).double().cpu()
        self._evaluation_sums += torch.cat((scores.sum(dim=0), torch.tensor([len(scores)])))
        return loss, None, None
