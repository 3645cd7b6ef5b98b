"""Asks the index which Python each pin of constraints.txt needs, and writes requires_python.json beside this file.

    python tests/repository/requires_python.py

Call it when a pin changes; pip downloads little more than the packages' metadata, and installs nothing.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

CONSTRAINTS = Path(__file__).parents[2] / "constraints.txt"
DATA = Path(__file__).with_suffix(".json")
PIN = re.compile(r"^(?P<name>[\w.-]+)==(?P<version>[\w.]+)(?: ; python_version (?P<side><|>=) \"3\.11\")?$")


def read_pins() -> list[re.Match]:
    """The pins, in the order of the file.

    Raises:
        ValueError: a line that is no exact pin, or has another marker.
    """
    lines = CONSTRAINTS.read_text(encoding="utf-8").splitlines()
    pins = []
    for line in lines:
        if line and not line.startswith("#"):
            match = PIN.match(line)
            if match is None:
                raise ValueError(f"not an exact pin without index, host or local version: {line!r}")
            pins.append(match)
    return pins


def normalize(name: str) -> str:
    """The name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def ask_index(requirements: list[str]) -> dict[str, str | None]:
    """What each of `requirements`, "name==version", says of the Python it needs (None: nothing)."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    command += ["--ignore-requires-python", "--report", "-", *requirements]
    report = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    found = {}
    for package in report["install"]:
        metadata = package["metadata"]
        version = metadata["version"].partition("+")[0]
        found[f"{normalize(metadata['name'])}=={version}"] = metadata.get("requires_python")
    return found


def main() -> None:
    pins, found = read_pins(), {}
    for sides in ((None, ">="), ("<",)):
        found |= ask_index([f"{pin['name']}=={pin['version']}" for pin in pins if pin["side"] in sides])
    DATA.write_text(json.dumps(dict(sorted(found.items())), indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
