"""Runs the commands and the snippets of the README and of docs/ as they stand there; exit status 1 if one fails.

    python tests/repository/run_readme.py [PAGE ...]

A block is run if `<!-- run -->` stands on a line before it: `bash` by bash in the repository's root, `python` after
readme_setup.py beside this file, which makes the tiny `model`, `data` and so on that the snippets are about. Models and reports
go where the README says (`outputs/`, which git ignores).
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SETUP = Path(__file__).with_name("readme_setup.py")
MARK = "<!-- run -->"
BLOCK = re.compile(r"^(?P<mark><!-- run -->\n+)?```(?P<language>\w*)\n(?P<code>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """A code block: its language, its text, the line of the page on which the text begins, whether it is to be run."""

    language: str
    code: str
    line: int
    runs: bool


def read_blocks(text: str) -> list[Block]:
    """The code blocks of a Markdown text, in their order.

    Raises:
        ValueError: a mark that stands before no block, or before one of a language that cannot be run.
    """
    blocks = []
    for match in BLOCK.finditer(text):
        line = text[: match.start("code")].count("\n") + 1
        blocks.append(Block(match["language"], match["code"], line, match["mark"] is not None))
    if sum(block.runs for block in blocks) != text.count(MARK):
        raise ValueError(f"{MARK} stands before something that is no code block")
    for block in blocks:
        if block.runs and block.language not in ("bash", "python"):
            raise ValueError(f"line {block.line}: a block of {block.language or 'no language'} cannot be run")
    return blocks


def run_block(block: Block, setup: str = "") -> subprocess.CompletedProcess:
    """Run a block in the repository's root, with this interpreter's programs first on the path."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment.get('PATH', '')}"
    environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{environment.get('PYTHONPATH', '')}"
    if block.language == "bash":
        command = ["bash", "-euo", "pipefail", "-c", block.code]
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    with tempfile.TemporaryDirectory() as folder:
        code = f"{setup}\nimport os\nos.chdir({folder!r})\n{block.code}"
        return subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True)


def main() -> int:
    setup, failed = SETUP.read_text(encoding="utf-8"), 0
    for page in [Path(name).resolve() for name in sys.argv[1:]] or PAGES:
        for block in read_blocks(page.read_text(encoding="utf-8")):
            if not block.runs:
                continue
            begin = time.perf_counter()
            done = run_block(block, setup)
            first = block.code.strip().splitlines()[0]
            verdict = "ok" if done.returncode == 0 else f"exit status {done.returncode}"
            place = f"{page.relative_to(ROOT)}:{block.line} {block.language}"
            print(f"{place} {first[:70]}: {verdict}, {time.perf_counter() - begin:.0f} s", flush=True)
            if done.returncode != 0:
                failed += 1
                print(done.stdout[-3000:] + done.stderr[-3000:], flush=True)
    return min(failed, 1)


if __name__ == "__main__":
    sys.exit(main())
