"""BLEU and chrF as an `evaluate` metric that is a class here and therefore needs no network."""

import json
import logging
from pathlib import Path

import datasets
import evaluate
import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from ...errors import InputError

logger = logging.getLogger("hf_v0init")

_DESCRIPTION = "Corpus BLEU and chrF of detokenised text, computed by sacrebleu, with its signatures."


class SacreBleu(evaluate.Metric):
    """Corpus BLEU (Papineni et al., 2002; Post, 2018) and chrF (Popović, 2015) by sacrebleu.

    `compute(predictions=, references=)` takes detokenised strings, one reference (or a list of them) a
    prediction, and returns `bleu` and `chrf` in percent with the signatures that let others reproduce them:
    `bleu_signature`, `chrf_signature`. `compute(..., tokenize="ja-mecab")` and the like pass to sacrebleu, which
    without it chooses the tokenizer by `target_language`.
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

    def _compute(
        self,
        predictions,
        references,
        tokenize: str | None = None,
        lowercase: bool = False,
        target_language: str = "",
    ) -> dict:
        references = [[r] if isinstance(r, str) else list(r) for r in references]
        num_references = {len(alternatives) for alternatives in references}
        if len(num_references) != 1:
            raise InputError(
                f"references: {sorted(num_references)} a prediction; sacrebleu needs the same number for all"
            )
        streams = [list(stream) for stream in zip(*references, strict=True)]
        bleu, chrf = make_bleu(tokenize, lowercase, target_language), CHRF(lowercase=lowercase)
        return {
            "bleu": bleu.corpus_score(predictions, streams).score,
            "chrf": chrf.corpus_score(predictions, streams).score,
            "bleu_signature": str(bleu.get_signature()),
            "chrf_signature": str(chrf.get_signature()),
        }


def make_bleu(tokenize: str | None, lowercase: bool, target_language: str = "") -> BLEU:
    """Make sacrebleu's BLEU.

    Args:
        tokenize: one of `BLEU.TOKENIZERS`; None: what sacrebleu takes for `target_language` (13a for most).

    Raises:
        InputError: an unknown tokenizer, or one whose package or model is missing.
    """
    if tokenize is not None and tokenize not in BLEU.TOKENIZERS:
        raise InputError(f"--sacrebleu_tokenize={tokenize}: choose one of {', '.join(sorted(BLEU.TOKENIZERS))}")
    try:
        return BLEU(tokenize=tokenize, lowercase=lowercase, trg_lang=target_language)
    except Exception as error:  # of a missing package, or of a model that cannot be fetched
        raise InputError(
            f"--sacrebleu_tokenize={tokenize or 'for ' + target_language}: cannot be used ({error}); install what it needs, or give "
            "another, such as 13a or char"
        ) from error


class TranslationMetrics:
    """A Trainer's `compute_metrics`: BLEU and chrF of generated tokens against the references as they were given.

    Args:
        tokenizer: decodes the predictions.
        references: the raw reference texts, in the order of the data set.
        sources: the raw source texts; with `num_samples`, the first are kept beside their translations in `samples`.
        num_best: translations of each sentence in the predictions' rows; the first of each counts.
        options: `tokenize`, `lowercase` and `target_language` of `SacreBleu`.
    """

    def __init__(self, tokenizer, references, sources=(), num_samples: int = 0, num_best: int = 1, **options) -> None:
        self.tokenizer = tokenizer
        self.references = list(references)
        self.sources = list(sources[:num_samples])
        self.num_best = num_best
        self.options = options
        self.samples: list[dict[str, str]] = []
        self.signatures: dict[str, str] = {}
        self._metric = SacreBleu(keep_in_memory=True)

    def decode(self, token_ids: np.ndarray) -> list[list[str]]:
        """Return the `num_best` texts of each row of predictions."""
        token_ids = np.where(token_ids < 0, self.tokenizer.pad_token_id, token_ids)
        rows = token_ids.reshape(len(token_ids) * self.num_best, -1)
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return [texts[start : start + self.num_best] for start in range(0, len(texts), self.num_best)]

    def __call__(self, evaluation) -> dict[str, float]:
        """Return `bleu` and `chrf` in percent and `gen_len`, the mean tokens of a translation (`count_tokens`)."""
        best = [texts[0] for texts in self.decode(evaluation.predictions)]
        if len(best) != len(self.references):
            raise RuntimeError(f"{len(best)} translations for {len(self.references)} references")
        result = self._metric.compute(predictions=best, references=self.references, **self.options)
        self.signatures = {name: result.pop(name) for name in ("bleu_signature", "chrf_signature")}
        self.keep_samples(best)
        rows = evaluation.predictions.reshape(len(best), self.num_best, -1)[:, 0]
        return {**result, "gen_len": float(np.mean([self.count_tokens(row) for row in rows]))}

    def count_tokens(self, row: np.ndarray) -> int:
        """Return how many tokens were generated for a translation: its end counts, the start token and what fills the row do not."""
        generated = row[1:]
        (ends,) = np.nonzero(
            generated == self.tokenizer.eos_token_id
        )  # beam search may fill with ends instead of padding
        if len(ends):
            return int(ends[0]) + 1
        return int(np.isin(generated, (-100, self.tokenizer.pad_token_id), invert=True).sum())

    def keep_samples(self, translations: list[str]) -> None:
        """Keep the first translations beside their sources and references, and log them."""
        self.samples = []
        for number, source in enumerate(self.sources[: len(translations)]):
            sample = {"source": source, "translation": translations[number]}
            if self.references:
                sample["reference"] = self.references[number]
            self.samples.append(sample)
            logger.info(
                "sample " + str(number + 1) + ": " + " | ".join(f"{name}: {text}" for name, text in sample.items())
            )


def write_predictions(folder: Path, sources: list[str], texts: list[list[str]]) -> None:
    """Write the best translation of each sentence to a line of generated_predictions.txt; if there are more, all of them beside
    their source to a line of generated_nbest.jsonl. In the order of the test set.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lines = [" ".join(best[0].split()) + "\n" for best in texts]
    (folder / "generated_predictions.txt").write_text("".join(lines), encoding="utf-8")
    if texts and len(texts[0]) > 1:
        rows = [{"source": source, "translations": best} for source, best in zip(sources, texts, strict=True)]
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (folder / "generated_nbest.jsonl").write_text(text, encoding="utf-8")
