"""The report on a comparison: `report.md`, a self-contained `report.html`, the tables and the figures.

It can be written at any time, also while runs are going on, and says how far they are. `report.html` is `report.md`, rendered.
"""

from __future__ import annotations

import base64
import html
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd
from markdown_it import MarkdownIt

from . import files
from .comparison_file import PUBLISHED_FILE
from .figures import draw_figures
from .results import (
    EVALUATIONS_FILE,
    KNOW_NO_END,
    MACHINES_FILE,
    RESULTS_FILE,
    Comparison,
    list_odd_beginnings,
    read_comparison,
    truncate_at_step,
    write_tables,
)
from .summary import (
    Condition,
    count_states,
    describe_arguments,
    find_unknown_costs,
    format_estimate,
    format_interval,
    format_number,
    make_budget_table,
    make_confirmed_table,
    make_rate_table,
    make_run_table,
    make_settings,
    make_tuning_table,
    sum_hours,
    summarize,
)

MARKDOWN_FILE, HTML_FILE, SETTINGS_FILE, FIGURES_FOLDER = "report.md", "report.html", "settings.csv", "figures"
COPIED = (files.PLAN_FILE, RESULTS_FILE, EVALUATIONS_FILE, MACHINES_FILE, SETTINGS_FILE, MARKDOWN_FILE)
FOLDED = ("Runs",)  # sections that the HTML shows on a click
STAGES = {files.TUNE: "First stage (tune)", files.CONFIRM: "Second stage (confirm)"}
LEFT = (
    "family",
    "setting",
    "chosen",
    "condition",
    "run",
    "state",
    "stage",
    "remarks",
    "flag",
    "value",
    "optimizer",
    "at the edge of",
)
STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --soft: #5b6470; --line: #d9dde3; --paper: #fbfbfa; --card: #fff; --mark: #0072b2; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8eb; --soft: #a2abb6; --line: #373d45; --paper: #15181c; --card: #1c2026; --mark: #6bb8e8; }
}
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, "Segoe UI", Roboto, sans-serif; }
main { max-width: 78rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h2 { font-size: 1.25rem; margin: 2.6rem 0 .8rem; padding-top: .9rem; border-top: 1px solid var(--line); }
p, li { max-width: 62rem; }
section.answer, section.alarm { background: var(--card); border: 1px solid var(--line); padding: .2rem 1.4rem .8rem; }
section.answer { border-left: 4px solid var(--mark); }
section.alarm { border-left: 4px solid; border-left-color: #d55e00; }
section.answer h2, section.alarm h2 { border: 0; }
details h2 { display: inline; border: 0; }
.wide { overflow-x: auto; margin: .8rem 0; }
table { border-collapse: collapse; font-size: .86rem; font-variant-numeric: tabular-nums; }
th, td { padding: .35rem .7rem; border-bottom: 1px solid var(--line); vertical-align: top; text-align: left; }
th.number, td.number { text-align: right; white-space: nowrap; }
pre { background: var(--card); border: 1px solid var(--line); padding: .8rem 1rem; overflow-x: auto; }
img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--line); padding: .5rem; margin: 1.6rem auto .4rem; }
p:has(> img) + p { color: var(--soft); font-size: .9rem; }
"""


def write_report(folder: str | Path, summary_dir: str | Path | None = None, at_step: int | None = None) -> Path:
    """Read a comparison, as far as it has come, and write the report into the same folder.

    A folder without runs, such as a copy in a repository, keeps its tables as they are: report.md, figures and settings.csv are written.

    Args:
        folder: of the comparison.
        summary_dir: a folder for a copy without the runs: plan, tables, report and figures. A report can be written from it again.
        at_step: an optimizer step; the report is then on every run as it stood at its evaluation after that step, and goes into the
            folder `at_step_N` inside `folder` and `summary_dir`, beside the report on whole runs.

    Returns the path of `report.html`, or of `report.md` for a folder without runs, which has no other.

    Raises:
        InputError: there is no comparison; no run was evaluated after `at_step`.
    """
    comparison = read_comparison(folder)
    has_runs = (comparison.folder / files.RUNS_FOLDER).is_dir()
    if at_step is not None:
        comparison = truncate_at_step(comparison, at_step)
        summary_dir = None if summary_dir is None else Path(summary_dir) / comparison.folder.name
    place = comparison.folder
    if has_runs or at_step is not None:
        write_tables(comparison, place)
    conditions = summarize(comparison)
    figures = draw_figures(comparison, conditions, place / FIGURES_FOLDER, (".svg", ".png") if has_runs else (".svg",))
    make_settings(comparison, conditions).to_csv(
        place / SETTINGS_FILE, index=False, lineterminator="\n", float_format="%.10g"
    )
    markdown = load_template().render(**make_context(comparison, conditions), figures=figures)
    (place / MARKDOWN_FILE).write_text(_tidy(markdown), encoding="utf-8")
    if not has_runs:
        return place / MARKDOWN_FILE
    (place / HTML_FILE).write_text(render_html(markdown, str(comparison.plan.get("title")), place), encoding="utf-8")
    if summary_dir is not None:
        _copy(place, Path(summary_dir))
    return place / HTML_FILE


def read_conclusion(folder: str | Path) -> str:
    """Return the conclusion of the report in a folder as plain text, for a terminal."""
    text = (Path(folder) / MARKDOWN_FILE).read_text(encoding="utf-8")
    conclusion = text.split("## Conclusion\n", 1)[1].split("\n## ", 1)[0]
    return conclusion.replace("**", "").replace("`", "").strip()


def _copy(place: Path, destination: Path) -> None:
    (destination / FIGURES_FOLDER).mkdir(parents=True, exist_ok=True)
    for name in COPIED:
        if (place / name).is_file():
            shutil.copyfile(place / name, destination / name)
    for file in (destination / FIGURES_FOLDER).glob("*.*"):
        file.unlink()
    for file in (place / FIGURES_FOLDER).glob("*.svg"):
        shutil.copyfile(file, destination / FIGURES_FOLDER / file.name)


# --------------------------------------------------------------------------------------------------------- Markdown


def load_template() -> jinja2.Template:
    """Load the template, with the filters that it uses."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), undefined=jinja2.StrictUndefined, autoescape=False
    )
    environment.filters |= {
        "cell": lambda value: _plain(value).replace("|", r"\|"),
        "plain": _plain,
        "number": format_number,
        "estimate": format_estimate,
        "interval": lambda interval: format_interval(interval).replace("(", "(95% CI "),
    }
    return environment.get_template("report.jinja")


def make_context(comparison: Comparison, conditions: Sequence[Condition]) -> dict[str, Any]:
    """Make all that the template says, but the figures."""
    plan, runs = comparison.plan, comparison.runs
    hours = sum_hours(comparison)
    has_gpus = any((machine.get("hardware") or {}).get("gpus") for machine in comparison.machines)
    schedules = {str(comparison.get_arguments(entry).get("lr_scheduler_type", "linear")) for entry in plan["runs"]}
    arguments = pd.DataFrame([{"flag": key, "value": value} for key, value in describe_arguments(comparison).items()])
    return {
        "plan": {"margin": 0.01, "margin_is_relative": True, "prune": None, "at_step": None, "command": "", **plan},
        "conditions": conditions,
        "stages": STAGES,
        "progress": {stage: count_states(comparison, stage) for stage in STAGES},
        "num_further": int((~runs["stage"].isin(STAGES)).sum()),
        "knows_no_end": schedules <= set(KNOW_NO_END),
        "odd": list_odd_beginnings(runs),
        "confirmed": make_confirmed_table(comparison, list(conditions)),
        "confirmed_any": any(here.losses for here in conditions),
        "is_own_confirmation": not (runs["stage"] == files.TUNE).any(),
        "tuned_any": any(here.choices for here in conditions),
        "tuning": make_tuning_table(comparison, list(conditions)),
        "rates": make_rate_table(comparison, list(conditions)),
        "budget": make_budget_table(list(conditions)),
        "published": [_read_published(name) for name in plan.get("published") or []],
        "runs": make_run_table(comparison),
        "num_checked": int((runs["initial_weights"] != "").sum()),
        "num_counted": int((runs["state"] != files.PENDING).sum()),
        "failures": {
            word: list(runs.loc[(runs["state"] == files.FAILED) & (runs["stage"] == stage), "setting"])
            for word, stage in (("first", files.TUNE), ("second", files.CONFIRM))
            if ((runs["state"] == files.FAILED) & (runs["stage"] == stage)).any()
        },
        "unknown_costs": find_unknown_costs(comparison),
        "hours": hours,
        "hour_name": "accelerator-hours" if has_gpus else "machine-hours",
        "machines": [_describe_machine(machine) for machine in comparison.machines],
        "arguments": arguments,
        "left": LEFT,
    }


def _read_published(name: str) -> dict[str, Any]:
    """Return a table of the paper: its label, what it is of, and its rows."""
    known = pd.read_csv(PUBLISHED_FILE, dtype=str).fillna("")
    mine = known[known["table"] == name]
    rows = mine.pivot_table(index="optimizer", columns="v0", values="value", aggfunc="first", sort=False).fillna("–")
    label = name.replace("_", " ").capitalize()
    return {"label": label, "what": mine["what"].iloc[0], "rows": rows.reset_index().rename_axis(None, axis=1)}


def _describe_machine(machine: dict[str, Any]) -> str:
    parts = [f"{name} {version}" for name, version in (machine.get("versions") or {}).items()]
    hardware = {key: value for key, value in (machine.get("hardware") or {}).items() if value not in (None, [], "")}
    parts += [f"{key}: {', '.join(value) if isinstance(value, list) else value}" for key, value in hardware.items()]
    return "; ".join(parts)


def _plain(value: Any) -> str:
    """Write text of the user's as text: no image, no line break."""
    return " ".join(str(value).split()).replace("![", r"!\[")


def _tidy(markdown: str) -> str:
    """Leave one empty line between blocks."""
    lines: list[str] = []
    for line in markdown.splitlines():
        if line.strip() or (lines and lines[-1]):
            lines.append(line.rstrip())
    return "\n".join(lines).strip() + "\n"


# ------------------------------------------------------------------------------------------------------------- HTML


def render_html(markdown: str, title: str, folder: Path) -> str:
    """Render Markdown as a whole HTML page that needs nothing else: figures (relative to `folder`) and style are inside."""
    parser = MarkdownIt("commonmark", {"html": False}).enable("table")
    tokens = parser.parse(_tidy(markdown))
    for token in tokens:
        for child in token.children or ():
            if child.type == "image":
                path = folder / str(child.attrs["src"])
                content = base64.b64encode(path.read_bytes()).decode("ascii")
                child.attrs["src"] = f"data:image/svg+xml;base64,{content}"
        if token.type in ("th_open", "td_open") and "right" in str(token.attrs.pop("style", "")):
            token.attrs["class"] = "number"
    parser.add_render_rule("table_open", lambda *_: '<div class="wide"><table>\n')
    parser.add_render_rule("table_close", lambda *_: "</table></div>\n")
    parts: list[tuple[str, list]] = [("", [])]
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and token.tag == "h2":
            parts.append((following.content, []))
        parts[-1][1].append(token)
    body = "".join(_wrap(heading, parser.renderer.render(part, parser.options, {})) for heading, part in parts)
    return (
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<title>{html.escape(title)}</title>\n'
        f"<style>{STYLE}</style>\n</head>\n<body>\n<main>\n{body}</main>\n</body>\n</html>\n"
    )


def _wrap(heading: str, content: str) -> str:
    if not heading:
        return content
    if heading in FOLDED:
        end = content.index("</h2>") + len("</h2>")
        return f"<details>\n<summary>{content[:end]}</summary>{content[end:]}</details>\n"
    kind = {"Conclusion": ' class="answer"', "Runs that did not begin alike": ' class="alarm"'}.get(heading, "")
    return f"<section{kind}>\n{content}</section>\n"
