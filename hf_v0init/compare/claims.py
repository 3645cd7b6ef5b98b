"""Who is at work in the folder of a comparison: workers on one or more machines share it, and each run is trained by one of them.

`.locks/` holds a lock for the plan, taken for the moment in which it is written, and one for each run in progress. They are leases
of the package filelock: files that their holder refreshes. A holder that was killed on this machine is noticed at once, one on
another machine when its file has not been refreshed for `LEASE_SECONDS` (by the clock of whoever looks). So any file system will
do that all machines see.
"""

from __future__ import annotations

import contextlib
import platform
from pathlib import Path

from filelock import SoftFileLease, Timeout

from ..errors import InputError
from .files import LOCKS_FOLDER

LEASE_SECONDS = 60.0
PLAN_SECONDS = 600.0  # how long to wait for a worker that is writing the plan or the report


def _make_lease(folder: Path, name: str) -> SoftFileLease:
    return SoftFileLease(folder / LOCKS_FOLDER / f"{name}.lock", lease_duration=LEASE_SECONDS, thread_local=False)


def lock_plan(folder: Path) -> contextlib.AbstractContextManager:
    """Hold what all workers share, the plan and the report, while they are written; the folder is made if need be.

    Raises:
        InputError: it cannot be written, or another worker holds it and goes on doing so.
    """
    lease = _make_lease(folder, "plan")
    try:
        Path(lease.lock_file).parent.mkdir(parents=True, exist_ok=True)
        return lease.acquire(timeout=PLAN_SECONDS)
    except Timeout:
        raise InputError(
            f"output_dir={folder}: {_describe_holder(lease)} has been writing plan or report for {PLAN_SECONDS:g} s; try again"
        ) from None
    except OSError as error:
        raise InputError(
            f"output_dir={folder} cannot be written ({error.strerror}); give another --output_dir"
        ) from error


def _describe_holder(lease: SoftFileLease) -> str:
    owner = lease.owner
    if owner is None:
        return "another worker"
    return f"process {owner.pid}" + ("" if owner.hostname == platform.node() else f" on {owner.hostname}")


class RunClaims:
    """The runs that this worker has claimed. A claim is by the run's digest, so it outlives a change of its name."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        # They are kept, since a lease remembers since when another's has been silent.
        self._leases: dict[str, SoftFileLease] = {}

    def acquire(self, digest: str) -> bool:
        """Claim a run; False if another worker has it."""
        lease = self._leases.setdefault(digest, _make_lease(self._folder, f"run_{digest}"))
        with contextlib.suppress(Timeout):
            lease.acquire(blocking=False)
        return lease.is_locked

    def release(self, digest: str) -> None:
        """Give a run free."""
        self._leases[digest].release()

    def is_lost(self, digest: str) -> bool:
        """Whether another worker has taken a run over because this one was silent for too long, as a suspended process is."""
        return self._leases[digest].compromise is not None

    def describe_holder(self, digest: str) -> str:
        """Say in words which worker has a run."""
        return _describe_holder(self._leases[digest])
