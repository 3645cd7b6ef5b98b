"""What a person sees: help, summary, which direction is better, bars."""

import io
import re
import subprocess
import sys

import pytest
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_v0init.cli.scripts import HELP_FOLDER, SCRIPTS, compose_help_of
from hf_v0init.tasks.script_support import parse_arguments
from hf_v0init.tasks.summary import list_scores


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_is_current_short_and_names_each_flag_once_in_its_group(name):
    text = (HELP_FOLDER / f"{name}.txt").read_text(encoding="utf-8")
    assert text == compose_help_of(name), "run python -m hf_v0init.cli.scripts"
    lines = text.splitlines()
    assert len(lines) < 350 and max(map(len, lines)) <= 80
    top = text.split("\nmodel: ")[0]
    assert "examples:" in top and top.count(f"hf-v0init {name} ") >= 3 and "torchrun" in top
    for group in ("model", "data", "v0", "training"):
        assert text.count(f"\n{group}: ") == 1
    flags = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    assert len(flags) == len(set(flags)) and {"learning_rate", "v0_init", "output_dir"} <= {*flags}
    refused = {"do_predict", "push_to_hub", "load_best_model_at_end"}
    assert not refused & {*flags} if name == "dcgan" else refused < {*flags}


def test_help_needs_nothing_that_a_training_needs():
    code = (
        "import sys; sys.argv = ['hf-v0init clm', '--help']\nfrom hf_v0init.cli.scripts import run_named\nrun_named('clm')\n"
        "assert not {'torch', 'transformers', 'datasets'} & set(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == (HELP_FOLDER / "clm.txt").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("metric", "given", "expected"),
    [("perplexity", [], False), ("eval_perplexity", [], False), ("loss", [], False), ("accuracy", [], True), ("bleu", [], True),
     ("perplexity", ["--greater_is_better", "true"], True)],
)  # fmt: skip
def test_the_best_model_is_the_one_with_the_lower_perplexity(metric, given, expected):
    """transformers takes more of anything but a loss for better."""
    flags = ["--output_dir=o", "--use_cpu", f"--metric_for_best_model={metric}", *given]
    assert parse_arguments([TrainingArguments], flags)[0].greater_is_better is expected


def test_there_are_no_bars_where_there_is_no_terminal(monkeypatch):
    flags = ["--output_dir=o", "--use_cpu"]
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    assert parse_arguments([TrainingArguments], flags)[0].disable_tqdm is True
    assert parse_arguments([TrainingArguments], [*flags, "--disable_tqdm=false"])[0].disable_tqdm is False
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    transformers_logging.set_verbosity_warning()
    assert parse_arguments([TrainingArguments], flags)[0].disable_tqdm is False


def test_the_summary_lists_the_scores_of_each_stage():
    results = {"train_loss": 2.5, "train_samples": 1200, "train_runtime": 12.0, "eval_loss": 1.25, "eval_bleu": 31.257}
    results |= {"predict_bleu": 30.0, "predict_runtime": 3.0}
    assert list_scores(results) == [
        ("training", "loss 2.5000"),
        ("validation", "loss 1.2500, bleu 31.26"),
        ("test", "bleu 30.00"),
    ]
