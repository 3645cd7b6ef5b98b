"""Claims on runs: held by one call at a time, on this machine or another, and free when their holder is gone."""

import platform
import subprocess
import sys

import pytest
from comparison_fakes import Comparison, behave, move_to_another_machine, wait_until

from hf_v0init.compare import claims as claims_module, executor as executor_module
from hf_v0init.compare.claims import RunClaims, lock_plan
from hf_v0init.compare.files import LOCKS_FOLDER

HOLDER = """
import sys, time
from pathlib import Path
from hf_v0init.compare.claims import RunClaims
claims = RunClaims(Path(sys.argv[1]))
print(claims.acquire("abc"), flush=True)
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


def test_a_claim_is_one_call_s_until_it_ends(folder):
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "True\n"
    claims = RunClaims(folder)
    assert not claims.acquire("abc") and claims.acquire("other")
    assert claims.describe_holder("abc") == f"process {holder.pid}"
    holder.kill()  # without a chance to give it free
    holder.wait()
    assert claims.acquire("abc")
    assert not RunClaims(folder).acquire("abc")
    claims.release("abc")
    assert RunClaims(folder).acquire("abc")


def test_a_claim_of_another_machine_expires_when_it_is_silent(folder, monkeypatch):
    monkeypatch.setattr(claims_module, "LEASE_SECONDS", 0.6)
    gone = RunClaims(folder)
    assert gone.acquire("abc")
    file = folder / LOCKS_FOLDER / "run_abc.lock"
    move_to_another_machine(file)
    claims = RunClaims(folder)
    assert not claims.acquire("abc") and claims.describe_holder("abc") == "process 1 on node7"
    wait_until(lambda: claims.acquire("abc"), 10)
    assert f"host={platform.node()}" in file.read_text()
    wait_until(lambda: gone.is_lost("abc"), 10)  # had it only been suspended, it would learn of it
    assert not claims.is_lost("abc")


def test_a_run_that_another_call_has_taken_over_is_left_to_it(comparison, tmp_path, monkeypatch):
    """As after a laptop's sleep: this call's process is ended, and the folder, now the other's, is not touched."""
    monkeypatch.setattr(claims_module, "LEASE_SECONDS", 0.6)
    comparison.write(behave("hang_once", "good"))

    class Thief(claims_module.RunClaims):
        def is_lost(self, digest):
            if list(tmp_path.glob("journal.ready.*")):
                (file,) = (tmp_path / "out" / LOCKS_FOLDER).glob(f"run_{digest}.lock")
                if "node7" not in file.read_text():
                    move_to_another_machine(file)
            return super().is_lost(digest)

    monkeypatch.setattr(executor_module, "RunClaims", Thief)
    told = comparison.run()
    assert any("was taken over by another worker" in warning for warning in told.warnings)
    assert comparison.read_states()["behaviour=hang_once 42"] == "running"  # as the other call has it
