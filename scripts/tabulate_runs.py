"""Sets finished training runs side by side: a table, a picture of their losses, and the figures as JSON.

python scripts/tabulate_runs.py runs/multi30k_* --figure losses.png --json results.json
"""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from hf_v0init.errors import InputError
from hf_v0init.plots import draw_losses, require_figure_path
from hf_v0init.records.run_table import read_run

COLUMNS = {
    "predict_bleu": "test BLEU",
    "predict_chrf": "test chrF",
    "eval_perplexity": "val. perplexity",
    "test_perplexity": "test perplexity",
}


def tabulate(
    folders: Annotated[list[Path], typer.Argument(help="Output folders of finished runs.")],
    figure: Annotated[Path | None, typer.Option(help="Draw the losses into this .png, .svg or .pdf.")] = None,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures into this file.")] = None,
    title: Annotated[str, typer.Option(help="Title of table and picture.")] = "Training runs",
) -> None:
    """Set finished runs side by side."""
    if figure is not None:
        require_figure_path(figure)
    runs = [read_run(folder) for folder in folders]
    shown = {key: label for key, label in COLUMNS.items() if any(key in run.metrics for run in runs)}
    table = Table(title=title)
    for heading in ("run", "v0", "steps", "final val. loss", *shown.values()):
        table.add_column(heading, justify="left" if heading in ("run", "v0") else "right")
    for run in runs:
        v0 = f"{run.v0['strategy']}, scale {run.v0['scale']:.4g}" if run.v0 else "zeros"
        loss = "-" if run.final_eval_loss is None else f"{run.final_eval_loss:.3f}"
        figures = [f"{run.metrics[key]:.2f}" if key in run.metrics else "-" for key in shown]
        table.add_row(run.name, v0, str(run.num_steps), loss, *figures)
    Console(width=140).print(table)
    if figure is not None:
        draw_losses(figure, runs, title=title)
    if json_file is not None:
        json_file.write_text(json.dumps([run.to_dict() for run in runs], indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    try:
        typer.run(tabulate)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
