"""Prints the tables of `configs/compare/results/measured_length/README.md` from the numbers of every run beside it:

    python configs/compare/measured_length/tabulate.py [FIGURE.png]

With a path it also draws why v0 alone is behind: the same multiplier m(t), on the second moment and on the learning rate.

A cell is a task at a learning rate. Regret is the final loss less that of the best warmup length tried in the same cell, no warmup
among them, on the same seed. Intervals are 95% t intervals of paired differences.
"""

import csv
import json
import math
import statistics
import sys
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path

from hf_v0init.compare.reading.summary import compute_paired_interval
from hf_v0init.plots import import_pyplot, require_figure_path, write_figure

RESULTS = Path("configs/compare/results")
POCKETS = {"multi30k_pocket": "multi30k", "ptb_pocket": "ptb"}  # earlier comparisons with the same settings
TASKS = {
    "multi30k": "Multi30k DE-EN, post-norm encoder-decoder, 1.5M",
    "demo": "the demo's corpus, post-norm encoder-decoder",
    "ptb": "Penn Treebank, GPT-2, 1.4M",
    "ptb_beta2_999": "the same, beta2 .999",
    "mlm": "Penn Treebank, masked words, small BERT",
    "vit": "digits, ViT",
    "resnet": "digits, ResNet with BatchNorm",
}
SHARES = {"3%": 0.03, "10%": 0.1, "33%": 0.33, "67%": 2 / 3}
MEASURED, NONE = "measured", "none"
V0_ARMS = {
    "data_driven, measured length": ("data_driven warmup auto", "none"),
    "random, measured length": ("random warmup auto", "none"),
    "m(t) on the rate": ("zeros", "multiplier"),
    "steady v0 + measured": ("data_driven 1", "measured"),
    "the same, corrections run out": ("data_driven 1 corrections run out", "measured"),
    "random 10 + measured": ("random 10", "measured"),
}


@dataclass(frozen=True)
class Run:
    """One run; `length` is its warmup in steps, None for what is no plain linear warmup."""

    task: str
    steps: int
    rate: float
    seed: int
    v0: str
    warmup: str
    optimizer: str
    loss: float
    held_back: int | None

    @property
    def cell(self) -> tuple[str, int, float]:
        """Task, horizon and learning rate."""
        return self.task, self.steps, self.rate

    @property
    def length(self) -> int | None:
        """Steps of a linear warmup without a v0, 0 for none."""
        if self.v0 != "zeros" or self.optimizer != "adamw":
            return None
        if self.warmup == NONE:
            return 0
        try:
            number = float(self.warmup)
        except ValueError:
            return None
        return math.ceil(number * self.steps) if number < 1 else int(number)


def read_runs() -> list[Run]:
    """Read every results.csv; where a run was made twice, its later one stands."""
    folders = [(path.parent, path.parent.name) for path in sorted((RESULTS / "measured_length").rglob("results.csv"))]
    runs = {}
    for folder, task in [(RESULTS / name, task) for name, task in POCKETS.items()] + folders:
        with (folder / "results.csv").open(encoding="utf-8", newline="") as file:
            for row in csv.DictReader(file):
                other = json.loads(row["other"]) if row["other"] else {}
                beta2, steps = other.pop("adam_beta2", 0.98), int(other.pop("max_steps", row["num_steps"] or 0))
                if other or not row["scored_loss"] or beta2 not in (0.98, 0.999):
                    continue
                run = Run(
                    task="ptb_beta2_999" if task == "ptb" and beta2 == 0.999 else task,
                    steps=steps,
                    rate=float(row["learning_rate"]),
                    seed=int(row["seed"]),
                    v0=row["v0"],
                    warmup=row["warmup"],
                    optimizer=row["optimizer"],
                    loss=float(row["scored_loss"]),
                    held_back=int(row["held_back"]) if row.get("held_back") else None,
                )
                runs[run.cell, run.seed, run.v0, run.warmup, run.optimizer] = run
    return list(runs.values())


def group_by_cell(runs: list[Run], seed: int = 1) -> dict[tuple, list[Run]]:
    """Group the runs of a seed by their cell."""
    cells = defaultdict(list)
    for run in sorted(runs, key=lambda run: run.cell):
        if run.seed == seed:
            cells[run.cell].append(run)
    return cells


def find_share(runs: list[Run], share: float) -> Run | None:
    """Find the linear warmup whose share of the run is within a tenth of this one."""
    near = [run for run in runs if run.length and abs(run.length / run.steps / share - 1) < 0.1]
    return min(near, key=lambda run: abs(run.length / run.steps - share)) if near else None


def find_arm(runs: list[Run], v0: str, warmup: str) -> Run | None:
    """Find the run of an arm; a multiplier of any length counts as one."""
    for run in runs:
        if run.v0 == v0 and run.optimizer == "adamw" and (run.warmup == warmup or run.warmup.split()[0] == warmup):
            return run
    return None


def find_best(runs: list[Run]) -> Run | None:
    """Find the best linear warmup without a v0 among those tried, no warmup among them; None unless two were."""
    tried = [run for run in runs if run.length is not None]
    return min(tried, key=lambda run: run.loss) if len(tried) > 1 else None


def write(number: float | None) -> str:
    """Write a loss."""
    return "-" if number is None else f"{number:.3f}"


def print_table(head: list[str], rows: list[list[str]]) -> None:
    """Print a Markdown table."""
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(row) + " |")
    print()


def print_warmups(cells: dict) -> None:
    """Print every cell's warmups."""
    rows = []
    for (task, steps, rate), runs in cells.items():
        measured, best = find_arm(runs, "zeros", MEASURED), find_best(runs)
        if best is None:
            continue
        row = [task, f"{steps:,}", f"{rate:g}", write(getattr(find_arm(runs, "zeros", NONE), "loss", None))]
        row += [write(getattr(find_share(runs, share), "loss", None)) for share in SHARES.values()]
        row.append("-" if measured is None else f"{measured.held_back}: {measured.loss:.3f}")
        rows.append([*row, f"{best.length}: {best.loss:.3f}"])
    print("## Warmups, seed 1\n")
    print_table(["task", "steps", "rate", "no warmup", *SHARES, "measured", "best tried"], rows)


def print_regret(cells: dict) -> None:
    """Print mean and worst regret of each rule over the cells where all of them were run."""
    rules = {"no warmup": lambda runs: find_arm(runs, "zeros", NONE)}
    rules |= {share: lambda runs, s=s: find_share(runs, s) for share, s in SHARES.items() if share in ("10%", "67%")}
    rules["measured"] = lambda runs: find_arm(runs, "zeros", MEASURED)
    regrets, ranks = defaultdict(list), defaultdict(list)
    for runs in cells.values():
        chosen = {name: find(runs) for name, find in rules.items()}
        if None in chosen.values():
            continue
        best = min(run.loss for run in [*chosen.values(), find_best(runs)])
        for name, run in chosen.items():
            regrets[name].append(run.loss - best)
            ranks[name].append(1 + sum(other.loss < run.loss for other in chosen.values()))
    number = len(next(iter(regrets.values()), []))
    print(f"## Regret over the {number} cells where all four were run, seed 1\n")
    rows = [
        [
            name,
            *(f"{value:.3f}" for value in (statistics.fmean(of_rule), statistics.median(of_rule), max(of_rule))),
            f"{sum(value <= 0.03 for value in of_rule)} of {number}",
            f"{statistics.fmean(ranks[name]):.2f}",
        ]
        for name, of_rule in regrets.items()
    ]
    print_table(["rule", "mean", "median", "worst", "within .03", "mean rank"], rows)


def print_v0_arms(cells: dict) -> None:
    """Print the arms with a v0 beside the measured warmup of the same cell."""
    rows = []
    for (task, steps, rate), runs in cells.items():
        found = {name: find_arm(runs, *arm) for name, arm in V0_ARMS.items()}
        if not any(found.values()):
            continue
        plain, measured = find_arm(runs, "zeros", NONE), find_arm(runs, "zeros", MEASURED)
        row = [task, f"{steps:,}", f"{rate:g}"] + [write(getattr(run, "loss", None)) for run in (plain, measured)]
        rows.append(row + [write(getattr(run, "loss", None)) for run in found.values()])
    print("## v0 beside a warmup of the same length, seed 1\n")
    print_table(["task", "steps", "rate", "no warmup", "measured warmup", *V0_ARMS], rows)


SEEDS = (1, 2, 3)
ARMS_OVER_SEEDS = {
    "no warmup": lambda of: find_arm(of, "zeros", NONE),
    "10%": lambda of: find_share(of, 0.1),
    "67%": lambda of: find_share(of, 2 / 3),
    "measured": lambda of: find_arm(of, "zeros", MEASURED),
    "steady v0 + measured": lambda of: find_arm(of, *V0_ARMS["steady v0 + measured"]),
    "data_driven, measured length": lambda of: find_arm(of, *V0_ARMS["data_driven, measured length"]),
    "untuned, 2/(1 - beta2)": lambda of: find_arm(of, "zeros", "untuned_linear"),
    "first_gradient": lambda of: find_arm(of, "first_gradient 1", NONE),
    "RAdam": lambda of: next((run for run in of if run.optimizer == "radam"), None),
    "schedule-free": lambda of: next((run for run in of if run.optimizer == "schedule_free"), None),
}


def collect_seeds(runs: list[Run]) -> dict[tuple, dict[str, dict[int, float]]]:
    """Collect {cell: {arm: {seed: loss}}} for the cells in which some arm was run on every seed."""
    by_seed = {seed: group_by_cell(runs, seed) for seed in SEEDS}
    collected = {}
    for cell in by_seed[1]:
        losses = {
            name: {s: run.loss for s, cells in by_seed.items() if (run := find(cells.get(cell, [])))}
            for name, find in ARMS_OVER_SEEDS.items()
        }
        if any(len(of_arm) == len(SEEDS) for of_arm in losses.values()):
            collected[cell] = losses
    return collected


def write_mean(losses: dict[int, float]) -> str:
    """Write mean and standard deviation over the seeds; the number of seeds where it is not three."""
    if not losses:
        return "-"
    values = list(losses.values())
    text = write(statistics.fmean(values))
    if len(values) > 1:
        text += f" ± {statistics.stdev(values):.3f}".replace("0.", ".", 1)
    return text if len(values) == len(SEEDS) else f"{text} ({len(values)})"


def print_seeds(collected: dict) -> None:
    """Print the cells with three seeds: means, and the measured warmup's paired difference to the others."""
    rows = []
    for (task, _, rate), losses in collected.items():
        if len(losses["measured"]) < len(SEEDS):
            continue
        for name, of_arm in losses.items():
            if len(of_arm) < 2:
                continue
            difference = compute_paired_interval(losses["measured"], of_arm) if name != "measured" else None
            ends = (
                ""
                if difference is None
                else f"{difference.mean:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
            )
            rows.append([task, f"{rate:g}", name, write_mean(of_arm), ends])
    print("## Over three seeds\n")
    print_table(["task", "rate", "arm", "loss, mean ± std", "measured less this"], rows)


def print_first_table(collected: dict) -> None:
    """Print the first table of the project's README: each arm at the best of its learning rates."""
    rows = []
    for task, name in TASKS.items():
        cells = [losses for cell, losses in collected.items() if cell[0] == task]
        if not any(losses["measured"] for losses in cells):
            continue

        def find_best_of(*arms: str, cells=cells) -> dict[int, float]:
            tried = [losses[arm] for losses in cells for arm in arms if losses[arm]]
            most = max(map(len, tried), default=0)
            whole = [of_arm for of_arm in tried if len(of_arm) == most]
            return min(whole, key=lambda of_arm: statistics.fmean(of_arm.values()), default={})

        families = (
            ("no warmup",),
            ("10%",),
            ("no warmup", "10%", "67%"),
            ("measured",),
            ("data_driven, measured length",),
        )
        rows.append([name, *(write_mean(find_best_of(*arms)) for arms in families)])
    print("## The first table of the project's README\n")
    print_table(["task", "no warmup", "10% of the run", "best of 3 lengths", "`auto`", "v0 alone"], rows)


def print_sensitivity(cells: dict) -> None:
    """Print the mean excess over the task's best loss across its learning rates, for the arms run at all of them."""
    names = {"no warmup": lambda of: find_arm(of, "zeros", NONE), "10%": lambda of: find_share(of, 0.1)}
    names |= {"67%": lambda of: find_share(of, 2 / 3), "measured": lambda of: find_arm(of, "zeros", MEASURED)}
    names |= {name: lambda of, arm=arm: find_arm(of, *arm) for name, arm in V0_ARMS.items()}
    tasks = defaultdict(dict)
    for (task, steps, rate), runs in cells.items():
        if find_arm(runs, "zeros", MEASURED):
            tasks[task, steps][rate] = runs
    rows = []
    for (task, steps), by_rate in tasks.items():
        if len(by_rate) < 2:
            continue
        best = min(run.loss for runs in by_rate.values() for run in runs)
        row = [task, f"{steps:,}", " ".join(f"{rate:g}" for rate in by_rate)]
        for find in names.values():
            losses = [getattr(find(runs), "loss", None) for runs in by_rate.values()]
            row.append("-" if None in losses else write(statistics.fmean(losses) - best))
        rows.append(row)
    print("## Sensitivity to the learning rate, seed 1\n")
    print_table(["task", "steps", "rates", *names], rows)


def draw_brakes(cells: dict, path: Path) -> None:
    """Draw the three ways of holding back for one length, and none, over the best of them: a row a cell."""
    arms = {
        "no warmup": ("zeros", NONE, "x", "0.5"),
        "v0, which fades by m(t)": ("data_driven warmup auto", NONE, "s", "tab:red"),
        "the same m(t) on the learning rate": ("zeros", "multiplier", "o", "tab:blue"),
        "linear warmup of that length": ("zeros", MEASURED, "^", "tab:green"),
    }
    rows = {}
    for (task, _, rate), runs in cells.items():
        found = {name: find_arm(runs, v0, warmup) for name, (v0, warmup, _, _) in arms.items()}
        if None not in list(found.values())[1:]:
            rows[f"{task}, {rate:g}"] = {name: run.loss for name, run in found.items() if run is not None}
    pyplot = import_pyplot()
    figure, axes = pyplot.subplots(figsize=(7.5, 1.2 + 0.38 * len(rows)), layout="constrained")
    for name, (_, _, marker, colour) in arms.items():
        points = [(losses[name] - min(losses.values()), y) for y, losses in enumerate(rows.values()) if name in losses]
        axes.plot(*zip(*points, strict=True), marker, color=colour, label=name, markersize=7)
    axes.set_yticks(range(len(rows)), list(rows))
    axes.invert_yaxis()
    axes.set_xscale("symlog", linthresh=0.1)
    axes.set_xlim(left=-0.01)
    axes.set_xlabel("final loss above the best of the row, nats (logarithmic from 0.1 on)")
    axes.grid(axis="y", alpha=0.3)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.18 - 0.3 / max(1, len(rows))), ncols=2, frameon=False)
    write_figure(figure, path)


def main() -> None:
    """Print all tables."""
    figure = require_figure_path(sys.argv[1]) if len(sys.argv) > 1 else None
    runs = read_runs()
    cells = group_by_cell(runs)
    if figure is not None:
        draw_brakes(cells, figure)
    print_warmups(cells)
    print_regret(cells)
    print_v0_arms(cells)
    print_sensitivity(cells)
    collected = collect_seeds(runs)
    print_seeds(collected)
    print_first_table(collected)


if __name__ == "__main__":
    main()
