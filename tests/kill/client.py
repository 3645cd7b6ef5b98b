"""What a test needs to train in children that are killed: forks of a process that has imported everything, which saves seconds a run.

That process must never run a backward pass itself, because autograd does not work in children of a process that has.
"""

import itertools
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from unittest import mock

import torch
from kill.runs import run_child
from processes import make_environment

TIME_LIMIT = 120.0  # seconds a child may take; a deadlock is a failure, not a wait
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["kill.preloaded"])


def run(folder: Path, task: str = "train", kill: dict | None = None, may_fail: bool = False, **request) -> dict:
    """Do a task of `runs.py` in `folder`; the answer has status, events, log and, where it came to its end, the result.

    `kill` = {"phase", "occurrence", "delay"}: SIGKILL (or "signal") so many seconds after the phase began for the
    so-manieth time.
    """
    folder.mkdir(parents=True, exist_ok=True)
    result, log = folder / "result.pt", folder / "log.txt"
    result.unlink(missing_ok=True)
    receiver, sender = CONTEXT.Pipe(duplex=False)
    request |= {"task": task, "folder": str(folder), "log": str(log), "time_limit": TIME_LIMIT}
    child = CONTEXT.Process(target=run_child, args=(request, sender))
    with mock.patch.dict(os.environ, make_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")):
        child.start()
    sender.close()
    events = watch(child, receiver, kill)
    child.join()
    answer = {"status": child.exitcode, "events": events, "log": log.read_text()}
    if answer["status"] != -signal.SIGKILL:
        assert answer["status"] == 0 or may_fail, answer["log"]
    if answer["status"] == 0:
        answer["result"] = torch.load(result, weights_only=False)
    return answer


def watch(child, receiver, kill: dict | None) -> list[tuple[float, str]]:
    """Note when a child began its phases, until it ends, and send the signal at the moment asked for."""
    start, events, seen, due = time.monotonic(), [], 0, None
    while True:
        now = time.monotonic()
        if due is not None and now >= due:
            os.kill(child.pid, kill.get("signal", signal.SIGKILL))
            due = None
        if now - start > TIME_LIMIT:
            child.kill()
            raise AssertionError("stopped after its time limit; its log has where it stood")
        if not receiver.poll(0.5 if due is None else max(0.0, due - now)):
            continue
        try:
            phase = receiver.recv()
        except (EOFError, OSError):  # it has ended, maybe in the middle of a word
            return events
        events.append((time.monotonic() - start, phase))
        if kill is not None and phase == kill["phase"]:
            seen += 1
            if seen == kill["occurrence"]:
                due = time.monotonic() + kill["delay"]


def read_lives(folder: Path, name: str = "lives.jsonl") -> list[dict]:
    """What every process of a run did: {"valid": checkpoints when it began, "resumed_from", "passes"}, in order."""
    lives = {}
    for line in (folder / name).read_text().splitlines():
        life = json.loads(line)
        lives[life["process"]] = life  # a later line of a process holds all of an earlier one
    return list(lives.values())


def choose_kill(events: list, phase: str, generator) -> dict:
    """Choose a moment within one random occurrence of `phase`, by the times of a run that was not killed.

    The phase `end` begins when the last save has ended.
    """
    if phase == "end":
        (start, phase), (end, _) = events[-2:]
        last = sum(name == phase for _, name in events)
        return {"phase": phase, "occurrence": last, "delay": generator.uniform(0.0, end - start)}
    spans = [after - now for (now, name), (after, _) in itertools.pairwise(events) if name == phase]
    occurrence = generator.randrange(len(spans))
    return {"phase": phase, "occurrence": occurrence + 1, "delay": generator.uniform(0.0, spans[occurrence])}
