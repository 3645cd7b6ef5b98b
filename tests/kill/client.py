"""What a test needs to train in children that are killed: starts `server.py`, asks it for runs, keeps their records."""

import itertools
import json
import signal
import subprocess
import sys
from pathlib import Path

import torch
from processes import make_environment

SERVER = Path(__file__).with_name("server.py")


class KillServer:
    """One server process; `run` trains in a fresh child of it."""

    def __enter__(self):
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=make_environment(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false"),
        )
        return self

    def __exit__(self, *_):
        self.process.stdin.close()
        self.process.wait(timeout=30)

    def run(
        self, folder: Path, task: str = "train", kill: dict | None = None, may_fail: bool = False, **request
    ) -> dict:
        """Do a task of `runs.py` in `folder`; the answer has status, events, log and, where it came to its end, the result.

        `kill` = {"phase", "occurrence", "delay"}: SIGKILL (or "signal") so many seconds after the phase began for the
        so-manieth time.
        """
        folder.mkdir(parents=True, exist_ok=True)
        result = folder / "result.pt"
        result.unlink(missing_ok=True)
        request |= {"task": task, "folder": str(folder), "log": str(folder / "log.txt"), "kill": kill}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        assert line, "the server has ended"
        answer = json.loads(line)
        answer["log"] = (folder / "log.txt").read_text()
        assert answer["in_time"], f"stopped after its time limit; where it stood:\n{answer['log']}"
        if answer["status"] != -signal.SIGKILL:
            assert answer["status"] == 0 or may_fail, answer["log"]
        if answer["status"] == 0:
            answer["result"] = torch.load(result, weights_only=False)
        return answer


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
