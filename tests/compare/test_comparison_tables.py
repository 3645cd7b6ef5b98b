from comparison_folders import make_entry, write_plan, write_run

from hf_v0init.compare.reading.results import read_comparison
from hf_v0init.compare.reading.summary import Estimate, compute_summary
from hf_v0init.compare.reporting.formats import (
    format_estimate,
    format_number,
    format_seconds,
    format_test,
    name_test_metric,
)
from hf_v0init.compare.reporting.tables import Table, describe_settings, make_group_table


def test_numbers_are_written_alike_everywhere():
    assert format_number(-0.0004, signed=True) == "+0.000" and format_number(-0.0004) == "0.000"
    assert format_number(-0.0126, signed=True) == "-0.013" and format_number(1234.5, 1) == "1,234.5"
    assert format_number(None) == "–" and format_number(float("inf")) == "diverged"
    assert (
        format_estimate(Estimate(2.0, None, 1)) == "2.000" and format_estimate(Estimate(2.0, 0.5, 3), 1) == "2.0 ± 0.5"
    )
    assert format_test(Estimate(0.9756, 0.0062, 3)) == "0.976 ± 0.006" and format_test(None) == "–"
    assert format_test(Estimate(33.456, 0.25, 3)) == "33.46 ± 0.25"
    names = ["predict_bleu", "test_perplexity", "eval_fid", "eval_frechet_distance_classifier"]
    assert [name_test_metric(name) for name in names] == [
        "test BLEU", "test perplexity", "FID", "Frechet distance in a classifier's features",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (3.21, 600.0, 9000.0)] == ["3.2 s", "10.0 min", "2.5 h"]


def test_v0_and_warmup_are_compared_within_each_setting(tmp_path):
    arms = [
        (v0, w, beta2)
        for beta2 in (None, 0.999)
        for v0, w in (("zeros", "100"), ("zeros", "200"), ("random 100", "none"))
    ]
    finals = dict(zip(arms, (2.5, 2.0, 2.25, 3.0, 3.5, 2.75), strict=True))
    entries = {}
    for seed in (1, 2):
        for v0, w, beta2 in arms:
            entry = make_entry(v0, w, 1e-3, seed, other={"adam_beta2": beta2} if beta2 else None)
            entries[entry["name"]] = entry, finals[v0, w, beta2] + 0.1 * seed
    write_plan(tmp_path, [entry for entry, _ in entries.values()])
    for entry, final in entries.values():
        write_run(tmp_path, entry, final)
    rows = make_group_table(compute_summary(read_comparison(tmp_path))).rows
    second, beta2 = "adamw, adam_beta2=0.999", "adam_beta2=0.999"
    assert [[row[0], row[1], row[2], row[5], row[7]] for row in rows] == [
        ["adamw", "random 100", "warmup 200", "+0.250 (+0.250 to +0.250)", "worse"],
        [second, f"random 100 + {beta2}", f"warmup 100 + {beta2}", "-0.250 (-0.250 to -0.250)", "better"],
    ]


def test_cells_cannot_break_a_table():
    assert Table(["a"], [["x | y\nz <b>"]]).to_markdown().splitlines()[-1] == "| x \\| y z &lt;b> |"


def test_settings_that_differ_are_told_apart():
    assert (
        describe_settings([{"torch": "2.13", "gpus": ["H100", "H100"], "none": None}] * 2)
        == "torch 2.13, gpus H100 + H100"
    )
    assert (
        describe_settings([{"torch": "2.13"}, {"torch": "2.12"}, {"torch": "2.13"}])
        == "torch 2.13 (2 runs); torch 2.12 (1 run)"
    )
