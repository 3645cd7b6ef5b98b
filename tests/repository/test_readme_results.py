"""The tables of the paper's tasks hold what the committed runs gave. (The README's own table: test_docs.py.)"""

import csv
import re
import statistics
from pathlib import Path

import pytest

from hf_v0init.compare.statistics import compute_paired_interval

ROOT = Path(__file__).resolve().parents[2]
PAPER = ROOT / "configs" / "paper"
PAGE = ROOT / "docs" / "paper_tables.md"
# Task -> its comparisons, the number of each run that the table shows, digits
TASKS = {
    "ResNet on digits, test accuracy": (["table_01"], "predict_accuracy", 3),
    "DCGAN on digits, Frechet distance": (["table_05", "table_11"], "final_loss", 1),
    "AWD-LSTM on PTB, test perplexity": (["table_03"], "test_perplexity", 1),
}
V0_COLUMNS = {"v0 = 0": "zeros", "`random` 100": "random 100", "`data_driven` 1": "data_driven 1"}


def read_table(heading: str) -> list[dict[str, str]]:
    """The rows of the first table of the page whose header begins so."""
    lines = PAGE.read_text(encoding="utf-8").splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(heading))
    split = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:]]
    rows = []
    for cells in split[2:]:
        if len(cells) != len(split[0]):
            break
        rows.append(dict(zip(split[0], cells, strict=True)))
    return rows


def read_runs(tables: list[str]) -> list[dict[str, str]]:
    runs = []
    for table in tables:
        with open(PAPER / "results" / table / "results.csv", encoding="utf-8", newline="") as file:
            runs += csv.DictReader(file)
    return runs


def write_estimate(values: list[float], digits: int) -> str:
    """Mean ± standard deviation as the page writes it, such as `.981 ± .010`."""
    numbers = [f"{number:.{digits}f}" for number in (statistics.mean(values), statistics.stdev(values))]
    return " ± ".join(re.sub(r"^0\.", ".", number) for number in numbers)


def test_the_table_of_the_papers_tasks_shows_what_was_run():
    rows, task, shown = read_table("| task | optimizer"), None, set()
    for row in rows:
        task = row["task"] or task
        tables, metric, digits = TASKS[task]
        optimizer = row["optimizer"].lower()
        shown.add((task, optimizer))
        wanted = {column: (v0, "none") for column, v0 in V0_COLUMNS.items()} | {"warmup": ("zeros", None)}
        for column, (v0, warmup) in wanted.items():
            by_table = {}  # the same setting of two tables is the same runs
            for table in tables:
                by_table[table] = [
                    float(run[metric])
                    for run in read_runs([table])
                    if (run["optimizer"], run["v0"]) == (optimizer, v0)
                    and (run["warmup"] == warmup if warmup else run["warmup"].isdigit())
                ]
            cells = {write_estimate(values, digits) for values in by_table.values() if values}
            assert cells <= {row[column]} and (cells or row[column] == "-"), (task, optimizer, column, cells)
    for task, (tables, *_) in TASKS.items():
        for run in read_runs(tables):
            assert run["v0"] == "zeros" or (task, run["optimizer"]) in shown


def test_each_of_the_papers_tables_has_an_answer():
    text = PAGE.read_text(encoding="utf-8")
    rows = read_table("| table | what")
    assert [int(row["table"]) for row in rows] == list(range(1, 13))
    for row in rows:
        config = f"configs/paper/table_{int(row['table']):02d}.yaml"
        if row["table"] == "7":
            assert row["command"].startswith("`hf-v0init saddle`") and not (ROOT / config).exists()
        else:
            assert config in row["command"] and (ROOT / config).is_file()
        report = PAPER / "results" / f"table_{int(row['table']):02d}" / "report.md"
        assert report.is_file() is (f"`results/{report.parent.name}/report.md` |" in text)


@pytest.mark.parametrize("number", [1, 3, 5, 6, 9, 11])
def test_the_tables_say_whether_the_small_scale_can_show_the_effect(number):
    """Half the width of the interval of `data_driven` 1 less v0 = 0, both with Adam, beside the paper's difference."""
    metric = {1: "predict_accuracy", 3: "test_perplexity", 6: "predict_accuracy", 9: "predict_accuracy"}.get(number)
    losses = {}
    for run in read_runs([f"table_{number:02d}"]):
        if run["optimizer"] == "adam" and run["warmup"] == "none":
            losses.setdefault(run["v0"], {})[run["seed"]] = float(run[metric or "final_loss"])
    interval = compute_paired_interval(losses["data_driven 1"], losses["zeros"])
    half = (interval.high - interval.mean) / statistics.mean(losses["zeros"].values())
    with open(PAPER / "published.csv", encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["table"] == f"table_{number}"]
    paper = {(row["optimizer"], row["v0"]): float(row["value"]) for row in rows}
    # Table 6 is over the scale, and its two columns are strategy and scale.
    zeros, ours = (
        (("data_driven", scale) for scale in "01") if number == 6 else (("Adam", v0) for v0 in ("zeros", "data_driven"))
    )
    effect = paper[ours] / paper[zeros] - 1
    answer = f"{'yes' if half < abs(effect) else 'no'}: ±{half:.1%}, the paper's {effect:+.1%}"
    (row,) = [row for row in read_table("| table | what") if row["table"] == str(number)]
    assert interval.n == 3 and row["can that scale show the effect?"] == answer


@pytest.mark.parametrize("name", ["table_01", "table_03", "table_05", "table_11"])
def test_the_runs_are_of_three_seeds(name):
    counts = {}
    for run in read_runs([name]):
        setting = (run["optimizer"], run["v0"], run["warmup"], run["learning_rate"], run["other"])
        counts.setdefault(setting, set()).add(run["seed"])
    assert {len(seeds) for seeds in counts.values()} == {3}
