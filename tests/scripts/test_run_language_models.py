"""scripts/run_clm.py and run_mlm.py from end to end on generated sentences, with GPT-2, AWD-LSTM and BERT."""

import csv
import gc
import gzip
import json
import math
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import ROOT, TORCHRUN, start
from safetensors.torch import load_file
from script_runs import (  # noqa: F401
    SMALL_RUN,
    assert_equal_weights,
    load_script,
    of_trained,
    quiet_logging,
    read_results,
    read_state,
    to_argv,
)  # fmt: skip
from test_awd_lstm import compute_loss_slowly, run_slowly
from transformers import AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from hf_v0init.analysis.checkpoint_loss import load_model
from hf_v0init.tasks.language_modeling.awd_lstm import AwdLstmForCausalLM
from hf_v0init.tasks.language_modeling.masking import Masking, compose_seed

gc.freeze()  # every `train()` collects garbage, which takes a second over all that has been imported
BERT = "hidden_size=16,num_hidden_layers=2,num_attention_heads=2,intermediate_size=32,max_position_embeddings=16"
NO_DROPOUT = f"{BERT},hidden_dropout_prob=0.0,attention_probs_dropout_prob=0.0"
KINDS = {
    "gpt2": {
        "model_type": "gpt2", "config_overrides": "n_embd=16,n_layer=2,n_head=2,n_positions=16,resid_pdrop=0.1", "vocab_size": 280,
    },
    "bert": {"model_type": "bert", "config_overrides": BERT, "vocab_size": 290},
    "awd_lstm": {
        "model_type": "awd_lstm", "config_overrides": "embedding_size=8,hidden_size=12,num_layers=2", "tokenizer_kind": "word",
        "vocab_size": 100, "block_size": 6, "per_device_eval_batch_size": 3,
    },
}  # fmt: skip
PARTS = (["the", "a"], ["cat", "dog", "Bär"], ["sees", "hears"], ["the", "a"], ["mat", "moon", "straße"], [".", "!"])


def make_sentences(num: int, seed: int) -> list[str]:
    chooser = random.Random(seed)
    return [" ".join(chooser.choice(words) for words in PARTS) for _ in range(num)]


TRAIN, VALIDATION, TEST = (make_sentences(num, seed) for seed, num in enumerate((60, 15, 11)))


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("texts")
    (folder / "train.txt").write_text("\n".join(TRAIN) + "\n", encoding="utf-8")
    (folder / "validation.txt.gz").write_bytes(gzip.compress(("\n".join(VALIDATION) + "\n").encode()))
    (folder / "test.txt").write_text("\n".join(TEST) + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def flags(data, tmp_path):
    """The flags of a small run from scratch, as a dict that a test changes; None leaves a flag out."""
    base = {
        "train_file": data / "train.txt", "validation_file": data / "validation.txt.gz", "test_file": data / "test.txt",
        "block_size": 16, "cache_dir": data / "cache", "do_train": True, "max_steps": 6, "save_steps": 2, "learning_rate": "1e-2",
        "per_device_train_batch_size": 4,
    }  # fmt: skip
    return lambda kind, name, **changes: to_argv(
        SMALL_RUN | base | KINDS[kind] | {"output_dir": tmp_path / name} | changes
    )


@pytest.fixture
def run(flags, tmp_path):
    """Run the script of a kind of model; its output folder and its results."""

    def run(kind: str, name: str = "out", **changes) -> tuple[Path, dict]:
        load_script("mlm" if kind == "bert" else "clm").main(flags(kind, name, **changes))
        return tmp_path / name, read_results(tmp_path / name)

    return run


# ---- what a run gives, by loops over tokens ----------------------------------------------------------------------------


@torch.no_grad()
def score_causal(folder: Path, lines: list[str]) -> dict:
    """One token after the other, in blocks of 16 tokens that overlap by one."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stream = [tokenizer.bos_token_id] + [i for line in lines for i in tokenizer(line + "\n")["input_ids"]]
    total = num_right = 0
    for position in range(1, len(stream)):
        logits = model(torch.tensor([stream[(position - 1) // 15 * 15 : position]])).logits[0, -1].double()
        total -= torch.log_softmax(logits, dim=-1)[stream[position]].item()
        num_right += int(logits.argmax() == stream[position])
    return {"loss": total / (len(stream) - 1), "num_tokens": len(stream) - 1, "accuracy": num_right / (len(stream) - 1)}


@torch.no_grad()
def score_masked(folder: Path, lines: list[str]) -> dict:
    """One block of 16 tokens after the other, and one masked token after the other."""
    model, tokenizer = AutoModelForMaskedLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    stream = []
    for line in lines:
        stream += tokenizer(line, add_special_tokens=False)["input_ids"] + [tokenizer.sep_token_id]
    total, num_tokens, num_right = 0.0, 0, 0
    for number, begin in enumerate(range(0, len(stream), 14)):
        block = [tokenizer.cls_token_id, *stream[begin : begin + 14], tokenizer.sep_token_id]
        masked, labels = Masking.for_tokenizer(tokenizer).mask(np.array(block), None, compose_seed(None, 0, number))
        logits = model(torch.tensor(masked)[None]).logits[0].double()
        for position in np.flatnonzero(labels != -100):
            total -= torch.log_softmax(logits[position], dim=-1)[labels[position]].item()
            num_right += int(logits[position].argmax() == labels[position])
            num_tokens += 1
    return {"loss": total / num_tokens, "num_tokens": num_tokens, "accuracy": num_right / num_tokens}


@torch.no_grad()
def score_streams(folder: Path, lines: list[str]) -> dict:
    """The words of the lines in three streams, cell by cell."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    words = ["<s>"] + [word for line in lines for word in [*line.split(), "</s>"]]
    text = [vocabulary.get(word, vocabulary["<unk>"]) for word in words]
    total = 0.0
    for positions in np.array_split(np.arange(len(text) - 1), 3):
        inputs = torch.tensor([text[positions[0] : positions[-1] + 1]])
        targets = torch.tensor([text[positions[0] + 1 : positions[-1] + 2]])
        total += compute_loss_slowly(run_slowly(model, inputs)[0], targets).item() * len(positions)
    return {"loss": total / (len(text) - 1), "num_tokens": len(text) - 1}


def assert_scores(results: dict, folder: Path, score) -> None:
    for role, lines in (("eval", VALIDATION), ("test", TEST)):
        expected = score(folder, lines)
        perplexity = f"{role}_pseudo_perplexity" if score is score_masked else f"{role}_perplexity"
        assert results[perplexity] == pytest.approx(math.exp(expected["loss"]), rel=1e-5)
        assert {name: results[f"{role}_{name}"] for name in expected} == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["gpt2", "bert"])
def test_a_run_from_scratch_trains_evaluates_averages_and_tests(kind, run, capsys):
    changes = {"v0_init": "data_driven", "max_steps": 30, "save_steps": 10, "average_checkpoints": 2}
    out, results = run(kind, do_eval=True, do_predict=True, **changes)
    assert_scores(results, out, score_masked if kind == "bert" else score_causal)
    assert results["eval_loss"] < math.log(280) - 0.2  # of guessing at random: it has learned something
    perplexity = "pseudo_perplexity" if kind == "bert" else "perplexity"
    assert f"perplexity {results[f'eval_{perplexity}']:.3f}" in capsys.readouterr().out
    assert {"v0_init.json", "trainer_state.json", "tokenizer.json"} <= {path.name for path in out.iterdir()}
    card = (out / "README.md").read_text(encoding="utf-8")
    assert all(
        word in card for word in ("fill-mask" if kind == "bert" else "text-generation", "2412.02153", "data_driven")
    )
    checkpoints = [load_file(out / f"checkpoint-{step}" / "model.safetensors") for step in (20, 30)]
    for name, tensor in load_file(out / "model.safetensors").items():
        torch.testing.assert_close(tensor, (checkpoints[0][name] + checkpoints[1][name]) / 2, rtol=0, atol=1e-7)

    # evaluated alone, whatever the size of batches, the seed and the smoothing, the numbers are the same
    for size, seed, smoothing in ((3, 7, 0.3), (64, 0, 0.0)):
        options = {"per_device_eval_batch_size": size, "seed": seed, "label_smoothing_factor": smoothing}
        _, alone = run(kind, f"alone{size}", **of_trained(out, **options))
        assert alone["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-6)
        assert alone["eval_num_tokens"] == results["eval_num_tokens"]


def test_awd_lstm_is_selected_on_validation(run):
    """At so large a rate that the model gets worse from some epoch on."""
    changes = {"max_steps": None, "num_train_epochs": 4, "save_strategy": "epoch", "eval_strategy": "epoch"}
    changes |= {"save_steps": None, "load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    changes |= {"learning_rate": "1.0", "save_total_limit": 1, "logging_steps": 1, "v0_init": "data_driven"}
    out, results = run("awd_lstm", do_eval=True, do_predict=True, v0_record_run=True, **changes)
    losses = [entry["eval_loss"] for entry in read_state(out)["log_history"] if "eval_loss" in entry][:4]
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-6) and losses.index(min(losses)) < 3
    assert_scores(results, out, score_streams)
    assert type(load_model(out)) is AwdLstmForCausalLM  # as the analysis commands load it
    assert len(set(json.loads((out / "fingerprint.json").read_text())["batches"])) == 4
    report = json.loads((out / "v0_init.json").read_text())
    assert set(report["parameters"]) == {"embedding.weight", "decoder.bias"} | {
        f"layers.{k}.{kind}" for k in (0, 1) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }
    _, alone = run("awd_lstm", "alone", **of_trained(out))
    assert alone["eval_perplexity"] == pytest.approx(results["eval_perplexity"], rel=1e-6)


LINES = {"line_by_line": True, "max_tokens_per_batch": 220}


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("gpt2", {"v0_init": "data_driven"}),
        ("awd_lstm", {"v0_init": "data_driven", "lr_decay_epochs": "1"}),
        ("bert", {"v0_init": "random", "max_steps": 12, "per_device_train_batch_size": 13}),
        ("bert", {"v0_init": "random", "max_steps": 12, "per_device_train_batch_size": 13, **LINES}),
    ],
    ids=["gpt2", "awd_lstm", "bert", "bert-lines"],
)
def test_stop_and_resume_gives_the_weights_of_the_straight_run(run, tmp_path, kind, changes):
    """Without a flag, with the checkpoint's tokenizer; of BERT over an epoch's end, whose masks are its own."""
    straight, _ = run(kind, "straight", logging_steps=1, **changes)
    losses = [entry["loss"] for entry in read_state(straight)["log_history"] if "loss" in entry]
    stop = 2 * len(losses) // 3
    epoch = read_state(straight / f"checkpoint-{stop}")["epoch"]
    assert epoch != int(epoch) and (epoch > 1 or kind != "bert")
    shutil.copytree(straight / f"checkpoint-{stop}", tmp_path / "resumed" / f"checkpoint-{stop}")
    resumed, results = run(kind, "resumed", logging_steps=1, **changes)
    assert_equal_weights(straight, resumed)
    assert results["train_loss"] == pytest.approx(np.mean(losses[stop:]), rel=1e-5)  # of the steps since
    reports = [json.loads((folder / "v0_init.json").read_text()) for folder in (straight, resumed)]
    assert all(report.pop("seconds") >= 0.0 for report in reports)  # of this call alone
    assert reports[0] == reports[1]
    if kind == "gpt2":  # killed between its last checkpoint and its results
        shutil.copytree(straight / "checkpoint-6", tmp_path / "killed" / "checkpoint-6")
        assert "train_loss" not in run(kind, "killed", **changes)[1]


def test_accumulated_batches_train_like_one_batch(run):
    """The loss of a step is the mean over all its masked tokens, however it is divided into micro-batches."""
    changes = {"config_overrides": NO_DROPOUT, "line_by_line": True, "max_steps": 3, "save_strategy": "no"}
    changes |= {"optim": "sgd", "learning_rate": "0.5", "max_grad_norm": "0"}
    one, _ = run("bert", "one", **changes, per_device_train_batch_size=12)
    many, _ = run("bert", "many", **changes, per_device_train_batch_size=3, gradient_accumulation_steps=4)
    one, many = (load_file(folder / "model.safetensors") for folder in (one, many))
    for name, tensor in one.items():
        torch.testing.assert_close(many[name], tensor, rtol=1e-4, atol=1e-6)


def test_prompts_with_completions(run, tmp_path):
    rows = [{"question": f"what does {line.split()[1]} do?", "answer": line} for line in TRAIN]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with open(tmp_path / "test.csv", "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, ["question", "answer"])
        writer.writeheader()
        writer.writerows(rows[:3])
    out, results = run(
        "gpt2", prompt_column="question", completion_column="answer", prompt_prefix="Q: ", block_size=48,
        config_overrides="n_embd=16,n_layer=1,n_head=2,n_positions=48", train_file=tmp_path / "train.jsonl",
        validation_file=tmp_path / "test.csv", test_file=tmp_path / "test.csv", do_eval=True, do_predict=True, max_predict_samples=2,
        max_tokens_per_batch=150,
    )  # fmt: skip
    tokenizer, answers = AutoTokenizer.from_pretrained(out), TRAIN[:3]
    assert results["eval_num_tokens"] == sum(len(tokenizer(answer)["input_ids"]) + 1 for answer in answers)  # with ends


def test_streaming_evaluates_like_reading_before(run):
    options = {"do_eval": True, "do_predict": True, "max_eval_samples": 3}
    out, streamed = run("gpt2", streaming=True, shuffle_buffer_size=20, **options)
    _, indexed = run("gpt2", "indexed", **of_trained(out, **options))
    for name in ("eval_loss", "test_loss", "test_accuracy"):
        assert streamed[name] == pytest.approx(indexed[name], rel=1e-6)
    assert streamed["eval_num_tokens"] == indexed["eval_num_tokens"] > 0


def test_a_validation_split_holds_the_first_rows_and_training_none_of_them(run, tmp_path):
    """Neither among its tokens nor in the tokenizer's vocabulary, streamed or not."""
    text = tmp_path / "train.txt"
    text.write_text("\n".join([f"only{number} here" for number in range(7)] + TRAIN) + "\n", encoding="utf-8")
    changes = {"tokenizer_kind": "word", "vocab_size": 100, "train_file": text, "validation_file": None}
    words = {word for line in TRAIN for word in line.split()}
    results = []
    for name, split in (
        ("streamed", {"validation_split_rows": 7, "streaming": True}),
        ("rows", {"validation_split_rows": 7}),
        ("share", {"validation_split_percentage": 10.5, "max_train_samples": 5, "preprocessing_num_workers": 2}),
    ):
        out, found = run("gpt2", name, do_eval=True, max_steps=1, learning_rate="0", **changes, **split)
        assert found["eval_num_tokens"] == 7 * 3
        assert set(AutoTokenizer.from_pretrained(out).get_vocab()) == words | {"<pad>", "<s>", "</s>", "<unk>"}
        results.append(found)
    assert results[2]["train_samples"] == 5
    assert [found["eval_loss"] for found in results[1:]] == pytest.approx([results[0]["eval_loss"]] * 2, rel=1e-6)


def test_early_stopping_ends_after_its_patience_and_a_resumed_run_where_the_straight_one_does(run, tmp_path):
    """At a learning rate of 0 no evaluation is better than the first, at step 2: the second worse one is at step 6."""
    early = {"do_eval": True, "eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True}
    early |= {"early_stopping_patience": 2}
    straight, _ = run("gpt2", "straight", **early, max_steps=20, learning_rate="0")
    state = read_state(straight)
    assert state["global_step"] == 6 and state["best_global_step"] == 2
    for step in (2, 4):
        shutil.copytree(straight / f"checkpoint-{step}", tmp_path / "resumed" / f"checkpoint-{step}")
    for path in (tmp_path / "resumed").glob("*/trainer_state.json"):
        path.write_text(path.read_text().replace("straight", "resumed"))
    resumed, _ = run("gpt2", "resumed", **early, max_steps=20, learning_rate="0")
    assert read_state(resumed)["global_step"] == 6
    better, _ = run("gpt2", "better", **early, max_steps=8)
    assert read_state(better)["global_step"] == 8


def test_positions_that_begin_behind_the_padding_are_counted(run):
    """RoBERTa with 16 positions and padding 0 takes 15 tokens: 16 would end in an IndexError while training."""
    _, results = run("bert", model_type="roberta", block_size=None, max_steps=1)
    assert results["train_loss"] > 0


# ---- processes of their own --------------------------------------------------------------------------------------------


@pytest.fixture
def launch(flags, tmp_path):
    """Run the script of a kind of model on two processes; its output folder."""

    def launch(kind: str, name: str = "two", **changes) -> Path:
        script = ROOT / "scripts" / ("run_mlm.py" if kind == "bert" else "run_clm.py")
        done = start(*TORCHRUN, script, *flags(kind, name, **changes))
        assert done.returncode == 0, done.stderr
        return tmp_path / name

    return launch


def assert_close_weights(one: Path, other: Path, atol: float) -> None:
    one, other = (load_file(folder / "model.safetensors") for folder in (one, other))
    for name, tensor in one.items():
        torch.testing.assert_close(other[name], tensor, rtol=1e-3, atol=atol)


@pytest.mark.slow
def test_two_processes_evaluate_like_one(run, launch):
    options = {"do_eval": True, "do_predict": True}
    two = launch("gpt2", v0_init="data_driven", per_device_eval_batch_size=4, average_checkpoints=2, **options)
    _, one = run("gpt2", "one", **of_trained(two, do_predict=True))
    trained = of_trained(two, do_predict=True, streaming=True, per_device_eval_batch_size=2)
    streamed = launch("gpt2", "streamed", **trained)
    for name in ("eval_perplexity", "test_perplexity", "eval_accuracy", "eval_num_tokens"):
        assert read_results(two)[name] == pytest.approx(one[name], rel=1e-5)
        assert read_results(streamed)[name] == pytest.approx(one[name], rel=1e-5)


@pytest.mark.slow
def test_the_main_process_alone_says_what_is_wrong(flags, tmp_path):
    result = start(*TORCHRUN, ROOT / "scripts" / "run_clm.py", *flags("gpt2", "bad", train_file="nowhere.txt"))
    assert result.returncode != 0 and result.stderr.count("error: nowhere.txt") == 1
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_two_processes_train_a_masked_model_like_one(run, launch):
    """Over two epochs and a half, without dropout: the same batches, and the masks of the same samples in the same epochs."""
    options = {"config_overrides": NO_DROPOUT, "do_eval": True, "line_by_line": True, "max_steps": 12}
    options |= {"save_strategy": "no", "optim": "sgd", "learning_rate": "0.5"}
    one, results = run("bert", "one", **options, per_device_train_batch_size=12)
    two = launch("bert", **options, per_device_train_batch_size=6, per_device_eval_batch_size=4)
    assert read_state(two)["epoch"] > 2
    assert_close_weights(one, two, atol=1e-5)
    of_two = read_results(two)
    assert of_two["eval_loss"] == pytest.approx(results["eval_loss"], rel=1e-4)
    assert of_two["eval_num_tokens"] == results["eval_num_tokens"]
    # and exactly for one set of weights
    _, again = run("bert", "again", **of_trained(two, line_by_line=True))
    assert again["eval_loss"] == pytest.approx(of_two["eval_loss"], rel=1e-6)


@pytest.mark.slow
def test_two_processes_with_half_the_streams_each_are_one_with_all(run, launch, tmp_path):
    """Without dropout; gradients are averaged over the processes, losses over all tokens, states stay where their streams are."""
    dropouts = ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop")
    overrides = ",".join([KINDS["awd_lstm"]["config_overrides"], *(f"{name}=0" for name in dropouts)])
    options = {"config_overrides": overrides, "do_eval": True, "do_predict": True, "max_steps": None}
    options |= {"num_train_epochs": 2, "save_steps": 5, "v0_init": "data_driven"}
    options |= {"learning_rate": "1e-3", "block_size": 20, "vary_block_size": True}
    one, of_one = run("awd_lstm", "one", **options, per_device_train_batch_size=4, per_device_eval_batch_size=4)
    options |= {"per_device_train_batch_size": 2, "per_device_eval_batch_size": 2}
    two = launch("awd_lstm", **options)
    of_two = read_results(two)
    for name in ("eval_loss", "test_loss", "eval_num_tokens"):
        assert of_two[name] == pytest.approx(of_one[name], rel=1e-4)
    assert_close_weights(one, two, atol=2e-5)
    checkpoint = two / "checkpoint-5"
    assert {path.name for path in checkpoint.glob("stream_state*")} == {"stream_state_0.pt", "stream_state_1.pt"}
    whole = torch.load(one / "checkpoint-5" / "stream_state.pt", weights_only=True)
    parts = [torch.load(checkpoint / f"stream_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for layer in range(2):
        for part in range(2):
            joined = torch.cat([of_rank[layer][part] for of_rank in parts])
            torch.testing.assert_close(joined, whole[layer][part], rtol=1e-3, atol=1e-5)
    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-5")
    assert_equal_weights(two, launch("awd_lstm", "again", **options))


LOAD_WITHOUT_PACKAGE = """
import sys
sys.modules["hf_v0init"] = None  # any import of it fails
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
tokens = AutoTokenizer.from_pretrained(sys.argv[1])("the cat sees", return_tensors="pt")
with torch.no_grad():
    torch.save((tokens["input_ids"], model(**tokens).logits), sys.argv[2])
"""


@pytest.mark.slow
def test_a_saved_awd_lstm_is_read_back_where_this_package_is_missing(run, tmp_path):
    out, _ = run("awd_lstm", v0_init="random", max_steps=1)
    done = start("-c", LOAD_WITHOUT_PACKAGE, out, tmp_path / "read.pt", HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    input_ids, logits = torch.load(tmp_path / "read.pt", weights_only=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(out)(input_ids).logits
    assert input_ids.shape == (1, 4) and torch.equal(logits, expected)
