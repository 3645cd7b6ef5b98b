"""Scores of translations, and how long they are."""

import math

import numpy as np
import pytest
from sacrebleu.metrics import CHRF
from transformers.trainer_utils import EvalPrediction

from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer
from hf_v0init.tasks.translation import script as run_translation
from hf_v0init.tasks.translation.metrics import TranslationMetrics, compute_scores, make_bleu

LINES = [f"the {a} dog runs over the {b} field and barks at every bird that he can see" for a in "abcd" for b in "wxyz"]


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe_tokenizer(LINES, 300, for_translation=True)


def make_metrics(tokenizer, texts, **options) -> TranslationMetrics:
    return TranslationMetrics(tokenizer, texts, np.arange(len(texts)), make_bleu(None, False), CHRF(), **options)


def score(predictions, references, **options) -> dict:
    return compute_scores(predictions, references, make_bleu(None, False, **options), CHRF())


def test_scores_are_those_counted_by_hand():
    # 7 tokens; n-grams right: 6 of 7, 5 of 6, 4 of 5, 3 of 4; equal length, so no brevity penalty
    result = score(["a b c d e f x"], ["a b c d e f g"], target_language="de")
    assert result["bleu"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    assert result["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")
    assert score(["a b c d e"], ["a b c d e f g"])["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert score(["a b c d"], ["a b c d"])["chrf"] == 100


def test_sacrebleu_chooses_by_the_target_language():
    assert run_translation.get_language("zho_Hans") == "zh" and run_translation.get_language("de_DE") == "de"
    assert "tok:zh" in score(["我们都很好"], ["我们都很好吗"], target_language="zh")["bleu_signature"]


def test_gen_len_counts_the_tokens_of_the_best_translation(tokenizer):
    pad, end = tokenizer.pad_token_id, tokenizer.eos_token_id
    rows = np.array([[pad, 7, 8, end, end, pad, 9, end], [pad, 7, 8, -100, pad, 8, 9, 9]])  # two translations in a row
    metrics = make_metrics(tokenizer, ["a", "b"], num_best=2)
    assert metrics(EvalPrediction(predictions=rows, label_ids=None))["gen_len"] == (3 + 2) / 2
    assert [len(texts) for texts in metrics.decode(rows)] == [2, 2]
