"""BLEU and chrF as an `evaluate` metric that is a class here and therefore needs no network."""

import datasets
import evaluate
from sacrebleu.metrics import BLEU, CHRF

from ...errors import InputError

_DESCRIPTION = "Corpus BLEU and chrF of detokenised text, computed by sacrebleu, with its signatures."


class SacreBleu(evaluate.Metric):
    """Corpus BLEU (Papineni et al., 2002; Post, 2018) and chrF (Popović, 2015) by sacrebleu.

    `compute(predictions=, references=)` takes detokenised strings, one reference (or a list of them) a
    prediction, and returns `bleu` and `chrf` in percent with the signatures that let others reproduce them:
    `bleu_signature`, `chrf_signature`. `compute(..., tokenize="ja-mecab")` and the like pass to sacrebleu.
    """

    def _info(self) -> evaluate.MetricInfo:
        text = datasets.Value("string")
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="Post, M. 2018. A Call for Clarity in Reporting BLEU Scores. WMT.",
            inputs_description="predictions: strings; references: a string, or a list of strings, for each.",
            features=[
                datasets.Features({"predictions": text, "references": datasets.Sequence(text)}),
                datasets.Features({"predictions": text, "references": text}),
            ],
        )

    def _compute(self, predictions, references, tokenize: str = "13a", lowercase: bool = False) -> dict:
        references = [[r] if isinstance(r, str) else list(r) for r in references]
        num_references = {len(alternatives) for alternatives in references}
        if len(num_references) != 1:
            raise InputError(
                f"references: {sorted(num_references)} a prediction; sacrebleu needs the same number for all"
            )
        streams = [list(stream) for stream in zip(*references, strict=True)]
        bleu, chrf = BLEU(tokenize=tokenize, lowercase=lowercase), CHRF(lowercase=lowercase)
        return {
            "bleu": bleu.corpus_score(predictions, streams).score,
            "chrf": chrf.corpus_score(predictions, streams).score,
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }
