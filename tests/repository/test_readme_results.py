"""The tables of results in the READMEs hold what the committed comparisons gave."""

import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"compare": ROOT / "configs" / "compare" / "results", "paper": ROOT / "configs" / "paper" / "results"}

# Row of the README -> v0 (one of these) and warmup of the arms it may come from; None stands for any number of steps.
MAIN_ROWS = {
    "no warmup, v0 = 0": ("zeros", "none"),
    "linear warmup, the best of those tried": ("zeros", None),
    "untuned linear warmup, 2/(1 - beta2) steps": ("zeros", "untuned_linear"),
    "`data_driven`, scale 1 (the paper's)": ("data_driven 1", "none"),
    "`data_driven`, scale 10": ("data_driven 10", "none"),
    "`data_driven`, `v0_decay_steps` of a third of the run": (
        ("data_driven warmup 200", "data_driven warmup 400"),
        "none",
    ),
    "`random`, scale 100 (the paper's)": ("random 100", "none"),
}
MAIN_COLUMNS = {
    "Multi30k, beta2 .98": ("multi30k_pocket", {}),
    "Multi30k at 10M, beta2 .98": ("multi30k", {}),
    "PTB, beta2 .98": ("ptb_pocket", {}),
    "PTB, beta2 .999": ("ptb_pocket", {"adam_beta2": 0.999}),
}
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
    with open(RESULTS[kind] / name / "arms.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_estimate(row: dict[str, str], figure: str, digits: int) -> str:
    """A figure of a row of arms.csv as the README writes it, such as `4.255 ± .080`."""
    mean, std = row[f"{figure}_mean"], row[f"{figure}_std"]
    numbers = [f"{float(number):.{digits}f}" for number in (mean, std) if number]
    return " ± ".join(re.sub(r"^0\.", ".", number) for number in numbers)


def without_bold(cell: str) -> str:
    return cell.replace("*", "")


@pytest.mark.parametrize("column", MAIN_COLUMNS)
def test_the_main_table_shows_every_arm_at_its_best_learning_rate(column):
    folder, other = MAIN_COLUMNS[column]
    arms = [row for row in read_arms("compare", folder) if row["optimizer"] == "adamw" and row["final_mean"]]
    rows = read_table("| arm | Multi30k")
    assert [row["arm"] for row in rows] == list(MAIN_ROWS)
    for row in rows:
        v0, warmup = MAIN_ROWS[row["arm"]]
        found = [
            arm
            for arm in arms
            if arm["v0"] in ((v0,) if isinstance(v0, str) else v0)
            and (arm["warmup"] == warmup if warmup else arm["warmup"].isdigit())
            and json.loads(arm["other"] or "{}") == other
        ]
        best = min(found, key=lambda arm: float(arm["final_mean"]), default=None)
        assert without_bold(row[column]) == ("-" if best is None else write_estimate(best, "final", 3)), row["arm"]
        if column == "Multi30k, beta2 .98":
            sensitivity = best["lr_sensitivity"]
            assert without_bold(row["sensitivity"]) == (f"{float(sensitivity):.2f}" if sensitivity else "-"), row["arm"]


def write_rows_at_10m() -> list[dict[str, str]]:
    """The table of the 10 million parameters: the arms that have both learning rates."""
    by_arm = {}
    for arm in read_arms("compare", "multi30k"):
        by_arm.setdefault(arm["arm"], {})[float(arm["learning_rate"])] = arm
    rows = []
    for name in ("warmup 200", "warmup 400", "warmup 800", "data_driven 10", "data_driven warmup 400", "random 100"):
        at = by_arm.pop(name)
        best = next(arm for arm in at.values() if arm["is_best_rate"] == "True")
        row = {
            "arm at 10M": name,
            "7.5e-4": write_estimate(at[7.5e-4], "final", 3),
            "1.5e-3": write_estimate(at[1.5e-3], "final", 3),
        }
        row["sensitivity"] = f"{float(best['lr_sensitivity']):.2f}"
        rows.append(row | {"test BLEU at the better rate": write_estimate(best, "predict_bleu", 1)})
    assert all(len(at) == 1 for at in by_arm.values())
    return rows


def test_the_table_of_10_million_parameters_shows_every_arm_at_both_rates():
    rows = [{name: without_bold(cell) for name, cell in row.items()} for row in read_table("| arm at 10M")]
    assert rows == write_rows_at_10m()


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


def test_the_table_of_the_papers_model_shows_the_arms_of_table_12():
    arms = {(row["v0"], row["warmup"]): row for row in read_arms("compare", "multi30k_paper_model")}
    rows = read_table("| the arms of the paper's Table 12")
    v0s = {"v0 = 0": "zeros", "`random` 100": "random 100", "`data_driven` 1": "data_driven 1"}
    columns = {"no warmup": "none", "warmup of 390 steps": "390"}
    assert len(rows) == len(v0s) and len(arms) == len(v0s) * len(columns)
    for row in rows:
        for column, warmup in columns.items():
            arm = arms[v0s[row["the arms of the paper's Table 12"]], warmup]
            assert without_bold(row[column]) == write_estimate(arm, "final", 3) and arm["final_n"] == "3"


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
