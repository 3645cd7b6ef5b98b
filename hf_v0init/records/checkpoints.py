"""Tells which checkpoints a run can be resumed from, wherever a save was cut off. Knows no Trainer and no torch.

`begin_save` puts a mark, the file `_save_in_progress`, into the folder before anything else in it is touched; `complete_save` takes it away
when every file of every process is on the disk. A checkpoint is valid if it has no mark, and has `trainer_state.json`, which the Trainer
writes last: so the stock Trainer's are judged as well.
"""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Iterable
from pathlib import Path

from ..errors import InputError
from .run_files import STATE_FILE

MARK = "_save_in_progress"  # pushes leave out names that begin with _
CUT_OFF = "its save was cut off"

_CANNOT_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.EBADF)  # file systems without fsync: no reason to stop a run


def find_defect(folder: str | os.PathLike) -> str | None:
    """Say in a few words why a run cannot be resumed from a checkpoint folder; None if it can."""
    folder = Path(folder)
    if not folder.is_dir():
        return "there is no such folder"
    if (folder / MARK).exists():
        return CUT_OFF
    try:
        json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))["global_step"]
    except FileNotFoundError:
        return f"{STATE_FILE}, which is written last, is missing"
    except (OSError, ValueError, KeyError, TypeError):
        return f"{STATE_FILE} is damaged"
    return None


def list_checkpoints(output_dir: str | os.PathLike) -> list[str]:
    """List the `checkpoint-N` folders of a run, valid or not, the largest N first; empty if there is no such folder."""
    paths = [path for path in Path(output_dir).glob("checkpoint-*") if path.is_dir()]
    numbered = [(int(match[1]), str(path)) for path in paths if (match := re.fullmatch(r"checkpoint-(\d+)", path.name))]
    return [path for _, path in sorted(numbered, reverse=True)]


def find_newest_valid(checkpoints: Iterable[str]) -> tuple[str | None, str]:
    """Find the first valid one of `checkpoints` (newest first).

    Returns:
        The folder, or None; and a line that names those skipped before it and why, "" if none was.
    """
    newest, skipped = None, []
    for folder in checkpoints:
        defect = find_defect(folder)
        if defect is None:
            newest = folder
            break
        skipped.append(f"{folder} ({defect})")
    instead = f"resuming from {newest}, the newest valid one" if newest else "none is valid: starting from scratch"
    return newest, f"skipped checkpoints: {', '.join(skipped)}; {instead}. Nothing was deleted" if skipped else ""


def require_valid(folder: str | os.PathLike) -> None:
    """Refuse to resume from a checkpoint that is not valid.

    Raises:
        InputError: what is wrong with `folder`, and which one beside it to take instead.
    """
    defect = find_defect(folder)
    if defect is not None:
        newest, _ = find_newest_valid(list_checkpoints(Path(folder).absolute().parent))
        instead = f"; the newest valid checkpoint is {newest}" if newest else ""
        # begins as the Trainer's does
        raise InputError(f"Can't find a valid checkpoint at {folder}: {defect}{instead}")


def begin_save(folder: str | os.PathLike) -> None:
    """Mark a checkpoint folder as not complete, durably, before anything in it is written or deleted; make the folder."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, MARK), "w"):
        pass
    _sync(folder)


def complete_save(folder: str | os.PathLike) -> None:
    """Bring every file of a checkpoint to the disk, then take its mark away."""
    for parent, _, names in os.walk(folder):
        for name in names:
            _sync(Path(parent, name))
        _sync(parent)
    Path(folder, MARK).unlink(missing_ok=True)
    _sync(folder)
    _sync(Path(folder).absolute().parent)


def delete_old_checkpoints(
    output_dir: str | os.PathLike, limit: int | None, newest: str, best: str | None = None
) -> None:
    """Delete checkpoints until at most `limit` are left (more if `newest` and `best` are two), broken ones first.

    Old is what was saved earlier, as in the Trainer, so that a folder left by an abandoned run goes before one of this run;
    within a second, the lower step. `newest`, which was just saved, and `best` always stay.
    """
    kept = {os.path.abspath(path) for path in (newest, best) if path is not None}
    folders = list_checkpoints(output_dir)[::-1] if limit else []
    excess = max(0, len(folders) - max(limit or 0, len(kept)))
    others = [folder for folder in folders if os.path.abspath(folder) not in kept]
    others.sort(key=lambda folder: (find_defect(folder) is None, int(os.path.getmtime(folder))))
    for folder in others[:excess]:
        delete_checkpoint(folder)


def delete_checkpoint(folder: str | os.PathLike) -> None:
    """Delete a checkpoint; as in the Trainer, what cannot be deleted stays. Cut off, it leaves nothing that looks valid."""
    with contextlib.suppress(OSError):
        begin_save(folder)
        Path(folder, STATE_FILE).unlink(missing_ok=True)  # the mark may go first
        _sync(folder)
        shutil.rmtree(folder, ignore_errors=True)


def _sync(path: str | os.PathLike) -> None:
    """Bring a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _CANNOT_SYNC:
            raise
    finally:
        os.close(descriptor)
