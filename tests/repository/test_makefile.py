"""The set-up that `make` does: every direct dependency pinned, nothing installed twice or into another environment."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

tomllib = pytest.importorskip("tomllib")

ROOT = Path(__file__).parents[2]
PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[\w.]+)(?: ; python_version >= \"3\.11\")?$")


def read_pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = {}
    for line in lines:
        if line and not line.startswith("#"):
            match = PIN.match(line)
            assert match, f"not an exact pin without index, host or local version: {line!r}"
            pins[normalize(match["name"])] = match["version"]
    return pins


def normalize(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def read_requirement_names(requirements: list[str]) -> set[str]:
    return {normalize(re.match(r"[\w.-]+", requirement)[0]) for requirement in requirements}


def test_every_direct_dependency_is_pinned():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = read_requirement_names(project["dependencies"])
    for requirements in project["optional-dependencies"].values():
        names |= read_requirement_names(requirements)
    names.discard(normalize(project["name"]))
    assert names - set(read_pins()) == set()


def test_torch_is_the_pinned_release():
    assert read_pins()["torch"] == "2.13.0"


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


@pytest.mark.parametrize("target", ["test", "demo"])
def test_first_call_makes_the_environment_and_installs_with_the_pins(checkout, target):
    planned = plan(checkout, target)
    assert "-m venv .venv" in planned
    assert "pip install --constraint constraints.txt" in planned


@pytest.mark.parametrize("target", ["test", "demo"])
def test_second_call_installs_nothing_until_a_pin_changes(checkout, target):
    (checkout / ".venv").mkdir()
    (checkout / ".venv" / ".installed").touch()
    planned = plan(checkout, target)
    assert "pip" not in planned and "venv .venv" not in planned
    assert plan(checkout, target, "--assume-new=constraints.txt").count("pip install") == 1


def test_another_python_is_used_as_it_is(checkout):
    planned = plan(checkout, "test", "PYTHON=/opt/other/bin/python")
    assert planned.startswith("/opt/other/bin/python -m pytest")
    assert "pip" not in planned and ".venv" not in planned
