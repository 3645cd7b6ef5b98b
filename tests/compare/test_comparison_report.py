import csv
import json
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
from comparison_folders import make_entry, write_grid, write_plan, write_run

from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reading.summary import compute_summary
from hf_v0init.compare.reporting.figure_canvas import choose_main_arms, compute_mean_curve
from hf_v0init.compare.reporting.report import write_report
from hf_v0init.compare.reporting.tables import make_group_table
from hf_v0init.errors import InputError

FINALS = {
    ("zeros", "none"): 5.0, ("zeros", "50"): 2.4, ("zeros", "200"): 2.0, ("data_driven 10", "none"): 2.02,
    ("random 100", "none"): 2.5, ("data_driven 1", "200"): 1.97,
}  # fmt: skip
FIGURES = ["tuning_budget", "loss_curves", "gap_to_warmup", "final_losses", "learning_rate_map", "learning_rates"]
FIGURES += ["quality_and_cost"]
DIAGNOSTICS_FIGURES = ["updates", "update_histograms", "second_moment_drift", "multiplier"]


def outcome(v0, warmup, rate, seed):
    if (v0, warmup, rate) == ("zeros", "none", 2e-3):
        return "diverged"
    if (v0, warmup, rate, seed) == ("zeros", "50", 2e-3, 2):
        return "failed"
    return FINALS[v0, warmup] + (0.3 if rate == 1e-3 else 0.0) + 0.013 * seed * (1.5 if v0 != "zeros" else 1.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("comparison")
    write_grid(
        folder,
        outcome,
        arms=list(FINALS),
        rates=(1e-3, 2e-3),
        with_diagnostics=True,
        pocket=True,
        published=["table_12"],
    )
    write_report(folder)
    return folder


@pytest.fixture
def without_figures(monkeypatch):
    monkeypatch.setattr("hf_v0init.compare.reporting.report.draw_figures", lambda *_, **__: [])


def read_table(markdown: str, heading: str) -> list[dict[str, str]]:
    """The first table below a heading; of columns with one name the last counts."""
    lines = markdown[markdown.index(f"# {heading}\n") :].splitlines()
    first = next(i for i, line in enumerate(lines) if line.startswith("|"))
    rows = []
    for line in lines[first:]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split(" | ")])
    return [dict(zip(rows[0], row, strict=True)) for row in rows[2:]]


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


# ----------------------------------------------------------------------------------------------------------- the numbers


def test_markdown_and_csv_have_the_same_numbers(folder):
    arms = {(row["arm"], row["learning_rate"]): row for row in read_csv(folder / "arms.csv")}
    table = read_table((folder / "report.md").read_text(), "Every arm at every learning rate")
    assert len(table) == len(arms) == 12
    for row in table:
        figures = arms[row["arm"], row["lr"]]
        for heading, name, digits in (
            ("final loss", "final", 3),
            ("best", "best", 3),
            ("test BLEU", "predict_bleu", 2),
        ):
            shown = row[heading].split(" (n")[0]
            if shown == "diverged":
                assert figures["num_diverged"] == figures["num_counted"]
                continue
            if figures[f"{name}_mean"] == "":
                assert shown == "–"
                continue
            expected = f"{float(figures[f'{name}_mean']):.{digits}f}"
            assert shown == (
                f"{expected} ± {float(figures[f'{name}_std']):.{digits}f}" if figures[f"{name}_std"] else expected
            )
        for state in ("diverged", "failed"):
            assert row[state].split(" of ")[0] == figures[f"num_{state}"].replace("0", "none")


def test_results_hold_one_row_a_run_from_which_the_means_follow(folder):
    results = read_csv(folder / "results.csv")
    assert len(results) == 36 and {row["state"] for row in results} == {"finished", "diverged", "failed"}
    for arm in read_csv(folder / "arms.csv"):
        runs = [r for r in results if (r["arm"], r["learning_rate"]) == (arm["arm"], arm["learning_rate"])]
        losses = [float(r["scored_loss"]) for r in runs if r["state"] != "failed"]
        assert float(arm["final_mean"]) == pytest.approx(sum(losses) / len(losses)) and int(arm["final_n"]) == len(
            losses
        )
        steps = [float(r["steps_to_target_charged"]) for r in runs if r["steps_to_target_charged"]]
        if steps:
            assert float(arm["steps_to_charged_mean"]) == pytest.approx(sum(steps) / len(steps))
    passes = {row["v0_extra_steps"] for row in results if row["v0"].startswith("data_driven")}
    assert passes == {"20.0"}


def test_differences_in_the_report_are_those_of_the_files(folder):
    results = read_csv(folder / "results.csv")

    def losses(arm):
        return {
            r["seed"]: float(r["final_loss"]) for r in results if r["arm"] == arm and float(r["learning_rate"]) == 2e-3
        }

    mine, warmup = losses("data_driven 10"), losses("warmup 200")
    mean = sum(mine[seed] - warmup[seed] for seed in mine) / 3
    row = next(
        r
        for r in read_table((folder / "report.md").read_text(), "Differences over seeds")
        if r["arm"] == "data_driven 10"
    )
    assert row["against the best warmup"].startswith(f"{mean:+.3f} (")


def test_diverged_runs_are_seen_in_the_robustness_table(folder):
    rows = {
        row["arm"]: row
        for row in read_table((folder / "report.md").read_text(), "Robustness against the learning rate")
    }
    assert rows["zeros"]["lr 0.002"] == "diverged (n = 3)"
    assert rows["warmup 200 (best warmup)"]["lr sensitivity"] == "0.150"  # (0.3 + 0) / 2
    assert rows["warmup 50"]["lr sensitivity"] == "–"  # a run failed


# ----------------------------------------------------------------------------------------------------------- the document


VOID = ("meta", "img", "br", "hr", "link")


class Document(HTMLParser):
    """Collects what an HTML page loads, and whether its elements close."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.references, self.open, self.tags, self.text = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.references += [
            value for name, value in attrs if name in ("src", "href", "srcset", "data", "action", "poster")
        ]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_html_needs_nothing_else(folder):
    html = (folder / "report.html").read_text()
    document = Document(html)
    assert document.open == [] and len([t for t in document.tags if t == "img"]) == len(FIGURES + DIAGNOSTICS_FIGURES)
    assert all(reference.startswith("data:image/svg+xml;base64,") for reference in document.references)
    assert not {"script", "link", "iframe", "object"} & set(document.tags)
    assert not re.search(r"(url\(|@import|https?:)", html)


def test_html_has_the_numbers_of_the_markdown(folder):
    text = "".join(Document((folder / "report.html").read_text()).text)
    for row in read_table((folder / "report.md").read_text(), "Arms at their best learning rate"):
        for cell in row.values():
            assert cell in text


def test_every_figure_is_there_twice_and_has_a_caption(folder):
    markdown = (folder / "report.md").read_text()
    for name in FIGURES + DIAGNOSTICS_FIGURES:
        assert (folder / "figures" / f"{name}.png").read_bytes()[:4] == b"\x89PNG"
        assert "<svg" in (folder / "figures" / f"{name}.svg").read_text()[:2000]
        after = markdown.split(f"(figures/{name}.svg)\n\n")[1].split("\n\n")[0]
        assert after.startswith("*") and len(after.split()) > 25
    assert not (folder / "figures" / "all_arms.png").exists()  # six arms fit into the others


def test_the_conclusion_comes_first_and_the_rest_is_complete(folder):
    markdown = (folder / "report.md").read_text()
    headings = re.findall(r"^## (.*)$", markdown, flags=re.MULTILINE)
    assert headings[0] == "Conclusion" and markdown.startswith("# A test (pocket scale)\n")
    assert headings[-4:] == ["Every arm at every learning rate", "Checks", "Runs", "How to make this again"]
    assert "36 runs of 6 arms, 3 seeds and 2 learning rates: 32 finished, 3 diverged, 1 failed." in markdown
    assert (
        "out of memory" in markdown
        and "torch 2.13.0" in markdown
        and "two cores" in markdown
        and "hf-v0init compare" in markdown
    )
    assert "agree within each seed" in markdown


def test_what_arms_without_a_named_optimizer_have_is_said_where_others_name_one(folder, tmp_path, without_figures):
    said = "Arms that name no optimizer have adamw."
    entries = [make_entry("zeros", "none", 1e-3, 1, optimizer) for optimizer in ("adamw", "radam")]
    write_plan(tmp_path, entries)
    for entry in entries:
        write_run(tmp_path, entry, 2.0)
    write_report(tmp_path)
    assert said in (tmp_path / "report.md").read_text()
    assert said not in (folder / "report.md").read_text()  # where all have the same


def test_pocket_scale_keeps_the_papers_figures_apart(folder):
    markdown = (folder / "report.md").read_text()
    section = markdown[markdown.index("## Published figures, of another task or scale") :].split("\n## ")[0]
    assert "must not be set against its figures as if they were equal" in section and "31.53" in section
    assert "| measured here" not in section and "data_driven 10" not in section
    assert "31.53" not in markdown.replace(section, "")


def test_full_scale_shows_both_with_their_source(tmp_path, without_figures):
    write_grid(
        tmp_path, lambda v0, w, r, s: FINALS[v0, w], arms=list(FINALS), published=["table_12", "table_3", "no_table"]
    )
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    rows = read_table(markdown, "Published, Table 12: IWSLT'14 German-English, Transformer, Adam, test BLEU")
    assert [row["source"].split(":")[0] for row in rows] == ["published", "published", "measured here", "measured here"]
    assert rows[0]["random"] == "31.53" and rows[2]["data_driven"] == "29.90 ± 0.00 (n = 3; data_driven 10)"
    assert rows[3]["zeros"] == "30.00 ± 0.00 (n = 3; warmup 200)"
    assert "`no_table`: there is no such table" in markdown
    # perplexity was not measured here, so the paper's table stands alone
    assert "source" not in read_table(markdown, "Published, Table 3: Penn Treebank, 2-layer LSTM, test perplexity")[0]


@pytest.mark.parametrize(("rates", "last"), [((1e-3,), "loss_curves"), ((1e-3, 2e-3), "learning_rate_map")])
def test_a_copy_for_a_repository_has_the_numbers_and_only_figures_that_it_holds(tmp_path, rates, last):
    write_grid(tmp_path / "runs_here", lambda v0, w, r, s: FINALS[v0, w], arms=list(FINALS), rates=rates)
    write_report(tmp_path / "runs_here", tmp_path / "copy")
    copy = tmp_path / "copy"
    for name in ("results.csv", "arms.csv"):
        assert (copy / name).read_bytes() == (tmp_path / "runs_here" / name).read_bytes()
    shown = re.findall(r"\]\((figures/[^)]*)\)", (copy / "report.md").read_text())
    expected = ["tuning_budget", "final_losses", "gap_to_warmup", last]
    assert sorted(shown) == sorted(f"figures/{name}.svg" for name in expected)
    assert sorted(shown) == sorted(str(path.relative_to(copy)) for path in copy.rglob("*.svg"))
    whole = (tmp_path / "runs_here" / "report.md").read_text()
    assert set((copy / "report.md").read_text().splitlines()) <= set(whole.splitlines())
    files = {path: path.read_bytes() for path in copy.rglob("*.*")}
    assert write_report(copy) == copy / "report.md"  # anew, from the copy alone
    assert {path: path.read_bytes() for path in copy.rglob("*.*")} == files


def test_a_copy_without_curves_has_what_they_said(tmp_path, without_figures):
    """As copies were before they had `evaluations.csv`: steps to the recorded target and best losses are kept."""
    write_grid(tmp_path / "runs_here", outcome, arms=list(FINALS), rates=(1e-3, 2e-3))
    write_report(tmp_path / "runs_here", tmp_path / "copy")
    before = (tmp_path / "copy" / "arms.csv").read_bytes()
    (tmp_path / "copy" / "evaluations.csv").unlink()
    write_report(tmp_path / "copy")
    assert (tmp_path / "copy" / "arms.csv").read_bytes() == before


def test_an_image_in_a_value_is_shown_as_text(tmp_path, without_figures):
    """Markdown of a user's own, in an axis value, a reason or a title, neither ends the report nor loads anything."""
    evil = "0.1 ![a](b.txt) ![c](http://x/y.png) [l](javascript:alert(2)) <img src=x onerror=alert(3)>"
    entries = [make_entry("zeros", w, 1e-3, s, other={"dropout": evil}) for w in ("none", "200") for s in (1, 2)]
    entries += [make_entry("data_driven 1", "none", 1e-3, s, other={"dropout": evil}) for s in (1, 2)]
    for i, entry in enumerate(entries):
        entry["name"] = f"run{i}"
    write_plan(tmp_path, entries, title=f"T {evil}", arguments={"note": evil})
    for entry in entries:
        write_run(tmp_path, entry, 2.0 + 0.01 * entry["seed"])
    document = Document(write_report(tmp_path).read_text())
    assert document.references == [] and not {"img", "script"} & set(document.tags)
    assert "![a](b.txt)" in "".join(document.text)


def test_a_gan_s_loss_is_called_what_it_is(tmp_path, without_figures):
    write_grid(tmp_path, lambda v0, w, r, s: FINALS[v0, w], arms=list(FINALS), script="run_dcgan")
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "| final Frechet distance |" in markdown and "stands here for the Frechet distance" in markdown


# --------------------------------------------------------------------------------------------------------- unfinished ones


def test_a_folder_in_which_nothing_has_started(tmp_path):
    write_grid(tmp_path, lambda *_: None)
    assert write_report(tmp_path) == tmp_path / "report.html"
    markdown = (tmp_path / "report.md").read_text()
    assert "No run has a result yet" in markdown and "9 pending" in markdown and not list(tmp_path.glob("figures/*"))
    assert [row["state"] for row in read_csv(tmp_path / "results.csv")] == ["pending"] * 9


def test_a_folder_that_is_half_done_and_is_then_finished(tmp_path):
    entries = [
        make_entry(v0, w, 1e-3, s)
        for s in (1, 2)
        for v0, w in (("zeros", "none"), ("zeros", "200"), ("random 100", "none"))
    ]
    write_plan(tmp_path, entries)
    (
        write_run(tmp_path, entries[0], 4.0),
        write_run(tmp_path, entries[1], "running"),
        write_run(tmp_path, entries[2], "interrupted"),
    )
    (tmp_path / "runs" / entries[3]["name"]).mkdir()  # begun this moment
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "1 finished, 1 interrupted, 1 running, 3 pending" in markdown and "so v0 cannot be judged" in markdown
    assert [row["arm"] for row in read_table(markdown, "Arms at their best learning rate")] == ["zeros"]
    assert "Without a result: warmup 200, random 100." in markdown
    assert "Preliminary: 1 of 6 runs" in markdown and not (tmp_path / "figures" / "gap_to_warmup.svg").exists()
    for entry in entries[1:3]:
        for file in sorted((tmp_path / "runs" / entry["name"]).rglob("*"), reverse=True):
            file.unlink() if file.is_file() else file.rmdir()
        (tmp_path / "runs" / entry["name"]).rmdir()
        write_run(tmp_path, entry, 2.0)
    write_report(tmp_path)
    assert "Too few seeds to tell" in (tmp_path / "report.md").read_text()
    assert (tmp_path / "figures" / "gap_to_warmup.svg").exists()


def test_a_folder_in_which_everything_diverged(tmp_path):
    write_grid(tmp_path, lambda *_: "diverged", rates=(1e-3, 2e-3))
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert "Every run that has ended diverged" in markdown and "nan" not in markdown.lower().replace(
        "a loss was nan", ""
    )
    assert {row["scored_loss"] for row in read_csv(tmp_path / "results.csv")} == {"9.0"}


def test_runs_that_diverged_before_any_loss_do_not_break_it(tmp_path):
    write_grid(tmp_path, lambda v0, w, r, s: "diverged" if v0 != "zeros" else 2.0)
    for log in tmp_path.glob("runs/*/output/run_log.jsonl"):
        log.unlink()
    write_report(tmp_path)
    rows = {
        row["arm"]: row for row in read_table((tmp_path / "report.md").read_text(), "Arms at their best learning rate")
    }
    assert rows["data_driven 10"]["final validation loss (nats per token)"] == "diverged"


def test_runs_that_did_not_begin_alike_come_before_the_conclusion(tmp_path, without_figures):
    write_grid(tmp_path, lambda v0, w, r, s: 2.0, seeds=(1, 2))
    next(tmp_path.glob("runs/zeros_*seed2/output/fingerprint.json")).write_text('{"initial_weights": "x"}')
    write_report(tmp_path)
    markdown = (tmp_path / "report.md").read_text()
    assert markdown.index("## Runs that did not begin alike") < markdown.index("## Conclusion")
    assert "seed 2: other initial weights in 1 of 3 runs" in markdown
    assert '<section class="alarm">' in (tmp_path / "report.html").read_text()


def test_text_of_the_user_is_shown_and_not_run(tmp_path, without_figures):
    entry = make_entry("zeros", "none", 1e-3, 1) | {"arm": "mine | <script>alert(1)</script>", "name": "a"}
    write_plan(tmp_path, [entry], title="<script>x</script> *A* | B")
    write_run(tmp_path, entry, 2.0)
    record = tmp_path / "runs" / "a" / "record.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"reason": "a | b\n<img src=http://x>"}))
    write_report(tmp_path)
    document = Document((tmp_path / "report.html").read_text())
    assert "script" not in document.tags and not any("http" in reference for reference in document.references)
    text = "".join(document.text)
    assert (
        "<script>x</script> *A* | B" in text
        and "mine | <script>alert(1)</script>" in text
        and "a | b <img src=http://x>" in text
    )


def test_a_folder_without_a_plan_is_refused(tmp_path):
    with pytest.raises(InputError, match="no comparison there"):
        write_report(tmp_path)


# ----------------------------------------------------------------------------------------------------------------- pieces


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    write_grid(tmp_path, lambda *_: 2.0, seeds=(1,))
    code = f"import sys; from hf_v0init.compare.reporting.report import write_report; assert 'matplotlib' not in sys.modules; write_report({str(tmp_path)!r})"
    subprocess.run(
        [sys.executable, "-c", f"{code}; assert not {{'torch', 'transformers'}} & set(sys.modules)"], check=True
    )


def test_the_same_runs_give_the_same_files(tmp_path):
    write_grid(tmp_path, lambda v0, w, r, s: FINALS[v0, w], seeds=(1,))
    first = {}
    for _ in range(2):
        write_report(tmp_path)
        files = {p.name: p.read_bytes() for p in [*tmp_path.glob("*.*"), *tmp_path.glob("figures/*")]}
        first = first or files
    assert files == first


def test_main_arms_are_chosen_by_the_rule(tmp_path):
    finals = {
        ("zeros", "none"): 5.0,
        ("zeros", "200"): 2.0,
        ("first_gradient 1", "none"): 4.0,
        ("data_driven 1", "200"): 3.0,
    }
    finals |= {("random 100", "none"): 3.5} | {
        (f"data_driven {scale}", "none"): 2.0 + scale / 100 for scale in range(1, 8)
    }
    summary = compute_summary(
        read_comparison(write_grid(tmp_path, lambda v0, w, *_: finals[v0, w], arms=list(finals), seeds=(1,)))
    )
    names = [arm.name for arm in choose_main_arms(summary)]
    assert names[:5] == ["zeros", "warmup 200", "data_driven 1", "random 100", "first_gradient 1"]
    assert names[5:] == ["data_driven 1 + warmup 200", "data_driven 2", "data_driven 3"]


def test_mean_curves_are_over_what_is_finite():
    steps, means, stds = compute_mean_curve(
        [([0, 10, 20], [4.0, 2.0, float("nan")]), ([0, 10], [6.0, 2.0]), ([20], [1.0])]
    )
    assert (steps, means) == ([0, 10, 20], [5.0, 2.0, 1.0]) and stds == pytest.approx([2.0**0.5, 0.0, 0.0])


def test_one_setting_needs_no_table_of_settings(folder):
    assert make_group_table(compute_summary(read_comparison(folder))) is None
