"""Programs that the tests start, on one process or on several, and how those on several end."""

import os
import subprocess
import sys
from pathlib import Path

import torch.distributed as dist

ROOT = Path(__file__).resolve().parents[2]
TESTS = ROOT / "tests"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")


def start(*command, **environment) -> subprocess.CompletedProcess:
    """Start python with these words; more than `os.environ` as given."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *map(str, command)], env=environment, capture_output=True, text=True)


def make_environment(**more: str) -> dict[str, str]:
    """One thread per process, and the tests' own modules on the path."""
    path = [str(TESTS), str(TESTS / "references"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(path)} | more


def launch(
    script: str, num_processes: int, *arguments, time_limit: float = 300.0, may_fail: bool = False, **environment: str
) -> subprocess.CompletedProcess:
    """Run a script below `tests` on so many processes; a deadlock is a failure after `time_limit` seconds."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(num_processes)]
    done = subprocess.run(
        [sys.executable, *(torchrun if num_processes > 1 else []), str(TESTS / script), *map(str, arguments)],
        env=make_environment(**environment),
        capture_output=True,
        text=True,
        timeout=time_limit,
    )
    assert may_fail or done.returncode == 0, done.stderr[-4000:]
    return done


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
