"""Loss and accuracy of an image classifier, exactly: every image of the set counts once and counts the same."""

import torch
from torch.nn import functional

from ..token_loss import ExactSumsMixin

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


class ExactAccuracyMixin(ExactSumsMixin):
    """Put before a Trainer of an image classifier: its evaluations report exact figures.

    `eval_loss` (nats per image, without label smoothing), `eval_accuracy` (the share of images whose class is the most likely
    one), with more than five classes `eval_top5_accuracy`, and `eval_num_images`, over the whole set and all processes.
    """

    def score(self, logits, labels, inputs) -> torch.Tensor:
        """Score each image by `score_images`, and count it."""
        self._has_top5 = logits.shape[1] > TOP
        return functional.pad(score_images(logits, labels), (0, 1), value=1.0)

    def compute_figures(self, sums: list[float]) -> dict[str, float]:
        """Compute loss, accuracies and the number of images."""
        nll, top1, top5, num_images = sums
        figures = {"loss": nll, "accuracy": top1} | ({"top5_accuracy": top5} if self._has_top5 else {})
        return {name: total / num_images for name, total in figures.items()} | {"num_images": int(num_images)}
