"""scripts/prepare_iwslt14.py on a made-up archive of a few lines, against what was worked out by hand."""

import gzip
import importlib.util
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from hf_v0init.errors import InputError

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "prepare_iwslt14.py"


def load_script():
    spec = importlib.util.spec_from_file_location("prepare_iwslt14", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["prepare_iwslt14"] = module
    spec.loader.exec_module(module)
    return module


prepare_iwslt14 = load_script()

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
    import typer

    app = typer.Typer()
    app.command()(prepare_iwslt14.run)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.output


def test_training_pairs_are_cleaned_and_every_23rd_is_validation(archive, tmp_path):
    said = call(archive, tmp_path / "out", "--no-tokenize")
    kept = [pair for _, _, pair in SPECIAL if pair is not None]
    kept += [(f"satz {number} .", f"sentence {number} .") for number in range(TALK_PAIRS)]
    assert len(kept) == 66
    assert read(tmp_path / "out", "valid") == [kept[22], kept[45]]
    assert read(tmp_path / "out", "train") == kept[:22] + kept[23:45] + kept[46:]
    assert "64 pairs in train, 2 pairs in valid, 10 pairs in test" in said


def test_test_pairs_are_all_segments_of_the_five_files_in_order(archive, tmp_path):
    call(archive, tmp_path / "out", "--no-tokenize")
    parts = ["ted.dev2010", "tedx.dev2012", "ted.tst2010", "ted.tst2011", "ted.tst2012"]
    expected = [(f"{part} wort's {n}", f"{part} it's {n}") for part in parts for n in (1, 2)]
    assert read(tmp_path / "out", "test") == expected


def test_moses_tokens_with_escapes(archive, tmp_path):
    pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    (archive / "train.tags.de-en.de").write_text("Herr Müller, z.B. „so“.\n" * 23, encoding="utf-8")
    (archive / "train.tags.de-en.en").write_text("It's Mr. Miller & co.\n" * 23, encoding="utf-8")
    call(archive, tmp_path / "out")
    assert read(tmp_path / "out", "train")[0] == ("herr müller , z.b. „ so “ .", "it &apos;s mr. miller &amp; co .")
    assert read(tmp_path / "out", "test")[0][1] == "ted.dev2010 it &apos;s 1"


def test_the_ratio_is_of_tokens(archive, tmp_path):
    """Two words are six tokens."""
    pytest.importorskip("sacremoses", reason="sacremoses is not installed")
    (archive / "train.tags.de-en.de").write_text("Ja, nein!\nJa, nein!\n" + "a b\n" * 25, encoding="utf-8")
    (archive / "train.tags.de-en.en").write_text("Yes no\nYes, no!\n" + "a b\n" * 25, encoding="utf-8")
    call(archive, tmp_path / "tokens")
    call(archive, tmp_path / "words", "--no-tokenize")
    assert read(tmp_path / "tokens", "train")[0] == ("ja , nein !", "yes , no !")
    assert read(tmp_path / "words", "train")[0] == ("ja, nein!", "yes no")


def test_a_packed_archive_gives_the_same_bytes_at_any_time(archive, tmp_path):
    with tarfile.open(tmp_path / "de-en.tgz", "w:gz") as packed:
        packed.add(archive, "2014-01/texts/de/en/de-en")
    call(archive, tmp_path / "first", "--no-tokenize")
    call(tmp_path / "de-en.tgz", tmp_path / "second", "--no-tokenize")
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == sorted(f"{n}.{language}.gz" for n in ("train", "valid", "test") for language in ("de", "en"))
    for name in names:
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_the_papers_config_reads_these_files(archive, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    call(archive, "data/iwslt14", "--no-tokenize")
    config = yaml.safe_load((ROOT / "configs" / "translation" / "iwslt14_paper.yaml").read_text())
    files = [value for key, value in config.items() if key.endswith("_file")]
    assert len(files) == 6 and all(Path(file).is_file() for file in files)


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


def spoil_missing(archive):
    (archive / "IWSLT14.TEDX.dev2012.de-en.de.xml").unlink()
    (archive / "train.tags.de-en.en").unlink()


def spoil_counts(archive):
    with open(archive / "train.tags.de-en.en", "a", encoding="utf-8") as file:
        file.write("one more\n")


def spoil_encoding(archive):
    (archive / "train.tags.de-en.de").write_bytes("Müller\n".encode("latin-1"))


def spoil_segments(archive):
    for language in ("de", "en"):
        (archive / f"IWSLT14.TED.tst2011.de-en.{language}.xml").write_text("<mteval></mteval>\n")


def spoil_few(archive):
    for language in ("de", "en"):
        (archive / f"train.tags.de-en.{language}").write_text("ja\n" * 22)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (spoil_missing, ["lacks 2 of 12 files", "train.tags.de-en.en", "IWSLT14.TEDX.dev2012.de-en.de.xml"]),
        (spoil_counts, ["train.tags.de-en.de has 70", "train.tags.de-en.en has 71"]),
        (spoil_encoding, ["train.tags.de-en.de is not UTF-8"]),
        (spoil_segments, ["IWSLT14.TED.tst2011.de-en.de.xml has 0"]),
        (spoil_few, ["22 clean training pairs are too few"]),
    ],
)
def test_an_archive_that_is_not_whole_is_refused(archive, tmp_path, spoil, words):
    spoil(archive)
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
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(tmp_path / "nowhere"), str(tmp_path / "out"), "--no-tokenize"],
        capture_output=True, text=True, timeout=120, env=os.environ,
    )  # fmt: skip
    assert done.returncode == 2
    assert done.stderr.strip() == (
        f"error: {tmp_path / 'nowhere'} does not exist; give the archive's folder de-en, or the archive de-en.tgz"
    )
