"""The tables of results in the READMEs hold what the committed comparisons gave."""

import csv
import os
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"compare": ROOT / "configs" / "compare" / "results", "paper": ROOT / "configs" / "paper" / "results"}

# Task -> its comparisons and the figure of them that the table shows
TASKS = {
    "ResNet on digits, test accuracy": (["table_01"], "predict_accuracy", 3),
    "DCGAN on digits, Frechet distance": (["table_05", "table_11"], "final", 1),
    "AWD-LSTM on PTB, test perplexity": (["table_03"], "test_perplexity", 1),
}
TASK_COLUMNS = {"v0 = 0": "zeros", "`random` 100": "random 100", "`data_driven` 1": "data_driven 1"}


def read_table(heading: str, readme: Path = RESULTS["compare"] / "README.md") -> list[dict[str, str]]:
    """The rows of the first table of a README whose header begins so."""
    lines = readme.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    rows = []
    for cells in split[2:]:
        if len(cells) != len(split[0]):
            break
        rows.append(dict(zip(split[0], cells, strict=True)))
    return rows


def read_arms(kind: str, name: str) -> list[dict[str, str]]:
    """A row for each setting of a comparison: mean and deviation over all its seeds, of the loss and of the test metrics."""
    with open(RESULTS[kind] / name / "results.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    groups: dict[tuple[str, str], list[dict[str, str]]] = {}
    for row in rows:
        groups.setdefault((row["setting"], row["learning_rate"]), []).append(row)
    arms = []
    for group in groups.values():
        arm = dict(group[0])
        columns = {"final": "scored_loss"}
        columns |= {column: column for column in group[0] if column.startswith(("predict_", "test_", "eval_"))}
        for figure, column in columns.items():
            values = [float(row[column]) for row in group if row[column]]
            arm[f"{figure}_mean"] = str(statistics.fmean(values)) if values else ""
            arm[f"{figure}_std"] = str(statistics.stdev(values)) if len(values) > 1 else ""
        arms.append(arm)
    return arms


def write_estimate(row: dict[str, str], figure: str, digits: int) -> str:
    """A figure of a row of arms.csv as the README writes it, such as `4.255 ± .080`."""
    mean, std = row[f"{figure}_mean"], row[f"{figure}_std"]
    numbers = [f"{float(number):.{digits}f}" for number in (mean, std) if number]
    return " ± ".join(re.sub(r"^0\.", ".", number) for number in numbers)


def test_the_table_of_the_papers_tasks_shows_every_run_arm():
    rows, task = read_table("| task | optimizer", RESULTS["paper"].parent / "README.md"), None
    shown = set()
    for row in rows:
        task = row["task"] or task
        tables, figure, digits = TASKS[task]
        arms = [arm for table in tables for arm in read_arms("paper", table)]
        optimizer = row["optimizer"].lower()
        shown.add((task, optimizer))
        wanted = {column: (v0, "none") for column, v0 in TASK_COLUMNS.items()} | {"warmup": ("zeros", None)}
        for column, (v0, warmup) in wanted.items():
            found = [
                arm
                for arm in arms
                if (arm["optimizer"], arm["v0"]) == (optimizer, v0)
                and (arm["warmup"] == warmup if warmup else arm["warmup"].isdigit())
            ]
            cells = {write_estimate(arm, figure, digits) for arm in found}
            assert cells <= {row[column]} and (cells or row[column] == "-"), (task, optimizer, column, cells)
    for task, (tables, *_) in TASKS.items():
        for table in tables:
            for arm in read_arms("paper", table):
                assert arm["v0"] == "zeros" or (task, arm["optimizer"]) in shown


def test_the_tables_of_the_measured_length_are_what_the_command_prints():
    """Those beside the runs, and the first table of the project's README."""
    command = [sys.executable, "configs/compare/measured_length/tabulate.py"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    printed = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=True).stdout
    body, first = printed.split("## The first table of the project's README\n\n")
    evidence = (RESULTS["compare"] / "measured_length" / "README.md").read_text(encoding="utf-8")
    shown = evidence.split("<!-- tables: begin -->\n")[1].split("<!-- tables: end -->")[0]
    assert shown.strip() == re.sub("^## ", "### ", body, flags=re.MULTILINE).strip()
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        readme.split("<!-- results: begin")[1].split("-->\n", 1)[1].split("<!-- results: end")[0].strip()
        == first.strip()
    )
    assert first.count("\n| ") >= 5 and body.count("\n| ") > 50


def test_each_of_the_papers_tables_has_an_answer():
    text = (RESULTS["paper"].parent / "README.md").read_text(encoding="utf-8")
    rows = read_table("| table | what", RESULTS["paper"].parent / "README.md")
    assert [int(row["table"]) for row in rows] == list(range(1, 13))
    for row in rows:
        config = f"configs/paper/table_{int(row['table']):02d}.yaml"
        if row["table"] == "7":
            assert row["command"].startswith("`hf-v0init saddle`") and not (ROOT / config).exists()
        else:
            assert config in row["command"] and (ROOT / config).is_file()
        report = RESULTS["paper"] / f"table_{int(row['table']):02d}" / "report.md"
        assert report.is_file() is (f"(results/{report.parent.name}/report.md)" in text)


LINK = re.compile(r"\]\((?!https?:|#)([^)\s]+)\)")
READMES = [path for folder in ("", "hf_v0init", "scripts", "configs") for path in (ROOT / folder).glob("README.md")]
READMES += [*(ROOT / "configs").glob("*/**/README.md"), *(ROOT / "hf_v0init").glob("*/README.md")]


@pytest.mark.parametrize("path", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_to_files(path):
    dead = [
        link
        for link in LINK.findall(path.read_text(encoding="utf-8"))
        if not (path.parent / link.split("#")[0]).exists()
    ]
    assert not dead
