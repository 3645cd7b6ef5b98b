"""Adds the finished runs of comparisons to results/TASK.csv; from the repository's root:

    hf-v0init compare configs/compare/v0_decay/llama.yaml --output_dir outputs/v0_decay/llama
    python configs/compare/v0_decay/collect.py llama outputs/v0_decay/llama    # more folders may follow

Columns: configuration, learning_rate, seed, eval_loss (nats), decay_steps (L) and x (learning rate / d50) of runs with a v0.
"""

import json
import sys
from pathlib import Path

import pandas as pd

ORDER = ["configuration", "learning_rate", "seed"]


def read_run(record: Path) -> dict | None:
    """Read one run; None if it is not finished."""
    run = json.loads(record.read_text(encoding="utf-8"))
    if run["state"] != "finished":
        return None
    output = record.parent / "output"
    row = {"configuration": run["setting"], "learning_rate": run["learning_rate"], "seed": run["seed"]}
    row["eval_loss"] = json.loads((output / "eval_results.json").read_text(encoding="utf-8"))["eval_loss"]
    if run["family"] == "v0":
        report = json.loads((output / "v0_init.json").read_text(encoding="utf-8"))
        row["decay_steps"] = report.get("decay_steps", 0)  # none: no warmup was needed
        row["x"] = (report.get("length") or {}).get("x")
    return row


def main(task: str, *folders: str) -> None:
    """Write the task's file: what it holds, and the folders' runs that it lacks."""
    rows = [read_run(record) for folder in folders for record in Path(folder).glob("runs/*/record.json")]
    table = pd.DataFrame([row for row in rows if row], columns=[*ORDER, "eval_loss", "decay_steps", "x"])
    file = Path(__file__).parent / "results" / f"{task}.csv"
    if file.is_file():
        table = pd.concat([pd.read_csv(file), table])
    table = table.drop_duplicates(ORDER)
    table["decay_steps"] = table["decay_steps"].astype("Int64")
    table.round({"eval_loss": 6, "x": 3}).sort_values(ORDER).to_csv(file, index=False)
    print(f"{file}: {len(table)} runs")


if __name__ == "__main__":
    main(*sys.argv[1:])
