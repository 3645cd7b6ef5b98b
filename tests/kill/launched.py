"""Started by `processes.launch`: one task of `runs.py` on several processes, of which one may kill itself.

In the request, `dies` = {"rank", "phase", "occurrence"}.

Arguments: REQUEST.json
"""

import json
import os
import signal
import sys
from pathlib import Path

import torch
from processes import leave
from runs import TASKS


def main(path: str) -> None:
    request = json.loads(Path(path).read_text())
    rank = int(os.environ.get("RANK", "0"))
    request["result"] = f"result.rank{rank}.pt"
    if rank != 0:
        request["lives"] = f"lives.rank{rank}.jsonl"
    seen = []

    def report(phase: str) -> None:
        seen.append(phase)
        dies = request.get("dies")
        if dies and dies["rank"] == rank and dies["phase"] == phase and seen.count(phase) == dies["occurrence"]:
            os.kill(os.getpid(), signal.SIGKILL)

    TASKS[request["task"]](request, report)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1])
    leave()
