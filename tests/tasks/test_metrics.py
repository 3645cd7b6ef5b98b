"""BLEU and chrF against sacrebleu's own functions and hand-counted numbers, and no network."""

import math
import socket

import pytest
import sacrebleu

from hf_v0init.errors import InputError
from hf_v0init.tasks.translation.metrics import SacreBleu

PREDICTIONS = ["The cat sat on the mat.", "There is a dog in the garden, and it barks.", "Two young men walk."]
REFERENCES = ["The cat sat on a mat.", "A dog is in the garden and barks.", "Two young men are walking outside."]


@pytest.fixture
def metric(monkeypatch, tmp_path):
    def refuse(*_args, **_kwargs):
        raise AssertionError("the metric went to the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    return SacreBleu(cache_dir=str(tmp_path))


def test_scores_and_signatures_are_sacrebleus(metric):
    result = metric.compute(predictions=PREDICTIONS, references=REFERENCES)
    assert result["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
    assert result["chrf"] == sacrebleu.corpus_chrf(PREDICTIONS, [REFERENCES]).score
    assert result["bleu_signature"].startswith("nrefs:1|case:mixed|eff:no|tok:13a|smooth:exp|version:")
    assert result["chrf_signature"].startswith("nrefs:1|case:mixed|eff:yes|nc:6|nw:0|space:no|version:")


def test_a_bleu_counted_by_hand(metric):
    # 7 tokens; n-grams right: 6 of 7, 5 of 6, 4 of 5, 3 of 4; equal length, so no brevity penalty
    result = metric.compute(predictions=["a b c d e f x"], references=["a b c d e f g"])
    assert result["bleu"] == pytest.approx(100 * (6 / 7 * 5 / 6 * 4 / 5 * 3 / 4) ** 0.25)
    shorter = metric.compute(predictions=["a b c d e"], references=["a b c d e f g"])
    assert shorter["bleu"] == pytest.approx(100 * math.exp(1 - 7 / 5))
    assert metric.compute(predictions=["a b c d"], references=["a b c d"])["chrf"] == 100


def test_several_references_and_options(metric):
    references = [[reference, prediction] for reference, prediction in zip(REFERENCES, PREDICTIONS, strict=True)]
    result = metric.compute(predictions=PREDICTIONS, references=references)
    assert result["bleu"] == pytest.approx(100)
    assert result["bleu_signature"].startswith("nrefs:2|")
    upper = [text.upper() for text in REFERENCES]
    assert metric.compute(predictions=REFERENCES, references=upper, lowercase=True)["bleu"] == pytest.approx(100)
    with pytest.raises(InputError, match=r"\[1, 2\]"):
        metric.compute(predictions=PREDICTIONS[:2], references=[["a"], ["b", "c"]])


def test_batches_may_be_added_one_after_the_other(metric):
    for prediction, reference in zip(PREDICTIONS, REFERENCES, strict=True):
        metric.add(prediction=prediction, reference=reference)
    assert metric.compute()["bleu"] == sacrebleu.corpus_bleu(PREDICTIONS, [REFERENCES]).score
