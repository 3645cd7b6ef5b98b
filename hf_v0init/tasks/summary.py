"""What a script says on the terminal at its end: one line per stage, and a table of what the run has been."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..method.length import describe_bound

# Of all the numbers of `all_results.json` those that people look for; the file has the rest.
SCORES = {
    "loss": "{:.4f}", "perplexity": "{:.3f}", "pseudo_perplexity": "{:.3f}", "accuracy": "{:.4f}", "top5_accuracy": "{:.4f}",
    "bleu": "{:.2f}", "chrf": "{:.2f}", "fid": "{:.2f}", "frechet_distance_classifier": "{:.3f}",
}  # fmt: skip
STAGES = {"train": "training", "eval": "validation", "predict": "test", "test": "test"}
LOG_WIDTH, RESULTS_FILE = 120, "all_results.json"


def read_results(output_dir) -> dict[str, Any]:
    """Read what `save_metrics` has written into an output folder; empty if there is nothing."""
    path = Path(output_dir, RESULTS_FILE)
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


def find_scores(results: Mapping[str, Any]) -> list[tuple[str, str, float]]:
    """Find the scores among a run's results: "training", "validation" or "test", the score's name, its value.

    Args:
        results: as in `all_results.json`, keys such as "eval_loss"; losses in nats, accuracies as shares, BLEU and chrF in percent.
    """
    named = [(title, name, results.get(f"{stage}_{name}")) for stage, title in STAGES.items() for name in SCORES]
    return [(title, name, value) for title, name, value in named if isinstance(value, (int, float))]


def list_scores(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """List the scores among a run's results, by stage: its name, and all of its scores in words."""
    rows: dict[str, list[str]] = {}
    for title, name, value in find_scores(results):
        rows.setdefault(title, []).append(f"{name.replace('_', ' ')} {SCORES[name].format(value)}")
    return [(title, ", ".join(words)) for title, words in rows.items()]


def print_summary(trainer) -> None:
    """Print the table. Call it on the main process, when everything has been written."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=LOG_WIDTH)
    results = read_results(trainer.args.output_dir)
    table = Table(title="Summary", show_header=False, title_justify="left", title_style="bold")
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    network = trainer.accelerator.unwrap_model(trainer.model)
    count = sum(p.numel() for p in network.parameters())
    table.add_row("model", f"{type(network).__name__}, {count:,} parameters")
    if trainer.args.do_train:
        steps, epochs = trainer.state.global_step, trainer.state.epoch or 0
        trained = f"{steps:,} step{'' if steps == 1 else 's'}, {epochs:.2f} epochs"
        seconds = results.get("train_runtime")
        table.add_row("trained", f"{trained}, {seconds:.0f} s" if seconds else trained)
        table.add_row("v0", _describe_v0(trainer.get_v0_report()))
    for title, words in list_scores(results):
        table.add_row(title, words)
    table.add_row("folder", str(Path(trainer.args.output_dir)))
    console.print(table)


def _describe_v0(report: Mapping[str, Any] | None) -> str:
    """Say what the run did in place of a tuned warmup, from its record."""
    if report is None:
        return "zero, as in torch"
    length = report.get("length") or {}
    measured = ""
    if length.get("x") is not None:
        measured = f" (learning rate / d50 = {length['x']:.3g}{describe_bound(length['x'], length['steps'])})"
    if report.get("strategy") == "zeros":
        return f"zero, as in torch, beside a warmup of {report.get('warmup_steps') or 0:,} steps{measured}"
    if report.get("decay") == "linear":
        return f"{report['strategy']}, linear decay over {report['decay_steps']:,} steps{measured}"
    return f"{report['strategy']}, decay by beta2, scale {report.get('scale')}"
