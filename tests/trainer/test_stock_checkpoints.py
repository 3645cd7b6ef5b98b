"""A Trainer with a v0 saves, rotates and resumes as the Trainer it was made from; `v0_init.json` is all that is added."""

import json
import os
import shutil

import pytest
import torch
from conftest import make_gpt2
from trainers import assert_equal_weights, make_trainer, train
from transformers import GPT2LMHeadModel, Trainer, TrainerCallback

from hf_v0init import InputError, V0InitMixin, V0InitTrainer
from hf_v0init.records.checkpoints import begin_save

RUN = {
    "max_steps": 4,
    "save_strategy": "steps",
    "save_steps": 2,
    "save_total_limit": 2,
    "lr_scheduler_type": "constant",
}
RANDOM = {"v0_init": "random", "v0_decay": "beta2"}


def list_files(folder) -> set[str]:
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def read_state(path) -> dict:
    state = json.loads(path.read_text())
    clocks = ("runtime", "per_second")
    state["log_history"] = [{k: v for k, v in e.items() if not k.endswith(clocks)} for e in state["log_history"]]
    return state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Output folders of the stock Trainer, and of ours without and with a v0, all called `out`."""
    folder, before = tmp_path_factory.mktemp("runs"), os.getcwd()
    try:
        for kind, kwargs in (("stock", {"stock": True}), ("zeros", {}), ("random", RANDOM)):
            (folder / kind).mkdir()
            os.chdir(folder / kind)  # trainer_state.json holds the name of the output folder
            trainer = train("out", **RUN | kwargs)
            trainer.save_model()
            trainer.save_state()
    finally:
        os.chdir(before)
    return folder


def test_zeros_leaves_the_files_of_the_stock_trainer_with_the_same_bytes_and_a_v0_adds_its_record(runs):
    stock, ours = runs / "stock" / "out", runs / "zeros" / "out"
    names = list_files(stock)
    assert list_files(ours) == names
    assert {"checkpoint-2/optimizer.pt", "checkpoint-4/model.safetensors", "model.safetensors"} <= names
    for name in names:
        if name.endswith("training_args.bin"):  # the class of the arguments is ours
            continue
        if name.endswith("trainer_state.json"):
            assert read_state(stock / name) == read_state(ours / name)
        else:
            assert (stock / name).read_bytes() == (ours / name).read_bytes(), name
    assert list_files(runs / "random" / "out") - names == {
        "v0_init.json", "checkpoint-2/v0_init.json", "checkpoint-4/v0_init.json"
    }  # fmt: skip


def reshard(folder):
    GPT2LMHeadModel.from_pretrained(folder).save_pretrained(folder, max_shard_size="16KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


EDITS = {
    "untouched": lambda folder: None,
    "resharded": reshard,
    "in bf16": lambda folder: GPT2LMHeadModel.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder),
    "a save that was cut off": begin_save,
    "no optimizer": lambda folder: (folder / "optimizer.pt").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "half an optimizer": lambda folder: os.truncate(folder / "optimizer.pt", 500),
    "half a record": lambda folder: (folder / "v0_init.json").write_text("{"),
}


def resume(folder, wanted, **options):
    """The resumed run, or the error's type and first line."""
    trainer = make_trainer(folder, model=make_gpt2(seed=9), **RUN | {"max_steps": 6} | options)
    try:
        trainer.train(resume_from_checkpoint=wanted)
    except Exception as error:
        return type(error).__name__, str(error).splitlines()[0]
    return trainer


@pytest.mark.parametrize(("edit", "wanted"), [("untouched", "checkpoint-2"), *((edit, True) for edit in EDITS)])
def test_zeros_resumes_from_what_the_stock_trainer_resumes_from(runs, tmp_path, monkeypatch, edit, wanted):
    monkeypatch.setattr("gc.collect", lambda: 0)  # the Trainer does it for every shard
    folder = tmp_path / "out"
    ends = []
    for stock in (True, False):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(runs / "stock" / "out", folder)
        EDITS[edit](folder / ("checkpoint-4" if wanted is True else wanted))
        ends.append(resume(folder, wanted if wanted is True else str(folder / wanted), stock=stock))
    if edit in ("no weights", "half an optimizer"):
        assert ends[0] == ends[1] and isinstance(ends[0], tuple)
    else:
        assert_equal_weights(*ends)
        assert [end.state.global_step for end in ends] == [6, 6]


def test_errors_of_a_resume_are_the_stock_trainers(tmp_path):
    for wanted, phrase in ((True, "No valid checkpoint found"), ("checkpoint-bogus", "Can't find a valid checkpoint")):
        with pytest.raises(ValueError, match=phrase):
            make_trainer(tmp_path, **RANDOM).train(resume_from_checkpoint=wanted)


def test_the_top_of_the_output_folder_is_left_to_its_checkpoints_during_training(tmp_path):
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(sorted(os.listdir(args.output_dir)))

    trainer = make_trainer(tmp_path, callbacks=[Look()], **RUN | RANDOM)
    trainer.train()
    assert seen == [[], [], ["checkpoint-2"], ["checkpoint-2"]]
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-4"]
    for folder in ("checkpoint-2", "checkpoint-4"):
        assert json.loads((tmp_path / folder / "v0_init.json").read_text()) == trainer.get_v0_report()
    trainer.save_model(str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "v0_init.json").is_file() and not (tmp_path / "v0_init.json").exists()
    trainer.save_model()
    assert json.loads((tmp_path / "v0_init.json").read_text()) == trainer.get_v0_report()


@pytest.mark.parametrize(("strategy", "at_top"), [("every_save", True), ("checkpoint", True), ("end", False)])
def test_a_push_during_training_takes_the_record_with_the_model(tmp_path, strategy, at_top):
    pushed = []

    class Pushes(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder):
            folders = (self.args.output_dir, checkpoint_folder)
            pushed.append([os.path.isfile(os.path.join(folder, "v0_init.json")) for folder in folders])

        def _finish_current_push(self):
            pass

    class Ours(V0InitMixin, Pushes):
        pass

    trainer = make_trainer(tmp_path, trainer_class=Ours, **RUN | RANDOM | {"hub_strategy": strategy})
    trainer.args.push_to_hub = True
    trainer.train()
    assert pushed == [[at_top, True]] * 2


# ---- the record of v0 on resume ----------------------------------------------------------------------------------------


def test_a_resumed_run_has_the_record_of_its_checkpoint_or_says_that_there_is_none(runs, tmp_path, our_log):
    folder = tmp_path / "out"
    shutil.copytree(runs / "random" / "out", folder)
    (folder / "checkpoint-2" / "v0_init.json").unlink()
    straight = train(tmp_path / "straight", **RUN | {"max_steps": 6} | RANDOM)
    trainer = resume(folder, True, **RANDOM)  # at step 4
    assert trainer.get_v0_report() == json.loads((runs / "random" / "out" / "v0_init.json").read_text())
    assert_equal_weights(straight, trainer)
    assert "trained without a v0" not in our_log.text
    trainer = resume(folder, str(folder / "checkpoint-2"), **RANDOM, save_strategy="no")
    assert "trained without a v0" in our_log.text and trainer.get_v0_report() is None
    assert_equal_weights(straight, trainer)


class NeverSteps(V0InitTrainer):
    def training_step(self, *args, **kwargs):
        pytest.fail("a step was made")


def test_a_cut_off_record_of_v0_is_an_error_before_any_step(runs, tmp_path):
    shutil.copytree(runs / "random" / "out", tmp_path / "out")
    record = tmp_path / "out" / "checkpoint-4" / "v0_init.json"
    os.truncate(record, record.stat().st_size // 2)
    for wanted in (True, str(record.parent)):
        trainer = make_trainer(tmp_path / "out", trainer_class=NeverSteps, **RUN | RANDOM)
        with pytest.raises(InputError, match=r"checkpoint-4/v0_init.json is damaged"):
            trainer.train(resume_from_checkpoint=wanted)
