"""The runs that are killed: each reports its phases and leaves what a test compares."""

import builtins
import faulthandler
import json
import os
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

import torch
import transformers.modeling_utils
from conftest import make_gpt2, make_sequences
from processes import leave
from tqdm import tqdm
from trainers import is_untouched, make_trainer, weights_of
from transformers import Trainer
from transformers.trainer_utils import get_last_checkpoint

from hf_v0init import SafeCheckpointsMixin, V0InitTrainer
from hf_v0init.records.checkpoints import MARK, find_defect, list_checkpoints

PAUSE = 0.004  # seconds that a batch of the pass takes at least, so that a kill can meet it

OPTIONS = {
    "max_steps": 6,
    "save_strategy": "steps",
    "save_steps": 1,
    "eval_strategy": "steps",
    "eval_steps": 1,
    "logging_steps": 1,
    "per_device_eval_batch_size": 8,
}


class ReportsPhases:
    """Reports `pass` before every batch of the pass, `train`, `evaluate`, `save`, and `saved` (whatever comes after a save)."""

    report = staticmethod(lambda phase: None)
    note = staticmethod(lambda **news: None)
    in_pass = False

    def choose_checkpoint(self, wanted):
        chosen = super().choose_checkpoint(wanted)
        self.note(resumed_from=None if chosen is None else os.path.basename(chosen))
        return chosen

    def compute_loss(self, model, *args, **kwargs):
        if self.in_pass:
            self.report("pass")
            time.sleep(PAUSE)
        elif model.training:
            self.report("train")
        return super().compute_loss(model, *args, **kwargs)

    def evaluate(self, *args, **kwargs):
        self.report("evaluate")
        return super().evaluate(*args, **kwargs)

    def _save_checkpoint(self, *args, **kwargs):
        self.report("save")
        super()._save_checkpoint(*args, **kwargs)
        self.report("saved")


class Ours(ReportsPhases, SafeCheckpointsMixin, V0InitTrainer):
    pass


class Stock(ReportsPhases, Trainer):
    pass


def build(request: dict, report) -> Trainer:
    stock = request.get("stock", False)
    options = OPTIONS | (
        {} if stock else {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_stats_batch_size": 2}
    )
    trainer = make_trainer(
        Path(request["folder"]) / "out",
        stock=stock,
        trainer_class=Stock if stock else Ours,
        model=make_gpt2(dropout=request.get("dropout", 0.1)),
        data=make_sequences(20),  # an epoch ends at step 5
        kwargs={"eval_dataset": make_sequences(8, seed=4)},
        **options | request.get("options", {}),
    )
    trainer.report = report
    if not stock:
        report_pass(trainer)
    return trainer


def report_pass(trainer) -> None:
    """Let a Trainer know when the pass before training runs, and note each that came to its end."""
    run_pass = trainer._v0_callback._run_pass

    def reporting(*args, **kwargs):
        trainer.in_pass = True
        try:
            written = run_pass(*args, **kwargs)
        finally:
            trainer.in_pass = False
        trainer.note(passes=1)
        return written

    trainer._v0_callback._run_pass = reporting


def warm_up() -> None:
    """Import, once for all children, what a Trainer imports only when it is built, evaluates and saves."""
    with tempfile.TemporaryDirectory() as folder:
        trainer = build({"folder": folder}, lambda phase: None)
        trainer.create_optimizer_and_scheduler(1)
        trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.evaluate()
        trainer._save_checkpoint(trainer.model, None)


def save_result(request: dict, trainer, **more) -> None:
    result = {
        "weights": weights_of(trainer),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.lr_scheduler.state_dict(),
        "history": trainer.state.log_history,
        "report": trainer.get_v0_report() if isinstance(trainer, V0InitTrainer) else None,
    }
    torch.save(result | more, Path(request["folder"]) / request.get("result", "result.pt"))


def train(request: dict, report) -> None:
    """Train; resume where a user's script would, that is where the output folder has a checkpoint-* folder."""
    folder = Path(request["folder"])
    trainer = build(request, report)
    out = trainer.args.output_dir
    valid = [os.path.basename(path) for path in list_checkpoints(out) if find_defect(path) is None]

    life = {"process": os.getpid(), "passes": 0, "valid": valid, "resumed_from": "not yet known"}

    def note(**news) -> None:
        life.update(news)
        with open(folder / request.get("lives", "lives.jsonl"), "a") as file:
            file.write(json.dumps(life) + "\n")

    note()
    trainer.note = note
    resume = request.get("resume") or (os.path.isdir(out) and get_last_checkpoint(out) is not None)
    if "kill_at" in request:
        kill_at_file_operation(trainer, report, **request["kill_at"])
    trainer.train(resume_from_checkpoint=resume)
    report("trained")
    save_result(request, trainer)


def kill_at_file_operation(trainer, report, save: int, operation: int) -> None:
    """Die in the `save`-th save, in its `operation`-th write: halfway through a file, or before an open, a rename or the end of the mark.

    Reports `write` at each; with `operation=0` nobody dies.
    """
    count = {"saves": 0, "operations": 0, "inside": False}

    def count_down() -> bool:
        if not count["inside"] or count["saves"] != save:
            return False
        count["operations"] += 1
        report("write")
        return count["operations"] == operation

    def halfway(write):
        def cut_off(content, path, *args, **kwargs):
            last = count_down()
            count["inside"], before = False, count["inside"]
            write(content, path, *args, **kwargs)
            count["inside"] = before
            if last:
                os.truncate(path, os.path.getsize(path) // 2)
                os.kill(os.getpid(), signal.SIGKILL)

        return cut_off

    def before(call, counts):
        def dying(*args, **kwargs):
            if counts(*args, **kwargs) and count_down():
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*args, **kwargs)

        return dying

    def writes(file, mode="r", *args, **kwargs) -> bool:
        return any(letter in mode for letter in "wax+")

    torch.save = halfway(torch.save)
    transformers.modeling_utils.safe_save_file = halfway(transformers.modeling_utils.safe_save_file)
    builtins.open = before(builtins.open, writes)
    os.replace = before(os.replace, lambda *args, **kwargs: True)
    os.unlink = before(os.unlink, lambda path, *args, **kwargs: os.path.basename(path) == MARK)
    log_save_evaluate = trainer._maybe_log_save_evaluate  # from the mark to its end, once per step

    def counted(*args, **kwargs):
        count["saves"] += 1
        count["inside"] = True
        log_save_evaluate(*args, **kwargs)
        count["inside"] = False

    trainer._maybe_log_save_evaluate = counted


def interrupt(request: dict, report) -> None:
    """Train and be interrupted (Ctrl-C) in the pass; look at what is left, then train again with the same Trainer."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    trainer = build(request, report)
    before = weights_of(trainer)
    modes = [module.training for module in trainer.model.modules()]
    rng = torch.get_rng_state()
    left = None
    try:
        trainer.train()
    except KeyboardInterrupt:
        report("interrupted")
        left = {
            "step": trainer.state.global_step,
            "untouched": is_untouched(trainer.optimizer),
            "report": trainer.get_v0_report(),
            "weights": all(torch.equal(before[name], weight) for name, weight in weights_of(trainer).items()),
            "gradients": sum(parameter.grad is not None for parameter in trainer.model.parameters()),
            "hooks": sum(
                len(parameter._post_accumulate_grad_hooks or ())
                for parameter in trainer.model.parameters()
                if hasattr(parameter, "_post_accumulate_grad_hooks")
            ),
            "rng": torch.equal(rng, torch.get_rng_state()),
            "modes": modes == [module.training for module in trainer.model.modules()],
            "files": sorted(str(path) for path in Path(trainer.args.output_dir).rglob("*")),
        }
        trainer.train()
    save_result(request, trainer, left=left)


TASKS = {"train": train, "interrupt": interrupt}


def run_child(request: dict, progress) -> None:
    """Do the task in a forked child, with everything it says in a log file and its phases through a pipe."""
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    tqdm.set_lock(threading.RLock())  # the parent's may be held at the moment of the fork
    faulthandler.dump_traceback_later(0.9 * request["time_limit"], file=log)
    status = 1
    try:
        TASKS[request["task"]](request, progress.send)
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main(path: str) -> None:
    """One task on several processes, of which one may kill itself: in the request, `dies` = {"rank", "phase", "occurrence"}."""
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


if __name__ == "__main__":  # started by `processes.launch` with the path of a request
    torch.set_num_threads(1)
    main(sys.argv[1])
    leave()
