"""scripts/run_mlm.py from end to end on generated sentences, and what it refuses."""

import gzip
import json
import math
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from script_runs import ROOT, SMALL_RUN, TORCHRUN, load_script, quiet_logging, read_results, refuse, start, to_argv  # noqa: F401
from test_run_clm import cache, data  # noqa: F401 (fixtures)
from transformers import AutoModelForMaskedLM, AutoTokenizer

from hf_v0init.tasks.language_modeling.masking import Masking, compose_seed

SCRIPT = ROOT / "scripts" / "run_mlm.py"
run_mlm = load_script("mlm")


@pytest.fixture
def flags(data, cache, tmp_path):  # noqa: F811
    """The flags of a small run from scratch, as a dict that a test changes; None leaves a flag out."""
    base = {
        "model_type": "bert",
        "config_overrides": "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,"
        "max_position_embeddings=16",
        "train_file": data / "train.txt",
        "validation_file": data / "validation.txt.gz",
        "test_file": data / "test.txt",
        "vocab_size": 290,
        "block_size": 16,
        "cache_dir": cache,
        "output_dir": tmp_path / "out",
        "do_train": True,
        "max_steps": 6,
        "save_steps": 2,
        "learning_rate": "1e-2",
        "per_device_train_batch_size": 4,
    }
    return lambda **changes: to_argv(SMALL_RUN | base | changes)


PRETRAINED = {"model_type": None, "config_overrides": None}
NO_DROPOUT = {
    "config_overrides": "hidden_size=16,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32,"
    "max_position_embeddings=16,hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
}


@torch.no_grad()
def evaluate_slowly(folder: Path, lines: list[str], block_size: int) -> tuple[float, int, float]:
    """Reload model and tokenizer; mean loss, number of masked tokens and accuracy, by one loop over masked tokens."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stream = []
    for line in lines:
        stream += tokenizer(line, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    room, masking = block_size - 2, Masking.for_tokenizer(tokenizer)
    total, num_tokens, num_right = 0.0, 0, 0
    for number, begin in enumerate(range(0, len(stream), room)):
        block = [tokenizer.cls_token_id, *stream[begin : begin + room], tokenizer.sep_token_id]
        masked, labels = masking.mask(torch.tensor(block).numpy(), None, compose_seed(None, 0, number))
        logits = model(torch.tensor(masked)[None]).logits[0].double()
        for position, label in enumerate(labels.tolist()):
            if label == -100:
                continue
            total -= torch.log_softmax(logits[position], dim=-1)[label].item()
            num_right += int(logits[position].argmax() == label)
            num_tokens += 1
    return total / num_tokens, num_tokens, num_right / num_tokens


def read_lines(path: Path) -> list[str]:
    raw = path.read_bytes()
    return (gzip.decompress(raw) if path.suffix == ".gz" else raw).decode().splitlines()


# --------------------------------------------------------------------------------------------------- whole runs


def test_a_run_from_scratch_trains_evaluates_averages_and_tests(flags, data, tmp_path, capsys):  # noqa: F811
    out = tmp_path / "out"
    changes = {"do_eval": True, "do_predict": True, "v0_init": "data_driven"}
    changes |= {"max_steps": 30, "save_steps": 10, "average_checkpoints": 2}
    run_mlm.main(flags(**changes))
    for name in ("model.safetensors", "tokenizer.json", "README.md", "v0_init.json", "trainer_state.json"):
        assert (out / name).is_file(), name

    results = read_results(out)
    for role, path in (("eval", data / "validation.txt.gz"), ("test", data / "test.txt")):
        loss, num_tokens, accuracy = evaluate_slowly(out, read_lines(path), 16)
        assert results[f"{role}_num_tokens"] == num_tokens
        assert results[f"{role}_loss"] == pytest.approx(loss, rel=1e-5)
        assert results[f"{role}_pseudo_perplexity"] == pytest.approx(math.exp(loss), rel=1e-5)
        assert results[f"{role}_accuracy"] == pytest.approx(accuracy, abs=1e-9)
    assert results["eval_loss"] < math.log(290) - 0.2  # of guessing at random: it has learned something

    weights = load_file(out / "model.safetensors")
    checkpoints = [load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (20, 30)]
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, (checkpoints[0][name] + checkpoints[1][name]) / 2, rtol=0, atol=1e-7)

    card = (out / "README.md").read_text(encoding="utf-8")
    assert "fill-mask" in card and "arxiv:2412.02153" in card and "data_driven" in card
    assert f"pseudo perplexity {results['eval_pseudo_perplexity']:.3f}" in capsys.readouterr().out


@pytest.mark.parametrize("kind", ["blocks", "lines", "token_budget"])
def test_stop_and_resume_gives_the_weights_of_the_straight_run(flags, tmp_path, kind):
    """Over an epoch's end too: the masks of the epoch that is resumed are its own."""
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"v0_init": "random", "max_steps": 12, "per_device_train_batch_size": 13}
    if kind != "blocks":
        changes |= {"line_by_line": True, "max_tokens_per_batch": 220 if kind == "token_budget" else None}
    run_mlm.main(flags(**changes, output_dir=straight))
    epoch = json.loads((straight / "checkpoint-8" / "trainer_state.json").read_text())["epoch"]
    assert epoch > 1 and epoch != int(epoch)
    shutil.copytree(straight / "checkpoint-8", resumed / "checkpoint-8")
    run_mlm.main(flags(**changes, output_dir=resumed))
    expected, weights = load_file(straight / "model.safetensors"), load_file(resumed / "model.safetensors")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_evaluation_is_the_same_for_every_batch_size_seed_and_time(flags, tmp_path):
    run_mlm.main(flags(do_eval=True, eval_strategy="steps", eval_steps=3, max_steps=6, learning_rate="0"))
    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    losses = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert len(losses) == 2 and losses[0] == losses[1] == read_results(tmp_path / "out")["eval_loss"]
    for number, (batch_size, seed) in enumerate(((1, 0), (3, 7), (64, 3))):
        folder = tmp_path / str(number)
        changes = {**PRETRAINED, "model_name_or_path": tmp_path / "out", "do_train": None, "do_eval": True}
        run_mlm.main(flags(**changes, output_dir=folder, per_device_eval_batch_size=batch_size, seed=seed))
        assert read_results(folder)["eval_loss"] == pytest.approx(losses[0], rel=1e-6)
        assert read_results(folder)["eval_num_tokens"] == read_results(tmp_path / "out")["eval_num_tokens"]


def test_accumulated_batches_train_like_one_batch(flags, tmp_path):
    """The loss of a step is the mean over all its masked tokens, however it is divided into micro-batches."""
    changes = {**NO_DROPOUT, "line_by_line": True, "max_steps": 3, "save_strategy": "no", "optim": "sgd"}
    changes |= {"learning_rate": "0.5", "max_grad_norm": "0"}
    for name, size, accumulation in (("one", 12, 1), ("many", 3, 4)):
        run_mlm.main(
            flags(
                **changes,
                output_dir=tmp_path / name,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=accumulation,
            )
        )
    one, many = (load_file(tmp_path / name / "model.safetensors") for name in ("one", "many"))
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=1e-6)


def test_lines_by_token_budget_with_whole_words(flags, data, tmp_path):  # noqa: F811
    run_mlm.main(flags(line_by_line=True, max_tokens_per_batch=64, whole_word_mask=True, do_eval=True, max_steps=2))
    lines, results = read_lines(data / "validation.txt.gz"), read_results(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    masking = Masking.for_tokenizer(tokenizer, whole_words=True)
    num_tokens = 0
    for number, line in enumerate(lines):
        ids = [*tokenizer(line)["input_ids"][:-1][:15], tokenizer.sep_token_id]
        word_ids = tokenizer(line, add_special_tokens=False).word_ids()[: len(ids) - 2]
        starts = [True, *(i == 0 or word_ids[i] != word_ids[i - 1] for i in range(len(word_ids))), True]
        labels = masking.mask(torch.tensor(ids).numpy(), starts, compose_seed(None, 0, number))[1]
        num_tokens += (labels != -100).sum()
    assert results["eval_num_tokens"] == num_tokens
    assert results["train_samples"] == len(read_lines(data / "train.txt"))


def test_early_stopping_and_a_validation_split_by_rows(flags, tmp_path):
    changes = {"validation_file": None, "validation_split_rows": 9, "do_eval": True, "save_steps": 1}
    changes |= {"eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "early_stopping_patience": 1}
    run_mlm.main(flags(**changes, learning_rate="0"))
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


def test_words_json_and_a_validation_split(flags, data, tmp_path):  # noqa: F811
    changes = {"tokenizer_kind": "word", "vocab_size": 100, "validation_file": None, "train_file": data / "train.jsonl"}
    run_mlm.main(flags(**changes, text_column="answer", do_eval=True, max_steps=1, max_train_samples=5))
    assert read_results(tmp_path / "out")["train_samples"] == 5
    words = {json.loads(line)["answer"] for line in read_lines(data / "train.jsonl")[3:]}
    vocabulary = set(AutoTokenizer.from_pretrained(tmp_path / "out").get_vocab())
    assert vocabulary == {word for text in words for word in text.split()} | {"<pad>", "<s>", "</s>", "<unk>", "<mask>"}


def test_positions_that_begin_behind_the_padding_are_counted(flags, tmp_path, monkeypatch, capsys):
    """RoBERTa with 16 positions and padding 0 takes 15 tokens: 16 would end in an IndexError while training."""
    run_mlm.main(flags(model_type="roberta", block_size=None, max_steps=1))
    assert read_results(tmp_path / "out")["train_loss"] > 0  # it was trained
    argv = flags(model_type="roberta", output_dir=tmp_path / "other")
    refuse(run_mlm, argv, ["--block_size=16", "take 15 tokens"], capsys, monkeypatch)


# --------------------------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "nothing to guess": ({"mlm_probability": "0"}, ["--mlm_probability=0"]),
    "causal model": ({"model_type": "gpt2", "config_overrides": None}, ["gpt2", "masked", "run_clm"]),
    "encoder-decoder": ({"model_type": "bart", "config_overrides": None}, ["bart", "masked"]),
    "causal tokenizer": ({"tokenizer_name": "CAUSAL"}, ["mask token", "--tokenizer_name"]),
    "pretrained causal model": (
        {"model_type": None, "config_overrides": None, "model_name_or_path": "CAUSAL"},
        ["gpt2", "masked", "run_clm"],
    ),
    "block without room": ({"block_size": 2}, ["--block_size=2", "3"]),
    "row without text": ({"train_file": "DATA/gaps.jsonl"}, ["text", "None"]),
}


@pytest.fixture(scope="module")
def causal(tmp_path_factory) -> Path:
    from conftest import make_gpt2

    from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer

    folder = tmp_path_factory.mktemp("causal")
    make_gpt2().save_pretrained(folder)
    train_bpe_tokenizer(["the cat sat"], 270, for_translation=False).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_status_2_and_nothing_written(
    name,
    flags,
    data,  # noqa: F811
    causal,
    tmp_path,
    monkeypatch,
    capsys,
):
    changes, expected = BAD_INPUT[name]
    changes = {
        key: value.replace("DATA", str(data)).replace("CAUSAL", str(causal)) if isinstance(value, str) else value
        for key, value in changes.items()
    }
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(run_mlm, flags(**changes), expected, capsys, monkeypatch, with_log=True)
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------------ own processes


@pytest.mark.slow
def test_two_processes_train_and_evaluate_like_one(flags, tmp_path):
    """Over two epochs and a half, without dropout: the same batches, and the masks of the same samples in the same epochs."""
    options = {**NO_DROPOUT, "do_eval": True, "line_by_line": True, "max_steps": 12, "save_strategy": "no"}
    options |= {"optim": "sgd", "learning_rate": "0.5"}
    one, two = tmp_path / "one", tmp_path / "two"
    run_mlm.main(flags(**options, per_device_train_batch_size=12, output_dir=one))
    options |= {"per_device_eval_batch_size": 4}
    result = start(*TORCHRUN, SCRIPT, *flags(**options, per_device_train_batch_size=6, output_dir=two))
    assert result.returncode == 0, result.stderr
    state = json.loads((two / "trainer_state.json").read_text())
    assert state["epoch"] > 2
    weights = load_file(two / "model.safetensors")
    for name, tensor in load_file(one / "model.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=1e-5)
    assert read_results(two)["eval_loss"] == pytest.approx(read_results(one)["eval_loss"], rel=1e-4)
    assert read_results(two)["eval_num_tokens"] == read_results(one)["eval_num_tokens"]
    # and exactly for one set of weights
    pretrained = {**PRETRAINED, "model_name_or_path": two, "do_train": None, "do_eval": True, "line_by_line": True}
    run_mlm.main(flags(**pretrained, output_dir=tmp_path / "again"))
    assert read_results(tmp_path / "again")["eval_loss"] == pytest.approx(read_results(two)["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_exit_status_and_stderr_of_the_real_command(flags, tmp_path):
    result = start(SCRIPT, *flags(train_file="nowhere.txt"))
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: nowhere.txt")
    assert not (tmp_path / "out").exists()
