"""What is not in the base installation: which extra brings it, and the one line that says so when it is absent."""

from __future__ import annotations

import importlib.util

from .errors import InputError

# Extra -> the packages that code of ours imports by this name. pyproject.toml holds the versions; a test keeps the two together.
EXTRAS: dict[str, tuple[str, ...]] = {
    "scripts": ("datasets", "sacrebleu", "tokenizers"),
    "compare": ("pandas", "scipy", "matplotlib", "jinja2", "markdown_it", "filelock", "psutil"),
    "demo": ("matplotlib",),
    "images": ("PIL", "sklearn", "torchmetrics"),
    "fid": ("torch_fidelity",),
    "iwslt": ("sacremoses",),
}


class MissingExtraError(InputError, ImportError):
    """A package of an extra is not installed; the message names the `pip install` to type.

    An `InputError`, so that commands and scripts end with one line, and an `ImportError` that names the module that
    could not be imported, so that `python -m` of such a module ends with one line too.
    """

    def __init__(self, message: str, name: str | None = None) -> None:
        super().__init__(message)
        self.name = name


def require_extra(extra: str, *packages: str, importing: str | None = None, alternative: str = "") -> None:
    """Do nothing if the packages of an extra can be imported; imports none of them.

    Args:
        extra: a key of `EXTRAS`.
        packages: the ones needed, by the name they are imported by; without any, all of the extra.
        importing: the module of ours that cannot be imported without them.
        alternative: what to do without them, such as "give --no-tokenize".

    Raises:
        MissingExtraError: one of them is not installed.
    """
    missing = [name for name in packages or EXTRAS[extra] if importlib.util.find_spec(name) is None]
    if missing:
        verb = "is" if len(missing) == 1 else "are"
        line = describe_missing(extra, f"{', '.join(missing)} {verb} not installed")
        raise MissingExtraError(f"{line}, or {alternative}" if alternative else line, importing)


def describe_missing(extra: str, what: str) -> str:
    """Return the line that names the remedy: `what`, then the `pip install` to type."""
    return f"{what}; type: pip install 'hf_v0init[{extra}]'"
