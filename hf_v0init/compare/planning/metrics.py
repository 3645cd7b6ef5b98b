"""Which way the metric that runs are compared by gets better: known for the usual names, else it has to be given."""

from __future__ import annotations

from ...errors import InputError

# Words of a metric's name, as `eval_accuracy` has the words eval and accuracy.
HIGHER_IS_BETTER = {
    "accuracy", "acc", "bleu", "sacrebleu", "chrf", "rouge", "rouge1", "rouge2", "rougel", "rougelsum", "meteor", "f1", "precision",
    "recall", "auc", "auroc", "map", "mrr", "ndcg", "matthews", "mcc", "pearson", "pearsonr", "spearman", "spearmanr", "kappa", "r2",
    "iou", "dice", "psnr", "ssim", "comet", "bertscore", "reward", "exact", "similarity",
}  # fmt: skip
LOWER_IS_BETTER = {
    "loss", "perplexity", "ppl", "nll", "entropy", "fid", "kid", "distance", "frechet", "error", "mse", "mae", "rmse", "mape", "wer",
    "cer", "ter", "bpc", "bpb", "brier", "ece",
}  # fmt: skip


def find_direction(metric: str, given: bool | None = None) -> bool:
    """Say whether a greater value of the metric is better; what is `given` stands.

    Raises:
        InputError: nothing is given, and the name says nothing or two things.
    """
    if given is not None:
        return given
    words = set(metric.lower().replace("-", "_").split("_"))
    higher, lower = bool(words & HIGHER_IS_BETTER), bool(words & LOWER_IS_BETTER)
    if higher == lower:
        raise InputError(
            f"metric: {metric!r}: whether more of it is better cannot be told from its name; write greater_is_better: true or "
            "greater_is_better: false beside it"
        )
    return higher
