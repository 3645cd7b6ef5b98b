"""Writes those parts of the documentation that are made from code and from committed results, each between two comments.

    python docs/generate.py            # write them
    python docs/generate.py --check    # exit status 1 if one is not what it would be

| where | part | made from |
| --- | --- | --- |
| README.md | results | configs/compare/v0_decay/results/*.csv, read by configs/compare/v0_decay/tables.py |
| docs/flags.md | flags | the fields of `V0InitArguments` |
| docs/optimizers.md | optimizers, linear | the table of optimizers (`hf-v0init optimizers`) |
"""

import argparse
import importlib.util
import re
import sys
from dataclasses import fields
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # this checkout's package, installed or not

from hf_v0init.second_moment.table import ROWS, SUPPORTED_ROWS  # noqa: E402
from hf_v0init.settings import V0InitArguments  # noqa: E402

NUM_SEEDS = 5  # of v0 in each row


def make_results() -> str:
    """The README's table: validation loss over the fresh seeds, (n) where there are other than five; tasks with both sides alone."""
    spec = importlib.util.spec_from_file_location("v0_decay_tables", ROOT / "configs/compare/v0_decay/tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    lines = [
        "| task | no warmup | best tuned warmup | v0 | difference (95% CI) |",
        "| --- | --- | --- | --- | --- |",
    ]
    for task, (title, _, _) in tables.TASKS.items():
        if not (tables.FOLDER / "results" / f"{task}.csv").is_file():
            continue
        by_seed = tables.read_by_seed(task)
        keys = [tables.find_best(by_seed, kind) for kind in ("no warmup", "warmup", tables.DEFAULT_V0)]
        none, warmup, v0 = (None if key is None else by_seed[key].dropna() for key in keys)
        if v0 is None or warmup is None or len(v0) < NUM_SEEDS:
            continue
        difference = re.sub(r"\b0\.", ".", tables.compare(v0, warmup).partition(":")[0])
        cells = [title, *map(write_estimate, (none, warmup, v0)), difference]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write_estimate(values) -> str:
    """Mean ± standard deviation, such as `4.255 ± .080`."""
    if values is None:
        return "-"
    spread = f" ± {values.std():.3f}".replace("0.", ".", 1) if len(values) > 1 else ""
    return f"{values.mean():.3f}{spread}" + ("" if len(values) == NUM_SEEDS else f" ({len(values)})")


def make_flags() -> str:
    """A section for each flag: its choices and its help text."""
    sections = []
    for flag in fields(V0InitArguments):
        choices = flag.metadata.get("choices")
        values = f"Choices: {', '.join(f'`{choice}`' for choice in choices)}.\n\n" if choices else ""
        sections.append(f"### `--{flag.name}`\n\n{values}{flag.metadata['help']}")
    return "\n\n".join(sections)


def make_linear() -> str:
    """Which optimizers a v0 with the linear decay can be used with, and why not with the others."""
    lines = ["| optimizer | `--v0_decay linear` |", "| --- | --- |"]
    for row in SUPPORTED_ROWS:
        lines.append(f"| {row.full_name} | {row.describe_linear_decay()} |")
    return "\n".join(lines)


def make_optimizers() -> str:
    """Where each optimizer keeps its second moment, what it starts as and how exactly, or why it is refused."""
    lines = [
        "| optimizer | `--optim` | second moment | starts as | error | remark |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for row in ROWS:
        if row.refusal:
            cells = ("", "refused", "", row.refusal)
        elif row.is_probed:
            cells = ("", "v0, if the dry run finds where", "", "not measured: needs hardware or a build of its own")
        else:
            start = f"{row.start}, quantised" if row.stored_error else row.start
            error = f"{row.stored_error:.2g} stored, {row.error:.2g} after 2 steps" if row.stored_error else "exact"
            cells = (f"`{row.key}`{row.kept}", start, error, row.note)
        optim = ", ".join(f"`{value}`" for value in row.optim)
        lines.append("| " + " | ".join((row.full_name, optim, *cells)) + " |")
    lines.append(
        "| any other | `--v0_optimizer package:Class` | found by a dry run | v0, or refused |  | if one state tensor obeys "
        "v1 = beta2·v0 + (1−beta2)·g² at a copy's first step and all else starts at zero |"
    )
    return "\n".join(lines)


PARTS = [
    ("README.md", "results", make_results),
    ("docs/flags.md", "flags", make_flags),
    ("docs/optimizers.md", "optimizers", make_optimizers),
    ("docs/optimizers.md", "linear", make_linear),
]


def replace_part(text: str, name: str, content: str) -> str:
    """Put `content` between `<!-- NAME: begin -->` and `<!-- NAME: end -->`.

    Raises:
        ValueError: the two comments are not there once.
    """
    begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
    if text.count(begin) != 1 or text.count(end) != 1:
        raise ValueError(f"{begin.strip()} and {end} must be there once")
    pattern = re.escape(begin) + ".*?" + re.escape(end)
    return re.sub(pattern, lambda _: f"{begin}{content}\n{end}", text, flags=re.DOTALL)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="change nothing; exit status 1 if something would change")
    is_check, changed = parser.parse_args().check, 0
    for name, part, make in PARTS:
        path = ROOT / name
        text = path.read_text(encoding="utf-8")
        new = replace_part(text, part, make())
        if new == text:
            continue
        changed += 1
        print(f"{name}: {part} {'is not what the code gives: python docs/generate.py' if is_check else 'written'}")
        if not is_check:
            path.write_text(new, encoding="utf-8")
    return int(is_check and changed > 0)


if __name__ == "__main__":
    sys.exit(main())
