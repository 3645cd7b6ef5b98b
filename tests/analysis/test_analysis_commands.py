"""`hf-v0init saddle`, `linear-loss`, `landscape`, `connectivity`: what they print and write, and refuse."""

import json

import pytest
import torch
from command_line import run_command as run
from conftest import VOCAB, make_gpt2
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import MarianMTModel, PreTrainedTokenizerFast

from hf_v0init.analysis.checkpoint_loss import load_batch_loss, load_model, pair_checkpoints
from hf_v0init.errors import InputError
from hf_v0init.tasks.translation.post_norm import build_post_norm_config

WORDS = [f"w{i}" for i in range(VOCAB - 2)]


@pytest.fixture(scope="module")
def tokenizer():
    vocabulary = {"<pad>": 0, "</s>": 1} | {word: i + 2 for i, word in enumerate(WORDS)}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<pad>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>")


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    """Two runs of a causal model with two checkpoints each, a translation model, and texts."""
    root = tmp_path_factory.mktemp("checkpoints")
    for i, run_name in enumerate(("one", "two")):
        for step in (5, 10):
            place = root / run_name / f"checkpoint-{step}"
            make_gpt2(seed=10 * i + step).save_pretrained(place)
            tokenizer.save_pretrained(place)
    torch.manual_seed(0)
    config = build_post_norm_config(VOCAB, 0, 1, d_model=8, ffn_dim=8, num_heads=2, num_layers=1, max_positions=16)
    MarianMTModel(config).save_pretrained(root / "translation")
    tokenizer.save_pretrained(root / "translation")
    lines = [" ".join(WORDS[(7 * i + j) % len(WORDS)] for j in range(9)) for i in range(12)]
    (root / "text.txt").write_text("\n".join(lines) + "\n")
    pairs = zip(lines, reversed(lines), strict=True)
    (root / "pairs.tsv").write_text("".join(f"{one}\t{other}\n" for one, other in pairs))
    return root


def test_saddle_prints_and_writes_the_papers_values(tmp_path):
    done = run("saddle", "--figure", tmp_path / "s.svg", "--json", tmp_path / "s.json")
    assert done.returncode == 0, done.stderr
    assert all(value in done.stdout for value in ("-0.9613", "-0.96", "0.01104", "1e-7", "9e-7"))
    written = json.loads((tmp_path / "s.json").read_text())
    assert [row["final"] for row in written[:4]] == pytest.approx([-0.96125, 0.01104, -9.552e-8, -9.0475e-7], rel=1e-3)
    assert all(len(row["path"]) == 51 for row in written)
    assert (tmp_path / "s.svg").read_text().startswith("<?xml")


def test_linear_loss_prints_closed_form_beside_simulation(tmp_path):
    flags = ["--beta2", "0.9", "--gradient_mean", "0", "--gradient_std", "2"]
    done = run("linear-loss", *flags, "--figure", tmp_path / "l.png", "--json", tmp_path / "l.json")
    assert done.returncode == 0, done.stderr
    assert "= 4 (eq. 8)" in " ".join(done.stdout.split())
    rows = {row["start"]: row for row in json.loads((tmp_path / "l.json").read_text())}
    assert list(rows) == ["zero", "random", "data-driven"] and rows["zero"]["drift"] == pytest.approx(4.0)
    assert rows["zero"]["steps"][0]["update"] == pytest.approx(10**0.5)
    assert (tmp_path / "l.png").read_bytes().startswith(b"\x89PNG")


def test_landscape_of_a_checkpoint(folder, tmp_path):
    checkpoint = folder / "one" / "checkpoint-5"
    flags = ["--file", folder / "text.txt", "--num_points", "3", "--radius", "1", "--max_length", "8"]
    done = run("landscape", checkpoint, *flags, "--figure", tmp_path / "x.png", "--json", tmp_path / "x.json")
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "x.json").read_text())
    model = load_model(checkpoint)
    measure = load_batch_loss(checkpoint, model.config, folder / "text.txt", max_length=8)
    assert written["centre_loss"] == pytest.approx(measure(model), rel=1e-6)
    losses = [loss for row in written["losses"] for loss in row]
    expected = 100 * (max(losses) - written["centre_loss"]) / (1 + written["centre_loss"])
    assert len(losses) == 9 and written["sharpness"] == pytest.approx(expected)
    assert f"loss {written['centre_loss']:.4f}" in done.stdout
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_connectivity_of_two_runs_along_training(folder, tmp_path):
    flags = ["--file", folder / "text.txt", "--num_points", "3", "--max_length", "8"]
    flags += ["--figure", tmp_path / "c.png", "--json", tmp_path / "c.json"]
    done = run("connectivity", folder / "one", folder / "two", *flags)
    assert done.returncode == 0, done.stderr
    written = json.loads((tmp_path / "c.json").read_text())
    assert [row["step"] for row in written] == [5, 10]
    checkpoint = folder / "one" / "checkpoint-5"
    measure = load_batch_loss(checkpoint, load_model(checkpoint).config, folder / "text.txt", max_length=8)
    for row in written:
        ends = [measure(load_model(folder / name / f"checkpoint-{row['step']}")) for name in ("two", "one")]
        assert [row["errors"][0], row["errors"][-1]] == pytest.approx(ends, rel=1e-6)
        assert row["barrier"] == pytest.approx(max(row["errors"]) - sum(ends) / 2, abs=1e-6)
    assert (tmp_path / "c.png").read_bytes().startswith(b"\x89PNG")


def test_landscape_of_a_translation_model(folder, tmp_path):
    flags = ["--file", folder / "pairs.tsv", "--num_points", "3", "--radius", "1", "--json", tmp_path / "x.json"]
    done = run("landscape", folder / "translation", *flags)
    assert done.returncode == 0, done.stderr
    centre = json.loads((tmp_path / "x.json").read_text())["centre_loss"]
    assert centre == pytest.approx(torch.tensor(float(VOCAB)).log().item(), rel=0.3)


def test_windows_cover_the_text_once(folder, tokenizer):
    checkpoint = folder / "one" / "checkpoint-5"
    model = load_model(checkpoint)
    text = (folder / "text.txt").read_text()
    ids = torch.tensor(tokenizer(text)["input_ids"])
    assert len(ids) == 108
    total = 0.0
    for window in ids.split(16):
        with torch.no_grad():
            total += float(model(input_ids=window[None], labels=window[None]).loss) * (len(window) - 1)
    expected = total / (108 - 7)
    for options in ({}, {"max_length": 16}):  # the model has 16 positions
        measure = load_batch_loss(checkpoint, model.config, folder / "text.txt", **options)
        assert measure(model) == pytest.approx(expected, rel=1e-6)


BAD = [
    (["saddle", "--v0", "-1"], "--v0"),
    (["saddle", "--num_steps", "0"], "--num_steps"),
    (["saddle", "--figure", "x.bmp"], "x.bmp"),
    (["saddle", "--json", "/no/such/folder/x.json"], "/no/such/folder"),
    (["linear-loss", "--beta2", "1"], "adam_beta2=1"),
    (["landscape", "/no/such/folder"], "/no/such/folder"),
    (["landscape", "FOLDER/one/checkpoint-5"], "--file"),
    (["landscape", "FOLDER/one/checkpoint-5", "--file", "FOLDER/missing.txt"], "missing.txt"),
    (["landscape", "FOLDER/one/checkpoint-5", "--file", "FOLDER/text.txt", "--num_points", "4"], "num_points=4"),
    (["landscape", "FOLDER/one/checkpoint-5", "--file", "FOLDER/text.txt", "--radius", "2"], "radius=2"),
    (["connectivity", "FOLDER/one", "FOLDER/nowhere"], "nowhere"),
    (["connectivity", "FOLDER/one", "FOLDER"], "same steps"),
]


@pytest.mark.parametrize(("flags", "named"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input_is_one_line_and_exit_2(folder, flags, named):
    done = run(*(flag.replace("FOLDER", str(folder)) for flag in flags))
    assert done.returncode == 2 and done.stdout == ""
    lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1 and named in lines[0]


def test_pairs_are_those_of_common_steps(folder, tmp_path):
    pairs = pair_checkpoints(folder / "one", folder / "two")
    assert [(step, one.parent.name, other.parent.name) for step, one, other in pairs] == [
        (5, "one", "two"),
        (10, "one", "two"),
    ]
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="neither"):
        pair_checkpoints(folder / "one", tmp_path / "empty")
