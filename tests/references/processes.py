"""Programs that the tests start, on one process or on several, and how those on several end."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(*command, **environment) -> subprocess.CompletedProcess:
    """Start python with these words; more than `os.environ` as given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def leave() -> None:
    """End this process once all have come here. Everything must be saved.

    torch's own teardown of several process groups, meshes and engines in one process aborts now and then
    ("terminate called without an active exception"), which is not what the tests are about.
    """
    if dist.is_initialized():
        dist.barrier()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
