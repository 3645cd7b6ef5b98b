"""Started on several processes by `rows_draw.measure_reduction`: times the reduction of the statistics, writes a JSON file.

torchrun --nproc_per_node 2 -m benchmarks.reduction FILE.json NUM_PAIRS
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from benchmarks.measuring import measure_pairs, use_one_thread
from benchmarks.tasks import make_gpt2
from hf_v0init.sharding.processes import add_over_processes


def main(path: str, num_pairs: str) -> None:
    """Measure, and write the ratios on the main process."""
    use_one_thread()
    dist.init_process_group("gloo")
    wide, num_bytes = _measure(make_gpt2(2, 1024, vocabulary=20_000), int(num_pairs))
    narrow, _ = _measure(make_gpt2(6, 512), int(num_pairs))
    if dist.get_rank() == 0:
        Path(path).write_text(json.dumps({"ratios": wide, "narrow": narrow, "bytes": num_bytes}), encoding="utf-8")
    dist.destroy_process_group()


def _measure(model: nn.Module, num_pairs: int) -> tuple[list[float], int]:
    """Ratios of the reduction of the model's sums to one all-reduce, and the bytes of either."""
    sums = [torch.zeros_like(p) for p in model.parameters() if p.dim() > 1 for _ in range(2)]
    flat = torch.zeros(sum(tensor.numel() for tensor in sums))

    def reduce() -> float:
        return _time_together(lambda: add_over_processes(sums))

    def reduce_flat() -> float:
        return _time_together(lambda: dist.all_reduce(flat))

    return measure_pairs(reduce, reduce_flat, num_pairs), flat.numel() * 4


def _time_together(function) -> float:
    """Seconds from when all processes are there to when all are done."""
    dist.barrier()
    begin = time.perf_counter()
    function()
    dist.barrier()
    return time.perf_counter() - begin


if __name__ == "__main__":
    main(*sys.argv[1:])
