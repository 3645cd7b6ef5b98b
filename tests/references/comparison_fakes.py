"""Comparisons of fake runs: a script of a few lines that leaves what a training script leaves, and says when it was called."""

import json
import os
import platform
import sys
import time
from pathlib import Path
from unittest import mock

import yaml

from hf_v0init.compare.comparison_file import read_plan
from hf_v0init.compare.executor import LocalExecutor
from hf_v0init.compare.session import require_usable_folder, train_stages

# Behaves as a training script does, at once: `--losses a,b,...` are the validation losses at steps 0, 10, 20, ...
FAKE_SCRIPT = """
import json, os, signal, subprocess, sys, time

flags = dict(word.lstrip("-").split("=", 1) for word in sys.argv[1:])
output, behaviour = flags["output_dir"], flags.get("behaviour", "")
if "stubborn" in flags:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    worker = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], start_new_session=True)
    open(flags["journal"] + ".worker", "w").write(str(worker.pid))
with open(flags["journal"], "a") as journal:
    journal.write(json.dumps({"v0": flags["v0_init"], "warmup": flags["warmup_steps"], "rate": float(flags["learning_rate"]),
        "secret": flags.get("hub_token"), "seed": flags["seed"],
        "behaviour": behaviour, "time": time.time(), "pid": os.getpid(), "folder": os.path.exists(output),
        "checkpoint": flags.get("resume_from_checkpoint"),
        "env": {k: os.environ.get(k) for k in ("OMP_NUM_THREADS", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES")}}) + "\\n")
if behaviour == "refuse":
    sys.exit(print("error: --behaviour=refuse: choose another", file=sys.stderr) or 2)
if behaviour == "no_start":
    raise ValueError("Some specified arguments are not used by the HfArgumentParser: ['--widht=16']")
resumed_at = int(flags["resume_from_checkpoint"].rsplit("-", 1)[1]) if "resume_from_checkpoint" in flags else 0
os.makedirs(output, exist_ok="resume_from_checkpoint" in flags)
begun = {"initial_weights": "w" + flags["seed"], "batches": ["b1", "b2", "b3", "b4"], "rng": "r"}
if not resumed_at:
    json.dump(begun, open(output + "/fingerprint.json", "w"))
if flags["v0_init"] != "zeros":
    json.dump({"strategy": flags["v0_init"], "num_samples": 0, "seconds": 0.0}, open(output + "/v0_init.json", "w"))
words = flags.get("losses", "6,4,3").split(",")  # `wait` among them: nothing more happens until somebody stops it
losses = [float(loss) for loss in words if loss != "wait"]
log_file = output + "/run_log.jsonl"
kept = [line for line in open(log_file) if json.loads(line)["step"] <= resumed_at] if resumed_at else []
with open(log_file, "w") as log:
    log.writelines(kept)
    for number, loss in enumerate(losses):
        if resumed_at and 10 * number <= resumed_at:
            continue
        entry = {"eval_loss": loss, "step": 10 * number, "epoch": 0.5 * number}
        if behaviour == "no_metric":
            entry["loss"] = entry.pop("eval_loss")
        if behaviour == "nan" and number == 1:
            entry = {"loss": float("nan"), "step": 10, "epoch": 0.5}
        if behaviour == "no_eval_on_start" and number == 0:
            entry = {"loss": 5.0, "step": 1, "epoch": 0.05}
        log.write(json.dumps(entry) + "\\n")
        log.flush()
        if words[number + 1 : number + 2] == ["wait"]:
            time.sleep(60)
        time.sleep(float(flags.get("pause", 0)))
if behaviour == "hang_once" and not os.path.exists(flags["journal"] + ".once"):
    open(flags["journal"] + ".once", "w").close()
    open(flags["journal"] + ".ready." + str(os.getpid()), "w").close()
    time.sleep(60)
if behaviour == "fail":
    raise RuntimeError("the data are gone")
if behaviour == "killed":
    os.kill(os.getpid(), 9)
if behaviour == "save":
    os.makedirs(output + "/checkpoint-10")
    for name in ("model.safetensors", "checkpoint-10/optimizer.pt", "tokenizer.json", "config.json", "v0_init.json"):
        open(output + "/" + name, "w").write(" " * 2**21 if name == "model.safetensors" else "{}")
results = {"eval_loss": losses[-1], "predict_bleu": 1.0}
if behaviour != "plain_evaluate":
    json.dump({} if behaviour == "no_metric" else results, open(output + "/all_results.json", "w"))
print("done")
"""


class Recorder:
    """A `Progress` that keeps what it was told."""

    def __init__(self):
        self.ends, self.warnings, self.told, self.most_active = [], [], [], 0

    def begin_stage(self, plan, runs):
        pass

    def update(self, active, num_waiting):
        self.most_active = max(self.most_active, len(active))

    def report_end(self, run, state, reason, trace, seconds):
        if trace is not None:  # trained by this worker
            self.ends.append((run.setting, run.seed, state, reason))

    def tell(self, message):
        self.told.append(message)

    def warn(self, message):
        self.warnings.append(message)


class Comparison:
    """A comparison of fake runs in a temporary folder."""

    def __init__(self, root: Path):
        self.root, self.folder, self.config = root, root / "out", root / "grid.yaml"
        (root / "fake.py").write_text(FAKE_SCRIPT)

    def write(self, grids, arguments=None, **further):
        arguments = {"journal": str(self.root / "journal"), **(arguments or {})}
        content = {
            "title": "Fake",
            "script": "fake.py",
            "arguments": arguments,
            "grids": grids,
            "confirm_seeds": 0,
            **further,
        }
        self.config.write_text(yaml.safe_dump(content))
        return self

    def run(self, jobs=1, retry_failed=False, resume=False, devices=None, poll_seconds=0.01) -> Recorder:
        """Train both stages, as the command does."""
        plan, recorder = read_plan(self.config), Recorder()
        require_usable_folder(self.folder)
        self.last = recorder
        with mock.patch("hf_v0init.compare.executor.POLL_SECONDS", poll_seconds):
            executor = LocalExecutor(self.folder, jobs, recorder, devices, resume)
            train_stages(plan, self.folder, executor, retry_failed)
        return recorder

    def read_journal(self) -> list[dict]:
        path = self.root / "journal"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def read_records(self) -> dict[str, dict]:
        """The records by setting and seed."""
        records = [json.loads(path.read_text()) for path in sorted(self.folder.glob("runs/*/record.json"))]
        return {f"{record['setting']} {record['seed']}": record for record in records}

    def list_states(self) -> list[str]:
        """The states of all runs, those of one setting and seed at several rates too."""
        return sorted(json.loads(path.read_text())["state"] for path in self.folder.glob("runs/*/record.json"))

    def read_states(self) -> dict[str, str]:
        return {name: record["state"] for name, record in self.read_records().items()}


def make_call(config, folder, *options) -> list[str]:
    """The words that start `hf-v0init compare` as a process."""
    program = [sys.executable, "-m", "hf_v0init.cli.main", "compare"]
    return [*program, str(config), "--output_dir", str(folder), *options]


def move_to_another_machine(file: Path, pid: int = 1) -> None:
    """Make a lock look as if it were held by a process of another machine, node7."""
    text = file.read_text().replace(f"host={platform.node()}", "host=node7").replace(f"pid={os.getpid()}", f"pid={pid}")
    assert "host=node7" in text
    file.unlink()
    file.write_text(text)


def behave(*names: str) -> list[dict]:
    """A grid whose runs behave so, in that order."""
    return [{"behaviour": list(names)}]


def wait_until(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)


def is_alive(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except OSError:
        return False
    return state != "Z"


def write_checkpoint(output: Path, step: int, *left_out: str) -> Path:
    """The files of a checkpoint as the stock Trainer leaves it."""
    folder = output / f"checkpoint-{step}"
    folder.mkdir()
    for name in ("model.safetensors", "optimizer.pt", "scheduler.pt"):
        (folder / name).write_text("x")
    (folder / "trainer_state.json").write_text(json.dumps({"global_step": step}))
    for name in left_out:
        (folder / name).unlink()
    return folder
