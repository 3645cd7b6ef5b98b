"""The report on a folder of runs: `report.md`, a self-contained `report.html`, `results.csv`, `arms.csv` and the figures.

It can be written at any time, also while runs are going on, and says how far they are. `report.html` is `report.md`, rendered. A light
copy of a folder (`summary_dir`) can have its report written anew too; in it, figures of what the copy does not hold stay as they are.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..planning.axes import DEFAULT_OPTIMIZER
from ..planning.published import PUBLISHED, SOURCE
from ..reading.budget import Budget, compute_budget
from ..reading.copies import RESULTS_FILE, list_kept_figures, read_runs_or_copy, write_copy
from ..reading.fingerprints import FingerprintCheck, check_fingerprints
from ..reading.interim import knows_no_end, take_back
from ..reading.results import PLAN_FILE, START_SOURCES, STATES, Comparison
from ..reading.summary import CONFIDENCE, Summary, compute_summary
from .conclusion import Conclusion, compose_conclusion
from .formats import count_of, explain_loss, format_rate, name_loss
from .html import render_html
from .loss_figures import DrawnFigure, draw_figures
from .tables import (
    Table,
    describe_settings,
    make_arm_table,
    make_budget_table,
    make_cost_table,
    make_difference_table,
    make_group_table,
    make_learning_rate_table,
    make_published_table,
    make_rate_table,
    make_run_table,
    make_table_beside,
    write_arms,
    write_results,
)

MARKDOWN_FILE, HTML_FILE, ARMS_FILE = "report.md", "report.html", "arms.csv"
FIGURES_FOLDER = "figures"
# Of the copy for a repository: the first four of these that there are (one trial or one learning rate has no figure of its own).
SUMMARY_FIGURES = ("tuning_budget", "final_losses", "learning_rate_map", "gap_to_warmup", "loss_curves")
NUM_SUMMARY_FIGURES = 4
FOLDED = ("Every arm at every learning rate", "Runs")  # sections that the HTML shows on a click


def write_report(folder: str | Path, summary_dir: str | Path | None = None, at_step: int | None = None) -> Path:
    """Read the runs of a comparison, as far as they have come, and write the report into the same folder.

    Args:
        folder: of the comparison, or a light copy of one.
        summary_dir: a folder for a copy that is light enough for a repository: `report.md`, the tables and a few figures.
        at_step: an optimizer step; the report is then on every run as it stood at its evaluation after that step, and goes into the
            folder `at_step_N` inside `folder` and `summary_dir`, beside the report on whole runs.

    Returns the path of `report.html`; of `report.md` for a copy, which has no other.

    Raises:
        InputError: `folder` is neither; no run was evaluated after `at_step`.
    """
    folder = Path(folder)
    comparison = read_runs_or_copy(folder)
    is_copy = not (folder / PLAN_FILE).is_file()
    if at_step is not None:
        take_back(comparison, at_step)
        folder = folder / f"at_step_{at_step}"
        summary_dir = None if summary_dir is None else Path(summary_dir) / folder.name
    summary = compute_summary(comparison)
    check = check_fingerprints(comparison.runs)
    budget = compute_budget(summary)
    conclusion = compose_conclusion(summary, check, budget)
    folder.mkdir(exist_ok=True)
    kept = [DrawnFigure(**figure) for figure in list_kept_figures(comparison)] if is_copy else []
    figures = draw_figures(summary, budget, folder / FIGURES_FOLDER, keep=kept)
    write_results(folder / RESULTS_FILE, summary)
    write_arms(folder / ARMS_FILE, summary)
    shown = _choose_for_copy(figures) if is_copy else figures
    markdown = compose_markdown(summary, check, conclusion, budget, shown)
    (folder / MARKDOWN_FILE).write_text(markdown, encoding="utf-8")
    if summary_dir is not None:
        chosen = _choose_for_copy(figures)
        copied = compose_markdown(summary, check, conclusion, budget, chosen)
        _write_copy(folder, Path(summary_dir), comparison, copied, chosen)
    if is_copy:
        write_copy(comparison, folder, [asdict(figure) for figure in shown])
        _remove_figures(folder / FIGURES_FOLDER, shown)
        return folder / MARKDOWN_FILE
    html = render_html(markdown, comparison.title, folder, FOLDED)
    (folder / HTML_FILE).write_text(html, encoding="utf-8")
    return folder / HTML_FILE


def _choose_for_copy(figures: Sequence[DrawnFigure]) -> list[DrawnFigure]:
    by_name = {figure.name: figure for figure in figures}
    return [by_name[name] for name in SUMMARY_FIGURES if name in by_name][:NUM_SUMMARY_FIGURES]


def _write_copy(
    folder: Path, destination: Path, comparison: Comparison, markdown: str, figures: Sequence[DrawnFigure]
) -> None:
    (destination / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    files = [RESULTS_FILE, ARMS_FILE, *(f"{FIGURES_FOLDER}/{figure.name}.svg" for figure in figures)]
    for name in files:
        shutil.copyfile(folder / name, destination / name)
    (destination / MARKDOWN_FILE).write_text(markdown, encoding="utf-8")
    write_copy(comparison, destination, [asdict(figure) for figure in figures])
    _remove_figures(destination / FIGURES_FOLDER, figures)


def _remove_figures(folder: Path, kept: Sequence[DrawnFigure]) -> None:
    """Remove drawings that a copy does not show."""
    for file in folder.glob("*.*"):
        if file.suffix == ".png" or (file.suffix == ".svg" and file.stem not in {figure.name for figure in kept}):
            file.unlink()


def compose_markdown(
    summary: Summary,
    check: FingerprintCheck,
    conclusion: Conclusion,
    budget: Budget | None,
    figures: Sequence[DrawnFigure],
) -> str:
    """Compose the report as Markdown: the conclusion first, then what it rests on."""
    comparison = summary.comparison
    by_name = {figure.name: figure for figure in figures}
    blocks = [
        f"# {_plain(comparison.title)}" + (" (pocket scale)" if comparison.pocket else ""),
        _describe_progress(comparison),
        _describe_step(comparison),
    ]
    if check.violations:
        blocks.append("## Runs that did not begin alike")
        blocks.append(
            "Runs of one seed must have the same initial weights, batches and random state. These have not, so their paired "
            "differences do not mean what they should:"
        )
        blocks.append(_list(check.violations))
    blocks += ["## Conclusion", f"**{conclusion.headline}**"]
    blocks.append(
        _list(
            f"**{topic}** {text}" if topic[-1] in "?" else f"**{topic}:** {text}" for topic, text in conclusion.points
        )
    )
    if any(arm.best is not None for arm in summary.arms):
        blocks += _compose_results(summary, budget, by_name)
    blocks += _compose_published(summary)
    blocks += ["## Rules of this comparison", _list(_list_rules(summary))]
    if any(arm.best is not None for arm in summary.arms):
        blocks += ["## Every arm at every learning rate", make_rate_table(summary).to_markdown()]
    blocks += ["## Checks", *_compose_checks(check, comparison)]
    blocks += ["## Runs", make_run_table(summary).to_markdown()]
    blocks += ["## How to make this again", *_compose_origin(comparison)]
    return "\n\n".join(block for block in blocks if block) + "\n"


def _describe_progress(comparison: Comparison) -> str:
    arms = len({run.arm for run in comparison.runs})
    counts = [f"{number} {state.replace('_', ' ')}" for state in STATES if (number := comparison.count(state))]
    text = f"{count_of(len(comparison.runs), 'run')} of {count_of(arms, 'arm')}, {count_of(len(comparison.seeds), 'seed')} and "
    return f"{text}{count_of(len(comparison.learning_rates), 'learning rate')}: {', '.join(counts)}."


def _describe_step(comparison: Comparison) -> str:
    """Say what an interim report is worth; empty for one on whole runs."""
    if comparison.at_step is None:
        return ""
    text = (
        f"**Interim: every run as it stood at its evaluation after optimizer step {comparison.at_step:,}, not at its end.** "
        "No test data were touched by then. "
    )
    if knows_no_end(comparison):
        return (
            text
            + "The learning rate's schedule does not depend on the length of a run, so runs of that length would have come here too."
        )
    return text + (
        "The learning rate's schedule depends on the length of a run and was under way, so runs of that length would have ended "
        "elsewhere: judge by whole runs."
    )


def _explain_names(summary: Summary) -> str:
    """Say what arms are trained with that name no optimizer, where others do."""
    optimizers = {arm.optimizer for arm in summary.arms}
    return (
        f" Arms that name no optimizer have {DEFAULT_OPTIMIZER}."
        if DEFAULT_OPTIMIZER in optimizers and len(optimizers) > 1
        else ""
    )


def _compose_results(summary: Summary, budget: Budget, figures: dict[str, DrawnFigure]) -> list[str]:
    blocks = _compose_budget(budget, figures)
    without = [arm.name for arm in summary.arms if arm.best is None]
    blocks += ["## Arms at their best learning rate", make_arm_table(summary).to_markdown()]
    blocks.append(
        "Mean ± standard deviation (n - 1) over n runs, one per seed; best arm first. The steps are those after which the validation "
        "loss first reaches the final loss of the best warmup on the same seed; “with the pass” adds the samples of the statistics pass "
        "as steps; means over the runs that reach it, “reached” says how many. Diverged and failed runs are counted at all learning "
        "rates." + (f" Without a result: {', '.join(without)}." if without else "") + _explain_names(summary)
    )
    blocks += _show(figures, "final_losses")
    blocks += ["## Differences over seeds", make_difference_table(summary).to_markdown()]
    better = "above" if summary.greater_is_better else "below"
    blocks.append(
        f"Final validation loss of the arm less that of the other on the same seed: mean, and in brackets the {CONFIDENCE:.0%} Student-t "
        f"interval over the n seeds that both have; {better} 0 is better. With one seed there is no interval. A plain start is the arm "
        "without v0 and warmup of the same optimizer and settings. Of many intervals of 95% one in twenty misses by chance, and the "
        "best arm of many looks better than it is; the conclusion allows for that, this table does not."
    )
    if (groups := make_group_table(summary)) is not None:
        blocks += ["### Within each optimizer and setting", groups.to_markdown()]
    blocks += _show(figures, "loss_curves", "gap_to_warmup")
    blocks += ["## Robustness against the learning rate", make_learning_rate_table(summary).to_markdown()]
    blocks.append(
        "Mean final validation loss ± standard deviation over n seeds. The sensitivity (Wortsman et al., 2023) is the mean over the "
        "learning rates of min(loss, loss at start), less the lowest of them; lower is more robust. Only arms with results on the whole "
        "grid have one."
    )
    blocks += _show(figures, "learning_rate_map", "learning_rates")
    if (costs := make_cost_table(summary)) is not None:
        blocks += ["## What it cost", costs.to_markdown()]
        blocks.append(
            "Wall-clock of whole runs, evaluations included, failed and diverged ones too; runs side by side share the machine evenly."
        )
        blocks += _show(figures, "quality_and_cost")
    early = _show(figures, "updates", "update_histograms", "second_moment_drift", "multiplier")
    blocks += ["## What v0 does to the first steps", *early] if early else []
    blocks += ["## All arms", *_show(figures, "all_arms")] if "all_arms" in figures else []
    return blocks


def _compose_budget(budget: Budget, figures: dict[str, DrawnFigure]) -> list[str]:
    """What so many random trials come to; empty where no family has more than one."""
    if all(curve.num_trials == 1 for curve in budget.curves):
        return []
    seeds = ("seed " if len(budget.seeds) == 1 else "seeds ") + ", ".join(map(str, budget.seeds))
    blocks = ["## What a tuning budget buys", *_show(figures, "tuning_budget"), make_budget_table(budget).to_markdown()]
    blocks.append(
        "Expected best final validation loss after so many trials of a family, drawn at random without replacement (Dodge et al., 2019; "
        "Tang et al., 2020), and in brackets the ends between which 8 of 10 draws lie. A trial is one arm at one learning rate, with "
        f"{seeds}, which {'has' if len(budget.seeds) == 1 else 'have'} the most trials."
        + (f" {count_of(budget.num_left_out, 'trial')} without a result there left out." if budget.num_left_out else "")
        + " The best of all trials that were run stands where the number of draws is theirs."
    )
    return blocks


def _show(figures: dict[str, DrawnFigure], *names: str) -> list[str]:
    blocks = []
    for name in names:
        if name in figures:
            figure = figures[name]
            blocks.append(f"![{figure.title}]({FIGURES_FOLDER}/{name}.svg)")
            blocks.append(f"*{figure.title}.* {figure.caption}")
    return blocks


def _compose_published(summary: Summary) -> list[str]:
    comparison = summary.comparison
    if not comparison.published:
        return []
    if comparison.pocket:
        blocks = ["## Published figures, of another task or scale"]
        blocks.append(
            f"**These figures are from the paper ({SOURCE}), means over its five seeds, and were not measured here. They are of another "
            "task or another scale than this comparison, and must not be set against its figures as if they were equal.**"
        )
    else:
        blocks = ["## Beside the paper's figures"]
        blocks.append(
            f"Rows marked “published” are from the paper ({SOURCE}), means over its five seeds, and were not measured here. Ours are the "
            "best arm of each kind by validation loss, with the test figure of its runs."
        )
    for name in comparison.published:
        if name not in PUBLISHED:
            blocks.append(f"`{name}`: there is no such table of the paper; one of {', '.join(PUBLISHED)}.")
            continue
        table = PUBLISHED[name]
        beside = None if comparison.pocket else make_table_beside(table, summary)
        blocks.append(f"### Published, {table.title}")
        blocks.append((beside or make_published_table(table)).to_markdown())
    return blocks


def _list_rules(summary: Summary) -> list[str]:
    comparison = summary.comparison
    charges = {run.v0_samples for run in comparison.runs if run.v0_samples}
    samples = f" (here {', '.join(f'{number:,}' for number in sorted(charges))} samples)" if charges else ""
    sources = sorted({run.start_source for run in comparison.runs if run.start_source})
    start = f" Here it is the {'; the '.join(START_SOURCES[source] for source in sources)}." if sources else ""
    return [
        "Runs of one seed have the same initial weights, data order and dropout in every arm; fingerprints of each run check it.",
        f"Arms and learning rates are selected by the final {name_loss(comparison.metric, comparison.script)} alone"
        f"{' (more is better)' if comparison.greater_is_better else ''}. Test data are touched once per run, at its end."
        f"{explain_loss(comparison.metric, comparison.script)}",
        "A plain start has neither v0 nor warmup. A trial is one arm at one learning rate. A difference is beyond noise if its 95% "
        "interval leaves out 0, else within noise.",
        "Every arm is judged at its own best learning rate, that of the best mean, on the seeds it has there. An arm that was run at more "
        "learning rates had more chances; the number of trials is beside each verdict.",
        "The best of many trials looks better than it is, so the verdict has each seed judge choices made on the other seeds, and takes no "
        "seed as a judge on which more settings were tried than on the rest.",
        "The best warmup is the arm with a warmup and without a v0 that has the best mean, whatever its optimizer.",
        f"The statistics pass is charged to v0: its samples{samples} as steps of the run's effective batch, its seconds as training "
        "time. Times leave evaluations out; they are wall-clock, so runs that went side by side slowed each other down.",
        "Steps to a loss are interpolated linearly between evaluations.",
        "A run that diverged counts with the loss at start in means, differences and sensitivity, so that no arm looks better for losing "
        f"its bad runs.{start} A run that was stopped early counts with its last loss; one that failed counts nowhere but is shown.",
    ]


def _compose_checks(check: FingerprintCheck, comparison: Comparison) -> list[str]:
    lines = []
    if check.violations:
        lines.append("**Some runs of one seed did not begin alike; see above.**")
    elif check.num_checked:
        lines.append(
            f"Initial weights, first batches and random states of {count_of(check.num_checked, 'run')} agree within each seed."
        )
    lines += check.expected
    if check.unchecked:
        lines.append(f"Without a fingerprint, so unchecked: {', '.join(check.unchecked)}.")
    problems = [f"{run.name}: {problem}" for run in comparison.runs for problem in run.problems]
    return [_list([*lines, *problems]) if lines or problems else "Nothing to check yet."]


def _compose_origin(comparison: Comparison) -> list[str]:
    command = comparison.plan.get("command") or "hf-v0init compare CONFIG.yaml --output_dir FOLDER"
    script, launch = comparison.script, comparison.plan.get("launch")
    texts = [
        f"Script: `{script}`, started by `{launch}`. The command, which does not repeat finished runs and writes this report anew:",
        f"```\n{command}\n```",
    ]
    if comparison.at_step is not None:
        texts.append(f"with `--report_only --at_step {comparison.at_step}` after it for this interim report.")
    started = [run for run in comparison.runs if run.versions or run.hardware]
    if started:
        texts.append(f"Versions: {describe_settings([run.versions for run in started])}.")
        texts.append(f"Hardware: {describe_settings([run.hardware for run in started])}.")
    common = comparison.plan.get("arguments") or {}
    if common:
        rows = [[name, _write_argument(value)] for name, value in sorted(common.items())]
        texts += ["Arguments that all runs share:", Table(["argument", "value"], rows, num_left=2).to_markdown()]
    rates = ", ".join(map(format_rate, comparison.learning_rates))
    texts.append(
        f"Learning rates: {rates}. Seeds: {', '.join(map(str, comparison.seeds))}. Numbers of every run: `{RESULTS_FILE}`; of every "
        f"arm: `{ARMS_FILE}`."
    )
    return texts


def _write_argument(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _list(items) -> str:
    return "\n".join(f"- {' '.join(item.split())}" for item in items)


def _plain(text: str) -> str:
    """Text of the plan as Markdown that shows it as it is."""
    return "".join(f"\\{char}" if char in "\\`*_[]<>#|" else char for char in " ".join(text.split()))
