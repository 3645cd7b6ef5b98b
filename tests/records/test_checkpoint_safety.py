"""Which checkpoints are valid, which one a run resumes from, what a rotation may delete."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_sequences
from kill.saves import NAMES as FILES_OF_A_SAVE
from trainers import SafeTrainer, assert_equal_weights, make_trainer, train
from transformers import Trainer, TrainerCallback

from hf_v0init import InputError, SafeCheckpointsMixin, V0InitCallback, V0InitMixin
from hf_v0init.records.checkpoints import (
    CUT_OFF,
    MARK,
    begin_save,
    complete_save,
    delete_checkpoint,
    delete_old_checkpoints,
    find_defect,
    find_newest_valid,
    list_checkpoints,
)

RUN = {"v0_init": "random", "v0_decay": "beta2", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
SAFE = RUN | {"trainer_class": SafeTrainer}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of ours and one of the stock Trainer, each with checkpoints 1 to 3."""
    folder = tmp_path_factory.mktemp("runs")
    train(folder / "ours", **SAFE)
    train(folder / "stock", stock=True, **RUN)
    return folder


@pytest.fixture(params=["ours", "stock"])
def run(request, runs, tmp_path):
    shutil.copytree(runs / request.param, tmp_path / "out")
    return tmp_path / "out"


@pytest.fixture
def checkpoint(runs, tmp_path):
    """A copy of a checkpoint of ours."""
    return shutil.copytree(runs / "ours" / "checkpoint-3", tmp_path / "checkpoint-3")


def list_names(output_dir) -> list[str]:
    return [os.path.basename(path) for path in list_checkpoints(output_dir)]


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def write_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')


# ---- one folder ------------------------------------------------------------------------------------------------------


def test_what_the_trainer_saves_is_valid(run):
    assert [find_defect(folder) for folder in list_checkpoints(run)] == [None, None, None]


def test_without_a_mark_the_trainers_last_file_decides(checkpoint):
    (checkpoint / "optimizer.pt").unlink()  # as with save_only_model, or on purpose
    assert find_defect(checkpoint) is None
    for text in ("[]", '{"epoch": 1}', "", '{"global_step": 3'):
        (checkpoint / "trainer_state.json").write_text(text)
        assert find_defect(checkpoint) == "trainer_state.json is damaged"
    (checkpoint / "trainer_state.json").unlink()
    assert find_defect(checkpoint) == "trainer_state.json, which is written last, is missing"
    assert find_defect(checkpoint.parent / "nowhere") == "there is no such folder"


def test_a_save_begun_is_not_valid_until_it_is_complete(checkpoint):
    before = snapshot(checkpoint)
    begin_save(checkpoint)
    assert find_defect(checkpoint) == CUT_OFF
    complete_save(checkpoint)
    assert find_defect(checkpoint) is None and snapshot(checkpoint) == before
    begin_save(checkpoint.parent / "checkpoint-4")
    assert find_defect(checkpoint.parent / "checkpoint-4") == CUT_OFF


def kill_a_save(output_dir, seconds: float) -> None:
    """Let saves go on for a moment after the first, then kill -9."""
    command = [sys.executable, str(Path(__file__).parents[1] / "kill" / "saves.py"), str(output_dir)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "saved\n"
        time.sleep(seconds)
        process.kill()
    assert process.returncode == -signal.SIGKILL


def test_kill_9_at_any_moment_leaves_only_valid_checkpoints_to_resume_from(tmp_path):
    generator = random.Random(3)
    for _ in range(12):
        kill_a_save(tmp_path, generator.uniform(0.0, 0.03))
        valid = [Path(folder) for folder in list_checkpoints(tmp_path) if find_defect(folder) is None]
        assert 1 <= len(valid) <= 3  # one more than the limit while it is kept
        for folder in valid:
            token = json.loads((folder / "trainer_state.json").read_text())["token"]
            assert {(folder / name).read_text() for name in FILES_OF_A_SAVE} == {20 * token}


def test_a_deletion_that_is_cut_off_after_the_mark_leaves_nothing_that_looks_valid(tmp_path, monkeypatch):
    write_state(tmp_path / "checkpoint-1")
    complete_save(tmp_path / "checkpoint-1")
    monkeypatch.setattr("shutil.rmtree", lambda folder, **_: Path(folder, MARK).unlink())
    delete_checkpoint(tmp_path / "checkpoint-1")
    assert find_defect(tmp_path / "checkpoint-1") == "trainer_state.json, which is written last, is missing"


# ---- which one, and what goes ----------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_their_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-7x", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert list_checkpoints(tmp_path) == [str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-9")]
    assert list_checkpoints(tmp_path / "nowhere") == []


def make_folders(tmp_path, steps: dict[int, tuple[float, bool]]):
    """Folders with (seconds, valid)."""
    for step, (seconds, valid) in steps.items():
        folder = tmp_path / f"checkpoint-{step}"
        write_state(folder)
        (complete_save if valid else begin_save)(folder)
        os.utime(folder, (seconds, seconds))


@pytest.mark.parametrize(
    ("steps", "limit", "best", "deleted"),
    [
        ({1: (10, True), 2: (20, True), 3: (30, True)}, None, None, []),
        ({1: (10, True), 2: (20, True), 3: (30, True)}, 2, None, [1]),
        ({1: (10, True), 2: (20, True), 3: (30, True)}, 1, None, [1, 2]),
        ({1: (10, True), 2: (20, True), 3: (30, True)}, 1, 1, [2]),  # the best one stays besides the last
        # 9 was left by an earlier run: it is the oldest in time
        ({1: (10, True), 9: (5, True), 3: (30, True)}, 2, None, [9]),
        # times that tell nothing: by number, and yet the one just saved stays, where the Trainer deletes it
        ({1: (5, True), 9: (5, True), 3: (5, True)}, 1, None, [1, 9]),
        ({1: (5, True), 9: (5, False), 3: (5, True)}, 1, None, [9, 1]),
        # broken ones go first, whatever their age
        ({1: (10, True), 9: (20, False), 3: (30, True)}, 2, None, [9]),
        ({1: (10, True), 2: (20, True), 9: (25, False), 3: (30, True)}, 2, None, [9, 1]),
    ],
)
def test_what_a_rotation_deletes(tmp_path, steps, limit, best, deleted):
    make_folders(tmp_path, steps)
    path = {step: str(tmp_path / f"checkpoint-{step}") for step in steps}
    delete_old_checkpoints(tmp_path, limit, path[3], path.get(best))
    assert sorted(list_checkpoints(tmp_path)) == sorted(path[step] for step in steps if step not in deleted)


# ---- in the Trainer --------------------------------------------------------------------------------------------------


def cut_off(run):
    """Leave the newest checkpoint of a run as a kill in its save does; returns its defect."""
    (run / "checkpoint-3" / "trainer_state.json").unlink()
    return find_defect(run / "checkpoint-3")


def test_resume_true_takes_the_newest_valid_one_names_the_skipped_and_deletes_nothing(run, our_log):
    v0 = "random" if (run / "checkpoint-1" / "v0_init.json").exists() else "zeros"
    defect, before = cut_off(run), snapshot(run)
    trainer = make_trainer(run, **SAFE | {"v0_init": v0, "save_strategy": "no"})
    trainer.train(resume_from_checkpoint=True)
    assert (
        f"{run / 'checkpoint-3'} ({defect})" in our_log.text and f"resuming from {run / 'checkpoint-2'}" in our_log.text
    )
    assert snapshot(run) == before
    assert_equal_weights(train(run.parent / "straight", **RUN | {"v0_init": v0}), trainer)


def test_a_broken_checkpoint_asked_for_by_name_is_one_clear_error(run):
    defect = cut_off(run)
    trainer = make_trainer(run, **SAFE)
    newest = str(run / "checkpoint-2")
    for folder, words in (
        (run / "checkpoint-3", [defect, newest]),
        (run / "checkpoint-8", ["there is no such folder", newest]),
        (run.parent / "nowhere" / "checkpoint-8", ["there is no such folder"]),
    ):
        with pytest.raises(InputError, match="Can't find a valid checkpoint") as error:
            trainer.train(resume_from_checkpoint=folder)
        assert all(word in str(error.value) for word in [str(folder), *words])
    assert trainer.state.global_step == 0


def test_no_checkpoint_at_all_is_an_error_and_only_broken_ones_a_new_run(tmp_path, our_log):
    trainer = make_trainer(tmp_path / "a", **SAFE)
    for _ in range(2):  # without the folder, and with it
        with pytest.raises(InputError, match="No valid checkpoint found"):
            trainer.train(resume_from_checkpoint=True)
        (tmp_path / "a").mkdir(exist_ok=True)
    begin_save(tmp_path / "a" / "checkpoint-1")
    trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-1 ({CUT_OFF})" in our_log.text
    assert_equal_weights(train(tmp_path / "b", **RUN), trainer)
    assert [find_defect(folder) for folder in list_checkpoints(tmp_path / "a")] == [None, None, None]
    assert trainer.get_v0_report()["global_step"] == 0


def test_a_finished_run_that_is_resumed_makes_no_further_step(tmp_path):
    """The end is within an epoch, where the stock Trainer makes one step too many."""
    common = RUN | {"lr_scheduler_type": "constant"}

    def resume(**options):
        straight = train(tmp_path / "out", **common, **options)
        resumed = make_trainer(tmp_path / "out", model=make_gpt2(seed=9), **common, **options)
        resumed.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
        return straight, resumed

    straight, resumed = resume(trainer_class=SafeTrainer)
    assert resumed.state.global_step == 3
    assert_equal_weights(straight, resumed)
    _, stock = resume(stock=True)
    assert stock.state.global_step == 4
    for trainer in (resumed, make_trainer(tmp_path / "out", **SAFE)):  # outside of training: as the Trainer
        batches, _ = trainer.get_batch_samples(iter(trainer.get_train_dataloader()), 2, trainer.args.device)
        assert len(batches) == 2


def test_rotation_keeps_the_limit_and_the_arguments(tmp_path):
    trainer = train(tmp_path, **SAFE | {"save_total_limit": 2})
    assert list_names(tmp_path) == ["checkpoint-3", "checkpoint-2"]
    assert trainer.args.save_total_limit == 2
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
    begin_save(tmp_path / "checkpoint-9")
    resumed = make_trainer(tmp_path, **SAFE | {"save_total_limit": 1, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert list_names(tmp_path) == ["checkpoint-4"]
    assert find_defect(tmp_path / "checkpoint-4") is None


def test_the_best_checkpoint_stays(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "save_total_limit": 1}
    trainer = make_trainer(
        tmp_path, **SAFE | options | {"learning_rate": 3.0}, kwargs={"eval_dataset": make_sequences(8, seed=4)}
    )
    trainer.train()  # at this rate it gets worse with every step
    assert os.path.basename(trainer.state.best_model_checkpoint) == "checkpoint-1"
    assert find_defect(tmp_path / "checkpoint-1") is None


class FailsToSave(SafeTrainer):
    def _save_optimizer_and_scheduler(self, output_dir):
        if self.state.global_step == 2:
            raise OSError("no space left on device")
        super()._save_optimizer_and_scheduler(output_dir)


def test_a_save_that_fails_leaves_a_broken_checkpoint_and_the_arguments_as_they_were(tmp_path):
    trainer = make_trainer(tmp_path, trainer_class=FailsToSave, **RUN | {"save_total_limit": 1})
    with pytest.raises(OSError, match="no space left"):
        trainer.train()
    assert trainer.args.save_total_limit == 1
    newest, skipped = find_newest_valid(list_checkpoints(tmp_path))
    assert newest == str(tmp_path / "checkpoint-1")
    assert f"{tmp_path / 'checkpoint-2'} ({CUT_OFF})" in skipped


# ---- callbacks and pushes --------------------------------------------------------------------------------------------


class SafeStock(SafeCheckpointsMixin, Trainer):
    """The mixin alone."""


class SafeBehind(V0InitMixin, SafeCheckpointsMixin, Trainer):
    """Its place does not matter."""


class Killed(TrainerCallback):
    """Ends the run like a kill between the Trainer's last write of a checkpoint and the `on_save` of later callbacks."""

    def on_save(self, args, state, control, **kwargs):
        if state.global_step == 2:
            raise SystemExit


def test_a_kill_between_the_save_and_the_callbacks_falls_back_to_the_checkpoint_before(tmp_path, our_log):
    options = {name: value for name, value in RUN.items() if not name.startswith("v0_")}

    def make(folder, **more):
        trainer = make_trainer(folder, stock=True, trainer_class=SafeStock, **options | more)
        V0InitCallback(v0_init="data_driven", v0_decay_steps=3, v0_estimation_steps=2).attach(trainer)
        return trainer

    straight = make(tmp_path / "straight")
    straight.train()
    killed = make(tmp_path / "out", callbacks=[Killed()])
    with pytest.raises(SystemExit):
        killed.train()
    assert find_defect(tmp_path / "out" / "checkpoint-2") == CUT_OFF
    resumed = make(tmp_path / "out", model=make_gpt2(seed=9))
    resumed.train(resume_from_checkpoint=True)
    assert f"resuming from {tmp_path / 'out' / 'checkpoint-1'}" in our_log.text
    assert_equal_weights(straight, resumed)
    for folder in list_checkpoints(tmp_path / "out"):
        assert find_defect(folder) is None and os.path.isfile(os.path.join(folder, "v0_init.json"))


class Looks(TrainerCallback):
    """Sees the mark as long as callbacks have their `on_save`."""

    def __init__(self):
        self.marked = []

    def on_save(self, args, state, control, **kwargs):
        self.marked.append(os.path.exists(os.path.join(args.output_dir, f"checkpoint-{state.global_step}", MARK)))


@pytest.mark.parametrize("trainer_class", [SafeTrainer, SafeBehind])
def test_a_checkpoint_is_complete_when_the_callbacks_have_had_it(tmp_path, trainer_class):
    looks = Looks()
    train(tmp_path, callbacks=[looks], trainer_class=trainer_class, **RUN)
    assert looks.marked == [True] * 3
    assert [find_defect(folder) for folder in list_checkpoints(tmp_path)] == [None] * 3


def test_a_save_outside_of_the_training_loop_is_complete_too(tmp_path):
    """As at a shutdown that announces itself (JIT checkpoints)."""
    trainer = train(tmp_path, trainer_class=SafeTrainer, v0_init="random")
    trainer._save_checkpoint(trainer.model, None)
    assert list_names(tmp_path) == ["checkpoint-5"] and find_defect(tmp_path / "checkpoint-5") is None
