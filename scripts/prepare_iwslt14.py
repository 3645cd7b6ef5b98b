"""Makes training, validation and test files of IWSLT'14 German-English from the public archive's own files.

    python scripts/prepare_iwslt14.py ARCHIVE data/iwslt14

ARCHIVE is the folder `de-en` or its .tgz, with train.tags.de-en.{de,en} and IWSLT14.TED*.{dev2010,dev2012,tst2010,tst2011,
tst2012}.de-en.{de,en}.xml. What is written, {train,valid,test}.{de,en}.gz, is in effect what fairseq's example for this task
makes of them, before its BPE: about 160,200, 7,300 and 6,750 pairs of lines, as configs/translation/iwslt14_paper.yaml reads.

- Training: lines of markup are dropped, <title> and <description> lose their tags; Moses tokens; pairs stay of which both
  sides have 1 to 175 tokens and neither more than 1.5 times the other's; lower case. Every 23rd pair goes to validation.
- Test: the segments of the five XML files in that order, with ' for ’; Moses tokens; lower case; all of them.

With --no-tokenize words stay as they are and are counted between white space. Moses' tokens need sacremoses and take minutes.
"""

import gzip
import io
import os
import re
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.progress import track

from hf_v0init.errors import InputError
from hf_v0init.extras import require_extra

LANGUAGES = ("de", "en")
TEST_PARTS = ("TED.dev2010", "TEDX.dev2012", "TED.tst2010", "TED.tst2011", "TED.tst2012")
TRAIN_NAME = "train.tags.de-en.{}"
TEST_NAME = "IWSLT14.{}.de-en.{}.xml"
ARCHIVE_SUFFIXES = (".tgz", ".gz", ".tar", ".bz2", ".xz")

DROPPED_LINE = re.compile(r"<(url|talkid|keywords|speaker|reviewer|translator|doc|/doc)\b")
KEPT_TAG = re.compile(r"</?(title|description)>")
SEGMENT = re.compile(r"<seg id[^>]*>(.*?)(</seg>|$)")

MAX_TOKENS, MAX_RATIO = 175, 1.5
VALIDATION_EVERY = 23

Tokenize = Callable[[str, str], str]  # (line, language) -> tokens joined by spaces


# ---- reading ---------------------------------------------------------------------------------------------------------


def read_archive(path: Path) -> dict[str, list[str]]:
    """The lines of each file that is needed, by its name.

    Raises:
        InputError: no such folder or archive, files missing (all are named) or not UTF-8.
    """
    names = [TRAIN_NAME.format(language) for language in LANGUAGES]
    names += [TEST_NAME.format(part, language) for part in TEST_PARTS for language in LANGUAGES]
    if path.is_dir():
        found = {file.name: file.read_bytes() for file in sorted(path.rglob("*")) if file.name in names}
    elif path.is_file() and path.suffix in ARCHIVE_SUFFIXES:
        found = read_members(path, set(names))
    else:
        what = "is neither a folder nor a .tgz" if path.exists() else "does not exist"
        raise InputError(f"{path} {what}; give the archive's folder de-en, or the archive de-en.tgz")
    missing = [name for name in names if name not in found]
    if missing:
        raise InputError(
            f"{path} lacks {len(missing)} of {len(names)} files: {', '.join(missing)}; unpack the whole archive"
        )
    return {name: decode(name, found[name]) for name in names}


def read_members(path: Path, names: set[str]) -> dict[str, bytes]:
    try:
        with tarfile.open(path) as archive:
            wanted = [member for member in archive if member.isfile() and Path(member.name).name in names]
            return {Path(member.name).name: archive.extractfile(member).read() for member in wanted}
    except (tarfile.TarError, OSError, EOFError) as error:
        raise InputError(f"{path} cannot be read as an archive ({error}); download it again") from error


def decode(name: str, content: bytes) -> list[str]:
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{name} is not UTF-8 (byte {error.start}); unpack the archive again") from error
    return text.removesuffix("\n").split("\n")  # not splitlines: it would cut at a line separator within a sentence


# ---- cleaning --------------------------------------------------------------------------------------------------------


def strip_training_tags(lines: Iterable[str]) -> list[str]:
    """The lines without those of markup, titles and descriptions without their tags."""
    return [KEPT_TAG.sub("", line).strip() for line in lines if not DROPPED_LINE.search(line)]


def find_segments(lines: Iterable[str]) -> list[str]:
    """The texts of the <seg> elements, with a plain apostrophe for the curly one."""
    matches = (SEGMENT.search(line) for line in lines)
    return [match[1].strip().replace("’", "'") for match in matches if match]


def is_clean(source: str, target: str) -> bool:
    """Whether both sides have 1 to 175 tokens and neither has more than 1.5 times as many as the other."""
    lengths = len(source.split()), len(target.split())
    return min(lengths) >= 1 and max(lengths) <= MAX_TOKENS and max(lengths) <= MAX_RATIO * min(lengths)


def clean_pairs(pairs: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """The clean pairs in lower case, with single spaces between tokens."""
    return [(tidy(a), tidy(b)) for a, b in pairs if is_clean(a, b)]


def tidy(line: str) -> str:
    return " ".join(line.split()).lower()


def split_pairs(pairs: list) -> tuple[list, list]:
    """Training and validation: every 23rd pair, the 23rd first, is the latter's."""
    validation = pairs[VALIDATION_EVERY - 1 :: VALIDATION_EVERY]
    return [pair for number, pair in enumerate(pairs, 1) if number % VALIDATION_EVERY], validation


def pair_up(content: dict[str, list[str]], name: str, extract: Callable) -> list[tuple[str, str]]:
    """The pairs of two files whose names differ in the language alone.

    Raises:
        InputError: they hold different numbers of lines, or none.
    """
    sides = {language: extract(content[name.format(language)]) for language in LANGUAGES}
    numbers = {language: len(lines) for language, lines in sides.items()}
    if len(set(numbers.values())) > 1 or not all(numbers.values()):
        counted = ", ".join(f"{name.format(language)} has {number}" for language, number in numbers.items())
        raise InputError(f"{counted} lines of text: they must have as many, and some; unpack the archive again")
    return list(zip(*sides.values(), strict=True))


def load_tokenizers(tokenize: bool) -> Tokenize:
    """Moses' tokenizers of both languages with its escapes, as fairseq uses them; or what leaves lines as they are.

    Raises:
        InputError: sacremoses is not installed.
    """
    if not tokenize:
        return lambda line, language: line
    require_extra("iwslt", alternative="give --no-tokenize")
    from sacremoses import MosesTokenizer

    tokenizers = {language: MosesTokenizer(lang=language) for language in LANGUAGES}
    return lambda line, language: tokenizers[language].tokenize(line, return_str=True)


def prepare(content: dict[str, list[str]], tokenize: Tokenize, follow: Callable = lambda pairs, what: pairs) -> dict:
    """Pairs of lines of "train", "valid" and "test".

    Raises:
        InputError: files that do not go together, or nothing left.
    """

    def tokenize_all(pairs, what: str) -> list[tuple[str, str]]:
        return [tuple(map(tokenize, pair, LANGUAGES)) for pair in follow(pairs, what)]

    training = pair_up(content, TRAIN_NAME, strip_training_tags)
    tests = [pair for part in TEST_PARTS for pair in pair_up(content, TEST_NAME.format(part, "{}"), find_segments)]
    train, validation = split_pairs(clean_pairs(tokenize_all(training, "training")))
    if not validation:
        raise InputError(
            f"{len(train)} clean training pairs are too few for a validation set of every {VALIDATION_EVERY}rd; is the archive whole?"
        )
    test = [(tidy(a), tidy(b)) for a, b in tokenize_all(tests, "test")]
    return {"train": train, "valid": validation, "test": test}


# ---- writing ---------------------------------------------------------------------------------------------------------


def write_all(sets: dict[str, list[tuple[str, str]]], folder: Path) -> None:
    """Write {train,valid,test}.{de,en}.gz into `folder`, all of them or none; what was in it is replaced."""
    aside = None
    try:
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{folder.name}.partial-", dir=folder.absolute().parent))
        for name, pairs in sets.items():
            for side, language in enumerate(LANGUAGES):
                write_lines(aside / f"{name}.{language}.gz", (pair[side] for pair in pairs))
        aside.chmod(0o755)
        if folder.exists():
            old = aside.with_name(f"{aside.name}.old")
            os.replace(folder, old)
            os.replace(aside, folder)
            shutil.rmtree(old)
        else:
            os.replace(aside, folder)
    except OSError as error:
        raise InputError(
            f"{folder} cannot be written ({error.strerror}); nothing is left there of this call"
        ) from error
    finally:
        if aside is not None:
            shutil.rmtree(aside, ignore_errors=True)


def write_lines(path: Path, lines: Iterable[str]) -> None:
    """Write lines, gzipped, to the same bytes whenever it is done."""
    with open(path, "wb") as raw, gzip.GzipFile(filename="", mode="wb", fileobj=raw, mtime=0) as packed:
        with io.TextIOWrapper(packed, encoding="utf-8", newline="\n") as file:
            file.writelines(f"{line}\n" for line in lines)
        raw.flush()
        os.fsync(raw.fileno())


def require_writable(folder: Path, overwrite: bool) -> None:
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder} is a file; give another folder")
    if folder.is_dir() and any(folder.iterdir()):
        if not overwrite:
            raise InputError(f"{folder} is not empty; give another folder, or --overwrite")
        ours = {f"{name}.{language}.gz" for name in ("train", "valid", "test") for language in LANGUAGES}
        others = sorted({file.name for file in folder.iterdir()} - ours)
        if others:
            raise InputError(f"{folder} holds {others[0]}, which --overwrite would delete; give another folder")
    parent = folder.absolute().parent
    while not parent.exists():
        parent = parent.parent
    if not os.access(parent, os.W_OK):
        raise InputError(f"{folder} cannot be made: {parent} is not writable; give another folder")


def run(
    archive: Annotated[Path, typer.Argument(help="The archive's folder de-en, or de-en.tgz.")],
    output: Annotated[Path, typer.Argument(help="Folder for {train,valid,test}.{de,en}.gz.")],
    tokenize: Annotated[bool, typer.Option(help="Moses' tokens, by sacremoses; else words as they are.")] = True,
    overwrite: Annotated[bool, typer.Option(help="Replace files that an earlier call wrote.")] = False,
) -> None:
    """Make training, validation and test files of IWSLT'14 German-English from the public archive's files."""
    require_writable(output, overwrite)
    tokenizers = load_tokenizers(tokenize)
    console = Console(stderr=True)

    def follow(pairs, what):
        return track(pairs, description=f"{what}: tokens", console=console, disable=not console.is_terminal)

    sets = prepare(read_archive(archive), tokenizers, follow)
    write_all(sets, output)
    print(f"{output}: " + ", ".join(f"{len(pairs):,} pairs in {name}" for name, pairs in sets.items()))


if __name__ == "__main__":
    try:
        typer.run(run)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
