"""The files of an output folder: their names, as transformers' Trainer writes them, and how ours are written."""

import os
from pathlib import Path

STATE_FILE = "trainer_state.json"
RESULTS_FILE = "all_results.json"


def write_whole(path: Path, content: str | bytes) -> None:
    """Write a file whole or not at all: aside, then renamed."""
    aside = path.with_name(f"_{path.name}.{os.getpid()}")  # a push leaves out names that begin with _
    aside.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(aside, path)
