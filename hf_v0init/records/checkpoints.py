"""Tells a whole checkpoint from one whose save was cut off. Looks at folders only: knows no Trainer and no torch.

A save of ours writes `save_state.json` twice: first `{"complete": false}`, before anything else in the folder is touched,
and when every file is on the disk `{"complete": true, "files": {name: bytes}}`. Both are written aside and renamed, so a
process that dies at any moment leaves a folder that says what it is. A checkpoint without that file (the stock Trainer's)
is judged by its contents: the Trainer writes `trainer_state.json` last, a safetensors header tells the file's length, and
the directory of a torch file stands at its end. One thing cannot be seen there: a stock save that was cut off while it
wrote over an older whole checkpoint of the same step.

Nothing here deletes, except `delete_old_checkpoints`, which does what `save_total_limit` asks for.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InputError

SAVE_STATE_FILE = "save_state.json"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
_TORCH_FILE = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|(.*/)?(pytorch_model|adapter_model|optimizer)\b[^/]*\.bin|"
    r"global_step\d+/.*\.pt"
)
_WEIGHTS = re.compile(
    r".+\.(safetensors|distcp|gguf|h5)|(pytorch_model|adapter_model|model).*\.(bin|pt|pth)|.*mp_rank.*\.pt"
)
# What people edit by hand or delete without harm: judged, where resuming reads it, by whether it can be read.
_TEXT = (".json", ".jsonl", ".txt", ".md", ".jinja", ".yaml", ".yml", ".py", ".tmp")

Judge = Callable[[str], "str | None"]


# ---- is it whole? ----------------------------------------------------------------------------------------------------


def find_defect(folder: str | os.PathLike) -> str | None:
    """Say in a few words what is wrong with a checkpoint folder, or None if a run can be resumed from it.

    Reads the sizes of the files, the headers of safetensors files and the directories at the end of torch files; no weight.
    Whether `optimizer.pt` and what goes with it are there at all is the choice of `save_only_model`, and no defect.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    try:
        sizes = _list_sizes(folder)
        record = _read_record(folder)
        if record is not None:
            defect = _find_difference(record, sizes)
            if defect is not None:
                return defect
        return _find_damage(folder, sizes, must_have_weights=record is None)
    except _Damage as damage:
        return str(damage)
    except OSError as error:
        return f"it cannot be read ({error})"


class _Damage(Exception):
    """A file that cannot be what it should be; the message is the defect."""


def _list_sizes(folder: Path) -> dict[str, int]:
    """The files of a folder and those below it: relative name -> bytes, links followed, other things left out."""
    sizes = {}
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.is_file():
                sizes[path.relative_to(folder).as_posix()] = path.stat().st_size
    return sizes


def _read_json(path: Path) -> dict:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Damage(f"{path.name} is damaged") from error
    if not isinstance(content, dict):
        raise _Damage(f"{path.name} is damaged")
    return content


def _read_record(folder: Path) -> dict | None:
    path = folder / SAVE_STATE_FILE
    return _read_json(path) if path.is_file() else None


def _find_difference(record: dict, sizes: dict[str, int]) -> str | None:
    if record.get("complete") is not True:
        return "its save was cut off"
    for name, size in record.get("files", {}).items():
        if name not in sizes:
            return f"{name} is missing (without {SAVE_STATE_FILE} it is judged by the files that are left)"
        if sizes[name] != size:
            return f"{name} has {sizes[name]} of its {size} bytes"
    return None


def _find_damage(folder: Path, sizes: dict[str, int], must_have_weights: bool) -> str | None:
    """Judge by contents alone."""
    if "trainer_state.json" not in sizes:
        return "trainer_state.json, which is written last, is missing"
    if not isinstance(_read_json(folder / "trainer_state.json").get("global_step"), int):
        return "trainer_state.json is damaged"
    if must_have_weights and not any(_WEIGHTS.fullmatch(os.path.basename(name)) for name in sizes):
        return "it holds no weights"
    for name in sizes:
        base = os.path.basename(name)
        if base.endswith(".safetensors"):
            _require_whole_safetensors(folder / name, name)
        elif _TORCH_FILE.fullmatch(name):
            _require_whole_torch_file(folder / name, name)
        elif base.endswith((".safetensors.index.json", ".bin.index.json")):
            _require_shards(folder / name, sizes)
        elif base.endswith(".distcp") and not sizes.get(os.path.join(os.path.dirname(name), ".metadata")):
            return f"{os.path.dirname(name)}/.metadata, which is written last, is missing"
        shard = _SHARD.fullmatch(base)
        if shard and not base.startswith("adapter_"):
            index = os.path.join(os.path.dirname(name), f"{shard[1]}{shard[2]}.index.json")
            if index not in sizes and os.path.join(os.path.dirname(name), shard[1] + shard[2]) not in sizes:
                return f"{index}, which is written last of the weights, is missing"
    top = {name.split("/")[0] for name in sizes}
    if any(re.fullmatch(r"optimizer(\.pt|\.bin|_\d+)", name) for name in top) and "scheduler.pt" not in top:
        return "scheduler.pt is missing, and without it the optimizer would not be loaded either"
    if any(re.fullmatch(r"global_step\d+", name) for name in top):  # DeepSpeed's own folder
        tag = (folder / "latest").read_text(encoding="utf-8").strip() if "latest" in sizes else None
        if tag not in top:
            return "the file 'latest', which DeepSpeed writes last, is missing or names no folder"
    return None


def _require_whole_safetensors(path: Path, name: str) -> None:
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise _Damage(f"{name} is cut off")
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for key, entry in header.items() if key != "__metadata__"]
            expected = 8 + length + max(ends, default=0)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise _Damage(f"{name} is damaged") from error
    if size != expected:
        raise _Damage(f"{name} has {size} of its {expected} bytes")


def _require_whole_torch_file(path: Path, name: str) -> None:
    with open(path, "rb") as file:
        start = file.read(2)
        if start[:1] == b"\x80":  # a plain pickle, which torch wrote before 1.6: its end cannot be told
            return
        if start != b"PK":
            raise _Damage(f"{name} is damaged" if start else f"{name} is empty")
        try:
            zipfile.ZipFile(file).close()
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise _Damage(f"{name} is cut off") from error


def _require_shards(path: Path, sizes: dict[str, int]) -> None:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise _Damage(f"{path.name} is damaged")
    present = {os.path.basename(name) for name in sizes}
    missing = sorted(set(shards.values()) - present)
    if missing:
        raise _Damage(f"{missing[0]}, which {path.name} names, is missing")


# ---- which one? ------------------------------------------------------------------------------------------------------


def list_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """List the `checkpoint-N` folders of a run, whole or not, the largest N first. Empty if there is no such folder."""
    if not os.path.isdir(output_dir):
        return []
    steps = {name: _CHECKPOINT.fullmatch(name) for name in os.listdir(output_dir)}
    found = [(int(match[1]), name) for name, match in steps.items() if match]
    paths = [os.path.join(output_dir, name) for _, name in sorted(found, reverse=True)]
    return [path for path in paths if os.path.isdir(path)]


def find_newest_whole(checkpoints: Iterable[str], judge: Judge = find_defect) -> tuple[str | None, dict[str, str]]:
    """Find the first whole one of `checkpoints` (newest first).

    Returns:
        The folder, or None; and those passed over before it: folder -> what is wrong with it.
    """
    passed_over = {}
    for folder in checkpoints:
        defect = judge(folder)
        if defect is None:
            return folder, passed_over
        passed_over[folder] = defect
    return None, passed_over


def require_whole(folder: str | os.PathLike, others: Iterable[str], judge: Judge = find_defect) -> None:
    """Refuse to resume from a checkpoint that is not whole.

    Args:
        others: the checkpoints from which the newest whole one is named in the message, newest first.

    Raises:
        InputError: says what is wrong with `folder` and which one to take instead.
    """
    defect = judge(str(folder))
    if defect is None:
        return
    newest, _ = find_newest_whole((o for o in others if os.path.abspath(o) != os.path.abspath(folder)), judge)
    remedy = f"the newest whole checkpoint is {newest}" if newest else "no other checkpoint there is whole: start anew"
    raise InputError(f"cannot resume from {folder}: {defect}; {remedy}")


def describe_passed_over(passed_over: dict[str, str], newest: str | None) -> str:
    """Say in one line which broken checkpoints were passed over and what the run does instead."""
    broken = ", ".join(f"{folder} ({defect})" for folder, defect in passed_over.items())
    instead = (
        f"the run resumes from {newest}, the newest whole one" if newest else "none is whole, so the run starts anew"
    )
    return f"broken checkpoints passed over: {broken}; {instead}. Nothing was deleted"


# ---- the two marks of a save, and the rotation -----------------------------------------------------------------------


def begin_save(folder: str | os.PathLike) -> None:
    """Mark a checkpoint folder as not whole, durably, before anything in it is written or deleted; makes the folder."""
    os.makedirs(folder, exist_ok=True)
    _write_record(Path(folder), {"complete": False})


def complete_save(folder: str | os.PathLike) -> None:
    """Bring every file of a checkpoint to the disk, then mark the folder as whole, with the sizes of its binary files."""
    folder = Path(folder)
    files = {}
    for name in sorted(_list_sizes(folder)):
        with open(folder / name, "rb") as file:
            _sync(file.fileno())
            if _is_recorded(name):
                files[name] = os.fstat(file.fileno()).st_size
    for parent, _, _ in os.walk(folder):
        _sync_folder(parent)
    _write_record(folder, {"complete": True, "files": files})
    _sync_folder(folder.absolute().parent)


def update_record(folder: str | os.PathLike) -> None:
    """List the files of a whole checkpoint again if callbacks added or took away some after its save."""
    folder = Path(folder)
    record = _read_record(folder)
    if record is None or record.get("complete") is not True:
        return
    sizes = {name: size for name, size in _list_sizes(folder).items() if _is_recorded(name)}
    if sizes != record.get("files"):
        complete_save(folder)


def delete_old_checkpoints(
    output_dir: str | os.PathLike, limit: int | None, newest: str, best: str | None = None
) -> list[str]:
    """Delete checkpoints until at most `limit` are left (more if `newest` and `best` are two), broken ones first.

    Which is old is a matter of time, as in the Trainer, so that a folder left by an abandoned run goes before one of this
    run; where the folders' times cannot be told apart, of the step. `newest`, just saved, and `best` always stay.

    Returns:
        The folders deleted, in order.
    """
    if limit is None or limit <= 0:
        return []
    folders = list_checkpoints(output_dir)[::-1]
    kept = {os.path.abspath(path) for path in (newest, best) if path is not None}
    excess = len(folders) - max(limit, len(kept))
    if excess <= 0:
        return []
    times = {folder: os.path.getmtime(folder) for folder in folders}
    if max(times.values()) - min(times.values()) >= 1.0:
        folders.sort(key=times.get)
    candidates = [folder for folder in folders if os.path.abspath(folder) not in kept]
    candidates.sort(key=lambda folder: find_defect(folder) is None)  # stable: broken ones, then by age
    for folder in candidates[:excess]:
        with contextlib.suppress(OSError):  # as the Trainer: what cannot be deleted stays
            begin_save(folder)  # a deletion cut off half-way leaves no folder that looks whole
            shutil.rmtree(folder, ignore_errors=True)
    return candidates[:excess]


def _is_recorded(name: str) -> bool:
    """Not what people edit, nor what a file system, a file manager or the Hub's client leaves behind in hidden files."""
    hidden = any(part.startswith(".") and part != ".metadata" for part in name.split("/"))
    return not hidden and not name.endswith(_TEXT)


def _write_record(folder: Path, record: dict) -> None:
    aside = folder / f"_{SAVE_STATE_FILE}.tmp"
    with open(aside, "w", encoding="utf-8") as file:
        json.dump(record, file, indent=1)
        file.write("\n")
        file.flush()
        _sync(file.fileno())
    os.replace(aside, folder / SAVE_STATE_FILE)
    _sync_folder(folder)


def _sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # cannot sync at all: no reason to stop a run
            raise


def _sync_folder(path: str | os.PathLike) -> None:
    """Bring a folder's entries to the disk; where folders cannot be opened (Windows) nothing happens."""
    with contextlib.suppress(OSError):
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
