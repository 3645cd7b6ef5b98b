"""A German-English corpus that comes with the package, for runs of minutes without a download: numbers, dates, prices, sentences.

A small Transformer learns it on a CPU, and it is not trivial: German number words put the units before the tens
(einundzwanzig / twenty-one), clauses move the verb, nouns and adjectives inflect, decimal marks and 24-hour times change.
The pairs were generated from templates; `embedded_pairs.tsv.gz` holds the data set `embedded` of the scripts, 2,000 pairs, and
after it the 12,000 of the demo. No sentence occurs twice in either.
"""

import gzip
from pathlib import Path

from datasets import Dataset, DatasetDict

FILE = Path(__file__).with_name("embedded_pairs.tsv.gz")
NUM_SMALL, NUM_LARGE = 2_000, 12_000
HELD_OUT_SHARE = 0.05  # of validation and of test, each


def load_embedded_corpus(num_pairs: int = NUM_SMALL, large: bool = False) -> DatasetDict:
    """Load the first `num_pairs` pairs, split into train, validation and test (5% each of the latter, at least one pair).

    Args:
        num_pairs: in all three splits together, from 3 to as many as there are.
        large: of the demo's 12,000 pairs, not of the 2,000.

    Returns:
        Splits with the text columns `source` (German) and `target` (English). No sentence is in two splits.
    """
    with gzip.open(FILE, "rt", encoding="utf-8") as file:
        pairs = [line.rstrip("\n").split("\t") for line in file][NUM_SMALL if large else 0 :][:num_pairs]
    held_out = max(1, int(num_pairs * HELD_OUT_SHARE))
    parts = {"train": pairs[2 * held_out :], "validation": pairs[:held_out], "test": pairs[held_out : 2 * held_out]}
    return DatasetDict(
        {
            name: Dataset.from_dict(dict(zip(("source", "target"), zip(*part, strict=True), strict=True)))
            for name, part in parts.items()
        }
    )
