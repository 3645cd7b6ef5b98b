"""The corpus that comes with the package: its splits. The golden runs hold its pairs."""

import pytest

from hf_v0init.tasks.translation.embedded_corpus import NUM_LARGE, NUM_SMALL, load_embedded_corpus


@pytest.mark.parametrize(("large", "num_pairs"), [(False, NUM_SMALL), (True, NUM_LARGE)])
def test_no_sentence_occurs_twice_and_the_splits_share_none(large, num_pairs):
    corpus = load_embedded_corpus(num_pairs, large)
    held_out = num_pairs // 20
    assert {name: len(split) for name, split in corpus.items()} == {
        "train": num_pairs - 2 * held_out, "validation": held_out, "test": held_out,
    }  # fmt: skip
    for side in ("source", "target"):
        texts = [text for split in corpus.values() for text in split[side]]
        assert len(set(texts)) == num_pairs and all(text.strip() == text and text for text in texts)
