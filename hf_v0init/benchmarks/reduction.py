"""Started on several processes by `rows_draw.measure_reduction`: times the reduction of the statistics, writes a JSON file.

torchrun --nproc_per_node 2 -m hf_v0init.benchmarks.reduction FILE.json NUM_PAIRS
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

from ..gradient_statistics import PassCounts, reduce_sums
from .measuring import measure_pairs, use_one_thread
from .tasks import make_gpt2


def main(path: str, num_pairs: str) -> None:
    """Measure, and write the ratios on the main process."""
    use_one_thread()
    dist.init_process_group("gloo")
    sums = [
        torch.zeros_like(p) for p in make_gpt2(2, 1024, vocabulary=20_000).parameters() if p.dim() > 1 for _ in range(2)
    ]
    flat = torch.zeros(sum(tensor.numel() for tensor in sums))

    def reduce() -> float:
        return _time_together(lambda: reduce_sums(sums, PassCounts(1, 1)))

    def reduce_flat() -> float:
        return _time_together(lambda: dist.all_reduce(flat))

    ratios = measure_pairs(reduce, reduce_flat, int(num_pairs))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"ratios": ratios, "bytes": flat.numel() * 4}), encoding="utf-8")
    dist.destroy_process_group()


def _time_together(function) -> float:
    """Seconds from when all processes are there to when all are done."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(*sys.argv[1:])
