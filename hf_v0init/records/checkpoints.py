"""Tells a whole checkpoint from a damaged one. Looks at folders only: knows no Trainer and no torch.

A save of ours writes `save_state.json` twice: first `{"complete": false}`, before anything else in the folder is touched,
and when every file is on the disk `{"complete": true, "files": {name: {"bytes": ..., "crc32": ...}}}`. Both are written
aside and renamed, so a process that dies at any moment leaves a folder that says what it is. Later the files are held
against that list. People do change checkpoints on purpose, so the rule is:

| a file against the list | is taken for |
| --- | --- |
| same size, same CRC | as saved |
| same size, other bytes | damaged: bad disks, power failures and copies leave the length as it was, a re-save hardly ever |
| the same, but a torch file with other entries, each as its own CRC says | saved again on purpose (torch pads, so sizes often stay) |
| other size, and it shows by itself that it is whole (a safetensors header with the file's length, the directory at the end of a torch file, JSON that parses, templates and code people write) | changed on purpose |
| other size, anything else | damaged |
| gone, where a run can do without it (optimizer, schedule, scaler, random states, texts), or weights of which other whole ones stand there | removed or re-saved on purpose |
| gone, anything else | damaged |

Who changed bytes on purpose and kept the size (a digit in config.json, averaged weights) deletes `save_state.json`. A
checkpoint without it (the stock Trainer's) is judged by its contents: the Trainer writes `trainer_state.json` last, a
safetensors header tells the file's length, the directory of a torch file stands at its end, JSON parses. What cannot be
seen there: other bytes at the same size, and a stock save that was cut off over an older whole checkpoint of the same step.

Nothing here deletes, except `delete_old_checkpoints`, which does what `save_total_limit` asks for.
"""

import contextlib
import errno
import json
import os
import re
import shutil
import zipfile
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from ..errors import InputError

SAVE_STATE_FILE = "save_state.json"
NO_FOLDER = "there is no such folder"
_REMEDY = f" (if that was on purpose, delete its {SAVE_STATE_FILE}: then it is judged by the files that are left)"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(\.safetensors|\.bin)")
_TORCH_FILE = re.compile(
    r"(optimizer|scheduler|scaler)\.pt|rng_state(_\d+)?\.pth|(.*/)?(pytorch_model|adapter_model|optimizer)\b[^/]*\.bin|"
    r"global_step\d+/.*\.pt"
)
_WEIGHTS = re.compile(
    r".+\.(safetensors|distcp|gguf|h5)|(pytorch_model|adapter_model|model).*\.(bin|pt|pth)|.*mp_rank.*\.pt"
)
_OPTIMIZER_FOLDER = re.compile(r"optimizer_\d+")  # FSDP's
_MODEL_FILE = re.compile(r"(adapter_model|pytorch_model|model)\b[^/]*\.(safetensors|bin)")
# What a run resumes without, if with other random numbers or a new optimizer.
_DISPENSABLE = re.compile(
    r"(optimizer|scheduler|scaler)\.(pt|bin)|rng_state(_\d+)?\.pth|training_args\.bin|.*\.(json|txt|jinja|ya?ml|py)"
)
_TEMPLATES_AND_CODE = (".jinja", ".yaml", ".yml", ".py")  # people write them: of any length
_NOTES = (".md", ".jsonl", ".log", ".tmp")  # never read by a run that resumes
_BLOCK = 1 << 22  # bytes

Judge = Callable[[str], "str | None"]
Stamps = dict[str, tuple[int, int, int]]  # (inode, bytes, time of change in ns) by name: tells a file written again


# ---- is it whole? ----------------------------------------------------------------------------------------------------


def find_defect(folder: str | os.PathLike, read_bytes: bool = True) -> str | None:
    """Say in a few words what is wrong with a checkpoint folder, or None if a run can be resumed from it.

    Whether `optimizer.pt` and what goes with it are there at all is the choice of `save_only_model`, or of whoever removed
    them, and no defect.

    Args:
        read_bytes: hold every byte against the CRCs in `save_state.json`, which takes as long as reading the files does.
            Without it: only the names, the sizes, the headers of safetensors files and the directories of torch files.
    """
    return inspect_checkpoint(folder, read_bytes)[0]


def inspect_checkpoint(folder: str | os.PathLike, read_bytes: bool = True) -> tuple[str | None, list[str]]:
    """Judge a checkpoint folder.

    Returns:
        What `find_defect` does; and where that is None, what was changed on purpose since the save, a phrase per file.
    """
    folder, changes = Path(folder), []
    if not folder.is_dir():
        return NO_FOLDER, []
    try:
        sizes = _list_sizes(folder)
        record = _read_record(folder)
        files = {} if record is None else record["files"]
        if record is not None:
            if record.get("complete") is not True:
                return "its save was cut off", []
            changes = _compare_sizes(folder, files, sizes)
        had_weights = record is None or any(_is_weights(name) for name in files)
        _require_contents(folder, sizes, must_have_weights=had_weights)
        if read_bytes:
            changes += _compare_bytes(folder, files, sizes)
    except _Damage as damage:
        return str(damage), []
    except OSError as error:
        return f"it cannot be read ({error})", []
    return None, changes


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


def _read_json(path: Path, needs_keys: bool = True):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise _Damage(f"{path.name} is damaged") from error
    if needs_keys and not isinstance(content, dict):
        raise _Damage(f"{path.name} is damaged")
    return content


def _read_record(folder: Path) -> dict | None:
    path = folder / SAVE_STATE_FILE
    if not path.is_file():
        return None
    record = _read_json(path)
    files = record.get("files", {})
    if not all(isinstance(saved, dict) and {"bytes", "crc32"} <= saved.keys() for saved in files.values()):
        files = {}  # 0.1.0 knew no CRCs: by contents, then
    return record | {"files": files}


def _compare_sizes(folder: Path, files: dict[str, dict], sizes: dict[str, int]) -> list[str]:
    """What was changed on purpose, seen by names and sizes; raises `_Damage` where the table above says so."""
    changes = []
    for name, saved in files.items():
        if name not in sizes:
            if not _may_go(name, sizes):
                raise _Damage(f"{name} is missing{_REMEDY}")
            anew = ", so optimizer and schedule start anew" if name.startswith("optimizer") else ""
            changes.append(f"{name} was removed{anew}")
        elif sizes[name] != saved["bytes"]:
            try:
                shows = _shows_that_it_is_whole(folder / name, name)
            except _Damage:
                shows = False
            if not shows:
                raise _Damage(f"{name} has {sizes[name]} of its {saved['bytes']} bytes")
            changes.append(f"{name} was changed ({saved['bytes']} bytes when saved, {sizes[name]} now)")
    return changes


def _may_go(name: str, sizes: dict[str, int]) -> bool:
    """Whether a checkpoint whose file `name` is gone can be whole."""
    parent, base = os.path.split(name)
    if _OPTIMIZER_FOLDER.fullmatch(parent):
        return not any(other.startswith(f"{parent}/") for other in sizes)
    if _DISPENSABLE.fullmatch(name):
        return True
    saved = _MODEL_FILE.fullmatch(base)
    others = [_MODEL_FILE.fullmatch(os.path.basename(other)) for other in sizes if os.path.dirname(other) == parent]
    return saved is not None and any(
        other and (other[1] == "adapter_model") == (saved[1] == "adapter_model") for other in others
    )


def _shows_that_it_is_whole(path: Path, name: str) -> bool:
    """Judge one file by itself: raises `_Damage` if it is none, False if such a file does not tell."""
    if name.endswith(_TEMPLATES_AND_CODE):
        return path.stat().st_size > 0
    if name.endswith(".json"):
        _read_json(path, needs_keys=False)
        return True
    if name.endswith(".safetensors"):
        _require_whole_safetensors(path, name)
        return True
    if name.endswith((".pt", ".pth", ".bin")):
        return _require_whole_torch_file(path, name)
    return False


def _compare_bytes(folder: Path, files: dict[str, dict], sizes: dict[str, int]) -> list[str]:
    """As `_compare_sizes`, for the files of unchanged size, by their bytes."""
    names, changes = [name for name, saved in files.items() if sizes.get(name) == saved["bytes"]], []
    for name, crc in _compute_crcs(folder, names).items():
        if crc == files[name]["crc32"]:
            continue
        if not _was_saved_again(folder / name, files[name].get("entries")):
            raise _Damage(f"{name} is damaged: of its {sizes[name]} bytes some are not what was saved{_REMEDY}")
        changes.append(f"{name} was changed (of unchanged size)")
    return changes


def _read_entries(path: Path) -> str | None:
    """A CRC-32 of the names and CRCs that the directory of a torch file holds; None for other files."""
    if not path.name.endswith((".pt", ".pth", ".bin")) or not zipfile.is_zipfile(path):
        return None
    with zipfile.ZipFile(path) as file:
        entries = [(entry.filename, entry.CRC) for entry in file.infolist()]
    return f"{zlib.crc32(repr(entries).encode()):08x}"


def _was_saved_again(path: Path, entries: str | None) -> bool:
    """Whether a torch file holds other entries than when it was saved, every one as its own CRC says."""
    try:
        if entries is None or _read_entries(path) in (None, entries):
            return False
        with zipfile.ZipFile(path) as file:
            return file.testzip() is None
    except (zipfile.BadZipFile, ValueError, NotImplementedError, RuntimeError, EOFError):
        return False


def _compute_crcs(folder: Path, names: Iterable[str]) -> dict[str, str]:
    """CRC-32 of files as eight hexadecimal digits, by name; in threads, since zlib lets go of the interpreter."""

    def compute(name: str) -> str:
        crc = 0
        with open(folder / name, "rb", buffering=0) as file:
            while block := file.read(_BLOCK):
                crc = zlib.crc32(block, crc)
        return f"{crc:08x}"

    names = list(names)
    with ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1)) as pool:
        return dict(zip(names, pool.map(compute, names), strict=True))


def _require_contents(folder: Path, sizes: dict[str, int], must_have_weights: bool) -> None:
    """Judge by contents alone, without reading weights: raises `_Damage`."""
    if "trainer_state.json" not in sizes:
        raise _Damage("trainer_state.json, which is written last, is missing")
    if not isinstance(_read_json(folder / "trainer_state.json").get("global_step"), int):
        raise _Damage("trainer_state.json is damaged")
    if must_have_weights and not any(_is_weights(name) for name in sizes):
        raise _Damage("it holds no weights")
    for name in sizes:
        base = os.path.basename(name)
        if base.endswith(".safetensors"):
            _require_whole_safetensors(folder / name, name)
        elif _TORCH_FILE.fullmatch(name):
            _require_whole_torch_file(folder / name, name)
        elif base.endswith((".safetensors.index.json", ".bin.index.json")):
            if name.removesuffix(".index.json") not in sizes:  # else the Trainer loads that one file
                _require_shards(folder / name, sizes)
        elif base.endswith(".json") and _is_recorded(name):
            _read_json(folder / name, needs_keys=False)
        elif base.endswith(".distcp") and not sizes.get(os.path.join(os.path.dirname(name), ".metadata")):
            raise _Damage(f"{os.path.dirname(name)}/.metadata, which is written last, is missing")
        shard = _SHARD.fullmatch(base)
        if shard and not base.startswith("adapter_"):
            index = os.path.join(os.path.dirname(name), f"{shard[1]}{shard[2]}.index.json")
            if index not in sizes and os.path.join(os.path.dirname(name), shard[1] + shard[2]) not in sizes:
                raise _Damage(f"{index}, which is written last of the weights, is missing")
    top = {name.split("/")[0] for name in sizes}
    if any(re.fullmatch(r"optimizer(\.pt|\.bin|_\d+)", name) for name in top) and "scheduler.pt" not in top:
        raise _Damage("scheduler.pt is missing, and without it the optimizer would not be loaded either")
    if any(re.fullmatch(r"global_step\d+", name) for name in top):  # DeepSpeed's own folder
        tag = (folder / "latest").read_text(encoding="utf-8").strip() if "latest" in sizes else None
        if tag not in top:
            raise _Damage("the file 'latest', which DeepSpeed writes last, is missing or names no folder")


def _is_weights(name: str) -> bool:
    return not name.startswith("optimizer") and _WEIGHTS.fullmatch(os.path.basename(name)) is not None


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


def _require_whole_torch_file(path: Path, name: str) -> bool:
    """Raise `_Damage` unless it is whole; False where that cannot be told."""
    with open(path, "rb") as file:
        start = file.read(2)
        if start[:1] == b"\x80":  # a plain pickle, which torch wrote before 1.6: its end cannot be told
            return False
        if start != b"PK":
            raise _Damage(f"{name} is damaged" if start else f"{name} is empty")
        try:
            zipfile.ZipFile(file).close()
        except (zipfile.BadZipFile, ValueError, OSError) as error:
            raise _Damage(f"{name} is cut off") from error
    return True


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
        InputError: says what is wrong with `folder` and which one to take instead, after the stock Trainer's phrase.
    """
    defect = judge(str(folder))
    if defect is None:
        return
    newest, _ = find_newest_whole((o for o in others if os.path.abspath(o) != os.path.abspath(folder)), judge)
    if newest is not None:
        defect += f"; the newest whole checkpoint is {newest}"
    elif defect != NO_FOLDER:
        defect += "; no other checkpoint there is whole: start anew"
    raise InputError(f"Can't find a valid checkpoint at {folder}: {defect}")  # begins as the Trainer's does


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


def complete_save(folder: str | os.PathLike) -> Stamps:
    """Bring every file of a checkpoint to the disk, then mark the folder as whole, with sizes and CRCs of its files.

    Returns:
        What `update_record` needs to see later changes.
    """
    return _complete(Path(folder), {}, {})


def update_record(folder: str | os.PathLike, stamps: Stamps) -> Stamps:
    """List the files of a whole checkpoint again if callbacks added, changed or took away some since `complete_save`.

    Only files that were written again are read again.
    """
    folder = Path(folder)
    record = _read_record(folder)
    if record is None or record.get("complete") is not True or _read_stamps(folder) == stamps:
        return stamps
    return _complete(folder, record["files"], stamps)


def _complete(folder: Path, known: dict[str, dict], known_stamps: Stamps) -> Stamps:
    stamps = _read_stamps(folder)
    kept = {name for name in known if name in stamps and stamps[name] == known_stamps.get(name)}
    for name in _list_sizes(folder).keys() - kept:
        with open(folder / name, "rb") as file:
            _sync(file.fileno())
    for parent, _, _ in os.walk(folder):
        _sync_folder(parent)
    crcs = _compute_crcs(folder, [name for name in stamps if name not in kept])
    files = {}
    for name, (_, size, _) in stamps.items():
        if name in kept:
            files[name] = known[name]
            continue
        files[name] = {"bytes": size, "crc32": crcs[name]}
        entries = _read_entries(folder / name)
        if entries is not None:
            files[name]["entries"] = entries
    _write_record(folder, {"complete": True, "files": files})
    _sync_folder(folder.absolute().parent)
    return stamps


def _read_stamps(folder: Path) -> Stamps:
    names = sorted(name for name in _list_sizes(folder) if _is_recorded(name))
    return {name: (s.st_ino, s.st_size, s.st_mtime_ns) for name in names for s in [(folder / name).stat()]}


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
    broken_first = [
        find_defect(folder, read_bytes=False) is None for folder in candidates
    ]  # not gigabytes at each save
    candidates = [folder for _, folder in sorted(zip(broken_first, candidates, strict=True), key=lambda pair: pair[0])]
    for folder in candidates[:excess]:
        with contextlib.suppress(OSError):  # as the Trainer: what cannot be deleted stays
            begin_save(folder)  # a deletion cut off half-way leaves no folder that looks whole
            shutil.rmtree(folder, ignore_errors=True)
    return candidates[:excess]


def _is_recorded(name: str) -> bool:
    """Not notes, nor our own mark, nor what a file system, a file manager or the Hub's client leaves in hidden files."""
    hidden = any(part.startswith(".") and part != ".metadata" for part in name.split("/"))
    return not hidden and not name.endswith(_NOTES) and name != SAVE_STATE_FILE


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
