"""The report on a comparison: `report.md`, a self-contained `report.html`, the tables and the figures.

It can be written at any time, also while runs are going on, and says how far they are. `report.html` is `report.md`, rendered.
"""

from __future__ import annotations

import base64
import json
import re
import shutil
from pathlib import Path
from typing import Any

import jinja2
from markdown_it import MarkdownIt

from . import files, results, summary
from .figures import draw_figures
from .results import Comparison, find_odd_beginnings, read_comparison, write_tables
from .summary import Condition, summarize

MARKDOWN_FILE, HTML_FILE, FIGURES_FOLDER = "report.md", "report.html", "figures"
COPIED = (files.PLAN_FILE, results.RESULTS_FILE, results.EVALUATIONS_FILE, results.MACHINES_FILE, MARKDOWN_FILE)
STAGES = {files.TUNE: "First stage (tune)", files.CONFIRM: "Second stage (confirm)"}
LEFT = "family,setting,chosen,condition,run,state,stage,remarks,flag,value,optimizer,at the edge of".split(",")


def write_report(folder: str | Path, summary_dir: str | Path | None = None) -> Path:
    """Read a comparison, as far as it has come, and write the report into the same folder.

    A folder without runs, such as a copy in a repository, keeps its tables as they are: report.md and figures are written.

    Args:
        folder: of the comparison.
        summary_dir: a folder for a copy without the runs: plan, tables, report and figures. A report can be written from it again.

    Returns the path of `report.html`, or of `report.md` for a folder without runs, which has no other.

    Raises:
        InputError: there is no comparison.
    """
    comparison = read_comparison(folder)
    place = comparison.folder
    has_runs = (place / files.RUNS_FOLDER).is_dir()
    if has_runs:
        write_tables(comparison, place)
    conditions = summarize(comparison)
    figures = draw_figures(comparison, conditions, place / FIGURES_FOLDER, (".svg", ".png") if has_runs else (".svg",))
    markdown = _tidy(load_template("report.jinja").render(**make_context(comparison, conditions), figures=figures))
    (place / MARKDOWN_FILE).write_text(markdown, encoding="utf-8")
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
    shutil.rmtree(destination / FIGURES_FOLDER, ignore_errors=True)
    (destination / FIGURES_FOLDER).mkdir(parents=True)
    for file in [*(place / name for name in COPIED), *(place / FIGURES_FOLDER).glob("*.svg")]:
        if file.is_file():
            shutil.copyfile(file, destination / file.relative_to(place))


def load_template(name: str) -> jinja2.Template:
    """Load a template of this folder, with the filters that it uses."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(loader=loader, undefined=jinja2.StrictUndefined)
    environment.filters |= {
        "cell": lambda value: _plain(value).replace("|", r"\|"),
        "plain": _plain,
        "number": summary.format_number,
        "seconds": summary.format_seconds,
        "json": json.dumps,
        "estimate": summary.format_estimate,
        "interval": lambda interval: summary.format_interval(interval).replace("(", "(95% CI "),
    }
    return environment.get_template(name)


def make_context(comparison: Comparison, conditions: list[Condition]) -> dict[str, Any]:
    """Make all that the template says, but the figures."""
    plan, runs = comparison.plan, comparison.runs
    return {
        "plan": {"margin": 0.01, "margin_is_relative": True, "at_step": None, "command": "", "arguments": {}, **plan},
        "conditions": conditions,
        "stages": STAGES,
        "states": files.STATES,
        "runs": runs.to_dict("records"),
        "odd": find_odd_beginnings(runs),
        "confirmed": summary.make_confirmed_table(comparison, conditions),
        "confirmed_any": any(here.losses for here in conditions),
        "is_own_confirmation": not (runs["stage"] == files.TUNE).any(),
        "tuned_any": any(here.choices for here in conditions),
        "tuning": summary.make_tuning_table(comparison, conditions),
        "rates": summary.make_rate_table(comparison),
        "budget": summary.make_budget_table(conditions),
        "machines": comparison.machines,
        "left": LEFT,
    }


def _plain(value: Any) -> str:
    """Write text of the user's as text: no image, no line break."""
    return " ".join(str(value).split()).replace("![", r"\![")


def _tidy(markdown: str) -> str:
    """Leave one empty line between blocks."""
    lines = "\n".join(line.rstrip() for line in markdown.splitlines())
    return re.sub(r"\n{3,}", "\n\n", lines).strip() + "\n"


def render_html(markdown: str, title: str, folder: Path) -> str:
    """Render Markdown as a whole HTML page that needs nothing else: figures (relative to `folder`) and style are inside."""

    def embed(image: re.Match) -> str:
        content = base64.b64encode((folder / image[1]).read_bytes()).decode("ascii")
        return f'src="data:image/svg+xml;base64,{content}"'

    page = MarkdownIt("commonmark", {"html": False}).enable("table").render(markdown)
    page = re.sub(r'src="([^"]*)"', embed, page)
    page = page.replace(' style="text-align:right"', ' class="number"').replace(' style="text-align:left"', "")
    page = page.replace("<table>", '<div class="wide"><table>').replace("</table>", "</table></div>")
    # What comes before the first heading, then headings and their sections in turn
    head, *rest = re.split(r"<h2>(.*?)</h2>\n", page)
    sections = list(zip(rest[::2], rest[1::2], strict=True))
    return load_template("page.jinja").render(title=title, head=head, sections=sections)
