"""Writes the two texts of these comparisons that are made, not fetched, below `outputs/`; from the repository's root:

    python configs/compare/measured_length/write_data.py

`demo_pairs/{train,validation}.tsv`: the demo's sentence pairs, seed 1. `ptb_characters/{train,valid}.txt`: Penn Treebank with its characters
as words, from `data/ptb`, left out where that is not there.
"""

import gzip
from pathlib import Path

from hf_v0init.tasks.translation.embedded_corpus import generate_embedded_corpus

PTB = Path("data/ptb")


def main() -> None:
    """Write them."""
    corpus = generate_embedded_corpus(12_000, seed=1)
    folder = Path("outputs/demo_pairs")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = [f"{row['source']}\t{row['target']}\n" for row in corpus[split]]
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
    if not PTB.is_dir():
        print(f"{PTB} is not there (configs/README.md says what to fetch), so no ptb_characters")
        return
    folder = Path("outputs/ptb_characters")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "valid"):
        with gzip.open(PTB / f"ptb.{split}.txt.gz", "rt", encoding="utf-8") as sentences:
            lines = [" ".join("_" if c == " " else c for c in sentence.strip()) + "\n" for sentence in sentences]
        (folder / f"{split}.txt").write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
