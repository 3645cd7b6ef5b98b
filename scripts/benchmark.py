"""Measures what v0 and the scripts cost, each beside its limit, and compares with the committed record.

python scripts/benchmark.py --quick
python scripts/benchmark.py --quick --compare          # exit status 1 if something got worse
python scripts/benchmark.py --quick --write_record     # configs/benchmark/record.json
"""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: processor time is then what the work takes
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import contextlib
import json
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated

import datasets
import typer
from benchmarks import rows_commands, rows_draw, rows_first_step, rows_pass, rows_training, rows_translation
from benchmarks.measuring import MISSED, Conditions, Row, use_one_thread
from benchmarks.record import (
    RECORD_PATH,
    compose_record,
    find_worse,
    read_record,
    read_rows,
    write_record,
)
from rich.console import Console
from rich.table import Table
from transformers.utils import logging as transformers_logging

from hf_v0init.errors import InputError
from hf_v0init.tasks.translation import script as run_translation

EXIT_WORSE = 1
MEASURES: dict[str, Callable[[Conditions], Row | list[Row]]] = {
    "first_step": rows_first_step.measure_first_steps,
    "decay_memory": rows_first_step.measure_decay_memory,
    "length": rows_first_step.measure_length,
    "later": rows_first_step.measure_later_steps,
    "pass": rows_pass.measure_pass_time,
    "shards": rows_draw.measure_shards,
    "reduction": rows_draw.measure_reduction,
    "trainer": rows_training.measure_trainer_steps,
    "translation": rows_translation.measure_translation,
    "preprocessing": rows_translation.measure_preprocessing,
    "generation": rows_translation.measure_generation,
    "commands": rows_commands.measure_commands,
    "compare": rows_commands.measure_compare,
}


def benchmark(
    quick: Annotated[bool, typer.Option("--quick", help="Fewer pairs: under 5 minutes on two idle cores.")] = False,
    rows: Annotated[
        str, typer.Option("--rows", help=f"Only these, with commas between them: {', '.join(MEASURES)}.")
    ] = "",
    compare: Annotated[
        bool, typer.Option("--compare", help="Say what got worse than the record; exit status 1.")
    ] = False,
    write: Annotated[bool, typer.Option("--write_record", help=f"Replace {RECORD_PATH.name}.")] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the figures into this file.")] = None,
    data_dir: Annotated[
        Path,
        typer.Option("--data_dir", help="Folder with multi30k/ and ptb/; without them the embedded corpus serves."),
    ] = Path("data"),
) -> None:
    """Measure, print the table and, if asked, compare with the committed record or replace it."""
    names = rows.split(",") if rows else list(MEASURES)
    unknown = [name for name in names if name not in MEASURES]
    if unknown:
        raise InputError(f"--rows={rows}: {unknown[0]!r} is none of {', '.join(MEASURES)}")
    if write and rows:
        raise InputError(f"--write_record with --rows={rows}: a record has all rows; drop one of the two")
    before = read_rows(read_record()) if compare else []
    use_one_thread()
    console, begin = Console(width=170, highlight=False, markup=False), time.perf_counter()
    with _quiet():
        measured = measure(names, quick, data_dir, console)
    seconds = time.perf_counter() - begin
    print_table(measured, console, seconds)
    record = compose_record(measured, "scripts/benchmark.py" + (" --quick" if quick else ""), quick, seconds)
    if json_file is not None:
        json_file.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    if write:
        write_record(record)
        console.print(f"Record: {RECORD_PATH}")
    if compare:
        worse = find_worse(before, measured)
        console.print("Worse than the record:" if worse else "Nothing got worse than the record.")
        for line in worse:
            console.print(f"  {line}", soft_wrap=True)
        if worse:
            raise typer.Exit(EXIT_WORSE)


def measure(names: list[str], quick: bool, data_dir: Path, console: Console) -> list[Row]:
    """Measure the rows, each in a folder that is removed afterwards."""
    measured: list[Row] = []
    with tempfile.TemporaryDirectory(prefix="hf_v0init_benchmark_") as folder:
        conditions = Conditions(quick, data_dir, Path(folder), run_translation.TranslationTrainer)
        for name in names:
            begin = time.perf_counter()
            found = MEASURES[name](conditions)
            measured += found if isinstance(found, list) else [found]
            console.print(f"{name}: {time.perf_counter() - begin:.0f} s")
    return measured


def print_table(measured: list[Row], console: Console, seconds: float) -> None:
    """Print the rows; misses and remarks below."""
    table = Table("row", "what", "against", "aim", "ratio", "middle half", "verdict", title=f"{seconds:.0f} s")
    for row in measured:
        sign = "" if row.aim is None else (">= " if row.at_least else "<= ") + f"{row.aim:g}"
        low, high = row.quartiles
        spread = f"{low:.3f} to {high:.3f}" if len(row.ratios) > 1 else ""
        ratio = f"{row.median:.3f}" if row.ratios else ""
        style = "bold red" if row.verdict == MISSED else None
        table.add_row(row.name, row.what, row.against, sign, ratio, spread, row.verdict, style=style)
    console.print(table)
    for row in measured:
        figures = ", ".join(f"{name} {value:.4g}" for name, value in row.figures.items())
        if row.note or figures:
            console.print(f"{row.name}: {'; '.join(part for part in (row.note, figures) if part)}", soft_wrap=True)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the measured code from talking; afterwards all is as before."""
    ours, silent = logging.getLogger("hf_v0init"), logging.NullHandler()
    verbosity, shows_bars = transformers_logging.get_verbosity(), not datasets.are_progress_bars_disabled()
    transformers_logging.set_verbosity_error()
    ours.addHandler(silent)
    propagates, ours.propagate = ours.propagate, False
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        ours.removeHandler(silent)
        ours.propagate = propagates
        if shows_bars:
            datasets.enable_progress_bars()


if __name__ == "__main__":
    try:
        typer.run(benchmark)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
