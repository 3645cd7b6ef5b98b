"""Local files: what is read, and that what cannot be read is one line that names the file."""

import gzip
import json
import logging
import os

import datasets
import pytest

from hf_v0init.errors import InputError
from hf_v0init.tasks.text_files import LONGEST_WORD, load_local_files, read_lines
from hf_v0init.tasks.translation.embedded_corpus import NUM_LARGE, NUM_SMALL, load_embedded_corpus
from hf_v0init.tasks.translation.pairs import leave_out_empty_pairs, load_pair_files, select_pairs

LINES = ["Ein Hund läuft.", "", "zwei\u2028Zeilen, doch eine", "drei"]
PAIRS = {"source": ["eins", "zwei"], "target": ["one", "two"]}


def write(path, text: str, newline: str = "\n"):
    raw = newline.join(text.split("\n")).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.de"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_are_the_same_however_they_are_stored(tmp_path, name, newline, end):
    path = write(tmp_path / name, "\n".join(LINES) + end, newline)
    assert read_lines(path) == LINES


def test_gzip_is_told_by_content_and_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text_without_suffix"
    path.write_bytes(gzip.compress(b"eins\nzwei\n"))
    assert read_lines(path) == ["eins", "zwei"]
    (tmp_path / "marked.txt").write_bytes(b"\xef\xbb\xbfeins\n")
    assert read_lines(tmp_path / "marked.txt") == ["eins"]


BAD_FILES = {
    "missing.txt": None,
    "empty": b"",
    "latin1": "eins\nzwei\nfünf\n".encode("latin-1"),
    "cut.gz": gzip.compress(os.urandom(500).hex().encode())[:300],
    "text.gz": b"not compressed\n",
    "long": b"x\n" + b"a" * (LONGEST_WORD + 1),
    "a.xlsx": b"PK",
    "a.txt.zst": b"(\xb5/\xfd",
    "a.jsonl": b'{"a": 1}\n{"a": \n',
    "b.jsonl": b"17\n",
    "c.json": b'[{"a": 1},',
    "d.json": b"[]",
    "e.csv": b"a,b\n1,2\n3,4,5,6\n",
    "f.csv": b"a,b\n1,2,3\n4,5,6\n",
    "g.csv": b'a,b\n1,2\n"3,4\n5,6\n',
    "h.csv": b"a,b\n",
}


@pytest.mark.parametrize("name", [*BAD_FILES, ".", "pipe"])
def test_unreadable_files_are_named(tmp_path, name):
    if BAD_FILES.get(name) is not None:
        (tmp_path / name).write_bytes(BAD_FILES[name])
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError) as raised:
        load_local_files(tmp_path / name, role="train", cache_dir=str(tmp_path / "cache"))
    assert str(tmp_path / name) in str(raised.value)


@pytest.mark.parametrize("streaming", [False, True])
def test_tables_come_with_all_their_columns(tmp_path, streaming, caplog):
    rows = [{"source": "a,b", "target": "null", "id": 1}, {"source": "ä", "target": "NA", "id": 2}]
    jsonl = "\n".join(json.dumps(row) for row in rows) + "\n"
    csv = 'source,target,id\n"a,b",null,1\nä,NA,2\n'
    tables = [
        write(tmp_path / "a.jsonl", jsonl),
        write(tmp_path / "b.json", jsonl),
        write(tmp_path / "c.json", json.dumps(rows, indent=1)),
        write(tmp_path / "d.jsonl.gz", jsonl),
        tmp_path / "e.parquet",
    ]
    datasets.Dataset.from_list(rows).to_parquet(tables[-1])
    texts = [write(tmp_path / "e.csv", csv), write(tmp_path / "f.csv.gz", csv)]
    options = {"role": "train", "streaming": streaming, "cache_dir": str(tmp_path / "cache")}
    for path in tables:
        assert list(load_local_files(path, **options)) == rows, path
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        for path in texts:  # a CSV holds texts
            assert list(load_local_files(path, **options)) == [{**row, "id": str(row["id"])} for row in rows], path
        table = load_local_files(write(tmp_path / "a.tsv", 'text\tn\n"a\t1\n'), **options)
    assert list(table) == [{"text": '"a', "n": "1"}]
    assert "a.tsv: its first line names the columns: text, n" in caplog.text
    assert list(load_local_files(write(tmp_path / "g.txt", "x\ny\n"), **options)) == [{"text": "x"}, {"text": "y"}]


@pytest.mark.parametrize("name", ["a.tsv", "a.txt", "a.txt.gz"])
def test_a_header_of_tab_separated_pairs_is_no_pair(tmp_path, caplog, name):
    path = write(tmp_path / name, "Source\tTarget\neins\tone\nzwei\ttwo\n")
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        assert load_pair_files("train", path).to_dict() == PAIRS
    assert "its first line, 'Source' and 'Target', names the columns and is no pair" in caplog.text
    plain = write(tmp_path / f"b_{name}", 'eins\tone\n\nNA\t"null"\n')
    expected = {"source": ["eins", "", "NA"], "target": ["one", "", '"null"']}
    assert load_pair_files("train", plain).to_dict() == expected


def test_pairs_are_found_in_every_usual_layout(tmp_path):
    languages = {"source_lang": "de", "target_lang": "en"}
    hub = datasets.Dataset.from_list([{"translation": {"de": "eins", "en": "one"}, "id": 0},
                                      {"translation": {"de": "zwei", "en": "two"}, "id": 1}])  # fmt: skip
    typed = hub.cast_column("translation", datasets.Translation(["de", "en"]))
    by_code = datasets.Dataset.from_dict({"en": PAIRS["target"], "id": [0, 1], "de": PAIRS["source"]})
    swapped = datasets.Dataset.from_dict({"source": PAIRS["target"], "target": PAIRS["source"]})
    tabbed = load_pair_files("train", write(tmp_path / "a.tsv.txt", "eins\tone\nzwei\ttwo\n"))
    for pairs in (
        select_pairs(hub, role="train", **languages),
        select_pairs(typed, role="train", **languages),
        select_pairs(hub, role="train", source_lang="de_DE", target_lang="en_XX"),
        select_pairs(by_code, role="train", **languages),
        select_pairs(by_code, role="train", source_column="de", target_column="en"),
        select_pairs(swapped, role="train", source_column="target", target_column="source"),
        select_pairs(tabbed, role="train"),
    ):
        assert pairs.to_dict() == PAIRS


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"source": [], "target": []}, {}, ["no examples"]),
        ({"source": ["a"], "german": ["b"]}, {}, ["'target'", "'german'", "--target_column"]),
        ({"source": ["a"], "target": ["b"]}, {"target_column": "source"}, ["both 'source'"]),
        ({"source": ["a", None], "target": ["b", "c"]}, {}, ["source", "None"]),
        ({"source": ["a"], "target": [3]}, {}, ["target", "3"]),
        ({"translation": [{"de": "a", "fr": "b"}]}, {"source_lang": "de"}, ["--target_lang", "'de', 'fr'"]),
        ({"translation": [{"de": "a", "en": "b"}, {"de": "a"}]}, {"source_lang": "de", "target_lang": "en"}, ["target", "None"]),
        ({"translation": [{"de": "a", "en": "b"}, None]}, {"source_lang": "de", "target_lang": "en"}, ["source", "None"]),
    ],
)  # fmt: skip
def test_pairs_that_are_not_there_are_named(columns, options, words):
    with pytest.raises(InputError) as raised:
        select_pairs(datasets.Dataset.from_dict(columns), role="train", **options)
    for word in words:
        assert word in str(raised.value)


def test_empty_pairs_are_left_out_and_counted(caplog):
    pairs = datasets.Dataset.from_dict({"source": ["a", " ", "b", ""], "target": ["x", "y", "", ""]})
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        assert leave_out_empty_pairs(pairs).to_dict() == {"source": ["a"], "target": ["x"]}
    assert "3 of 4 pairs have an empty side" in caplog.text
    with pytest.raises(InputError, match="all pairs have an empty side"):
        leave_out_empty_pairs(pairs.select([1, 2]))


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
