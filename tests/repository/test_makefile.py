"""The set-up that `make` does: every direct dependency pinned, nothing installed twice or into another environment."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version
from repository.requires_python import normalize, read_pins

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[2]
DATA = json.loads(Path(__file__).with_name("requires_python.json").read_text(encoding="utf-8"))
PYTHONS = [f"3.{minor}" for minor in range(10, 14)]


def read_pins_of(python: str) -> dict[str, str]:
    """What `pip install --constraint constraints.txt` holds packages to under this Python: name -> version."""
    newer = Version(python) >= Version("3.11")
    pins = {}
    for pin in read_pins():
        if pin["side"] in (None, ">=" if newer else "<"):
            name = normalize(pin["name"])
            assert name not in pins, f"{name} is pinned twice for Python {python}"
            pins[name] = pin["version"]
    return pins


def read_requirement_names(requirements: list[str]) -> set[str]:
    return {normalize(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = read_requirement_names(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        names |= read_requirement_names(requirements)
    names.discard(normalize(project["name"]))
    for python in PYTHONS:
        assert names - set(read_pins_of(python)) == set()


@pytest.mark.parametrize("python", PYTHONS)
def test_every_pin_can_be_installed_under_each_python(python):
    """By what the index said of each when it was pinned."""
    refused = {}
    for name, version in read_pins_of(python).items():
        requires = DATA[f"{name}=={version}"]  # missing: run tests/repository/requires_python.py
        if requires is not None and Version(f"{python}.20") not in SpecifierSet(requires):
            refused[f"{name}=={version}"] = requires
    assert not refused


def test_the_data_of_the_index_are_those_of_the_pins():
    assert set(DATA) == {f"{name}=={version}" for python in PYTHONS for name, version in read_pins_of(python).items()}


def test_the_pins_and_the_classifiers_are_those_of_the_declared_pythons():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    declared = [
        c.rpartition(" ")[2] for c in project["classifiers"] if c.startswith("Programming Language :: Python :: 3.")
    ]
    assert declared == PYTHONS
    lowest = SpecifierSet(project["requires-python"])
    assert Version("3.10") in lowest and Version("3.9") not in lowest


def test_torch_is_the_pinned_release():
    assert {read_pins_of(python)["torch"] for python in PYTHONS} == {"2.13.0"}


@pytest.fixture
def checkout(tmp_path):
    if shutil.which("make") is None:
        pytest.skip("no make on this machine")
    for name in ("Makefile", "pyproject.toml", "constraints.txt"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def plan(checkout: Path, *arguments: str) -> str:
    """What make would run."""
    command = ["make", "--no-print-directory", "--dry-run", *arguments]
    # These tests may run under a make of their own, whose settings it hands down.
    handed_down = {"MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "PYTHON"}
    env = {name: value for name, value in os.environ.items() if name not in handed_down}
    return subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True, check=True).stdout


@pytest.mark.parametrize(("target", "extra"), [("test", "dev"), ("demo", "demo"), ("lint", "dev"), ("docs", "dev")])
def test_first_call_makes_the_environment_and_installs_with_the_pins(checkout, target, extra):
    planned = plan(checkout, target)
    assert "-m venv .venv" in planned
    assert planned.count("pip install") == 1
    assert f"pip install --constraint constraints.txt --editable '.[{extra}]'" in planned


@pytest.mark.parametrize(("target", "mark"), [("test", ".installed-dev"), ("demo", ".installed-demo")])
def test_second_call_installs_nothing_until_a_pin_changes(checkout, target, mark):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / mark).touch()
    planned = plan(checkout, target)
    assert "pip" not in planned and "venv .venv" not in planned
    assert plan(checkout, target, "--assume-new=constraints.txt").count("pip install") == 1


def test_the_tests_install_on_top_of_the_demo(checkout):
    (checkout / ".venv" / "bin").mkdir(parents=True)
    (checkout / ".venv" / ".installed-demo").touch()
    assert plan(checkout, "test").count("pip install") == 1 and "'.[dev]'" in plan(checkout, "test")


def test_another_python_is_used_as_it_is(checkout):
    planned = plan(checkout, "test", "PYTHON=/opt/other/bin/python")
    assert planned.startswith("/opt/other/bin/python -m pytest")
    assert "pip" not in planned and ".venv" not in planned
