"""The benchmark's own arithmetic, its record, and the rows that are counts and not times."""

import importlib
import json
import math
from pathlib import Path

import pytest
import torch
from benchmarks.measuring import MET, MISSED, PRINTED, SKIPPED, Row, measure_memory, measure_pairs, measure_times
from benchmarks.record import RECORD_PATH, compose_record, find_worse, read_record, read_rows, write_record

from hf_v0init.errors import InputError

ROOT = Path(__file__).resolve().parents[2]


def row(ratios, aim=1.1, name="a", **options) -> Row:
    return Row(name, "ours", "theirs", ratios, aim=aim, **options)


class Clock:
    """Goes on as it is told to."""

    def __init__(self):
        self.now, self.calls = 0.0, []

    def __call__(self):
        return self.now

    def taking(self, name, seconds):
        def run():
            self.calls.append(name)
            self.now += seconds

        return run


def test_pairs_are_interleaved_after_a_warm_up_change_their_order_and_may_measure_themselves():
    clock = Clock()
    ratios = measure_pairs(clock.taking("ours", 3.0), clock.taking("theirs", 2.0), 3, clock)
    assert ratios == [1.5, 1.5, 1.5]
    assert clock.calls == ["ours", "theirs", "theirs", "ours", "ours", "theirs", "theirs", "ours"]
    times = measure_times([lambda: 5.0, clock.taking("b", 2.0), lambda: 0.25], 2, clock)
    assert times == [[5.0, 2.0, 0.25]] * 2


def test_median_quartiles_and_verdict():
    one = row([1.3, 1.0, 1.1, 1.2, 0.9])
    assert (one.median, one.quartiles, one.verdict) == (1.1, (1.0, 1.2), MET)
    assert row([1.104]).verdict == MET and row([1.106]).verdict == MISSED  # as printed
    assert row([0.95, 0.97], aim=0.96, at_least=True).verdict == MET
    assert row([0.94], aim=0.96, at_least=True).verdict == MISSED
    assert row([3.0], aim=None).verdict == PRINTED
    nothing = row([])
    assert nothing.verdict == SKIPPED and math.isnan(nothing.median)
    assert row([2.0]).quartiles == (2.0, 2.0)


def test_memory_counts_what_is_alive_at_once_and_inside_kernels():
    def build():
        first = torch.zeros(1000)
        second = torch.zeros(2000)
        del first
        return torch.zeros(500), second.sum()

    used = measure_memory(build)
    assert used.left == 2000 + 4
    assert 12_000 <= used.peak <= 12_000 + 200
    narrow, wide = torch.zeros(1 << 16, dtype=torch.bfloat16), torch.zeros(1 << 16)
    assert measure_memory(lambda: wide.mul_(2.0)).peak < 1000
    assert measure_memory(lambda: wide.add_(narrow)).peak >= 4 << 16  # cast inside the kernel


# ---- the record ------------------------------------------------------------------------------------------------------


def test_a_record_comes_back_as_it_was(tmp_path):
    edge = row([1.03503, 1.03497, 1.0352], aim=1.03, name="edge")  # its median rounds to the aim
    rows = [
        row([1.0, 1.25], figures={"x": 2.0}),
        row([0.5], aim=None, name="b", at_least=True),
        row([], name="c"),
        edge,
    ]
    path = tmp_path / "deep" / "record.json"
    write_record(compose_record(rows, "benchmark --quick", True, 12.34), path)
    record = read_record(path)
    assert (record["quick"], record["seconds"], record["command"]) == (True, 12.3, "benchmark --quick")
    assert record["rows"][0]["median"] == 1.125 and record["rows"][0]["quartiles"] == [1.062, 1.188]
    assert record["rows"][2]["median"] is None and record["rows"][2]["verdict"] == SKIPPED
    assert record["hardware"]["cores"] >= 1 and "torch" in record["versions"]
    back = read_rows(record)
    assert back == rows and back[3].verdict == edge.verdict == record["rows"][3]["verdict"]
    for text in ("{", "[]", '{"rows": 3}'):
        path.write_text(text)
        with pytest.raises(InputError, match="--write_record makes"):
            read_record(path)
    with pytest.raises(InputError, match="--write_record makes"):
        read_record(tmp_path / "none.json")


SPEED = {"aim": 0.9, "at_least": True}
CHANGES = [  # name, ratios before and now, options, whether it is worse
    ("same", [1.00, 1.01, 1.02], [1.01, 1.00, 1.02], {}, False),
    ("slower", [1.00, 1.01, 1.02], [1.09, 1.08, 1.09], {}, True),
    ("little", [1.00, 1.01, 1.02], [1.03, 1.032, 1.033], {}, False),
    ("noisy", [0.90, 1.01, 1.20], [1.00, 1.15, 1.16], {"aim": 1.3}, False),
    ("speed", [1.00, 1.01, 1.02], [0.95, 0.94, 0.96], SPEED, True),
    ("faster", [1.00, 1.01, 1.02], [2.00, 2.01, 2.02], SPEED, False),
    ("was met", [1.05, 1.06, 1.30], [1.10, 1.20, 1.30], {}, True),
    ("gone", [1.00], [], {}, False),
    ("printed", [1.00], [2.00], {"aim": None}, True),
]


def test_only_what_is_worse_beyond_noise_is_named():
    before = [row(ratios, name=name, **options) for name, ratios, _, options, _ in CHANGES]
    now = [row(ratios, name=name, **options) for name, _, ratios, options, _ in CHANGES]
    worse = find_worse(before, [*now, row([9.00], name="new")])
    assert [line.split(":")[0] for line in worse] == [name for name, *_, is_worse in CHANGES if is_worse]
    assert "1.010 -> 1.090 (middle halves 1.005 to 1.015, now 1.085 to 1.090): ours / theirs" in worse[0]
    assert find_worse(before, before) == []


def test_the_committed_record_has_every_row_and_says_why_a_miss_stays():
    record = read_record()
    rows = read_rows(record)
    assert RECORD_PATH == ROOT / "configs" / "benchmark" / "record.json"
    names = [one.name for one in rows]
    assert len(set(names)) == len(names) >= 18
    assert all(one.what and one.against for one in rows)
    assert all(one.note for one in rows if one.verdict == MISSED)
    stated = {one["name"]: one["verdict"] for one in record["rows"]}
    assert stated == {one.name: one.verdict for one in rows}


# ---- the script ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def script():
    return importlib.import_module("benchmark")


@pytest.fixture
def run(script, monkeypatch):
    """Runs the script on rows that are given."""
    import typer
    from typer.testing import CliRunner

    def run(rows, *flags):
        monkeypatch.setattr(script, "MEASURES", {one.name: lambda conditions, one=one: one for one in rows})
        app = typer.Typer()
        app.command()(script.benchmark)
        return CliRunner().invoke(app, ["--quick", *flags])

    return run


def test_the_script_writes_a_record_and_says_what_got_worse(run, script, tmp_path, monkeypatch):
    path = tmp_path / "record.json"
    for name in ("write_record", "read_record"):
        original = getattr(script, name)
        monkeypatch.setattr(script, name, lambda *args, f=original: f(*args, path))
    good, bad = row([1.0, 1.0], name="speed", note="as ever"), row([1.5, 1.5], name="speed")
    written = run([good], "--write_record", "--json", str(tmp_path / "now.json"))
    assert written.exit_code == 0, written.output
    assert "as ever" in written.output and "met" in written.output
    assert json.loads(path.read_text())["rows"] == json.loads((tmp_path / "now.json").read_text())["rows"]
    same = run([good], "--compare")
    assert same.exit_code == 0 and "Nothing got worse" in same.output
    worse = run([bad], "--compare")
    assert worse.exit_code == 1 and "speed: 1.000 -> 1.500" in worse.output and "MISSED" in worse.output


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--rows", "speed,nothing"], "'nothing' is none of speed"),
        (["--rows", "speed", "--write_record"], "a record has all rows"),
    ],
)
def test_the_script_refuses_what_makes_no_sense(run, flags, words):
    result = run([row([1.0], name="speed")], *flags)
    assert isinstance(result.exception, InputError) and words in str(result.exception)
