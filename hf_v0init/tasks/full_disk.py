"""Tells an error of a full disk, which different libraries put into different words, from others."""

from __future__ import annotations

import errno
import os
import re
from pathlib import Path

from ..records.checkpoints import find_newest_valid, list_checkpoints

STORAGE_ERRNOS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def describe_full_disk(error: BaseException, output_dir: str | None) -> str | None:
    """Describe in one line an error that comes of a full disk, a quota or a limit on files; None for other errors.

    Args:
        output_dir: the run's, whose newest whole checkpoint is named.
    """
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    reason = next((reason for link in chain if (reason := _find_storage_reason(link))), None)
    if reason is None:
        return None
    line = f"{reason}; free some, and give the same command again"
    newest = None
    if output_dir is not None and Path(output_dir).is_dir():
        newest, _ = find_newest_valid(list_checkpoints(output_dir))
    return f"{line}: it goes on from {newest}, which is whole" if newest else f"{line} (no checkpoint was saved yet)"


def _find_storage_reason(error: BaseException) -> str | None:
    text = " ".join(str(error).split())
    if isinstance(error, OSError) and error.errno in STORAGE_ERRNOS:
        at = f" at {error.filename}" if error.filename else ""
        return f"{os.strerror(error.errno).lower()}{at}"
    for number in STORAGE_ERRNOS:  # the Rust of safetensors, and Arrow, put the error of the system into words
        if os.strerror(number) in text or f"os error {number})" in text or f"code: {number}," in text:
            return os.strerror(number).lower()
    if isinstance(error, RuntimeError) and re.search(
        "PytorchStreamWriter failed|inline_container|unexpected pos", text
    ):
        return "a file could not be written to its end, so there is no space left on the disk, or a quota is used up"
    return None
