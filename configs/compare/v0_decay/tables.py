"""The tables of v0_decay/README.md, from the committed numbers of every run; from the repository's root:

    python configs/compare/v0_decay/tables.py

Stage 1 (`tuning.csv`, and the runs of seed 1 in results/*.csv) chose each configuration's learning rate and length. Stage 2 is the runs of
all other seeds, which had no part in that; only these make the tables. Intervals are paired t intervals over those seeds.
"""

from pathlib import Path

import pandas as pd
from scipy import stats

FOLDER = Path(__file__).parent
TASKS = {  # title in the README, optimizer steps of a run, L: two thirds of it, v0's default
    "multi30k": ("Multi30k DE-EN", 600, 400),
    "ptb": ("PTB, GPT-2", 600, 400),
    "ptb_long": ("PTB, GPT-2, longer", 3000, 2000),
    "long": ("PTB subwords, GPT-2, longest", 10000, 6666),
    "llama": ("Multi30k English, Llama", 600, 400),
    "german": ("Multi30k German, GPT-2", 600, 400),
    "opt": ("PTB subwords, OPT", 600, 400),
    "vit": ("digits, ViT", 680, 453),
    "resnet": ("digits, ResNet", 680, 453),
    "demo": ("the demo's corpus", 500, 333),
    "awd_lstm": ("PTB, AWD-LSTM", 400, 267),
    "mlm": ("masked words, BERT", 800, 533),
    "fine_tuning": ("fine-tuning, MiniLM", 100, 66),
}
COLUMNS = ["configuration", "rate", "seeds", "loss", "less the best warmup"]
TUNING_SEED = 1
DEFAULT_V0 = "v0, the default"
MARGIN = 0.01  # of the warmup's loss, up to which v0 is not inferior


def read_runs(task: str) -> pd.DataFrame:
    """Read a task's runs: columns configuration, learning_rate, seed, eval_loss; finished ones alone."""
    runs = pd.read_csv(FOLDER / "results" / f"{task}.csv")
    return runs[runs["eval_loss"].notna()].copy()


def is_default_v0(runs: pd.DataFrame, task: str) -> pd.Series:
    """Whether a run is one of `--v0_init data_driven` with nothing else: over two thirds of training, typed, or measured where that gave it."""
    _, _, length = TASKS[task]
    return runs["configuration"].str.startswith("data_driven linear") & (runs["decay_steps"] == length)


def read_by_seed(task: str) -> pd.DataFrame:
    """Read the losses of the seeds that chose nothing: a row each, columns (configuration, learning rate).

    Runs of the default v0 have one name, however it was asked for.
    """
    runs = read_runs(task)
    runs.loc[is_default_v0(runs, task), "configuration"] = DEFAULT_V0
    fresh = runs[runs["seed"] != TUNING_SEED]
    return fresh.pivot_table(index="seed", columns=["configuration", "learning_rate"], values="eval_loss")


def describe(task: str) -> pd.DataFrame:
    """Mean and standard deviation of each configuration over the fresh seeds, and the paired difference to the best warmup."""
    by_seed = read_by_seed(task)
    best = find_best(by_seed, "warmup")
    rows = []
    for key in by_seed.columns:
        values = by_seed[key].dropna()
        row = {"configuration": key[0], "rate": f"{key[1]:g}", "seeds": len(values)}
        row["loss"] = f"{values.mean():.3f} ± {values.std():.3f}" if len(values) > 1 else f"{values.mean():.3f}"
        row["less the best warmup"] = "" if best is None or key == best else compare(by_seed[key], by_seed[best])
        rows.append(row)
    return pd.DataFrame(rows, columns=COLUMNS).sort_values("loss")


def find_best(by_seed: pd.DataFrame, kind: str) -> tuple[str, float] | None:
    """Find the configuration of a kind, and its rate, with the lowest mean among those with the most seeds; None without any."""
    counts = by_seed.count()[[key for key in by_seed.columns if key[0].startswith(kind)]]
    if counts.empty:
        return None
    return by_seed[counts.index[counts == counts.max()]].mean().idxmin()


def compare(ours: pd.Series, theirs: pd.Series) -> str:
    """The paired mean difference with its 95% interval, and what it says."""
    differences = (ours - theirs).dropna()
    if len(differences) < 2:
        return f"{differences.mean():+.3f}" if len(differences) else ""
    interval = stats.ttest_1samp(differences, 0.0).confidence_interval(0.95)
    margin = MARGIN * theirs[differences.index].mean()
    if interval.high < 0.0:
        verdict = "better"
    elif interval.low > 0.0:
        verdict = "worse, within 1%" if interval.high < margin else "worse"
    else:
        verdict = "not inferior" if interval.high < margin else "not shown"
    return f"{differences.mean():+.3f} ({interval.low:+.3f} to {interval.high:+.3f}): {verdict}"


def main() -> None:
    """Print the tables."""
    for task, (title, max_steps, _) in TASKS.items():
        if not (FOLDER / "results" / f"{task}.csv").is_file():
            continue
        print(f"### {title}, {max_steps:,} steps\n")
        table = describe(task)
        if table.empty:
            print("no fresh seeds so far\n")
            continue
        print("| " + " | ".join(table.columns) + " |\n|" + " --- |" * len(table.columns))
        for row in table.itertuples(index=False):
            print("| " + " | ".join(map(str, row)) + " |")
        print()


if __name__ == "__main__":
    main()
