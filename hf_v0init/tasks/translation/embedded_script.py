"""Runs the translation script on the corpus that the package generates, so that nothing has to be downloaded.

python -m hf_v0init.tasks.translation.embedded_script --do_train --do_eval --max_steps 50 --output_dir outputs/embedded

All flags of the translation script but those that name data. The corpus is the same for every seed.
"""

import tempfile
from pathlib import Path

from ..script_support import run_script
from . import script as run_translation
from .embedded_corpus import generate_embedded_corpus

NUM_PAIRS = 2000  # 1,800 for training, 100 each for validation and test


def write_corpus(folder: Path) -> dict[str, Path]:
    """Write the corpus as files of source<TAB>target lines; return the file of each flag."""
    files = {}
    for role, pairs in generate_embedded_corpus(NUM_PAIRS, seed=0).items():
        files[f"{role}_file"] = folder / f"{role}.tsv"
        lines = (f"{source}\t{target}\n" for source, target in zip(pairs["source"], pairs["target"], strict=True))
        files[f"{role}_file"].write_text("".join(lines), encoding="utf-8")
    return files


def main(argv: list[str]) -> None:
    """Write the corpus into a temporary folder and run the script on it."""
    with tempfile.TemporaryDirectory() as folder:
        flags = [f"--{flag}={file}" for flag, file in write_corpus(Path(folder)).items()]
        run_translation.main([*argv, *flags])


if __name__ == "__main__":
    run_script(main)
