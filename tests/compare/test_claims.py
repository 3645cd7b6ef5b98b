"""Claims on runs: held by one call at a time, on this machine or another, and free when their holder is gone."""

import contextlib
import platform
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_fakes import Comparison, behave, move_to_another_machine, wait_until
from filelock import SoftFileLease, Timeout

from hf_v0init.compare import executor as executor_module
from hf_v0init.compare.executor import describe_holder, lock_plan, make_lease
from hf_v0init.compare.files import LOCKS_FOLDER

HOLDER = """
import sys, time
from pathlib import Path
from hf_v0init.compare.executor import make_lease
lease = make_lease(Path(sys.argv[1]), "run_abc")
lease.acquire(blocking=False)
print(lease.is_locked, flush=True)
time.sleep(60)
"""


@pytest.fixture
def folder(tmp_path):
    with lock_plan(tmp_path):
        pass
    return tmp_path


@pytest.fixture
def comparison(tmp_path):
    return Comparison(tmp_path)


def claim(lease) -> bool:
    with contextlib.suppress(Timeout):
        lease.acquire(blocking=False)
    return lease.is_locked


def test_a_claim_is_one_call_s_until_it_ends(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    lease = make_lease(folder, "run_abc")
    assert not claim(lease) and claim(make_lease(folder, "run_other"))
    assert describe_holder(lease) == f"process {holder.pid}"
    holder.kill()  # without a chance to give it free
    holder.wait()
    assert claim(lease)
    assert not claim(make_lease(folder, "run_abc"))
    lease.release()
    assert claim(make_lease(folder, "run_abc"))


def test_a_claim_of_another_machine_expires_when_it_is_silent(folder, monkeypatch):
    monkeypatch.setattr(executor_module, "LEASE_SECONDS", 0.6)
    gone, lease = make_lease(folder, "run_abc"), make_lease(folder, "run_abc")
    assert claim(gone)
    file = folder / LOCKS_FOLDER / "run_abc.lock"
    move_to_another_machine(file)
    assert not claim(lease) and describe_holder(lease) == "process 1 on node7"
    wait_until(lambda: claim(lease), 10)
    assert f"host={platform.node()}" in file.read_text()
    wait_until(lambda: gone.compromise, 10)  # had it only been suspended, it would learn of it
    assert not lease.compromise


def test_a_run_that_another_call_has_taken_over_is_left_to_it(comparison, tmp_path, monkeypatch):
    """As after a laptop's sleep: this call's process is ended, and the folder, now the other's, is not touched."""
    monkeypatch.setattr(executor_module, "LEASE_SECONDS", 0.6)
    comparison.write(behave("hang_once", "good"))

    class Stolen(SoftFileLease):
        @property
        def compromise(self):
            if list(tmp_path.glob("journal.ready.*")) and "node7" not in Path(self.lock_file).read_text():
                move_to_another_machine(Path(self.lock_file))
            return super().compromise

    monkeypatch.setattr(executor_module, "SoftFileLease", Stolen)
    told = comparison.run()
    assert any("was taken over by another worker" in warning for warning in told.warnings)
    assert comparison.read_states()["behaviour=hang_once 42"] == "running"  # as the other call has it
