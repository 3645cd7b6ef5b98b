"""The generated German-English corpus: what it says, that it repeats exactly, and that its splits share nothing."""

import hashlib
import os
import subprocess
import sys
from datetime import date, time

import pytest

from hf_v0init.errors import InputError
from hf_v0init.tasks.translation import embedded_phrases as phrases, script
from hf_v0init.tasks.translation.embedded_corpus import TEMPLATES, generate_embedded_corpus, generate_sentence_pairs

NUM_PAIRS = 6000
FINGERPRINT = """
import hashlib
from hf_v0init.tasks.translation.embedded_corpus import generate_sentence_pairs
text = "\\n".join(f"{p.source}\\t{p.target}" for p in generate_sentence_pairs(300, seed=7))
print(hashlib.sha256(text.encode()).hexdigest())
"""


@pytest.fixture(scope="module")
def corpus():
    return generate_embedded_corpus(NUM_PAIRS, seed=3)


def test_splits_have_the_sizes_asked_for(corpus):
    assert {name: len(split) for name, split in corpus.items()} == {"train": 5400, "validation": 300, "test": 300}
    assert corpus["train"].column_names == ["source", "target", "template", "values"]


@pytest.mark.parametrize("columns", [("source",), ("target",), ("template", "values")])
def test_nothing_occurs_twice_within_or_across_splits(corpus, columns):
    seen = [key for split in corpus.values() for key in zip(*(split[c] for c in columns), strict=True)]
    assert len(set(seen)) == len(seen) == NUM_PAIRS


def test_every_template_occurs_in_every_split(corpus):
    names = {template.__name__ for template in TEMPLATES}
    assert len(names) == len(TEMPLATES)
    for split in corpus.values():
        assert set(split["template"]) == names


def test_sentences_are_plain_lines(corpus):
    for split in corpus.values():
        for text in [*split["source"], *split["target"]]:
            assert text == " ".join(text.split()), f"odd white space: {text!r}"
            assert "\u00a0" not in text and "\u202f" not in text


def test_same_seed_gives_the_same_corpus_in_another_process():
    pairs = generate_sentence_pairs(300, seed=7)
    here = hashlib.sha256("\n".join(f"{p.source}\t{p.target}" for p in pairs).encode()).hexdigest()
    environment = {**os.environ, "PYTHONHASHSEED": "12345"}
    there = subprocess.run(
        [sys.executable, "-c", FINGERPRINT], capture_output=True, text=True, env=environment, check=True
    )
    assert there.stdout.strip() == here
    assert [p.source for p in generate_sentence_pairs(300, seed=8)] != [p.source for p in pairs]


@pytest.mark.parametrize(
    ("phrase", "german", "english"),
    [
        (phrases.cardinal(21), "einundzwanzig", "twenty-one"),
        (phrases.ordinal(3), "dritte", "third"),
        (phrases.year_in_words(1984), "neunzehnhundertvierundachtzig", "nineteen eighty-four"),
        (phrases.long_date(date(2025, 3, 3)), "3. März 2025", "March 3, 2025"),
        (phrases.full_date(date(2025, 3, 3)), "Montag, 3. März 2025", "Monday, March 3, 2025"),
        (phrases.weekday(date(2025, 3, 3)), "Montag", "Monday"),
        (phrases.digital_time(time(14, 5)), "14:05 Uhr", "2:05 PM"),
        (phrases.digital_time(time(0, 30)), "00:30 Uhr", "12:30 AM"),
        (phrases.spoken_time(3, 30), "halb vier", "half past three"),
        (phrases.spoken_time(12, 25), "fünf vor halb eins", "twenty-five past twelve"),
        (phrases.spoken_time(12, 35), "fünf nach halb eins", "twenty-five to one"),
        (phrases.spoken_time(1, 0), "ein Uhr", "one o'clock"),
        (phrases.spoken_time(1, 15), "Viertel nach eins", "a quarter past one"),
        (phrases.spoken_time(6, 45), "Viertel vor sieben", "a quarter to seven"),
        (phrases.price(123450, "EUR"), "1.234,50 €", "€1,234.50"),
        (phrases.measure(125, "length-kilometer"), "12,5 Kilometer", "12.5 kilometers"),
        (phrases.measure(10, "length-kilometer"), "1 Kilometer", "1 kilometer"),
        (phrases.span_of_time(1, phrases.SPANS[3]), "einer Woche", "one week"),
        (phrases.span_of_time(3, phrases.SPANS[2]), "drei Tagen", "three days"),
    ],
)
def test_phrases(phrase, german, english):
    assert phrase == (german, english)


@pytest.mark.parametrize(
    ("number", "noun", "german", "english"),
    [
        (1, "apple", "einen roten Apfel", "one red apple"),
        (1, "lamp", "eine rote Lampe", "one red lamp"),
        (1, "book", "ein rotes Buch", "one red book"),
        (3, "apple", "drei rote Äpfel", "three red apples"),
        (21, "knife", "einundzwanzig rote Messer", "twenty-one red knives"),
    ],
)
def test_articles_adjectives_and_plurals_agree(number, noun, german, english):
    thing = next(n for n in phrases.THINGS if n.english == noun)
    assert phrases.counted_object(number, thing, ("rot", "red")) == (german, english)


def test_clauses_move_the_verb():
    pairs = {pair.template: pair for pair in generate_sentence_pairs(400, seed=0)}
    assert pairs["reported_arrival"].source.endswith(" ankommt.")
    assert " arrives at " in pairs["reported_arrival"].target
    assert pairs["purchase"].source.endswith(" gekauft.")
    assert " has bought " in pairs["purchase"].target


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"num_pairs": 2}, "num_pairs=2"),
        ({"num_pairs": 0}, "num_pairs=0"),
        ({"num_pairs": 100, "held_out_fraction": 0.5}, "held_out_fraction=0.5"),
        ({"num_pairs": 100, "held_out_fraction": float("nan")}, "held_out_fraction=nan"),
    ],
)
def test_bad_sizes_are_named(arguments, named):
    with pytest.raises(InputError, match=named):
        generate_embedded_corpus(**arguments)


def test_smallest_corpus_has_one_pair_a_split():
    assert {name: len(split) for name, split in generate_embedded_corpus(3).items()} == {
        "train": 1,
        "validation": 1,
        "test": 1,
    }


def test_the_translation_script_takes_it_by_name():
    arguments = script.DataArguments(dataset_name="embedded")
    loaded, generated = arguments.load_dataset(script.ModelArguments()), generate_embedded_corpus(2000, seed=0)
    assert {role: len(rows) for role, rows in loaded.items()} == {"train": 1800, "validation": 100, "test": 100}
    for role in loaded:
        assert loaded[role]["source"][:] == generated[role]["source"][:]
        assert loaded[role]["target"][:] == generated[role]["target"][:]


def test_without_its_extra_the_name_is_refused_at_once(monkeypatch):
    monkeypatch.setitem(sys.modules, "num2words", None)
    with pytest.raises(InputError, match=r"^num2words is not installed; type: pip install 'hf_v0init\[demo\]'$"):
        script.DataArguments(dataset_name="embedded")
