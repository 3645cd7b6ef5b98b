"""The command line: how soon it answers, and what `compare` adds to the runs that it starts."""

import resource
import subprocess
import sys
import time
from pathlib import Path

from benchmarks.measuring import WALL, Conditions, Row, measure_pairs
from hf_v0init.compare.files import RECORD_FILE, RUNS_FOLDER, read_json

COMPARE_FILE = Path(__file__).resolve().parents[2] / "configs" / "benchmark" / "compare.yaml"
TIME_LIMIT = 1200


def _run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True, timeout=TIME_LIMIT)
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(command)} ended with status {done.returncode}:\n{done.stderr[-2000:]}")


def _time_children() -> float:
    """Processor time of the processes that were started and have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def measure_commands(conditions: Conditions) -> list[Row]:
    """`hf-v0init --help` and `explain`, beside `import torch`."""
    rows, num_pairs = [], conditions.choose(3, 15)
    for name, flags in (
        ("--help", ["--help"]),
        ("explain", ["explain", "--v0_decay_steps", "500", "--max_steps", "5000"]),
    ):
        ratios = measure_pairs(
            lambda flags=flags: _run("-m", "hf_v0init.cli.main", *flags),
            lambda: _run("-c", "import torch"),
            num_pairs,
            _time_children,
        )
        rows.append(Row(f"hf-v0init {name}", f"hf-v0init {name}", 'python -c "import torch"', ratios, aim=0.5))
    return rows


def measure_compare(conditions: Conditions) -> Row:
    """`hf-v0init compare` on eight tiny runs, report included, beside the runs alone.

    A quick measurement takes the runs' own times in that comparison, which are one after another; else each run's command is
    started again, alone.
    """
    folder = conditions.work_dir / "compare"
    begin = time.perf_counter()
    _run("-m", "hf_v0init.cli.main", "compare", str(COMPARE_FILE), "--output_dir", str(folder))
    ours = time.perf_counter() - begin
    records = [read_json(path) for path in sorted((folder / RUNS_FOLDER).glob(f"*/{RECORD_FILE}"))]
    theirs = sum(record["seconds"] for record in records)
    if not conditions.quick:
        begin = time.perf_counter()
        for number, record in enumerate(records):
            command = record["command"][1:]
            place = next(index for index, part in enumerate(command) if "output_dir" in part)
            command[place] = f"--output_dir={conditions.work_dir / f'alone_{number}'}"
            _run(*command)
        theirs = time.perf_counter() - begin
    return Row(
        "compare",
        f"hf-v0init compare, {len(records)} tiny runs one after another, with the report",
        "the sum of the runs' own times" if conditions.quick else "the sum of the runs alone",
        [ours / theirs],
        aim=1.1,
        clock=WALL,
        figures={"seconds": ours, "seconds_of_the_runs": theirs},
    )
