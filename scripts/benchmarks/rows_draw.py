"""The draw of a random v0 and the reduction of the statistics, each beside torch's own operation on the same tensors."""

import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from benchmarks.measuring import WALL, Conditions, Row, measure_pairs
from hf_v0init.method.strategies import compute_random_v0_mean
from hf_v0init.sharding.draws import draw_standard_normal_

NUM_PROCESSES = 2
TIME_LIMIT = 300


def measure_shards(conditions: Conditions) -> Row:
    """The shares of eight processes, drawn one after another, beside the whole: each costs an eighth."""
    rows, width, num_shards = 4096, 2048, 8
    whole, mean = torch.empty(rows, width), compute_random_v0_mean((rows, width), 100.0)

    def draw(first: int, count: int) -> None:
        draw_standard_normal_(
            whole[first : first + count],
            name="w",
            seed=0,
            full_shape=(rows, width),
            offset=(first, 0),
            transform=lambda z: z.square_().mul_(mean),
        )

    def draw_shards() -> None:
        for first in range(0, rows, rows // num_shards):
            draw(first, rows // num_shards)

    return Row(
        "shards of a random v0",
        f"drawing the {num_shards} shards of a tensor, one after another",
        "drawing the whole",
        measure_pairs(draw_shards, lambda: draw(0, rows), conditions.choose(9, 25)),
        aim=1.1,
        note=f"a process of {num_shards} takes 1/{num_shards} of it",
    )


def measure_reduction(conditions: Conditions) -> Row:
    """The reduction of the pass's sums over two gloo processes, beside one all-reduce of as many bytes."""
    path = Path(conditions.work_dir) / "reduction.json"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(NUM_PROCESSES)]
    command += ["-m", "benchmarks.reduction", str(path), str(conditions.choose(8, 20))]
    scripts = Path(__file__).resolve().parents[1]  # where the package `benchmarks` lies
    done = subprocess.run(command, capture_output=True, text=True, timeout=TIME_LIMIT, cwd=scripts)
    if done.returncode != 0:
        raise RuntimeError(
            f"the processes of the reduction ended with status {done.returncode}:\n{done.stderr[-2000:]}"
        )
    measured = json.loads(path.read_text(encoding="utf-8"))
    return Row(
        "reduction",
        f"reduction of the statistics, {measured['bytes'] / 2**20:.0f} MiB, {NUM_PROCESSES} processes",
        "one all-reduce of as many bytes",
        measured["ratios"],
        aim=1.1,
        clock=WALL,
        note="gloo; once per run; GPT-2, 2 layers of 1,024; medians of a few pairs vary from 1.00 to 1.14. The figure is for 6"
        " layers of 512, with twice as many tensors for half the bytes: what is above 1 is the fixed cost of an all-"
        "reduce a tensor. Joining them in one buffer was slower still, 1.6 and 2.1, and needs its memory",
        figures={"ratio_at_6_layers_of_512": statistics.median(measured["narrow"])},
    )
