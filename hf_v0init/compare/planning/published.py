"""Results that the paper reports (Abuduweili & Liu, arXiv 2412.02153), as data to show beside one's own.

Means over the paper's five seeds. None of them was measured here. A plan names the tables it wants by the keys of `PUBLISHED`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ...errors import InputError

SOURCE = "Abuduweili & Liu, arXiv 2412.02153"
START_VALUES = ("zeros", "random", "data_driven")  # the columns of the tables that compare start values


@dataclass(frozen=True)
class PublishedTable:
    """One table of the paper: figures by row and column; None where the paper has none, text where it gives a bound."""

    label: str
    task: str
    metric: str
    higher_is_better: bool
    columns: tuple[str, ...]
    rows: dict[str, tuple[float | str | None, ...]]

    @property
    def title(self) -> str:
        """The table's name in the paper, task and metric."""
        return f"{self.label}: {self.task}, {self.metric}"


def _make(label: str, task: str, metric: str, better: str, rows: dict, columns: tuple = START_VALUES) -> PublishedTable:
    return PublishedTable(label, task, metric, better == "higher", columns, rows)


PUBLISHED: dict[str, PublishedTable] = {
    "table_1": _make(
        "Table 1",
        "CIFAR-10, ResNet-34",
        "test accuracy (%)",
        "higher",
        {
            "Adam": (95.25, 95.87, 96.02),
            "Adam, with warmup": (95.31, None, None),
            "AdamW": (95.36, 95.94, 95.95),
            "AdaBound": (95.38, 95.80, 95.96),
            "RAdam": (95.61, 95.83, 95.90),
            "AdaBelief": (95.94, 96.11, 96.24),
            "SGD": (96.19, None, None),
        },
    ),
    "table_2": _make(
        "Table 2",
        "ImageNet, ResNet-18",
        "top-1 accuracy (%)",
        "higher",
        {
            "Adam": (63.79, 65.99, 66.13),
            "AdamW": (67.93, 68.95, 68.49),
            "AdaBelief": (70.08, 70.69, 70.77),
            "SGD": (70.23, None, None),
        },
    ),
    "table_3": _make(
        "Table 3",
        "Penn Treebank, 2-layer LSTM",
        "test perplexity",
        "lower",
        {
            "Adam": (67.11, 66.70, 66.37),
            "AdamW": (73.61, 68.35, 69.31),
            "AdaBound": (67.69, 66.94, 66.90),
            "RAdam": (73.61, 68.55, 69.32),
            "AdaBelief": (66.75, 66.12, 65.87),
            "SGD": (67.25, None, None),
        },
    ),
    "table_4": _make(
        "Table 4",
        "IWSLT'14 German-English, Transformer, with warmup",
        "test BLEU",
        "higher",
        {
            "AdamW": (35.62, 36.06, 35.98),
            "RAdam": (34.76, 34.97, 34.84),
            "AdaBelief": (35.60, 36.12, 36.18),
            "SGD": (28.22, None, None),
        },
    ),
    "table_5": _make(
        "Table 5",
        "CIFAR-10, DCGAN",
        "FID",
        "lower",
        {
            "Adam": (54.22, 48.60, 47.02),
            "Adam, with warmup": (55.87, None, None),
            "AdamW": (52.39, 46.94, 45.25),
        },
    ),
    "table_6": _make(
        "Table 6",
        "CIFAR-10, ResNet-34, over the scale sigma",
        "test accuracy (%)",
        "higher",
        {
            "random": (95.25, 95.45, 95.74, 95.89, 95.87, 95.84),
            "data_driven": (95.25, 95.70, 96.02, 95.92, 95.85, 95.72),
        },
        ("0", "0.1", "1", "10", "100", "1000"),
    ),
    "table_8": _make(
        "Table 8",
        "Penn Treebank, 3-layer LSTM",
        "test perplexity",
        "lower",
        {
            "Adam": (64.10, 62.68, 62.46),
            "AdamW": (69.91, 66.43, 66.38),
            "AdaBound": (63.52, 62.75, 62.07),
            "RAdam": (70.10, 68.05, 68.14),
            "AdaBelief": (61.33, 61.29, 60.70),
        },
    ),
    "table_9": _make(
        "Table 9",
        "CIFAR-10, ResNet-34, Adam",
        "test accuracy (%)",
        "higher",
        {"Adam": (95.25, 95.87, 96.02), "Adam, with warmup": (95.31, None, None)},
    ),
    "table_10": _make(
        "Table 10", "Penn Treebank, LSTM, Adam", "test perplexity", "lower", {"Adam, with warmup": (67.12, None, None)}
    ),
    "table_11": _make(
        "Table 11",
        "CIFAR-10, DCGAN, Adam",
        "FID",
        "lower",
        {"Adam": (54.22, 48.60, 47.02), "Adam, with warmup": (55.87, None, None)},
    ),
    "table_12": _make(
        "Table 12",
        "IWSLT'14 German-English, Transformer, Adam",
        "test BLEU",
        "higher",
        {"without warmup": ("<10", 31.53, 30.74), "with warmup": (30.14, 33.71, 33.64)},
    ),
}


def get_published_tables(names: Iterable[str]) -> list[PublishedTable]:
    """Return the paper's tables of these names, in order.

    Raises:
        InputError: a name that is no key of `PUBLISHED`.
    """
    tables = []
    for name in names:
        if name not in PUBLISHED:
            raise InputError(f"published={name}: there is no such table of the paper; one of {', '.join(PUBLISHED)}")
        tables.append(PUBLISHED[name])
    return tables
