"""The demo, end to end: tiny runs of three steps as a fast test, the whole of it as a slow one."""

import json
from pathlib import Path

import demo
import pytest

from hf_v0init import plots
from hf_v0init.errors import InputError


def make_tiny_settings(folder: Path) -> demo.DemoSettings:
    return demo.DemoSettings(
        output_dir=str(folder), steps=3, num_pairs=150, num_test=4, vocab_size=300, num_layers=1, d_model=16, ffn_dim=16, num_heads=2,
        batch_size=8, customary_fraction=0.34, best_fraction=0.67, log_every=1, max_tokens=8,
    )  # fmt: skip


def check_results(folder: Path, results: list[demo.ArmResult], settings: demo.DemoSettings) -> None:
    assert [result.name for result in results] == list(demo.FOLDERS)
    no_warmup, customary, warmup, long_warmup, v0 = results
    measured = min(settings.steps, settings.update_steps)
    for result in results:
        assert result.validation_loss > 0.0 and 0.0 <= result.bleu <= 100.0
        assert result.update_steps == list(range(1, measured + 1)) and len(result.update_sizes) == measured
        assert result.loss_steps[-1] <= settings.steps and len(result.losses) == len(result.loss_steps) > 0
    # Adam's first update moves every weight that has a gradient by the learning rate, v0 proportionally to the
    # gradient; a warmup starts at learning rate 0.
    assert 0.5 < no_warmup.update_sizes[0] <= 1.0 + 1e-3
    assert warmup.update_sizes[0] == 0.0
    first = no_warmup.update_sizes[0] / v0.warmup_steps
    assert v0.update_sizes[0] == pytest.approx(first, rel=1e-3)  # the first of as many steps
    assert all(result.v0_report is None for result in (no_warmup, customary, warmup, long_warmup))
    lengths = [0, round(settings.customary_fraction * settings.steps), round(settings.best_fraction * settings.steps)]
    two_thirds = 2 * settings.steps // 3
    assert [result.warmup_steps for result in results[:4]] == [*lengths, two_thirds]
    assert v0.v0_report["strategy"] == "data_driven"
    assert settings.steps / 3 <= v0.warmup_steps == v0.v0_report["decay_steps"] <= two_thirds

    saved = json.loads((folder / demo.RESULTS_FILE).read_text(encoding="utf-8"))
    assert [run["bleu"] for run in saved["runs"]] == [result.bleu for result in results]
    assert saved["settings"]["steps"] == settings.steps
    assert (folder / demo.FIGURE_FILE).read_bytes().startswith(b"\x89PNG")
    for name in demo.FOLDERS.values():
        assert (folder / name / "model.safetensors").is_file()
    assert (folder / "v0" / "v0_init.json").is_file()


def test_three_steps_end_to_end(tmp_path, capfd):
    settings = make_tiny_settings(tmp_path / "demo")
    bystander = tmp_path / "demo" / "notes.txt"
    bystander.parent.mkdir()
    bystander.write_text("mine")
    results = demo.run_demo(settings)
    check_results(tmp_path / "demo", results, settings)
    assert bystander.read_text() == "mine"
    # All start from the same weights and see the same first batch.
    assert len({result.losses[0] for result in results}) == 1
    printed = " ".join(capfd.readouterr().out.split())
    for words in ("BLEU", "validation loss", demo.FIGURE_FILE, demo.RESULTS_FILE, "In this one run"):
        assert words in printed


def test_every_run_is_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(plots, "write_figure", lambda figure, path: drawn.append(figure))
    names = [f"run {i}" for i in range(8)]
    curves = [plots.TrainingCurve(name, [1, 2], [2.0, 1.0], [1, 2], [0.1, 0.2]) for name in names]
    plots.draw_training_curves(tmp_path / "a.png", curves, title="eight")
    for axes in drawn[0].axes:
        lines = [line for line in axes.lines if line.get_label() in names]
        assert [line.get_label() for line in lines] == names
        assert len({(line.get_color(), line.get_linestyle(), str(line._dash_pattern)) for line in lines}) == 8


def make_result(name: str, bleu: float) -> demo.ArmResult:
    return demo.ArmResult(name, validation_loss=2.0, bleu=bleu, chrf=0.0, seconds=1.0, num_parameters=1)


OUTCOMES = [
    (
        (5.0, 20.0, 30.0, 24.5, 25.0),
        ["20.0 better than no warmup", "5.0 better than", "5.0 worse than", "about the same"],
    ),
    ((25.0, 20.0, 5.0, 7.5, 5.5), ["19.5 worse than no warmup", "about the same as the best", "2.0 worse than"]),
]


@pytest.mark.parametrize(("bleu", "said"), OUTCOMES)
def test_the_sentence_follows_the_numbers(bleu, said):
    results = [make_result(name, score) for name, score in zip(demo.FOLDERS, bleu, strict=True)]
    sentence = demo.describe_outcome(results, demo.DemoSettings())
    for words in (*said, f"reached {bleu[-1]:.1f} BLEU"):
        assert words in sentence


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--steps", "0"], "--steps 0"),
        (["--steps", "few"], "few"),
        (["--seed", "-1"], "--seed -1"),
        (["--speed", "3"], "--speed"),
        (["--output_dir", "/proc/demo"], "/proc/demo"),
        (["--output_dir", demo.__file__], "is a file"),
    ],
)
def test_bad_flags_are_named_before_anything_is_done(argv, named):
    with pytest.raises(InputError, match=named):
        demo.read_settings(argv)


@pytest.mark.slow
def test_whole_demo(tmp_path):
    settings = demo.read_settings(["--output_dir", str(tmp_path / "demo")])
    results = demo.run_demo(settings)
    check_results(tmp_path / "demo", results, settings)
    assert max(result.bleu for result in results) > 10.0
