"""Writes the demo's sentence pairs, seed 1, as the files that demo.yaml and mlm.yaml read, below `outputs/`; from the repository's root:

python configs/compare/v0_decay/write_data.py
"""

from pathlib import Path

from hf_v0init.tasks.translation.embedded_corpus import load_embedded_corpus


def main() -> None:
    """Write them."""
    corpus, folder = load_embedded_corpus(12_000, large=True), Path("outputs/demo_pairs")
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "validation"):
        lines = [f"{row['source']}\t{row['target']}\n" for row in corpus[split]]
        (folder / f"{split}.tsv").write_text("".join(lines), encoding="utf-8")
        english = "".join(f"{row['target']}\n" for row in corpus[split])
        (folder / f"{split}.en.txt").write_text(english, encoding="utf-8")


if __name__ == "__main__":
    main()
