"""The documentation: what is made from code is up to date, every exported name has its place, every link leads somewhere, every word is ours."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import yaml

import hf_v0init

ROOT = Path(__file__).resolve().parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
FOLDER_READMES = [ROOT / folder / "README.md" for folder in ("", "hf_v0init", "scripts", "configs")]
TEXTS = [*PAGES, *FOLDER_READMES, ROOT / "CONTRIBUTING.md"]


def load_generator():
    spec = importlib.util.spec_from_file_location("docs_generate", DOCS / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = load_generator()


@pytest.mark.parametrize(("name", "part", "make"), GENERATOR.PARTS, ids=[part for _, part, _ in GENERATOR.PARTS])
def test_what_is_made_from_code_and_results_is_up_to_date(name, part, make):
    text = (ROOT / name).read_text(encoding="utf-8")
    assert GENERATOR.replace_part(text, part, make()) == text, "python docs/generate.py writes it"


def test_every_exported_name_is_on_the_page_of_the_api():
    shown = re.findall(r"^::: hf_v0init\.(\w+)$", (DOCS / "api.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert sorted(shown) == hf_v0init.__all__


def test_every_page_is_in_the_navigation():
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    assert sorted(page for entry in nav for page in entry.values()) == [page.name for page in PAGES]


LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)|^\[\w+\]: (?!https?:)(\S+)$", re.MULTILINE)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    links = [a or b for a, b in LINK.findall(path.read_text(encoding="utf-8"))]
    assert not [link for link in links if not (path.parent / link.split("#")[0]).exists()]


# Files that a text names between backticks or in a command; `data/`, `outputs/` and `runs/` are the reader's own.
NAMED = re.compile(r"(?<![\w./-])((?:configs|scripts|docs|tests|hf_v0init)/[\w./-]*\w/?)(?![\w*{])")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_that_a_text_names_exist(path):
    text = path.read_text(encoding="utf-8")
    assert not {name for name in NAMED.findall(text) if not (ROOT / name).exists()}


FLAG = re.compile(r"--(v0_\w+|untuned_warmup)\b")


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_flags_that_a_text_names_exist(path):
    named = set(FLAG.findall(path.read_text(encoding="utf-8")))
    if path.name == "changes.md":
        return
    assert named <= {field.name for field in GENERATOR.fields(hf_v0init.V0InitArguments)}


OLD_WORDS = re.compile(
    r"hold(?:s|ing)? back|held back|\barms?\b|plain start|pocket|share of the run|within noise|beyond noise|measured length of a run"
    r"|stop_hopeless|v0_warmup_steps|v0_measure_steps|v0_statistic|v0_one_dimensional|per_step\b|v0_init auto|whole checkpoint",
    re.IGNORECASE,
)


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_the_words_are_the_fields(path):
    assert not OLD_WORDS.findall(path.read_text(encoding="utf-8"))


def test_the_readme_of_a_package_index_has_no_links_into_the_repository():
    tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")
    tool = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for substitution in tool["hatch"]["metadata"]["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(substitution["pattern"], substitution["replacement"], text)
    assert not LINK.search(text) and "](" in text and "][" not in text and "<!--" not in text
