"""The report: its words follow from the numbers, it can be written from the tables alone, and it is the same each time."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
from comparison_folders import make_entry, write_grid, write_plan, write_run

from hf_v0init.compare.files import PLAN_FILE
from hf_v0init.compare.report import read_conclusion, write_report
from hf_v0init.compare.results import read_comparison
from hf_v0init.compare.statistics import Verdict
from hf_v0init.compare.summary import format_interval, make_confirmed_table, summarize

ROOT = Path(__file__).resolve().parents[2]
NOISE = {1: 0.0, 2: 0.002, 3: -0.002, 4: 0.001}


def outcome_of(none=4.0, warmup=3.0, v0=3.0):
    """Losses of the three families, with a little noise of each run."""

    def outcome(v0_word, warmup_word, rate, seed):
        base = v0 if v0_word != "zeros" else warmup if warmup_word != "none" else none
        return base if isinstance(base, str) or base is None else base + NOISE[seed] * (1 if v0_word == "zeros" else -1)

    return outcome


@pytest.fixture(autouse=True)
def without_figures(request, monkeypatch):
    if "figures" not in request.node.name:
        monkeypatch.setattr("hf_v0init.compare.report.draw_figures", lambda *given: [])


def conclude(folder) -> str:
    write_report(folder)
    return " ".join(read_conclusion(folder).split())


@pytest.mark.parametrize(
    ("losses", "replacement", "verdicts", "words"),
    [
        ({}, Verdict.CAN_REPLACE, ["not significant", "better", "better"], "v0 can replace the warmup: with 95% confidence it ends at most 0.01"),
        ({"v0": 3.1}, Verdict.NOT_SHOWN, ["worse", "better", "better"], "Not shown that v0 can replace the warmup: it may end 0.11"),
        ({"v0": 2.8}, Verdict.CAN_REPLACE, ["better", "better", "better"], "with 95% confidence it ends no worse, within the margin of 0.030 (1% of"),
        ({"warmup": 4.2, "v0": 4.1}, Verdict.CAN_REPLACE, ["better", "worse", "worse"], "no worse"),
    ],
)  # fmt: skip
def test_the_conclusion_follows_from_the_second_stage(tmp_path, losses, replacement, verdicts, words):
    folder = write_grid(tmp_path, outcome_of(**losses))
    (here,) = summarize(read_comparison(folder))
    assert here.replacement.verdict is replacement and [c.verdict.value for c in here.contrasts] == verdicts
    text = conclude(folder)
    assert words in text
    said = {"better": "significantly better", "worse": "significantly worse", "not significant": "not significant"}
    for contrast, verdict in zip(here.contrasts, verdicts, strict=True):
        assert f"{said[verdict]}." in text and f"p = {contrast.p_adjusted:.2g} by Holm, 3 seeds" in text
    best = min(here.losses, key=lambda family: sum(here.losses[family].values()))
    assert re.search(r"Best mean of what was confirmed: [^.]*`?" + re.escape(here.settings[best][0]), text)


def test_the_first_stage_has_no_part_in_the_verdict(tmp_path):
    """Its seed says the opposite of what the fresh ones say."""
    outcome = outcome_of(v0=2.8)
    folder = write_grid(tmp_path, lambda *place: 9.0 if place[3] == 1 and place[0] != "zeros" else outcome(*place))
    (here,) = summarize(read_comparison(folder))
    assert here.contrasts[0].verdict is Verdict.BETTER and set(here.losses["v0"]) == {2, 3, 4}


def test_nothing_is_concluded_before_something_is_confirmed(tmp_path):
    folder = write_grid(tmp_path, lambda *place: 3.0 if place[3] == 1 else None, confirm_seeds=[2, 3, 4])
    text = conclude(folder)
    assert "No verdict: nothing is confirmed yet." in text and "significant" not in text
    assert "First stage (tune): 3 finished. Second stage (confirm): 9 pending." in (folder / "report.md").read_text()
    folder = write_grid(tmp_path / "none", lambda *place: 3.0, confirm=())
    assert "the file asks for no confirmation (confirm_seeds: 0)" in conclude(folder)


def test_one_fresh_seed_decides_nothing(tmp_path):
    text = conclude(write_grid(tmp_path, outcome_of(), confirm=(2,)))
    assert "Whether v0 can replace the warmup is open: one seed has no interval." in text
    assert text.count("too few seeds for a verdict") == 3


def test_conditions_are_compared_apart(tmp_path):
    """v0 wins at one beta2 and loses at the other: no sentence mixes them."""
    entries = [
        make_entry(v0, w, 1e-3, seed, other={"adam_beta2": b})
        for b in (0.98, 0.999)
        for v0, w in (("zeros", "5"), ("random 1", "none"))
        for seed in (1, 2, 3, 4)
    ]
    folder = write_plan(tmp_path, entries)
    for entry in entries:
        base = 3.0 if entry["v0"] == "zeros" else {0.98: 2.5, 0.999: 3.5}[entry["other"]["adam_beta2"]]
        write_run(folder, entry, base + NOISE[entry["seed"]] * (1 if entry["v0"] == "zeros" else -1))
    first, second = summarize(read_comparison(folder))
    assert (first.name, first.contrasts[0].verdict) == ("adam_beta2=0.98", Verdict.BETTER)
    assert (second.name, second.contrasts[0].verdict) == ("adam_beta2=0.999", Verdict.WORSE)
    text = conclude(folder)
    assert text.index("Under adam_beta2=0.98:") < text.index("can replace") < text.index("Under adam_beta2=0.999:")


def test_an_accuracy_that_is_nan_on_one_seed_leaves_the_others(tmp_path):
    entries = [
        make_entry(v0, w, 1e-3, seed) for v0, w in (("zeros", "5"), ("random 1", "none")) for seed in (1, 2, 3, 4)
    ]
    folder = write_plan(tmp_path, entries, metric="eval_accuracy", greater_is_better=True, test_metrics=[])
    for entry in entries:
        value = (
            math.nan
            if entry["v0"] != "zeros" and entry["seed"] == 2
            else 0.8 + NOISE[entry["seed"]] * (1 if entry["v0"] == "zeros" else -1)
        )
        write_run(folder, entry, 3.0)
        output = folder / "runs" / entry["name"] / "output"
        (output / "all_results.json").write_text(json.dumps({"eval_accuracy": value}))
    (here,) = summarize(read_comparison(folder))
    assert (here.contrasts[0].interval.n, here.contrasts[0].interval.lost_one) == (3, 1)
    assert "3 seeds: not significant (left out, since they diverged: 1 and 0 seeds)" in conclude(folder)


def test_an_edge_is_said_with_the_value_to_add(tmp_path):
    outcome = lambda v0, warmup, rate, seed: 3.0 + rate * (10 if v0 == "zeros" else -10)  # noqa: E731
    folder = write_grid(tmp_path, outcome, rates=(1e-3, 2e-3, 4e-3), settings=[("zeros", "none"), ("random 1", "none")])
    text = conclude(folder)
    assert (
        "The best learning_rate of no warmup (no warmup), 0.001, is the lowest tried: a better one may lie beyond, so add 0.0005"
        in text
    )
    assert (
        "of v0 (random 1), 0.004, is the highest tried: a better one may lie beyond, so add 0.008, or write extend: true"
        in text
    )


def test_the_table_has_every_confirmed_setting_and_its_test_metrics(tmp_path):
    folder = write_grid(tmp_path, outcome_of(v0=2.0))
    comparison = read_comparison(folder)
    table = make_confirmed_table(comparison, summarize(comparison)).set_index("family")
    assert list(table.index) == ["v0", "warmup", "no warmup"]  # best first, none left out
    assert (
        table.loc["v0", "predict_bleu"] == "30.002 ± 0.010"
        and table.loc["no warmup", "predict_bleu"] == "19.998 ± 0.010"
    )


def test_a_copy_gives_the_same_report_and_keeps_its_tables(tmp_path):
    folder = write_grid(tmp_path / "whole", outcome_of(), rates=(1e-3, 1e-2))
    write_report(folder, summary_dir=tmp_path / "copy")
    before = {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir() if path.is_file()}
    assert set(before) == {PLAN_FILE, "results.csv", "evaluations.csv", "machines.json", "report.md"}
    assert write_report(tmp_path / "copy") == tmp_path / "copy" / "report.md"
    assert before == {path.name: path.read_bytes() for path in (tmp_path / "copy").iterdir() if path.is_file()}
    assert before["report.md"] == (folder / "report.md").read_bytes()


def test_failed_and_diverged_runs_are_seen(tmp_path):
    outcome = outcome_of()
    folder = write_grid(
        tmp_path, lambda *p: {2: "failed", 3: "diverged"}.get(p[3], 3.0) if p[1] == "200" else outcome(*p)
    )
    text = conclude(folder)
    report = (folder / "report.md").read_text()
    assert "1 of 3 | 1 of 3 |" in report and "out of memory" in report and "1 run of the second stage failed" in text


def test_runs_that_did_not_begin_alike_come_before_the_conclusion(tmp_path):
    folder = write_grid(tmp_path, outcome_of())
    path = next(folder.glob("runs/*seed2*/output/fingerprint.json"))
    path.write_text(json.dumps({"initial_weights": "x", "batches": [], "rng": "r2"}))
    write_report(folder)
    text = (folder / "report.md").read_text()
    assert text.index("## Runs that did not begin alike") < text.index("## Conclusion")
    assert f"- seed 2: other initial weights in 1 of 3 runs: {path.parents[1].name}\n" in text
    assert '<section class="alarm">' in (folder / "report.html").read_text()


def test_text_of_the_user_is_shown_and_not_run(tmp_path):
    title = "<script>alert(1)</script> | ![x](http://x/y.png)"
    folder = write_grid(tmp_path, outcome_of(), title=title, arguments={"run_name": "a|b\n<b>", "max_steps": 400})
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert "<script>" not in page and "<img" not in page and "<b>" not in page and "&lt;script&gt;" in page
    assert r"a\|b <b>" in (folder / "report.md").read_text()


def test_the_page_needs_nothing_else_and_its_tables_can_be_scrolled(tmp_path):
    folder = write_grid(tmp_path, outcome_of())
    write_report(folder)
    page = (folder / "report.html").read_text()
    assert (
        not re.search(r'(src|href)="(?!data:)', page)
        and page.count('<div class="wide"><table>') == page.count("<table>") > 3
    )
    assert "overflow-x: auto" in page


def test_figures_have_captions_that_say_more_than_their_titles(tmp_path):
    folder = write_grid(
        tmp_path,
        outcome_of(),
        rates=(1e-3, 1.1e-3, 1.2e-3, 1e-2),
        settings=[*[("zeros", "none"), ("zeros", "200")], ("random 1", "none")],
    )
    write_report(folder)
    text = (folder / "report.md").read_text()
    captions = re.findall(r"!\[([^]]*)\]\(figures/(\w+)\.svg\)\n\n\*(.*)\*", text)
    assert [name for _, name, _ in captions] == ["confirmed", "loss_curves", "learning_rates", "tuning_budget"]
    for title, name, caption in captions:
        assert not caption.startswith(title) and (folder / "figures" / f"{name}.png").stat().st_size > 5000
    first = {path.name: path.read_bytes() for path in (folder / "figures").glob("*.svg")}
    labels = re.findall(r"<!-- (0\.\d+) -->", first["learning_rates.svg"].decode())
    assert "0.001" in labels and "0.01" in labels and "0.0011" not in labels  # would run together with its neighbour
    write_report(folder)
    assert first == {path.name: path.read_bytes() for path in (folder / "figures").glob("*.svg")}
    assert (folder / "report.html").read_text().count("data:image/svg+xml;base64,") == 4


COMMITTED = sorted((ROOT / "configs").glob("*/results/*/plan.json"))


@pytest.mark.parametrize("plan", COMMITTED, ids=lambda path: f"{path.parts[-4]}/{path.parent.name}")
def test_committed_results_follow_from_their_committed_numbers(plan, tmp_path):
    """`hf-v0init report FOLDER` writes what is there."""
    folder = tmp_path / plan.parent.name
    folder.mkdir()
    for path in plan.parent.glob("*.*"):
        (folder / path.name).write_bytes(path.read_bytes())
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"results.csv", "report.md"} <= set(before)
    write_report(folder)
    without = re.sub(rb"\n!\[.*\n\n\*.*\*\n", b"", before["report.md"])  # the figures are not drawn here
    assert (folder / "report.md").read_bytes().split() == without.split()
    for name in set(before) - {"report.md"}:
        assert (folder / name).read_bytes() == before[name]


def test_the_page_of_results_says_what_the_committed_numbers_say():
    """Its intervals, in the order of its rows: every contrast of v0 and warmup there is."""
    place = ROOT / "configs" / "compare" / "results"
    rows = [line for line in (place / "README.md").read_text(encoding="utf-8").splitlines() if line.startswith("| [")]
    found = []
    for name in ("multi30k_small", "multi30k", "multi30k_paper_model", "ptb_small"):
        for here in summarize(read_comparison(place / name)):
            if here.replacement:
                verdicts = (here.contrasts[0].verdict, here.replacement.verdict)
                assert verdicts == (Verdict.NOT_SIGNIFICANT, Verdict.NOT_SHOWN)
                words = f"| {format_interval(here.contrasts[0].interval)} | not significant"
                found.append((f"({name}/report.md)", words))
    assert len(rows) == len(found)
    for row, (link, words) in zip(rows, found, strict=True):
        assert link in row and words in row, row


def test_neither_torch_nor_transformers_is_imported(tmp_path):
    folder = write_grid(tmp_path, outcome_of())
    program = f"import sys; from hf_v0init.compare.report import write_report; write_report({str(folder)!r}); "
    program += "sys.exit(str([m for m in ('torch', 'transformers') if m in sys.modules]))"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stderr.strip() == "[]"
