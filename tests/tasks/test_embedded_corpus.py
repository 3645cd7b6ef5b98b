"""The corpus that comes with the package: its pairs, its splits, and that the scripts take it."""

import hashlib
import importlib

import pytest

from hf_v0init import InputError
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


def test_the_pairs_are_those_that_earlier_versions_generated():
    rows = [f"{row['source']}\t{row['target']}" for split in load_embedded_corpus().values() for row in split]
    assert hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16] == "c14d8aedbbea1aa2"
    assert load_embedded_corpus(100)["validation"]["source"][:] == load_embedded_corpus()["validation"]["source"][:5]


@pytest.mark.parametrize("num_pairs", [2, NUM_SMALL + 1])
def test_more_than_there_are_is_refused(num_pairs):
    with pytest.raises(InputError, match="from 3 to 2,000"):
        load_embedded_corpus(num_pairs)


def test_the_script_takes_it_as_a_data_set():
    script = importlib.import_module("hf_v0init.tasks.translation.script")
    loaded = script.DataArguments(dataset_name="embedded").load_dataset(None)
    assert loaded["test"][:] == load_embedded_corpus()["test"][:]
