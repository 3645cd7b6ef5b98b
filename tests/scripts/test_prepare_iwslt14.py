"""scripts/prepare_iwslt14.py on a made-up archive of a few lines, against what was worked out by hand."""

import gzip
import sys
import tarfile
from pathlib import Path

import prepare_iwslt14
import pytest
import typer
import yaml
from processes import ROOT, start
from typer.testing import CliRunner

from hf_v0init.errors import InputError

MARKUP = ["<url>http://www.example.org/talk</url>", "<keywords>talks, {}</keywords>", "<talkid>7</talkid>"]
SPECIAL = [  # pairs, and whether they stay
    ("<title>Ein Vortrag</title>", "<title>A Talk</title>", ("ein vortrag", "a talk")),
    ("<description>Worum es geht</description>", "<description>What is it</description>", ("worum es geht", "what is it")),
    ("", "Nothing there", None),
    ("   ", "Only blanks there", None),
    ("eins zwei", "one two three", ("eins zwei", "one two three")),  # exactly 1.5
    ("eins zwei", "one two three four", None),
    ("ja " * 175, "yes " * 175, (" ".join(["ja"] * 175), " ".join(["yes"] * 175))),
    ("ja " * 176, "yes " * 176, None),
    ("Viel  Platz\t hier", "Much   space here ", ("viel platz hier", "much space here")),
    ("Zeile\u2028 mit Trenner", "line with it", ("zeile mit trenner", "line with it")),
]  # fmt: skip
TALK_PAIRS = 60


def write_archive(folder: Path) -> Path:
    """What is needed of the archive, and a file that is not."""
    folder.mkdir()
    for side, language in enumerate(("de", "en")):
        lines = [line.format(language) for line in MARKUP]
        lines += [pair[side] for pair in SPECIAL]
        lines += [f"{('Satz', 'Sentence')[side]} {number} ." for number in range(TALK_PAIRS)]
        (folder / f"train.tags.de-en.{language}").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for part in prepare_iwslt14.TEST_PARTS:
            segments = "\n".join(
                f'<seg id="{number}"> {part} {("Wort’s", "It’s")[side]} {number} </seg>' for number in (1, 2)
            )
            text = f'<?xml version="1.0"?>\n<mteval>\n<doc docid="1">\n<title>Left Out</title>\n{segments}\n</doc>\n</mteval>\n'
            (folder / f"IWSLT14.{part}.de-en.{language}.xml").write_text(text, encoding="utf-8")
    (folder / "README").write_text("not needed")
    return folder


@pytest.fixture
def archive(tmp_path) -> Path:
    return write_archive(tmp_path / "de-en")


def read(folder: Path, name: str) -> list[tuple[str, str]]:
    packed = [(folder / f"{name}.{language}.gz").read_bytes() for language in ("de", "en")]
    sides = [gzip.decompress(content).decode("utf-8") for content in packed]
    return list(zip(*(side.split("\n")[:-1] for side in sides), strict=True))


def call(*arguments):
    """Run the command in this process; what it refuses is raised."""
    app = typer.Typer()
    app.command()(prepare_iwslt14.run)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_pairs_are_cleaned_every_23rd_is_validation_and_test_pairs_are_all_segments_in_order(
    archive, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    said = call(archive, "data/iwslt14", "--no-tokenize")
    out = tmp_path / "data" / "iwslt14"
    kept = [pair for _, _, pair in SPECIAL if pair is not None]
    kept += [(f"satz {number} .", f"sentence {number} .") for number in range(TALK_PAIRS)]
    assert len(kept) == 66
    assert read(out, "valid") == [kept[22], kept[45]]
    assert read(out, "train") == kept[:22] + kept[23:45] + kept[46:]
    parts = ["ted.dev2010", "tedx.dev2012", "ted.tst2010", "ted.tst2011", "ted.tst2012"]
    assert read(out, "test") == [(f"{part} wort's {n}", f"{part} it's {n}") for part in parts for n in (1, 2)]
    assert "64 pairs in train, 2 pairs in valid, 10 pairs in test" in said
    # the files are those that the paper's configuration reads
    config = yaml.safe_load((ROOT / "configs" / "translation" / "iwslt14_paper.yaml").read_text())
    files = {str(Path(value)) for key, value in config.items() if key.endswith("_file")}
    assert files == {str(path.relative_to(tmp_path)) for path in out.iterdir()} and len(files) == 6
    # a packed archive gives the same bytes at any time
    with tarfile.open("de-en.tgz", "w:gz") as packed:
        packed.add(archive, "2014-01/texts/de/en/de-en")
    call("de-en.tgz", "second", "--no-tokenize")
    for path in out.iterdir():
        assert (tmp_path / "second" / path.name).read_bytes() == path.read_bytes()


def test_moses_tokens_with_escapes_and_a_ratio_of_tokens(archive, tmp_path):
    """Two words are six tokens."""
    pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    german, english = ["Herr Müller, z.B. „so“.", "Ja, nein!"], ["It's Mr. Miller & co.", "Yes no"]
    for language, lines in (("de", german), ("en", english)):
        text = "\n".join([*lines, *["a b"] * 25]) + "\n"
        (archive / f"train.tags.de-en.{language}").write_text(text, encoding="utf-8")
    call(archive, tmp_path / "tokens")
    call(archive, tmp_path / "words", "--no-tokenize")
    pairs = read(tmp_path / "tokens", "train")
    assert pairs[:2] == [("herr müller , z.b. „ so “ .", "it &apos;s mr. miller &amp; co ."), ("a b", "a b")]
    assert read(tmp_path / "words", "train")[1] == ("ja, nein!", "yes no")
    assert read(tmp_path / "tokens", "test")[0][1] == "ted.dev2010 it &apos;s 1"


def test_whole_or_not_at_all(archive, tmp_path, monkeypatch):
    def fail(path, lines):
        if path.name.startswith("test"):
            raise OSError(28, "No space left on device")
        return write_lines(path, lines)

    call(archive, tmp_path / "out", "--no-tokenize")
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    write_lines = prepare_iwslt14.write_lines
    monkeypatch.setattr(prepare_iwslt14, "write_lines", fail)
    for folder, more in ((tmp_path / "new", []), (tmp_path / "out", ["--overwrite"])):
        with pytest.raises(InputError, match="No space left on device"):
            call(archive, folder, "--no-tokenize", *more)
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de-en", "out"]
    monkeypatch.undo()
    (archive / "train.tags.de-en.de").write_text("neu\n" * 46)
    (archive / "train.tags.de-en.en").write_text("new\n" * 46)
    call(archive, tmp_path / "out", "--no-tokenize", "--overwrite")
    assert read(tmp_path / "out", "valid") == [("neu", "new")] * 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["de-en", "out"]


SPOILT = [
    ({"train.tags.de-en.en": None, "IWSLT14.TEDX.dev2012.de-en.de.xml": None}, ["2 of 12 files", "train.tags.de-en.en", "dev2012.de-en.de.xml"]),
    ({"train.tags.de-en.en": b"one more\n"}, ["train.tags.de-en.de has 70", "train.tags.de-en.en has 1"]),
    ({"train.tags.de-en.de": "Müller\n".encode("latin-1")}, ["train.tags.de-en.de is not UTF-8"]),
    ({f"IWSLT14.TED.tst2011.de-en.{side}.xml": b"<mteval></mteval>\n" for side in ("de", "en")}, ["tst2011.de-en.de.xml has 0"]),
    ({f"train.tags.de-en.{side}": b"ja\n" * 22 for side in ("de", "en")}, ["22 clean training pairs are too few"]),
]  # fmt: skip


@pytest.mark.parametrize(("files", "words"), SPOILT, ids=lambda x: str(x)[:30])
def test_an_archive_that_is_not_whole_is_refused(archive, tmp_path, files, words):
    for name, content in files.items():
        (archive / name).unlink() if content is None else (archive / name).write_bytes(content)
    with pytest.raises(InputError) as caught:
        call(archive, tmp_path / "out", "--no-tokenize")
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_other_bad_input_is_refused(archive, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("x")
    (tmp_path / "broken.tgz").write_bytes(b"no archive")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("x")
    for arguments, words in (
        ((tmp_path / "nowhere", tmp_path / "out"), "nowhere does not exist"),
        ((tmp_path / "file", tmp_path / "out"), "is neither a folder nor a .tgz"),
        ((tmp_path / "broken.tgz", tmp_path / "out"), "cannot be read as an archive"),
        ((archive, tmp_path / "file"), "file is a file"),
        ((archive, tmp_path / "mine"), "mine is not empty"),
        ((archive, tmp_path / "mine", "--overwrite"), "thesis.txt, which --overwrite would delete"),
    ):
        with pytest.raises(InputError) as caught:
            call(*arguments, "--no-tokenize")
        assert words in str(caught.value)
    monkeypatch.setitem(sys.modules, "sacremoses", None)
    with pytest.raises(InputError, match=r"pip install 'hf_v0init\[iwslt\]', or give --no-tokenize"):
        call(archive, tmp_path / "out")
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "x" and not (tmp_path / "out").exists()


def test_the_command_line_ends_with_status_2_and_one_line(tmp_path):
    done = start(ROOT / "scripts" / "prepare_iwslt14.py", tmp_path / "nowhere", tmp_path / "out", "--no-tokenize")
    assert done.returncode == 2
    assert done.stderr.startswith(f"error: {tmp_path / 'nowhere'} does not exist") and done.stderr.count("\n") == 1
