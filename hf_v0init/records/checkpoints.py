"""Tells which checkpoints a run can be resumed from, wherever a save was cut off. Knows no Trainer and no torch.

A save has one mark, `save_state.json`. `begin_save` writes `{"complete": false}` before anything else in the folder is
touched. When every file of every process is on the disk, `complete_save` replaces it by
`{"complete": true, "files": {name: bytes}}`. Both are written aside and renamed.

- With a mark, a checkpoint is valid if the mark says complete and every file it lists is there in its size. Files that
  are added later do not matter. Who changes a listed file on purpose deletes the mark.
- Without one (the stock Trainer's), it is valid if it has `trainer_state.json`, which the Trainer writes last.

Nothing here deletes but `delete_checkpoint`, and `delete_old_checkpoints`, which does what `save_total_limit` asks for.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

from ..errors import InputError

SAVE_STATE_FILE = "save_state.json"
STATE_FILE = "trainer_state.json"
NO_FOLDER = "there is no such folder"

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # file systems without fsync: no reason to stop a run

Judge = Callable[[str], "str | None"]


def find_defect(folder: str | os.PathLike) -> str | None:
    """Say in a few words why a run cannot be resumed from a checkpoint folder; None if it can.

    Whether `optimizer.pt` was saved at all is the choice of `save_only_model`, and no defect.
    """
    folder = Path(folder)
    if not folder.is_dir():
        return NO_FOLDER
    try:
        mark = _read_json(folder / SAVE_STATE_FILE)
        if mark is not None and mark.get("complete") is not True:
            return "its save was cut off"
        for name, saved in ({} if mark is None else mark.get("files", {})).items():
            size = saved["bytes"] if isinstance(saved, dict) else saved  # 0.2 listed CRCs too
            if not (folder / name).is_file():
                return f"{name} is missing (if that was on purpose, delete {SAVE_STATE_FILE})"
            found = (folder / name).stat().st_size
            if found != size:
                return f"{name} has {found} bytes instead of {size} (if that was on purpose, delete {SAVE_STATE_FILE})"
        state = _read_json(folder / STATE_FILE)
        if state is None:
            return f"{STATE_FILE}, which is written last, is missing"
        return None if isinstance(state.get("global_step"), int) else f"{STATE_FILE} is damaged"
    except ValueError as error:
        return str(error)
    except OSError as error:
        return f"it cannot be read ({error})"


def list_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """List the `checkpoint-N` folders of a run, valid or not, the largest N first; empty if there is no such folder."""
    if not os.path.isdir(output_dir):
        return []
    matches = [match for name in os.listdir(output_dir) if (match := _CHECKPOINT.fullmatch(name))]
    paths = [os.path.join(output_dir, match[0]) for match in sorted(matches, key=lambda match: -int(match[1]))]
    return [path for path in paths if os.path.isdir(path)]


def find_newest_valid(checkpoints: Iterable[str], judge: Judge = find_defect) -> tuple[str | None, dict[str, str]]:
    """Find the first valid one of `checkpoints` (newest first).

    Returns:
        The folder, or None; and those skipped before it: folder -> what is wrong with it.
    """
    skipped = {}
    for folder in checkpoints:
        defect = judge(folder)
        if defect is None:
            return folder, skipped
        skipped[folder] = defect
    return None, skipped


def require_valid(folder: str | os.PathLike, others: Iterable[str], judge: Judge = find_defect) -> None:
    """Refuse to resume from a checkpoint that is not valid.

    Args:
        others: the checkpoints of which the newest valid one is named in the message, newest first.

    Raises:
        InputError: what is wrong with `folder` and which one to take instead, after the stock Trainer's phrase.
    """
    defect = judge(str(folder))
    if defect is None:
        return
    newest, _ = find_newest_valid((o for o in others if os.path.abspath(o) != os.path.abspath(folder)), judge)
    if newest is not None:
        defect += f"; the newest valid checkpoint is {newest}"
    elif defect != NO_FOLDER:
        defect += "; no other checkpoint there is valid: start from scratch"
    raise InputError(f"Can't find a valid checkpoint at {folder}: {defect}")  # begins as the Trainer's does


def describe_skipped(skipped: dict[str, str], newest: str | None) -> str:
    """Say in one line which checkpoints were skipped and what the run does instead."""
    broken = ", ".join(f"{folder} ({defect})" for folder, defect in skipped.items())
    instead = f"resuming from {newest}, the newest valid one" if newest else "none is valid: starting from scratch"
    return f"skipped checkpoints: {broken}; {instead}. Nothing was deleted"


def begin_save(folder: str | os.PathLike) -> None:
    """Mark a checkpoint folder as not complete, durably, before anything in it is written or deleted; make the folder."""
    os.makedirs(folder, exist_ok=True)
    _write_mark(Path(folder), {"complete": False})


def complete_save(folder: str | os.PathLike) -> None:
    """Bring every file of a checkpoint to the disk, then mark the folder as complete; again, if files have changed since."""
    folder, sizes = Path(folder), {}
    for parent, _, names in os.walk(folder):
        for path in (Path(parent, name) for name in names):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and name != SAVE_STATE_FILE:
                _sync(path)
                if path.suffix != ".md":  # people edit model cards
                    sizes[name] = path.stat().st_size
        _sync(parent)
    _write_mark(folder, {"complete": True, "files": dict(sorted(sizes.items()))})
    _sync(folder.absolute().parent)


def delete_old_checkpoints(
    output_dir: str | os.PathLike, limit: int | None, newest: str, best: str | None = None
) -> list[str]:
    """Delete checkpoints until at most `limit` are left (more if `newest` and `best` are two), broken ones first.

    Old is what was saved earlier, as in the Trainer, so that a folder left by an abandoned run goes before one of this run;
    within a second, the lower step. `newest`, which was just saved, and `best` always stay.

    Returns:
        The folders deleted, in order.
    """
    kept = {os.path.abspath(path) for path in (newest, best) if path is not None}
    folders = list_checkpoints(output_dir)[::-1]
    excess = len(folders) - max(limit or 0, len(kept))
    if not limit or limit < 0 or excess <= 0:
        return []
    candidates = [folder for folder in folders if os.path.abspath(folder) not in kept]
    candidates.sort(key=lambda folder: (find_defect(folder) is None, int(os.path.getmtime(folder))))
    for folder in candidates[:excess]:
        delete_checkpoint(folder)
    return candidates[:excess]


def delete_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint; as in the Trainer, what cannot be deleted stays. Cut off, it leaves nothing that looks valid."""
    with contextlib.suppress(OSError):
        begin_save(folder)
        Path(folder, STATE_FILE).unlink(missing_ok=True)  # before the mark goes, without which this file decides
        _sync(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _read_json(path: Path) -> dict | None:
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path.name} is damaged")
    return content


def _write_mark(folder: Path, mark: dict) -> None:
    aside = folder / f"_{SAVE_STATE_FILE}.tmp"
    aside.write_text(json.dumps(mark, indent=1) + "\n", encoding="utf-8")
    _sync(aside)
    os.replace(aside, folder / SAVE_STATE_FILE)
    _sync(folder)


def _sync(path: str | os.PathLike) -> None:
    """Bring a file, or the names in a folder, to the disk; folders that cannot be opened (Windows) are left."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except PermissionError:
        if os.path.isdir(path):
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
