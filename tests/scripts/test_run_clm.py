"""scripts/run_clm.py from end to end on generated sentences, and what it refuses."""

import csv
import gzip
import json
import math
import random
import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from script_runs import ROOT, SMALL_RUN, TORCHRUN, load_script, quiet_logging, read_results, refuse, start, to_argv  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

SCRIPT = ROOT / "scripts" / "run_clm.py"
run_clm = load_script("clm")


def make_sentences(num: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    parts = [
        ["the", "a"],
        ["cat", "dog", "Bär"],
        ["sees", "hears"],
        ["the", "a"],
        ["mat", "moon", "straße"],
        [".", "!"],
    ]
    return [" ".join(chooser.choice(words) for words in parts) for _ in range(num)]


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("clm_data")
    train, validation, test = (make_sentences(num, seed) for seed, num in enumerate((60, 15, 11)))
    (folder / "train.txt").write_text("\n".join(train) + "\n", encoding="utf-8")
    (folder / "validation.txt.gz").write_bytes(gzip.compress(("\n".join(validation) + "\n").encode()))
    (folder / "test.txt").write_text("\n".join(test) + "\n", encoding="utf-8")
    rows = [{"question": f"what does {line.split()[1]} do?", "answer": line} for line in train]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(folder / "test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows[:3])
    (folder / "numbers.jsonl").write_text('{"value": 1}\n{"value": 2}\n', encoding="utf-8")
    (folder / "gaps.jsonl").write_text('{"text": "a"}\n{"text": null}\n', encoding="utf-8")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    (folder / "broken.txt.gz").write_bytes(gzip.compress(b"some text\n" * 50)[:-12])
    (folder / "empty.txt").write_text("")
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("clm_cache")


@pytest.fixture
def flags(data, cache, tmp_path):
    """The flags of a small run from scratch, as a dict that a test changes; None leaves a flag out."""
    base = {
        "model_type": "gpt2",
        "config_overrides": "n_embd=16,n_layer=2,n_head=2,n_positions=16,resid_pdrop=0.1",
        "train_file": data / "train.txt",
        "validation_file": data / "validation.txt.gz",
        "test_file": data / "test.txt",
        "vocab_size": 280,
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


@torch.no_grad()
def compute_perplexity_slowly(folder: Path, lines: list[str], block_size: int) -> tuple[float, int]:
    """Reload model and tokenizer and ask for one token after the other, in blocks that overlap by one token."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stream = [tokenizer.bos_token_id] + [i for line in lines for i in tokenizer(line + "\n")["input_ids"]]
    total = 0.0
    for position in range(1, len(stream)):
        start = (position - 1) // (block_size - 1) * (block_size - 1)
        logits = model(torch.tensor([stream[start:position]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, dim=-1)[stream[position]].item()
    return math.exp(total / (len(stream) - 1)), len(stream) - 1


# --------------------------------------------------------------------------------------------------- whole runs


def test_a_run_from_scratch_trains_evaluates_averages_and_tests(flags, data, tmp_path, capsys):
    out = tmp_path / "out"
    changes = {"do_eval": True, "do_predict": True, "v0_init": "data_driven"}
    changes |= {"max_steps": 30, "save_steps": 10, "average_checkpoints": 2}
    run_clm.main(flags(**changes))
    for name in ("model.safetensors", "tokenizer.json", "README.md", "v0_init.json", "trainer_state.json"):
        assert (out / name).is_file(), name

    results = read_results(out)
    validation = gzip.decompress((data / "validation.txt.gz").read_bytes()).decode().splitlines()
    for role, lines in (("eval", validation), ("test", (data / "test.txt").read_text(encoding="utf-8").splitlines())):
        perplexity, num_tokens = compute_perplexity_slowly(out, lines, 16)
        assert results[f"{role}_num_tokens"] == num_tokens
        assert results[f"{role}_perplexity"] == pytest.approx(perplexity, rel=1e-5)
        assert results[f"{role}_loss"] == pytest.approx(math.log(perplexity), rel=1e-5)
    assert results["eval_perplexity"] < 140  # half the vocabulary: it has learned something

    weights = load_file(out / "model.safetensors")
    checkpoints = [load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (20, 30)]
    assert set(weights) == set(checkpoints[0])
    for name, tensor in weights.items():
        torch.testing.assert_close(tensor, (checkpoints[0][name] + checkpoints[1][name]) / 2, rtol=0, atol=1e-7)

    card = (out / "README.md").read_text(encoding="utf-8")
    assert (
        "text-generation" in card
        and "perplexity" in card
        and "arxiv:2412.02153" in card
        and "hf_v0init" in card
        and "data_driven" in card
    )
    assert f"perplexity {results['eval_perplexity']:.3f}" in capsys.readouterr().out


def test_stop_and_resume_gives_the_weights_of_the_straight_run(flags, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"v0_init": "data_driven"}
    run_clm.main(flags(**changes, output_dir=straight))
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    # no tokenizer flag: that of the checkpoint is used; the last checkpoint is found without a flag
    run_clm.main(flags(**changes, output_dir=resumed))
    explicit = tmp_path / "explicit"
    run_clm.main(flags(**changes, output_dir=explicit, resume_from_checkpoint=straight / "checkpoint-4"))
    expected = load_file(straight / "model.safetensors")
    for folder in (resumed, explicit):
        weights = load_file(folder / "model.safetensors")
        assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
        reports = [json.loads((each / "v0_init.json").read_text()) for each in (folder, straight)]
        assert all(report.pop("seconds") >= 0.0 for report in reports)  # of this call alone
        assert reports[0] == reports[1]


def test_a_trained_model_is_evaluated_alone_and_trained_further(flags, tmp_path):
    run_clm.main(flags(do_eval=True, output_dir=tmp_path / "first"))
    perplexity = read_results(tmp_path / "first")["eval_perplexity"]
    pretrained = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "first"}
    run_clm.main(flags(**pretrained, do_train=None, do_eval=True, output_dir=tmp_path / "second"))
    assert read_results(tmp_path / "second")["eval_perplexity"] == pytest.approx(perplexity, rel=1e-6)
    run_clm.main(flags(**pretrained, do_eval=True, output_dir=tmp_path / "third"))
    assert read_results(tmp_path / "third")["eval_perplexity"] < perplexity


def test_overwriting_starts_afresh_and_removes_old_checkpoints(flags, tmp_path):
    out = tmp_path / "out"
    run_clm.main(flags(max_steps=8, save_steps=4))
    run_clm.main(flags(overwrite_output_dir=True, average_checkpoints=3))
    assert sorted(p.name for p in out.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_prompts_with_completions(flags, data, tmp_path):
    out = tmp_path / "out"
    changes = {"prompt_column": "question", "completion_column": "answer", "prompt_prefix": "Q: ", "block_size": 48}
    overrides = "n_embd=16,n_layer=1,n_head=2,n_positions=48"
    run_clm.main(
        flags(
            **changes,
            config_overrides=overrides,
            train_file=data / "train.jsonl",
            validation_file=data / "test.csv",
            test_file=data / "test.csv",
            do_eval=True,
            do_predict=True,
            max_predict_samples=2,
            max_tokens_per_batch=150,
        )
    )
    tokenizer = AutoTokenizer.from_pretrained(out)
    with open(data / "test.csv", encoding="utf-8") as file:
        answers = [row["answer"] for row in csv.DictReader(file)]
    num_tokens = sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)  # and the end of each
    assert read_results(out)["eval_num_tokens"] == num_tokens


def test_streaming_trains_on_the_same_text(flags, tmp_path):
    run_clm.main(flags(streaming=True, do_eval=True, do_predict=True, max_eval_samples=3, shuffle_buffer_size=20))
    results = read_results(tmp_path / "out")
    assert results["eval_num_tokens"] == 3 * 15
    assert math.isfinite(results["test_perplexity"])


def test_a_validation_split_by_rows_is_the_same_streamed_or_not(flags, data, tmp_path):
    """The first rows, and none of them in training: neither among its tokens nor in the tokenizer's vocabulary."""
    lines = (data / "train.txt").read_text(encoding="utf-8").splitlines()
    path = tmp_path / "train.txt"
    path.write_text("\n".join([f"only{number} here" for number in range(7)] + lines) + "\n", encoding="utf-8")
    changes = {
        "tokenizer_kind": "word",
        "vocab_size": 100,
        "train_file": path,
        "validation_file": None,
        "do_eval": True,
    }
    results = []
    for streaming in (True, False):
        out = tmp_path / str(streaming)
        run_clm.main(
            flags(
                **changes, validation_split_rows=7, streaming=streaming, output_dir=out, max_steps=1, learning_rate="0"
            )
        )
        results.append(read_results(out))
        words = {word for line in lines for word in line.split()}
        assert set(AutoTokenizer.from_pretrained(out).get_vocab()) == words | {"<pad>", "<s>", "</s>", "<unk>"}
    assert results[0]["eval_num_tokens"] == results[1]["eval_num_tokens"] == 7 * 3
    assert results[0]["eval_loss"] == pytest.approx(results[1]["eval_loss"], rel=1e-6)


EARLY = {
    "do_eval": True,
    "eval_strategy": "steps",
    "eval_steps": 2,
    "load_best_model_at_end": True,
    "early_stopping_patience": 2,
    "max_steps": 20,
}


def test_early_stopping_ends_after_its_patience_and_a_resumed_run_where_the_straight_one_does(flags, tmp_path):
    """At a learning rate of 0 no evaluation is better than the first, at step 2: the second worse one is at step 6."""
    run_clm.main(flags(**EARLY, learning_rate="0", output_dir=tmp_path / "straight"))
    state = json.loads((tmp_path / "straight" / "trainer_state.json").read_text())
    assert state["global_step"] == 6 and state["best_global_step"] == 2
    shutil.copytree(tmp_path / "straight" / "checkpoint-2", tmp_path / "resumed" / "checkpoint-2")
    shutil.copytree(tmp_path / "straight" / "checkpoint-4", tmp_path / "resumed" / "checkpoint-4")
    for path in (tmp_path / "resumed").glob("*/trainer_state.json"):
        path.write_text(path.read_text().replace("straight", "resumed"))
    run_clm.main(flags(**EARLY, learning_rate="0", output_dir=tmp_path / "resumed"))
    assert json.loads((tmp_path / "resumed" / "trainer_state.json").read_text())["global_step"] == 6


def test_early_stopping_lets_a_run_that_gets_better_go_on(flags, tmp_path):
    changes = EARLY | {"max_steps": 8}
    run_clm.main(flags(**changes, output_dir=tmp_path / "better"))
    assert json.loads((tmp_path / "better" / "trainer_state.json").read_text())["global_step"] == 8


def test_words_and_a_validation_split(flags, data, tmp_path):
    out = tmp_path / "out"
    changes = {"tokenizer_kind": "word", "vocab_size": 100, "validation_file": None, "validation_split_percentage": 10}
    run_clm.main(flags(**changes, do_eval=True, max_steps=1, max_train_samples=5, preprocessing_num_workers=2))
    lines = (data / "train.txt").read_text(encoding="utf-8").splitlines()
    results = read_results(out)
    assert results["eval_num_tokens"] == sum(len(line.split()) + 1 for line in lines[:6])
    assert results["train_samples"] == 5
    words = {word for line in lines[6:] for word in line.split()}
    assert set(AutoTokenizer.from_pretrained(out).get_vocab()) == words | {"<pad>", "<s>", "</s>", "<unk>"}


def test_flags_from_a_yaml_file(flags, tmp_path):
    pairs = dict(flag[2:].split("=", 1) for flag in flags(max_steps=1))
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"{name}: {value}\n" for name, value in pairs.items()), encoding="utf-8")
    run_clm.main([str(path), "--max_steps", "2", "--save_strategy", "no"])
    assert json.loads((tmp_path / "out" / "trainer_state.json").read_text())["global_step"] == 2


# --------------------------------------------------------------------------------------------------- bad input

BAD_INPUT = {
    "no task": ({"do_train": None}, ["--do_train", "--do_eval"]),
    "no model": ({"model_type": None, "config_overrides": None}, ["--model_name_or_path", "--model_type"]),
    "two models": ({"model_name_or_path": "gpt2"}, ["--model_name_or_path", "--model_type"]),
    "not causal": ({"model_type": "t5", "config_overrides": None}, ["t5", "causal"]),
    "small vocabulary": ({"vocab_size": 100}, ["100", "260", "--vocab_size"]),
    "vocabulary override": (
        {"config_overrides": "vocab_size=50,n_positions=16,n_embd=16,n_head=2"},
        ["vocab_size=50", "280"],
    ),
    "no data": ({"train_file": None, "validation_file": None, "test_file": None}, ["--dataset_name", "--train_file"]),
    "unknown data set": (
        {"train_file": None, "validation_file": None, "test_file": None, "dataset_name": "./no_such_folder"},
        ["./no_such_folder"],
    ),
    "no training data": ({"train_file": None}, ["--train_file"]),
    "missing file": ({"train_file": "nowhere.txt"}, ["nowhere.txt", "no such file"]),
    "not UTF-8": ({"train_file": "DATA/latin.txt"}, ["latin.txt", "utf-8"]),
    "corrupt gzip": ({"train_file": "DATA/broken.txt.gz"}, ["broken.txt.gz"]),
    "empty file": ({"train_file": "DATA/empty.txt"}, ["empty.txt", "empty"]),
    "empty stream": ({"train_file": "DATA/empty.txt", "streaming": True}, ["empty.txt", "empty"]),
    "missing column": ({"train_file": "DATA/train.jsonl", "text_column": "text"}, ["text", "question, answer"]),
    "missing prompt column": (
        {"train_file": "DATA/train.jsonl", "prompt_column": "query", "completion_column": "answer"},
        ["query", "question, answer"],
    ),
    "half a pair": ({"prompt_column": "question"}, ["--prompt_column", "--completion_column"]),
    "numbers for text": ({"train_file": "DATA/numbers.jsonl"}, ["value", "text"]),
    "row without text": ({"train_file": "DATA/gaps.jsonl"}, ["text", "None"]),
    "no validation": (
        {"validation_file": None, "do_eval": True, "streaming": True},
        ["validation", "--validation_file"],
    ),
    "empty validation split": (
        {"validation_file": None, "do_eval": True, "validation_split_percentage": "0.1"},
        ["60 training rows", "0 cannot"],
    ),
    "rows of a short stream": (
        {"validation_file": None, "do_eval": True, "streaming": True, "validation_split_rows": 60},
        ["--validation_split_rows=60", "no more rows"],
    ),
    "more rows than there are": (
        {"validation_file": None, "do_eval": True, "validation_split_rows": 60},
        ["60 training rows", "60 cannot"],
    ),
    "impatience": ({**EARLY, "early_stopping_patience": 0}, ["--early_stopping_patience=0", "1 or more"]),
    "patience without evaluation": ({"early_stopping_patience": 2}, ["--early_stopping_patience=2", "--eval_strategy"]),
    "patience without the best model": (
        {**EARLY, "load_best_model_at_end": None},
        ["--early_stopping_patience=2", "--load_best_model_at_end"],
    ),
    "block too long": ({"block_size": 17}, ["17", "16"]),
    "block too short": ({"block_size": 1}, ["--block_size=1", "2"]),
    "sample beyond the budget": (
        {
            "train_file": "DATA/train.jsonl",
            "prompt_column": "question",
            "completion_column": "answer",
            "max_tokens_per_batch": 5,
        },
        ["max_tokens_per_batch=5"],
    ),
    "average without saving": ({"average_checkpoints": 2, "save_strategy": "no"}, ["average_checkpoints=2", "save_strategy"]),
    "evaluation of nothing": ({"do_train": None, "do_eval": True}, ["--model_name_or_path"]),
    "best model": ({"load_best_model_at_end": True}, ["load_best_model_at_end"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_status_2_and_nothing_written(
    name, flags, data, tmp_path, monkeypatch, capsys
):
    changes, expected = BAD_INPUT[name]
    changes = {
        key: value.replace("DATA", str(data)) if isinstance(value, str) else value for key, value in changes.items()
    }
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    refuse(run_clm, flags(**changes), expected, capsys, monkeypatch, with_log=True)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_folder_with_other_things_is_left_alone(flags, tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    out.mkdir()
    (out / "thesis.txt").write_text("precious")
    refuse(run_clm, flags(), ["--overwrite_output_dir"], capsys, monkeypatch)
    assert [p.name for p in out.iterdir()] == ["thesis.txt"]


def test_help_lists_the_v0_flags(capsys):
    with pytest.raises(SystemExit) as caught:
        run_clm.main(["--help"])
    assert caught.value.code == 0
    out = capsys.readouterr().out
    assert "--v0_init" in out and "--tokenizer_kind" in out and "--average_checkpoints" in out


# ------------------------------------------------------------------------------------------------ own processes


@pytest.mark.slow
def test_exit_status_and_stderr_of_the_real_command(flags, tmp_path):
    result = start(SCRIPT, *flags(train_file="nowhere.txt"))
    assert result.returncode == 2
    # what third-party packages say while they are imported is not the script's to suppress
    assert result.stderr.splitlines()[-1].startswith("error: nowhere.txt")
    assert result.stderr.count("error: ") == 1 and "Traceback" not in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_evaluate_like_one(flags, tmp_path):
    options = {"do_eval": True, "do_predict": True, "v0_init": "data_driven"}
    result = start(*TORCHRUN, SCRIPT, *flags(**options, per_device_eval_batch_size=4, average_checkpoints=2))
    assert result.returncode == 0, result.stderr
    both = read_results(tmp_path / "out")
    pretrained = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "out"}
    run_clm.main(flags(**pretrained, do_train=None, do_eval=True, do_predict=True, output_dir=tmp_path / "one"))
    one = read_results(tmp_path / "one")
    for name in ("eval_perplexity", "test_perplexity", "eval_accuracy", "eval_num_tokens"):
        assert both[name] == pytest.approx(one[name], rel=1e-5)
    result = start(*TORCHRUN, SCRIPT, *flags(train_file="nowhere.txt", output_dir=tmp_path / "bad"))
    assert result.returncode != 0
    assert result.stderr.count("error: nowhere.txt") == 1
    assert not (tmp_path / "bad").exists()
