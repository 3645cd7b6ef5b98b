"""BLEU and chrF of translations, by sacrebleu, with its signatures; and the files that translations are written to."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from sacrebleu.metrics import BLEU, CHRF

from ...errors import InputError


def make_bleu(tokenize: str | None, lowercase: bool, target_language: str = "") -> BLEU:
    """Make sacrebleu's BLEU.

    Args:
        tokenize: one of `BLEU.TOKENIZERS`; None: what sacrebleu takes for `target_language` (13a for most).

    Raises:
        InputError: an unknown tokenizer, or one whose package or model is missing.
    """
    try:
        return BLEU(tokenize=tokenize, lowercase=lowercase, trg_lang=target_language)
    except Exception as error:  # of an unknown name, of a missing package, or of a model that cannot be fetched
        raise InputError(
            f"--sacrebleu_tokenize={tokenize or 'for ' + target_language}: cannot be used ({error}); install what it needs, or give "
            f"another of {', '.join(sorted(BLEU.TOKENIZERS))}"
        ) from error


def compute_scores(predictions: Sequence[str], references: Sequence[str], bleu: BLEU, chrf: CHRF) -> dict:
    """Compute corpus BLEU (Papineni et al., 2002; Post, 2018) and chrF (Popović, 2015) of detokenised texts.

    Returns:
        `bleu` and `chrf` in percent, with the signatures that let others reproduce them: `bleu_signature`, `chrf_signature`.
    """
    return {
        "bleu": bleu.corpus_score(predictions, [references]).score,
        "chrf": chrf.corpus_score(predictions, [references]).score,
        "bleu_signature": str(bleu.get_signature()),
        "chrf_signature": str(chrf.get_signature()),
    }


class TranslationMetrics:
    """A Trainer's `compute_metrics`: BLEU and chrF of generated tokens against the references as they were given.

    Args:
        tokenizer: decodes the predictions.
        references: the raw texts, in the order of the data set; perhaps none.
        order: sample i of the predictions is number order[i] of the data set.
        bleu, chrf: sacrebleu's metrics.
        num_best: translations of each sentence in the predictions' rows; the first of each counts.
    """

    def __init__(self, tokenizer, references: Sequence[str], order, bleu: BLEU, chrf: CHRF, num_best: int = 1) -> None:
        self.tokenizer, self.bleu, self.chrf, self.num_best = tokenizer, bleu, chrf, num_best
        self.references, self.places = list(references), np.argsort(order)
        self.signatures: dict[str, str] = {}

    def decode(self, token_ids: np.ndarray) -> list[list[str]]:
        """Return the `num_best` texts of each row of predictions, in the order of the data set."""
        token_ids = np.where(token_ids < 0, self.tokenizer.pad_token_id, token_ids)[self.places]
        rows = token_ids.reshape(len(token_ids) * self.num_best, -1)
        texts = [text.strip() for text in self.tokenizer.batch_decode(rows, skip_special_tokens=True)]
        return [texts[start : start + self.num_best] for start in range(0, len(texts), self.num_best)]

    def __call__(self, evaluation) -> dict[str, float]:
        """Return `bleu` and `chrf` in percent and `gen_len`, the mean tokens of a translation (`count_tokens`)."""
        best = [texts[0] for texts in self.decode(evaluation.predictions)]
        result = compute_scores(best, self.references, self.bleu, self.chrf)
        self.signatures = {name: result.pop(name) for name in ("bleu_signature", "chrf_signature")}
        rows = evaluation.predictions.reshape(len(best), self.num_best, -1)[:, 0]
        return {**result, "gen_len": float(np.mean([self.count_tokens(row) for row in rows]))}

    def count_tokens(self, row: np.ndarray) -> int:
        """Return how many tokens were generated for a translation: its end counts, the start token and what fills the row do not."""
        generated = row[1:]
        (ends,) = np.nonzero(generated == self.tokenizer.eos_token_id)
        if len(ends):  # beam search may fill with ends instead of padding
            return int(ends[0]) + 1
        return int(np.isin(generated, (-100, self.tokenizer.pad_token_id), invert=True).sum())


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
