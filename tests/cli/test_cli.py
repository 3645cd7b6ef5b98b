"""`hf-v0init explain`: its numbers against the closed form, what it imports, what it refuses; version, environment, help."""

import importlib.metadata
import re
import subprocess
import sys

import pytest
from command_line import Done, assert_light_imports, run_command

import hf_v0init


def run_explain(*flags: str) -> Done:
    """Run `hf-v0init explain` inside this process."""
    return run_command("explain", *flags)


def read_tables(output: str) -> list[list[str]]:
    """The cells of every body row that was printed."""
    rows = [line for line in output.splitlines() if line.startswith("│")]
    return [[cell.strip() for cell in row.strip("│").split("│")] for row in rows]


def multiplier(step: int, scale: float, beta2: float) -> float:
    """m(t), written out again here as the oracle."""
    return (1.0 + scale * beta2**step / (1.0 - beta2**step)) ** -0.5


@pytest.mark.parametrize(
    ("flags", "scale", "beta2", "max_steps"),
    [
        (("--v0_decay", "beta2"), 1.0, 0.999, 10_000),
        (("--v0_scale", "100", "--adam_beta2", "0.98", "--max_steps", "500"), 100.0, 0.98, 500),
        (("--v0_init", "first_gradient", "--v0_scale", "1", "--adam_beta2", ".95", "--max_steps", "7"), 1.0, 0.95, 7),
    ],
)
def test_table_is_the_closed_form(flags, scale, beta2, max_steps):
    done = run_explain(*flags)
    assert done.returncode == 0, done.stderr
    rows = read_tables(done.stdout)
    steps = [step for step in (1, 10, 100, 1000) if step < max_steps] + [max_steps]
    printed = {int(step.removesuffix(" (end)").replace(",", "")): float(m) for step, m in rows[: len(steps)]}
    assert list(printed) == steps
    for step, value in printed.items():
        assert value == pytest.approx(multiplier(step, scale, beta2), abs=6e-5)

    reached = {float(m): int(step.replace(",", "")) for m, step in rows[len(steps) :]}
    assert list(reached) == [0.5, 0.9, 0.99]
    for target, step in reached.items():
        assert multiplier(step, scale, beta2) >= target
        assert step == 1 or multiplier(step - 1, scale, beta2) < target


def test_known_washout_steps():
    assert "1,660" in run_explain("--v0_decay", "beta2").stdout
    assert re.search(r"0\.9 │\s+83 ", run_explain("--v0_decay", "beta2", "--adam_beta2", "0.98").stdout)


def test_decay_steps_choose_the_scale():
    done = run_explain("--v0_decay", "beta2", "--v0_decay_steps", "400", "--adam_beta2", "0.98")
    assert re.search(r"0\.9 │\s+400 ", done.stdout)
    expected = (1 / 0.81 - 1) * (0.98**-400 - 1)
    assert float(re.search(r"v0_scale ([\d.]+)", done.stdout)[1]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("steps", ["400", "0.4"])
def test_the_linear_decay_is_a_linear_factor(steps):
    done = run_explain("--v0_decay_steps", steps, "--max_steps", "1000")
    printed = {int(step.removesuffix(" (end)").replace(",", "")): float(m) for step, m in read_tables(done.stdout)}
    assert printed == pytest.approx({t: min(1.0, t / 400) for t in (1, 10, 100, 200, 400, 1000)}, abs=6e-5)
    assert "Warning" not in done.stdout and "v0_decay_steps 400" in done.stdout
    assert "Warning" in run_explain("--v0_decay_steps", "1000", "--max_steps", "1000").stdout


def test_a_length_that_is_measured_has_a_column_for_each_bound():
    done = run_explain("--v0_decay_steps", "auto", "--max_steps", "900")
    assert done.returncode == 0 and "from 300 to 600 of 900 steps" in " ".join(done.stdout.split())
    for step, *factors in read_tables(done.stdout):
        t = int(step.removesuffix(" (end)").replace(",", ""))
        assert [float(m) for m in factors] == pytest.approx([min(1.0, t / 300), min(1.0, t / 600)], abs=6e-5)


def test_a_length_that_is_measured_is_asked_for_with_beta2():
    done = run_explain("--v0_decay", "beta2", "--v0_decay_steps", "auto")
    assert done.returncode == 2 and "--probe_only" in done.stderr


def test_similar_linear_warmup_takes_away_the_same_steps():
    done = run_explain("--v0_scale", "10", "--adam_beta2", "0.99")
    length = int(re.search(r"linear warmup over ([\d,]+) steps", " ".join(done.stdout.split()))[1].replace(",", ""))
    # A sum over steps is the integral up to half a step at the start.
    lost = sum(1.0 - multiplier(step, 10.0, 0.99) for step in range(1, 5000)) + 0.5
    assert length / 2 == pytest.approx(lost, abs=1.0)
    text = " ".join(run_explain("--v0_scale", "10", "--max_steps", "600").stdout.split())
    assert "a linear warmup over 1,709 steps, longer than the run of 600" in text


def test_warns_with_a_remedy_only_if_not_washed_out():
    late = run_explain("--v0_decay", "beta2", "--max_steps", "500")
    assert late.returncode == 0
    text = " ".join(late.stdout.split())
    assert "Warning" in text and "Remedy" in text and "1,660" in text
    assert "Warning" not in run_explain("--v0_decay", "beta2", "--max_steps", "5000").stdout


def test_random_shows_ratios_and_says_why():
    done = run_explain("--v0_init", "random", "--v0_decay", "beta2", "--adam_beta2", "0.98", "--max_steps", "500")
    assert "cannot be known" in " ".join(done.stdout.split())
    rows = read_tables(done.stdout)[-4:]
    assert [row[0] for row in rows] == ["1", "100", "10,000", "1,000,000"]
    for ratio, row in zip((1.0, 1e2, 1e4, 1e6), rows, strict=True):
        assert float(row[1]) == pytest.approx(multiplier(1, ratio, 0.98), rel=0.05, abs=6e-5)
        washed_out = int(row[-1].replace(",", ""))
        assert multiplier(washed_out, ratio, 0.98) >= 0.9 > multiplier(washed_out - 1, ratio, 0.98)
    assert "ratio of 10,000 on" in " ".join(done.stdout.split())


def test_zeros_has_nothing_to_wash_out():
    done = run_explain("--v0_init", "zeros", "--max_steps", "10")
    assert done.returncode == 0 and "m(t) = 1 at every step" in done.stdout and "Warning" not in done.stdout


@pytest.mark.parametrize(
    "flags", [["explain", "--v0_decay_steps", "9"], ["saddle"], ["landscape", "--help"]], ids=" ".join
)
def test_imports_neither_torch_nor_transformers_nor_matplotlib(flags):
    assert_light_imports(*flags)


BAD_FLAGS = [
    (["--v0_init", "ones"], "ones"),
    (["--v0_scale", "nan"], "v0_scale=nan"),
    (["--v0_scale", "1", "--v0_decay_steps", "10"], "v0_decay_steps=10"),
    (["--v0_decay_steps", "1.5"], "v0_decay_steps=1.5"),
    (["--v0_decay_steps", "long"], "v0_decay_steps='long'"),
    (["--adam_beta2", "1"], "adam_beta2=1"),
    (["--max_steps", "0"], "--max_steps"),
    (["--max_steps", "many"], "--max_steps"),
    (["--scale", "3"], "--scale"),
]


@pytest.mark.parametrize(("flags", "named"), BAD_FLAGS, ids=[" ".join(flags) for flags, _ in BAD_FLAGS])
def test_bad_input_is_one_line_and_exit_2(flags, named):
    done = run_explain(*flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert named in done.stderr


def test_bad_input_in_a_process_has_no_traceback():
    command = [sys.executable, "-m", "hf_v0init", "explain", "--v0_scale", "nan"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr


def test_the_bare_command_prints_help():
    done = run_command()
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == run_command("--help").stdout
    assert "explain" in done.stdout and "compare" in done.stdout and "env" in done.stdout


def test_version_is_that_of_the_package():
    assert run_command("--version") == Done(0, f"hf_v0init {hf_v0init.__version__}\n", "")


def test_the_environment_names_what_decides_the_numbers():
    done = run_command("env")
    lines = dict(line.removeprefix("- ").split(": ", 1) for line in done.stdout.splitlines())
    assert done.returncode == 0 and lines["hf_v0init"] == hf_v0init.__version__
    assert lines["torch"] == importlib.metadata.version("torch") and "Python" in lines and lines["devices"]
