"""What a person sees: help, summary, which direction is better, bars."""

import importlib
import io
import json
import re
import sys
from types import SimpleNamespace

import pytest
import torch
from rich.console import Console
from transformers import TrainingArguments
from transformers.utils import logging as transformers_logging

from hf_v0init.tasks.script_support import parse_arguments
from hf_v0init.tasks.summary import list_scores, print_summary

SCRIPTS = [
    "translation.script",
    "language_modeling.script",
    "language_modeling.masked_script",
    "images.script",
    "gan.script",
]


def read_help(folder: str, flag: str, capsys) -> str:
    module = importlib.import_module(f"hf_v0init.tasks.{folder}")
    with pytest.raises(SystemExit) as ended:
        module.main([flag])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("folder", SCRIPTS)
def test_help_is_short_and_names_each_flag_once_in_its_group(folder, capsys):
    text = read_help(folder, "--help", capsys)
    lines = text.splitlines()
    assert len(lines) < 300 and max(map(len, lines)) <= 120
    top = text.split("model:")[0]
    assert "examples:" in top and top.count(".py ") >= 4
    titles = [line.split(":")[0] for line in lines if re.match(r"(model|data|training|v0|generation): ", line)]
    assert titles == [name for name in ("model", "data", "training", "v0", "generation") if name in titles]
    assert {"model", "data", "training", "v0"} <= {*titles}
    flags = re.findall(r"^  --(\w+)", text, flags=re.MULTILINE)
    assert len(flags) == len(set(flags)) and {"learning_rate", "v0_init", "output_dir"} <= {*flags}
    everything = re.findall(r"^  --(\w+)", read_help(folder, "--help_all", capsys), flags=re.MULTILINE)
    assert len(everything) == len(set(everything)) and {*flags} < {*everything}
    assert {*TrainingArguments.__dataclass_fields__} - {"debug"} < {*everything, "_n_gpu"}


def test_generation_flags_have_their_group(capsys):
    text = read_help("translation.script", "--help", capsys)
    generation = text.split("\ngeneration: ")[1]
    assert all(
        f"--{name} " in generation
        for name in ("num_beams", "max_length_a", "sacrebleu_tokenize", "num_return_sequences")
    )
    assert "--learning_rate" not in generation


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


def test_the_summary_says_what_was_trained_how_well_and_where_it_is(tmp_path):
    results = {"train_loss": 2.5, "train_samples": 1200, "train_runtime": 12.0, "train_samples_per_second": 100.0, "eval_loss": 1.25,
               "eval_bleu": 31.257, "predict_bleu": 30.0, "predict_runtime": 3.0}  # fmt: skip
    assert list_scores(results) == [
        ("training", "loss 2.5000"),
        ("validation", "loss 1.2500, bleu 31.26"),
        ("test", "bleu 30.00"),
    ]
    (tmp_path / "all_results.json").write_text(json.dumps(results))
    (tmp_path / "README.md").write_text("card")
    trainer = SimpleNamespace(
        args=SimpleNamespace(output_dir=str(tmp_path), do_train=True),
        accelerator=SimpleNamespace(unwrap_model=lambda model: model),
        model=torch.nn.Linear(30, 40),
        state=SimpleNamespace(global_step=1500, epoch=2.5),
        get_v0_report=lambda: {"strategy": "random", "scale": 100.0},
    )
    out = io.StringIO()
    print_summary(trainer, Console(file=out))
    words = " ".join(re.sub("[│┌┐└┘├┤─┬┴]", " ", out.getvalue()).split())
    for part in (
        "Linear, 1,240 parameters", "1,500 steps, 2.50 epochs, 1,200 samples, 12 s, 100.0 samples per second", "random, scale 100",
        "loss 1.2500, bleu 31.26", "README.md (card)",
    ):  # fmt: skip
        assert part in words
    assert str(tmp_path) in re.sub(r"\s", "", words)
