"""What counts as a whole checkpoint, which one a run resumes from, what a rotation may delete."""

import json
import logging
import os
import random
import shutil
import zipfile
import zlib
from pathlib import Path

import pytest
import torch
from conftest import make_gpt2, make_sequences
from trainers import SafeTrainer, assert_equal_weights, make_trainer, train
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback

from hf_v0init import SafeCheckpointsMixin, V0InitMixin
from hf_v0init.errors import InputError
from hf_v0init.records import checkpoints as module
from hf_v0init.records.checkpoints import (
    SAVE_STATE_FILE,
    begin_save,
    complete_save,
    delete_old_checkpoints,
    find_defect,
    find_newest_whole,
    inspect_checkpoint,
    list_checkpoints,
)

RUN = {"v0_init": "random", "v0_decay": "beta2", "max_steps": 3, "save_strategy": "steps", "save_steps": 1}
SAFE = RUN | {"trainer_class": SafeTrainer}
CUT_OFF = "its save was cut off"
REMEDY = "(if that was on purpose, delete its save_state.json: then it is judged by the files that are left)"


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


# ---- one folder ------------------------------------------------------------------------------------------------------


def test_what_the_trainer_saves_is_whole(run):
    assert [find_defect(folder) for folder in list_checkpoints(run)] == [None, None, None]


def test_our_record_lists_the_files_with_their_sizes_and_crcs(runs, monkeypatch):
    folder = runs / "ours" / "checkpoint-3"
    record = json.loads((folder / SAVE_STATE_FILE).read_text())
    names = {path.name for path in folder.iterdir()} - {SAVE_STATE_FILE}
    assert record["complete"] is True and set(record["files"]) == names and len(names) == 9
    assert {"model.safetensors", "optimizer.pt", "config.json", "trainer_state.json", "v0_init.json"} <= names
    monkeypatch.setattr(module, "_BLOCK", 1000)  # bytes; no multiple of the files' sizes
    for name, saved in record["files"].items():
        content = (folder / name).read_bytes()
        assert (saved["bytes"], saved["crc32"]) == (len(content), f"{zlib.crc32(content):08x}")
        assert ("entries" in saved) == name.endswith((".pt", ".pth", ".bin"))
    assert find_defect(folder) is None


@pytest.mark.parametrize(
    "name", ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json"]
)
def test_a_file_cut_off_anywhere_is_seen(run, name):
    path = run / "checkpoint-3" / name
    content = path.read_bytes()
    generator = random.Random(len(content))
    lengths = {0, 1, 7, 9, len(content) - 1} | {generator.randrange(len(content) - 1) for _ in range(40)}
    for length in lengths:
        if name == "trainer_state.json" and length == len(content) - 1:
            continue  # the line break at the end
        path.write_bytes(content[:length])
        assert name in find_defect(path.parent), length
    path.write_bytes(content)
    assert find_defect(path.parent) is None


@pytest.mark.parametrize(
    ("name", "ours", "stock"),
    [
        ("model.safetensors", "model.safetensors is missing " + REMEDY, "it holds no weights"),
        ("optimizer.pt", None, None),  # as with save_only_model
        ("scheduler.pt", "scheduler.pt is missing", "scheduler.pt is missing"),
        ("rng_state.pth", None, None),
        (
            "trainer_state.json",
            "trainer_state.json, which is written last",
            "trainer_state.json, which is written last",
        ),
        ("config.json", None, None),
        ("v0_init.json", None, None),
    ],
)
def test_a_missing_file(runs, tmp_path, name, ours, stock):
    for kind, words in (("ours", ours), ("stock", stock)):
        folder = tmp_path / kind
        shutil.copytree(runs / kind / "checkpoint-3", folder)
        (folder / name).unlink(missing_ok=True)
        defect = find_defect(folder)
        assert (words in defect) if words else defect is None
        if defect is None and kind == "ours":
            ((change,),) = inspect_checkpoint(folder)[1:]
            assert change.startswith(f"{name} was removed") and ("anew" in change) == (name == "optimizer.pt")


def test_damage_that_keeps_the_length_is_seen_where_the_file_tells(run):
    for name in ("model.safetensors", "optimizer.pt"):
        path = run / "checkpoint-3" / name
        content = path.read_bytes()
        path.write_bytes(bytes(len(content)))  # zeros, as after a power failure
        assert name in find_defect(path.parent)
        path.write_bytes(content)
    for text in ("[]", '{"epoch": 1}', ""):
        (run / "checkpoint-3" / "trainer_state.json").write_text(text)
        assert find_defect(run / "checkpoint-3").startswith("trainer_state.json ")


def flip_a_bit(path, generator, keep_time=False):
    content, status = bytearray(path.read_bytes()), path.stat()
    content[generator.randrange(len(content))] ^= 1 << generator.randrange(8)
    path.write_bytes(content)
    if keep_time:
        os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


@pytest.mark.parametrize(
    "name",
    ["model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "config.json", "tokenizer.json", "merges.txt",
     "trainer_state.json", "v0_init.json"],
)  # fmt: skip
def test_one_wrong_bit_at_unchanged_size_is_damage(runs, tmp_path, name):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "ours" / "checkpoint-3", folder)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0, "b": 1}}}))
    (folder / "merges.txt").write_text("a b\nab c\n")
    complete_save(folder)
    assert inspect_checkpoint(folder) == (None, [])
    content = (folder / name).read_bytes()
    generator = random.Random(name)
    for number in range(20):
        flip_a_bit(folder / name, generator, keep_time=number % 2)
        assert name in find_defect(folder), number
        (folder / name).write_bytes(content)
    assert find_defect(folder) is None
    middle = len(content) // 2 - (name == "merges.txt")
    (folder / name).write_bytes(content[:middle] + b"7" + content[middle + 1 :])
    if name in ("model.safetensors", "optimizer.pt", "merges.txt"):  # no parser can see it
        wanted = f"{name} is damaged: of its {len(content)} bytes some are not what was saved {REMEDY}"
        assert find_defect(folder) == wanted
        assert find_defect(folder, read_bytes=False) is None
        (folder / SAVE_STATE_FILE).unlink()  # what the words say
        assert inspect_checkpoint(folder) == (None, [])


def save_in_bf16(folder):
    AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).save_pretrained(folder)


def reshard(folder):
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="16KB")
    (folder / "model.safetensors").unlink(missing_ok=True)


def save_as_torch_file(folder):
    torch.save(AutoModelForCausalLM.from_pretrained(folder).state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def remove_optimizer(folder):
    for name in ("optimizer.pt", "scheduler.pt"):
        (folder / name).unlink()


def edit_config(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"attn_pdrop": 0.25}))


def save_optimizer_again(folder):
    size = (folder / "optimizer.pt").stat().st_size
    state = torch.load(folder / "optimizer.pt")
    state["param_groups"][0]["weight_decay"] = 0.125
    torch.save(state, folder / "optimizer.pt")
    assert (folder / "optimizer.pt").stat().st_size == size


# What people do to a checkpoint, and the files that the warning must name.
ON_PURPOSE = {
    save_in_bf16: {"model.safetensors", "config.json"},
    reshard: {"model.safetensors"},
    save_as_torch_file: {"model.safetensors"},
    remove_optimizer: {"optimizer.pt", "scheduler.pt"},
    edit_config: {"config.json"},
    save_optimizer_again: {"optimizer.pt"},
    lambda folder: (folder / "rng_state.pth").unlink(): {"rng_state.pth"},
    lambda folder: (folder / "README.md").write_text("notes"): set(),
    lambda folder: shutil.copy(folder / "optimizer.pt", folder / "optimizer.pt.bak"): set(),
}
edits = pytest.mark.parametrize("edit", ON_PURPOSE)


@edits
def test_what_was_changed_on_purpose_and_is_whole_is_no_damage(runs, tmp_path, edit):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "ours" / "checkpoint-3", folder)
    edit(folder)
    defect, changes = inspect_checkpoint(folder)
    assert defect is None
    assert {change.split()[0] for change in changes} == ON_PURPOSE[edit]
    assert all("was removed" in change or "was changed (" in change for change in changes)


@pytest.mark.parametrize(
    ("edit", "damaged", "words"),
    [
        (save_in_bf16, "model.safetensors", "model.safetensors has "),
        (reshard, "model-00002-of-*.safetensors", "model-00002-of-"),
        (save_as_torch_file, "pytorch_model.bin", "pytorch_model.bin is cut off"),
        (edit_config, "config.json", "config.json has "),
        (save_optimizer_again, "optimizer.pt", "optimizer.pt has "),
    ],
)
def test_what_was_changed_on_purpose_and_then_cut_off_is_damage(runs, tmp_path, edit, damaged, words):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "ours" / "checkpoint-3", folder)
    edit(folder)
    (path,) = folder.glob(damaged)
    os.truncate(path, path.stat().st_size - 3)
    assert words in find_defect(folder)
    if edit is reshard:
        path.unlink()
        assert find_defect(folder) == f"{path.name}, which model.safetensors.index.json names, is missing"


def test_an_optimizer_saved_again_at_the_same_size_and_then_damaged_is_seen(runs, tmp_path):
    """Its own CRCs tell the one from the other, and the recorded entries what lies between them from both."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "ours" / "checkpoint-3", folder)
    save_optimizer_again(folder)
    assert inspect_checkpoint(folder) == (None, ["optimizer.pt was changed (of unchanged size)"])
    content = (folder / "optimizer.pt").read_bytes()
    with zipfile.ZipFile(folder / "optimizer.pt") as file:
        largest = max(file.infolist(), key=lambda entry: entry.file_size)
    start = largest.header_offset + 200  # behind the name and the padding
    for position in range(start, start + largest.file_size - 200, 997):
        (folder / "optimizer.pt").write_bytes(content[:position] + b"\xa5" + content[position + 1 :])
        assert content[position] == 0xA5 or "optimizer.pt is damaged" in find_defect(folder)


def test_files_that_do_not_show_their_end_are_damaged_at_any_other_size(tmp_path):
    write_state(tmp_path)
    torch.save({}, tmp_path / "pytorch_model.bin")
    torch.save({}, tmp_path / "training_state.pt")  # not the Trainer's: nothing resumes without it
    for name, content in (("merges.txt", "a b\nab c\n"), ("chat_template.jinja", "{{ a }}"), ("spiece.model", "abc")):
        (tmp_path / name).write_text(content)
    complete_save(tmp_path)
    for name, content, defect in (
        ("merges.txt", "a b\n", "merges.txt has 4 of its 9 bytes"),
        ("merges.txt", "a b\nab c\nd e\n", "merges.txt has 13 of its 9 bytes"),
        ("spiece.model", "ab", "spiece.model has 2 of its 3 bytes"),
        ("chat_template.jinja", "", "chat_template.jinja has 0 of its 7 bytes"),
        ("chat_template.jinja", "{{ a }}{{ b }}", None),
        ("chat_template.jinja", "{{ b }}", f"chat_template.jinja is damaged: of its 7 bytes some are not what was saved {REMEDY}"),
        ("training_state.pt", None, f"training_state.pt is missing {REMEDY}"),
        ("spiece.model", None, f"spiece.model is missing {REMEDY}"),
    ):  # fmt: skip
        before = (tmp_path / name).read_bytes()
        (tmp_path / name).unlink() if content is None else (tmp_path / name).write_text(content)
        assert find_defect(tmp_path) == defect, (name, content)
        (tmp_path / name).write_bytes(before)
    assert find_defect(tmp_path) is None


def test_a_record_without_crcs_is_judged_by_contents(runs, tmp_path):
    """As version 0.1.0 wrote it."""
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "ours" / "checkpoint-3", folder)
    size = (folder / "model.safetensors").stat().st_size
    record = {"complete": True, "files": {"model.safetensors": size}}
    (folder / SAVE_STATE_FILE).write_text(json.dumps(record))
    assert inspect_checkpoint(folder) == (None, [])
    os.truncate(folder / "model.safetensors", size - 1)
    assert find_defect(folder) == f"model.safetensors has {size - 1} of its {size} bytes"


def test_a_save_begun_is_not_whole_until_it_is_completed(runs, tmp_path):
    folder = tmp_path / "checkpoint-3"
    shutil.copytree(runs / "stock" / "checkpoint-3", folder)
    begin_save(folder)
    assert find_defect(folder) == CUT_OFF
    complete_save(folder)
    assert find_defect(folder) is None
    (folder / "config.json").write_text("{}")  # edited by hand
    (folder / ".nfs01").write_text("what a file system leaves")
    assert find_defect(folder) is None
    (folder / SAVE_STATE_FILE).write_text('{"comp')
    assert find_defect(folder) == f"{SAVE_STATE_FILE} is damaged"
    begin_save(tmp_path / "checkpoint-4")
    assert find_defect(tmp_path / "checkpoint-4") == CUT_OFF
    assert find_defect(tmp_path / "nowhere") == "there is no such folder"


def write_state(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "trainer_state.json").write_text('{"global_step": 3}')


def test_sharded_weights(tmp_path):
    write_state(tmp_path)
    make_gpt2().save_pretrained(tmp_path, max_shard_size="8KB")
    index = tmp_path / "model.safetensors.index.json"
    shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
    assert len(shards) > 2 and find_defect(tmp_path) is None
    (tmp_path / shards[1]).rename(tmp_path / "elsewhere")
    assert find_defect(tmp_path) == f"{shards[1]}, which model.safetensors.index.json names, is missing"
    (tmp_path / "elsewhere").rename(tmp_path / shards[1])
    index.unlink()
    assert "model.safetensors.index.json, which is written last of the weights" in find_defect(tmp_path)


def test_adapters_fsdp_and_deepspeed_folders(tmp_path):
    adapter = tmp_path / "adapter"
    write_state(adapter / "other")
    write_state(adapter)
    torch.save({"a": torch.zeros(3)}, adapter / "other" / "adapter_model.bin")
    assert find_defect(adapter) is None
    os.truncate(adapter / "other" / "adapter_model.bin", 100)
    assert find_defect(adapter) == "other/adapter_model.bin is cut off"

    fsdp = tmp_path / "fsdp"
    write_state(fsdp)
    for name in ("pytorch_model_fsdp_0", "optimizer_0"):
        (fsdp / name).mkdir()
        (fsdp / name / "__0_0.distcp").write_bytes(b"x")
        (fsdp / name / ".metadata").write_bytes(b"x")
    assert "scheduler.pt is missing" in find_defect(fsdp)
    torch.save({}, fsdp / "scheduler.pt")
    assert find_defect(fsdp) is None
    complete_save(fsdp)
    assert "optimizer_0/.metadata" in json.loads((fsdp / SAVE_STATE_FILE).read_text())["files"]
    shutil.copytree(fsdp, tmp_path / "copy")
    (tmp_path / "copy" / "optimizer_0" / "__0_0.distcp").unlink()  # a part of what belongs together
    assert "optimizer_0/__0_0.distcp is missing" in find_defect(tmp_path / "copy")
    shutil.rmtree(tmp_path / "copy" / "optimizer_0")
    defect, changes = inspect_checkpoint(tmp_path / "copy")
    assert defect is None and "optimizer_0/.metadata was removed" in changes[0]
    shutil.rmtree(tmp_path / "copy" / "pytorch_model_fsdp_0")
    assert "pytorch_model_fsdp_0/.metadata is missing" in find_defect(tmp_path / "copy")
    (fsdp / SAVE_STATE_FILE).unlink()
    (fsdp / "optimizer_0" / ".metadata").write_bytes(b"")
    assert find_defect(fsdp) == "optimizer_0/.metadata, which is written last, is missing"

    zero = tmp_path / "zero"
    write_state(zero)
    (zero / "global_step3").mkdir()
    torch.save({}, zero / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt")
    assert "'latest'" in find_defect(zero)
    (zero / "latest").write_text("global_step3")
    assert find_defect(zero) is None
    os.truncate(zero / "global_step3" / "zero_pp_rank_0_mp_rank_00_model_states.pt", 50)
    assert "model_states.pt is cut off" in find_defect(zero)


# ---- which one, and what goes ----------------------------------------------------------------------------------------


def test_checkpoints_are_listed_by_their_step(tmp_path):
    for name in ("checkpoint-9", "checkpoint-10", "checkpoint-best", "checkpoint-7x", "runs"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").write_text("a file")
    assert list_checkpoints(tmp_path) == [str(tmp_path / "checkpoint-10"), str(tmp_path / "checkpoint-9")]
    assert list_checkpoints(tmp_path / "nowhere") == []


def make_folders(tmp_path, steps: dict[int, tuple[float, bool]]):
    """Folders with (seconds, whole)."""
    for step, (seconds, whole) in steps.items():
        folder = tmp_path / f"checkpoint-{step}"
        write_state(folder)
        torch.save({}, folder / "pytorch_model.bin")
        (complete_save if whole else begin_save)(folder)
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
    gone = delete_old_checkpoints(tmp_path, limit, path[3], path.get(best))
    assert gone == [path[step] for step in deleted]
    assert sorted(list_checkpoints(tmp_path)) == sorted(path[step] for step in steps if step not in deleted)


def test_a_rotation_reads_no_weights(tmp_path, monkeypatch):
    make_folders(tmp_path, {1: (10, True), 2: (20, True), 3: (30, True)})
    monkeypatch.setattr(module, "_compute_crcs", lambda *args: pytest.fail("gigabytes would be read at every save"))
    assert delete_old_checkpoints(tmp_path, 2, str(tmp_path / "checkpoint-3")) == [str(tmp_path / "checkpoint-1")]


def test_the_stock_rotation_would_have_deleted_the_only_whole_one(tmp_path):
    """Why we do it ourselves: among folders of one time, the Trainer keeps the highest number, whole or not."""
    from transformers.trainer_utils import rotate_checkpoints

    make_folders(tmp_path, {3: (5, True), 9: (5, False)})
    rotate_checkpoints(str(tmp_path), save_total_limit=1, use_mtime=True)
    assert find_newest_whole(list_checkpoints(tmp_path))[0] is None


# ---- in the Trainer --------------------------------------------------------------------------------------------------


def snapshot(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_resume_true_takes_the_newest_whole_one_names_the_broken_and_deletes_nothing(run, caplog):
    v0 = "random" if (run / "checkpoint-1" / "v0_init.json").exists() else "zeros"
    os.truncate(run / "checkpoint-3" / "optimizer.pt", 500)
    before = snapshot(run)
    trainer = make_trainer(run, **SAFE | {"v0_init": v0, "save_strategy": "no"})
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=True)
    assert f"{run / 'checkpoint-3'} (optimizer.pt " in caplog.text
    assert f"resumes from {run / 'checkpoint-2'}, the newest whole one. Nothing was deleted" in caplog.text
    assert snapshot(run) == before
    straight = train(run.parent / "straight", **RUN | {"v0_init": v0})
    assert_equal_weights(straight, trainer)


def test_a_broken_checkpoint_asked_for_by_name_is_one_clear_error(run):
    size = (run / "checkpoint-3" / "model.safetensors").stat().st_size
    os.truncate(run / "checkpoint-3" / "model.safetensors", size - 1)
    trainer = make_trainer(run, **SAFE)
    with pytest.raises(InputError) as error:
        trainer.train(resume_from_checkpoint=str(run / "checkpoint-3"))
    assert str(error.value) == (
        f"Can't find a valid checkpoint at {run / 'checkpoint-3'}: model.safetensors has {size - 1} of its {size} bytes; "
        f"the newest whole checkpoint is {run / 'checkpoint-2'}"
    )
    assert trainer.state.global_step == 0
    start = "Can't find a valid checkpoint at "
    for folder, end in (
        (run / "checkpoint-8", f"; the newest whole checkpoint is {run / 'checkpoint-2'}"),
        (run.parent / "nowhere" / "checkpoint-8", ""),
    ):
        with pytest.raises(InputError) as error:
            trainer.train(resume_from_checkpoint=folder)
        assert str(error.value) == f"{start}{folder}: there is no such folder{end}"
    begin_save(run.parent / "alone" / "checkpoint-8")
    with pytest.raises(InputError, match=r"no other checkpoint there is whole: start anew$"):
        trainer.train(resume_from_checkpoint=str(run.parent / "alone" / "checkpoint-8"))


class SafeStock(SafeCheckpointsMixin, Trainer):
    """The mixin alone; and its place does not matter."""


class SafeBehind(V0InitMixin, SafeCheckpointsMixin, Trainer):
    pass


@pytest.mark.parametrize(
    ("trainer_class", "names"),
    [(SafeStock, ("model.safetensors", "config.json")), (SafeBehind, ("optimizer.pt",))],
)
def test_wrong_bytes_make_a_resume_pass_over_to_the_older_one(tmp_path, caplog, trainer_class, names):
    kwargs = RUN | {"trainer_class": trainer_class, "stock": trainer_class is SafeStock}
    straight = train(tmp_path / "out", **kwargs)
    newest, older = tmp_path / "out" / "checkpoint-3", tmp_path / "out" / "checkpoint-2"
    for name in names:
        content = (newest / name).read_bytes()
        position = len(content) * 3 // 4
        (newest / name).write_bytes(content[:position] + bytes([content[position] ^ 1]) + content[position + 1 :])
        caplog.clear()
        trainer = make_trainer(tmp_path / "out", **kwargs | {"save_strategy": "no"}, model=make_gpt2(seed=5))
        with caplog.at_level(logging.WARNING, logger="hf_v0init"):
            trainer.train(resume_from_checkpoint=True)
        (warning,) = [r.getMessage() for r in caplog.records if r.name == "hf_v0init"]
        assert f"{newest} ({name} is damaged" in warning and f"resumes from {older}, the newest whole one" in warning
        assert_equal_weights(straight, trainer)
        with pytest.raises(InputError, match=rf"Can't find a valid checkpoint at {newest}: {name} is damaged"):
            trainer.train(resume_from_checkpoint=str(newest))
        (newest / name).write_bytes(content)


@pytest.mark.parametrize(
    ("edit", "by_name"),
    [(save_in_bf16, True), (reshard, False), (remove_optimizer, True), (save_optimizer_again, False)],
)
def test_a_checkpoint_changed_on_purpose_resumes_as_with_the_stock_trainer_and_says_so(
    runs, tmp_path, caplog, monkeypatch, edit, by_name
):
    monkeypatch.setattr("gc.collect", lambda: 0)  # the Trainer does it for every shard
    shutil.copytree(runs / "ours", tmp_path / "out")
    shutil.rmtree(tmp_path / "out" / "checkpoint-3")
    folder = tmp_path / "out" / "checkpoint-2"
    edit(folder)
    wanted = str(folder) if by_name else True
    resumed = []
    for kwargs in ({"trainer_class": SafeStock}, {}):
        trainer = make_trainer(
            tmp_path / "out", stock=True, model=make_gpt2(seed=5), **RUN | {"save_strategy": "no"} | kwargs
        )
        with caplog.at_level(logging.WARNING, logger="hf_v0init"):
            trainer.train(resume_from_checkpoint=wanted)
        resumed.append(trainer)
    assert_equal_weights(*resumed)
    warnings = [r.getMessage() for r in caplog.records if r.name == "hf_v0init"]
    assert len(warnings) == bool(ON_PURPOSE[edit])
    for warning in warnings:
        assert warning.startswith(f"{folder} is not as it was saved, and taken as it is: ")
        assert all(name in warning for name in ON_PURPOSE[edit])


def test_no_checkpoint_at_all_is_an_error_and_only_broken_ones_a_new_run(tmp_path, caplog):
    trainer = make_trainer(tmp_path / "a", **SAFE)
    for _ in range(2):  # without the folder, and with it
        with pytest.raises(InputError) as error:
            trainer.train(resume_from_checkpoint=True)
        assert str(error.value).startswith(f"No valid checkpoint found in output directory ({tmp_path / 'a'}): give ")
        (tmp_path / "a").mkdir(exist_ok=True)
    begin_save(tmp_path / "a" / "checkpoint-1")
    with caplog.at_level(logging.WARNING, logger="hf_v0init"):
        trainer.train(resume_from_checkpoint=True)
    assert f"checkpoint-1 ({CUT_OFF}); none is whole, so the run starts anew" in caplog.text
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
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
    assert trainer.args.save_total_limit == 2
    saved = torch.load(tmp_path / "checkpoint-3" / "training_args.bin", weights_only=False)
    assert saved.save_total_limit == 2
    begin_save(tmp_path / "checkpoint-9")
    resumed = make_trainer(tmp_path, **SAFE | {"save_total_limit": 1, "max_steps": 4})
    resumed.train(resume_from_checkpoint=True)
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path)] == ["checkpoint-4"]
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
    newest, passed_over = find_newest_whole(list_checkpoints(tmp_path))
    assert newest == str(tmp_path / "checkpoint-1")
    assert passed_over == {str(tmp_path / "checkpoint-2"): CUT_OFF}


class Prunes(TrainerCallback):
    """As some do on `on_save`: the optimizer's state is thrown away, an adapter saved beside the weights, a digit edited."""

    def on_save(self, args, state, control, **kwargs):
        folder = os.path.join(args.output_dir, f"checkpoint-{state.global_step}")
        os.remove(os.path.join(folder, "optimizer.pt"))
        torch.save({}, os.path.join(folder, "adapter_model.bin"))
        config = Path(folder, "config.json")
        config.write_text(config.read_text().replace('"n_inner": null', '"n_inner": 1234'))


def test_only_files_that_were_written_again_are_read_again(tmp_path, monkeypatch):
    write_state(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"weights")
    (tmp_path / "merges.txt").write_text("a b")
    stamps, read, compute = complete_save(tmp_path), [], module._compute_crcs
    monkeypatch.setattr(
        module, "_compute_crcs", lambda folder, names: (read.append(list(names)), compute(folder, names))[1]
    )
    assert module.update_record(tmp_path, stamps) == stamps and read == []
    (tmp_path / "merges.txt").unlink()
    (tmp_path / "v0_init.json").write_text("{}")
    later = module.update_record(tmp_path, stamps)
    assert read == [["v0_init.json"]]
    record = json.loads((tmp_path / SAVE_STATE_FILE).read_text())
    assert record["files"]["pytorch_model.bin"] == {"bytes": 7, "crc32": f"{zlib.crc32(b'weights'):08x}"}
    assert set(record["files"]) == set(later) == {"pytorch_model.bin", "trainer_state.json", "v0_init.json"}


@pytest.mark.parametrize("late", [False, True])
def test_what_callbacks_change_in_a_fresh_checkpoint_belongs_to_it(tmp_path, late):
    trainer = make_trainer(tmp_path, callbacks=[] if late else [Prunes()], **SAFE)
    if late:
        trainer.add_callback(Prunes())  # comes after ours
    trainer.train()
    for folder in list_checkpoints(tmp_path):
        assert inspect_checkpoint(folder) == (None, [])
        with open(os.path.join(folder, SAVE_STATE_FILE)) as file:
            assert {"adapter_model.bin"} == set(json.load(file)["files"]) & {"adapter_model.bin", "optimizer.pt"}


def test_what_is_pushed_is_marked_as_whole(tmp_path):
    pushed = []

    class Pushes(Trainer):
        def _push_from_checkpoint(self, checkpoint_folder):
            with open(os.path.join(checkpoint_folder, SAVE_STATE_FILE)) as file:
                pushed.append((json.load(file)["complete"], find_defect(checkpoint_folder), self.args.save_total_limit))

    class Ours(SafeCheckpointsMixin, V0InitMixin, Pushes):
        pass

    trainer = make_trainer(tmp_path, trainer_class=Ours, **RUN | {"save_total_limit": 2})
    trainer.args.push_to_hub = True
    trainer._finish_current_push = lambda: None
    trainer.train()
    assert pushed == [(True, None, 2)] * 3
    assert [os.path.basename(path) for path in list_checkpoints(tmp_path)] == ["checkpoint-3", "checkpoint-2"]
