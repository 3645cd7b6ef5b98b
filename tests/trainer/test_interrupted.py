"""Runs that are killed, interrupted or resumed elsewhere end as the run that was left alone."""

import json
import os
import random
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
from kill.client import choose_kill, read_lives, run
from processes import launch

from hf_v0init.records.checkpoints import find_defect, find_newest_valid, list_checkpoints

PHASES = ["pass", "train", "save", "evaluate", "end"]  # the end: after the last save


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    return run(tmp_path_factory.mktemp("straight"))


def find_differences(a: dict, b: dict) -> list[str]:
    """Name what is not bit for bit the same in two runs' weights, optimizer, schedule and logged losses."""
    different = [name for name, weight in a["weights"].items() if not torch.equal(weight, b["weights"][name])]
    states = [run["optimizer"]["state"] for run in (a, b)]
    if states[0].keys() != states[1].keys():
        different.append("parameters in the optimizer")
    for index, state in states[0].items():
        different += [
            f"{key} of {index}" for key, value in state.items() if not torch.equal(value, states[1][index][key])
        ]
    different += [key for key in ("scheduler",) if a[key] != b[key]]
    for key in ("loss", "eval_loss", "grad_norm", "learning_rate"):
        logged = [{entry["step"]: entry[key] for entry in run["history"] if key in entry} for run in (a, b)]
        if logged[0] != logged[1]:
            different.append(key)
    if a["report"] is not None and a["report"]["parameters"] != b["report"]["parameters"]:
        different.append("record of v0")
    return different


def count_passes_that_lasted(folder: Path) -> int:
    """The v0 passes whose process left a valid checkpoint; every process that found one must have done none."""
    lives = read_lives(folder)
    for life in lives:
        assert not (life["valid"] and life["passes"]), lives
        if life["resumed_from"] != "not yet known":  # killed before that
            assert life["resumed_from"] == (life["valid"] or [None])[0], lives
    later = [life["valid"] for life in lives[1:]] + [["the end"]]
    return sum(life["passes"] for life, valid in zip(lives, later, strict=True) if valid)


def kill_and_resume(folder: Path, kills: list[dict], may_fail: bool = False, **request) -> tuple[dict, list[str]]:
    """Kill a run so often, then let it come to its end; its answer and the phases it was killed in."""
    died_in = []
    for kill in kills:
        answer = run(folder, kill=kill, may_fail=may_fail, **request)
        if answer["status"] == 0:
            return answer, died_in
        died_in.append(answer["events"][-1][1] if answer["events"] else "before")
    return run(folder, may_fail=may_fail, **request), died_in


def test_a_run_killed_in_the_pass_a_save_and_an_evaluation_ends_the_same(straight, tmp_path):
    generator = random.Random(1)
    kills = [choose_kill(straight["events"], phase, generator) for phase in ("pass", "save", "evaluate")]
    kills[1]["occurrence"], kills[2]["occurrence"] = 3, 1
    answer, died_in = kill_and_resume(tmp_path, kills)
    assert died_in[0] == "pass" and len(died_in) == 3
    assert find_differences(straight["result"], answer["result"]) == []
    assert count_passes_that_lasted(tmp_path) == 1


@pytest.mark.slow
def test_ten_runs_killed_at_random_moments_end_the_same(straight, tmp_path):
    """Two first kills in every phase, some runs killed again and again; with and without rotation."""
    generator, died = random.Random(20), Counter()
    for number in range(10):
        kills = [choose_kill(straight["events"], PHASES[number % 5], generator)]
        while generator.random() < 0.4:
            kills.append(choose_kill(straight["events"], generator.choice(PHASES[1:4]), generator) | {"occurrence": 2})
        limit, folder = [None, 1, 2][number % 3], tmp_path / str(number)
        answer, died_in = kill_and_resume(folder, kills, options={"save_total_limit": limit})
        died.update(died_in)
        assert find_differences(straight["result"], answer["result"]) == [], (number, died_in)
        assert count_passes_that_lasted(folder) == 1, (number, died_in)
        kept = [path for path in list_checkpoints(folder / "out") if find_defect(path) is None]
        assert limit is None or len(list_checkpoints(folder / "out")) <= limit
        assert os.path.basename(kept[0]) == "checkpoint-6"
    assert all(died[phase] for phase in PHASES[:4]), died


# ---- every write of a save -------------------------------------------------------------------------------------------


def count_writes(folder: Path, **request) -> int:
    """How many writes, opens and renames the second save of a run has."""
    answer = run(folder, kill_at={"save": 2, "operation": 0}, **request)
    return sum(phase == "write" for _, phase in answer["events"])


SHORT = {"max_steps": 3, "eval_strategy": "no"}


def check_kill_at(folder: Path, operation: int, straight: dict) -> str:
    answer = run(folder, kill_at={"save": 2, "operation": operation}, options=SHORT)
    assert answer["status"] == -signal.SIGKILL
    out = folder / "out"
    newest, skipped = find_newest_valid(list_checkpoints(out))
    state = "valid" if os.path.basename(newest) == "checkpoint-2" else "broken"
    if state == "broken":
        assert os.path.basename(newest) == "checkpoint-1"
        missing = "trainer_state.json, which is written last, is missing"
        assert find_defect(out / "checkpoint-2") in ("its save was cut off", missing if operation == 1 else None)
    answer = run(folder, options=SHORT)
    assert ("skipped checkpoints" in answer["log"]) == bool(skipped)
    assert find_differences(straight["result"], answer["result"]) == []
    return state


def test_a_save_cut_off_at_some_of_its_writes(tmp_path):
    straight = run(tmp_path / "straight", options=SHORT)
    for operation in (1, 3, 6):
        assert check_kill_at(tmp_path / str(operation), operation, straight) == "broken"


@pytest.mark.slow
def test_a_save_cut_off_at_every_one_of_its_writes(tmp_path):
    """Files are cut in half, opens and renames do not happen: valid only when the mark is gone."""
    straight = run(tmp_path / "straight", options=SHORT)
    last = count_writes(tmp_path / "count", options=SHORT)
    states = [check_kill_at(tmp_path / str(k), k, straight) for k in range(1, last + 1)]
    assert states == ["broken"] * last and last > 10


@pytest.mark.slow
def test_a_save_cut_off_over_an_older_valid_checkpoint_is_not_taken_for_valid(tmp_path):
    """Resumed by hand from step 1, the run saves step 2 over an older one; a mixture of the two must not pass."""
    straight = run(tmp_path / "straight", options=SHORT)
    last = count_writes(tmp_path / "count", options=SHORT)
    for operation in range(1, last + 1):
        folder = tmp_path / str(operation)
        run(folder, options=SHORT)
        first = str(folder / "out" / "checkpoint-1")
        kill_at = {"save": 1, "operation": operation}
        run(folder, options=SHORT, resume=first, kill_at=kill_at)
        defect = find_defect(folder / "out" / "checkpoint-2")
        # before the first mark is in place nothing was touched
        assert defect == (None if operation == 1 else "its save was cut off")
        answer = run(folder, options=SHORT, resume=first)
        assert find_differences(straight["result"], answer["result"]) == []


@pytest.mark.slow
def test_the_stock_trainers_broken_checkpoints_lack_its_last_file(tmp_path):
    last = count_writes(tmp_path / "count", stock=True, options=SHORT)
    assert last > 5
    for operation in range(1, last + 1):
        out = tmp_path / str(operation) / "out"
        run(out.parent, stock=True, options=SHORT, kill_at={"save": 2, "operation": operation})
        assert find_defect(out / "checkpoint-2") is not None
        assert find_newest_valid(list_checkpoints(out))[0] == str(out / "checkpoint-1")


# ---- Ctrl-C ----------------------------------------------------------------------------------------------------------


def check_interrupt(folder: Path, kill: dict, straight: dict) -> bool:
    """True if the interrupt met the pass."""
    answer = run(folder, task="interrupt", kill=kill | {"signal": signal.SIGINT})
    left = answer["result"]["left"]
    if left is None or left["step"] > 0 or left["report"] is not None:  # it came after the pass
        return False
    assert left == {
        "step": 0, "untouched": True, "report": None, "weights": True, "gradients": 0, "hooks": 0, "rng": True, "modes": True,
        "files": [],
    }  # fmt: skip
    assert find_differences(straight["result"], answer["result"]) == []
    return True


@pytest.mark.parametrize("seed", [0, 1])
def test_ctrl_c_in_the_pass_leaves_nothing_and_the_trainer_usable(straight, tmp_path, seed):
    kill = choose_kill(straight["events"], "pass", random.Random(seed)) | {"occurrence": 2 + 3 * seed}
    assert check_interrupt(tmp_path, kill, straight)


@pytest.mark.slow
def test_ctrl_c_at_a_hundred_moments_of_the_pass(straight, tmp_path):
    generator = random.Random(5)
    kills = [choose_kill(straight["events"], "pass", generator) for _ in range(100)]
    met = [check_interrupt(tmp_path / str(number), kill, straight) for number, kill in enumerate(kills)]
    assert sum(met) >= 75


# ---- several processes -----------------------------------------------------------------------------------------------


def start(num_processes: int, folder: Path, may_fail: bool = False, **request) -> tuple[int, list[dict], str]:
    """Do a task of `kill/runs.py` on so many processes; (status, what each left, stderr)."""
    folder.mkdir(parents=True, exist_ok=True)
    for result in folder.glob("result*"):
        result.unlink()
    path = folder / "request.json"
    path.write_text(json.dumps({"task": "train", "folder": str(folder)} | request))
    done = launch("kill/runs.py", num_processes, path, may_fail=may_fail)
    results = [folder / f"result.rank{rank}.pt" for rank in range(num_processes)]
    return done.returncode, [torch.load(r, weights_only=False) for r in results if r.exists()], done.stderr


TWO = {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 4, "max_steps": 5}


@pytest.fixture(scope="module")
def straight_on_two(tmp_path_factory):
    return start(2, tmp_path_factory.mktemp("two"), options=TWO)[1]


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "phase"), [(1, "train"), (0, "save"), (1, "save")])
def test_one_of_two_processes_killed_ends_both_and_the_run_resumes(straight_on_two, tmp_path, rank, phase):
    dies = {"rank": rank, "phase": phase, "occurrence": 3}
    status, results, _ = start(2, tmp_path / "killed", may_fail=True, options=TWO, dies=dies)
    assert status != 0 and results == []
    _, results, _ = start(2, tmp_path / "killed", options=TWO)
    for before, after in zip(straight_on_two, results, strict=True):
        assert find_differences(before, after) == []
    assert count_passes_that_lasted(tmp_path / "killed") == 1


@pytest.mark.slow
def test_processes_agree_on_the_newest_valid_checkpoint_and_on_refusals(tmp_path):
    start(2, tmp_path, options=TWO)
    (tmp_path / "out" / "checkpoint-5" / "trainer_state.json").write_text("{")
    _, results, said = start(2, tmp_path, options=TWO)
    assert len(results) == 2
    for name in ("lives.jsonl", "lives.rank1.jsonl"):
        assert [life["resumed_from"] for life in read_lives(tmp_path, name)] == [None, "checkpoint-4"]
    assert said.count("checkpoint-5 (trainer_state.json is damaged") == 1  # one process speaks
    named = str(tmp_path / "out" / "checkpoint-4")
    (tmp_path / "out" / "checkpoint-4" / "trainer_state.json").write_text("{")
    status, results, said = start(2, tmp_path, may_fail=True, options=TWO, resume=named)
    assert status != 0 and results == [] and "trainer_state.json is damaged" in said


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_run_resumes_on_another_number_of_processes(tmp_path, before, after):
    """Same samples per step, no dropout: the resumed run is the straight one but for the order of additions.

    Steps are 0.01 wide; the loosest weights are the keys' biases, whose gradient is nothing but rounding.
    """

    def options(num_processes: int, steps: int) -> dict:
        return TWO | {
            "per_device_train_batch_size": 4 // num_processes,
            "max_steps": steps,
            "lr_scheduler_type": "constant",
        }

    _, straight, _ = start(1, tmp_path / "straight", dropout=0.0, options=options(1, 5))
    start(before, tmp_path / "moved", dropout=0.0, options=options(before, 2))
    _, moved, _ = start(after, tmp_path / "moved", dropout=0.0, options=options(after, 5))
    assert [life["passes"] for life in read_lives(tmp_path / "moved")] == [1, 0]
    assert moved[0]["report"]["num_processes"] == before
    for result in moved:
        for name, weight in straight[0]["weights"].items():
            torch.testing.assert_close(result["weights"][name], weight, rtol=1e-4, atol=1e-5)
        for index, state in straight[0]["optimizer"]["state"].items():
            theirs = result["optimizer"]["state"][index]
            assert state["step"] == theirs["step"] == 5
            v = state["exp_avg_sq"]
            torch.testing.assert_close(theirs["exp_avg_sq"], v, rtol=1e-4, atol=1e-6 * v.max().item())
