"""Local files: what is read, and that every fault is one line that names file, place and remedy."""

import gzip
import json
import logging
import os

import datasets
import pytest

from hf_v0init.errors import InputError
from hf_v0init.tasks.text_files import LONGEST_WORD, load_local_files, open_stream, read_lines
from hf_v0init.tasks.translation.pairs import load_pair_files, select_pairs

LINES = ["Ein Hund läuft.", "", "zwei\u2028Zeilen, doch eine", "drei"]


def write(path, text: str, newline: str = "\n"):
    raw = newline.join(text.split("\n")).encode()
    path.write_bytes(gzip.compress(raw) if path.suffix == ".gz" else raw)
    return path


@pytest.mark.parametrize("name", ["a.txt", "a.txt.gz", "a.gz", "a.de"])
@pytest.mark.parametrize("newline", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("end", ["\n", ""])
def test_lines_are_the_same_however_they_are_stored(tmp_path, name, newline, end):
    path = write(tmp_path / name, "\n".join(LINES) + end, newline)
    assert read_lines(path) == LINES


def test_gzip_is_told_by_content_and_a_byte_order_mark_is_dropped(tmp_path):
    path = tmp_path / "text_without_suffix"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbfeins\nzwei\n"))
    assert read_lines(path) == ["eins", "zwei"]


def write_bad_files(folder) -> dict:
    good = gzip.compress(b"eins\nzwei\n" * 100)
    files = {
        "empty": b"",
        "blank": b"\n \n",
        "latin1": "eins\nzwei\nfünf\n".encode("latin-1"),
        "cut.gz": good[: len(good) // 2],
        "flipped.gz": good[:15] + bytes([good[15] ^ 0xFF]) + good[16:],
        "text.gz": b"not compressed\n",
        "nul": b"eins\nzw\0ei\n",
        "long": b"x\n" + b"a" * (LONGEST_WORD + 1),
        "a.xlsx": b"PK",
        "a.txt.zst": b"(\xb5/\xfd",
    }
    for name, raw in files.items():
        (folder / name).write_bytes(raw)
    os.mkfifo(folder / "pipe")
    return files


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("missing.txt", ["no such file", "path"]),
        (".", ["folder"]),
        ("empty", ["is empty", "at least one line"]),
        ("blank", ["is empty"]),
        ("latin1", ["line 3", "byte 11", "0xfc", "UTF-8", "iconv"]),
        ("cut.gz", ["gzip", "again"]),
        ("flipped.gz", ["gzip", "again"]),
        ("text.gz", ["gzip"]),
        ("nul", ["line 2", "NUL", "iconv"]),
        ("long", ["line 2", "100,000 characters", "split it"]),
        ("a.xlsx", [".xlsx cannot be read", ".parquet"]),
        ("a.txt.zst", [".zst cannot be read", ".gz"]),
        ("pipe", ["pipe", ".jsonl"]),
    ],
)
def test_unreadable_files_are_named(tmp_path, name, words):
    write_bad_files(tmp_path)
    with pytest.raises(InputError) as raised:
        read_lines(tmp_path / name)
    message = str(raised.value)
    assert "\n" not in message
    assert str(tmp_path / name) in message
    for word in words:
        assert word in message


def test_tables_come_with_all_their_columns(tmp_path):
    rows = [{"source": "a,b", "target": "null", "id": 1}, {"source": "ä", "target": "NA", "id": 2}]
    jsonl = "\n".join(json.dumps(row) for row in rows) + "\n"
    csv = 'source,target,id\n"a,b",null,1\nä,NA,2\n'
    files = [
        write(tmp_path / "a.jsonl", jsonl),
        write(tmp_path / "b.json", jsonl),
        write(tmp_path / "c.json", json.dumps(rows, indent=1)),
        write(tmp_path / "d.jsonl.gz", jsonl),
        write(tmp_path / "e.csv", csv),
        write(tmp_path / "f.csv.gz", csv),
    ]
    for path in files[:4]:
        assert load_local_files(path, role="train").to_list() == rows, path
    for path in files[4:]:  # a CSV holds texts
        assert load_local_files(path, role="train").to_list() == [{**row, "id": str(row["id"])} for row in rows], path
    assert load_local_files(write(tmp_path / "g.txt", "x\ny\n"), role="train").to_dict() == {"text": ["x", "y"]}


def test_parquet_and_tsv_are_read_and_the_log_says_what_the_header_is(tmp_path, caplog):
    rows = [{"text": "a\tb", "n": 1}, {"text": "null", "n": 2}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "a.parquet")
    assert load_local_files(tmp_path / "a.parquet", role="train").to_list() == rows
    assert list(open_stream(tmp_path / "a.parquet")) == rows
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        table = load_local_files(write(tmp_path / "a.tsv", 'text\tn\n"a\t1\n'), role="train")
        load_local_files(write(tmp_path / "b.csv", "the cat,sat\nthe dog,ran\n"), role="train")
    assert table.to_dict() == {"text": ['"a'], "n": ["1"]}
    assert "a.tsv: its first line names the columns: text, n" in caplog.text
    assert "b.csv: its first line names the columns: the cat, sat" in caplog.text


@pytest.mark.parametrize("name", ["a.tsv", "a.txt"])
@pytest.mark.parametrize("streaming", [False, True])
def test_a_header_of_tab_separated_pairs_is_no_pair(tmp_path, caplog, name, streaming):
    expected = [{"source": "eins", "target": "one"}, {"source": "zwei", "target": "two"}]
    path = write(tmp_path / name, "Source\tTarget\neins\tone\nzwei\ttwo\n")
    with caplog.at_level(logging.INFO, logger="hf_v0init"):
        assert list(load_pair_files("train", path, streaming=streaming)) == expected
    assert "its first line, 'Source' and 'Target', names the columns and is no pair" in caplog.text
    plain = write(tmp_path / f"b_{name}", "eins\tone\nzwei\ttwo\n")
    assert list(load_pair_files("train", plain, streaming=streaming)) == expected


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("a.jsonl", '{"a": 1}\n{"a": \n', ["line 2", "JSON"]),
        ("b.jsonl", "17\n", ["line 1", "JSON object"]),
        ("c.json", '[{"a": 1},', ["line 1", "JSON"]),
        ("d.json", "[]", ["list of JSON objects"]),
        ("e.csv", "a,b\n1,2\n3,4,5,6\n", ["line 3", "4 fields", "a, b"]),
        ("f.csv", "a,b\n1,2\n3\n", ["line 3", "1 fields"]),
        ("g.csv", 'a,b\n1,2\n"3,4\n5,6\n', ["line 3", "quote", "never closed"]),
        ("h.csv", "a;b\n1;2\n", ["separated by ';'", "'a;b'"]),
        ("i.csv", "a,a\n1,2\n", ["two columns 'a'"]),
        ("j.csv", "a,b\n", ["no rows"]),
    ],
)
def test_broken_tables_are_named(tmp_path, name, text, words):
    path = write(tmp_path / name, text)
    with pytest.raises(InputError) as raised:
        load_local_files(path, role="validation")
    message = str(raised.value)
    assert "\n" not in message
    for word in [str(path), *words]:
        assert word in message


def test_parallel_files_pair_line_by_line(tmp_path):
    source, target = write(tmp_path / "a.de.gz", "eins\nzwei\n"), write(tmp_path / "a.en", "one\ntwo\n")
    assert load_pair_files("train", None, source, target).to_dict() == {
        "source": ["eins", "zwei"],
        "target": ["one", "two"],
    }
    with pytest.raises(InputError, match=r"has 2 lines but .* has 3"):
        load_pair_files("train", None, source, write(tmp_path / "b.en", "one\ntwo\nthree\n"))


def test_pairs_are_found_in_every_usual_layout(tmp_path):
    expected = {"source": ["eins", "zwei"], "target": ["one", "two"]}
    languages = {"source_lang": "de", "target_lang": "en"}
    hub = datasets.Dataset.from_list([{"translation": {"de": "eins", "en": "one"}, "id": 0},
                                      {"translation": {"de": "zwei", "en": "two"}, "id": 1}])  # fmt: skip
    by_code = datasets.Dataset.from_dict({"en": expected["target"], "id": [0, 1], "de": expected["source"]})
    swapped = datasets.Dataset.from_dict({"source": expected["target"], "target": expected["source"]})
    tabbed = load_pair_files("train", write(tmp_path / "a.tsv.txt", "eins\tone\nzwei\ttwo\n"))
    for pairs in (
        select_pairs(hub, role="train", **languages),
        select_pairs(hub, role="train", source_lang="de_DE", target_lang="en_XX"),
        select_pairs(by_code, role="train", **languages),
        select_pairs(by_code, role="train", source_column="de", target_column="en"),
        select_pairs(swapped, role="train", source_column="target", target_column="source"),
        select_pairs(tabbed, role="train"),
    ):
        assert pairs.to_dict() == expected


@pytest.mark.parametrize(
    ("columns", "options", "words"),
    [
        ({"source": [], "target": []}, {}, ["no examples"]),
        ({"source": ["a"], "german": ["b"]}, {}, ["'target'", "'german'", "--target_column"]),
        ({"source": ["a"], "target": ["b"]}, {"target_column": "source"}, ["both 'source'"]),
        ({"source": ["a", None], "target": ["b", "c"]}, {}, ["example 2", "source is missing"]),
        ({"source": ["a"], "target": [3]}, {}, ["example 1", "target", "3"]),
        ({"translation": [{"de": "a", "fr": "b"}]}, {"source_lang": "de"}, ["--target_lang", "de, fr"]),
        (
            {"translation": [{"de": "a", "fr": "b"}]},
            {"source_lang": "de", "target_lang": "en"},
            ["--target_lang=en", "de, fr"],
        ),
    ],
)
def test_pairs_that_are_not_there_are_named(columns, options, words):
    with pytest.raises(InputError) as raised:
        select_pairs(datasets.Dataset.from_dict(columns), role="train", **options)
    for word in words:
        assert word in str(raised.value)


def test_one_way_of_giving_a_file(tmp_path):
    source, target = write(tmp_path / "a", "x\n"), write(tmp_path / "b", "y\n")
    assert load_pair_files("test") is None
    with pytest.raises(InputError, match="--validation_source_file: needs --validation_target_file"):
        load_pair_files("validation", source_file=source)
    assert load_pair_files("test", source_file=source).to_dict() == {"source": ["x"]}  # to be translated
    with pytest.raises(InputError, match="not both"):
        load_pair_files("test", source, source, target)
    with pytest.raises(InputError, match="line 1 is not 'source<TAB>target'"):
        load_pair_files("test", source)
