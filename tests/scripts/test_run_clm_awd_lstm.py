"""scripts/run_clm.py with --model_type awd_lstm, from end to end: streams, selection on validation, step decay, refusals."""

import gc
import gzip
import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from loopback_hub import LoopbackHub
from safetensors.torch import load_file
from script_runs import TORCHRUN, quiet_logging, read_results, refuse, start  # noqa: F401
from test_awd_lstm import compute_loss_slowly, run_slowly
from test_run_clm import SCRIPT, cache, data, flags, run_clm  # noqa: F401 (fixtures)
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_v0init.analysis.checkpoint_loss import load_model
from hf_v0init.tasks.language_modeling.awd_lstm import AwdLstmForCausalLM

gc.freeze()  # every `train()` collects garbage, which takes a second over all that has been imported


@pytest.fixture
def awd_flags(flags):  # noqa: F811
    def make(**changes) -> list[str]:
        return flags(
            **{
                "model_type": "awd_lstm",
                "config_overrides": "embedding_size=8,hidden_size=12,num_layers=2",
                "tokenizer_kind": "word",
                "vocab_size": 100,
                "block_size": 6,
                "per_device_eval_batch_size": 3,
            }
            | changes
        )

    return make


@torch.no_grad()
def compute_loss_of_lines(folder: Path, lines: list[str], num_streams: int) -> tuple[float, int]:
    """Reload model and tokenizer, and read the words of the lines in so many streams, cell by cell."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    vocabulary = tokenizer.get_vocab()
    words = ["<s>"] + [word for line in lines for word in [*line.split(), "</s>"]]
    text = [vocabulary.get(word, vocabulary["<unk>"]) for word in words]
    total, num_targets = 0.0, len(text) - 1
    for positions in np.array_split(np.arange(num_targets), num_streams):
        inputs = torch.tensor([text[positions[0] : positions[-1] + 1]])
        targets = torch.tensor([text[positions[0] + 1 : positions[-1] + 2]])
        total += compute_loss_slowly(run_slowly(model, inputs)[0], targets).item() * len(positions)
    return total / num_targets, num_targets


def read_log(folder: Path) -> list[dict]:
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_a_run_selects_on_validation_and_its_perplexities_are_the_slow_ones(awd_flags, data, tmp_path):  # noqa: F811
    out = tmp_path / "out"
    changes = {"max_steps": None, "num_train_epochs": 4, "save_strategy": "epoch", "eval_strategy": "epoch"}
    changes |= {"save_steps": None, "load_best_model_at_end": True, "lr_scheduler_type": "constant"}
    # so large a rate that the model gets worse from some epoch on
    changes |= {"learning_rate": "1.0", "save_total_limit": 1, "logging_steps": 1, "v0_init": "data_driven"}
    changes |= {"do_eval": True, "do_predict": True, "v0_record_run": True}
    run_clm.main(awd_flags(**changes))
    losses = [entry["eval_loss"] for entry in read_log(out) if "eval_loss" in entry][:4]
    results = read_results(out)
    assert results["eval_loss"] == pytest.approx(min(losses), rel=1e-6) and losses.index(min(losses)) < 3
    validation = gzip.decompress((data / "validation.txt.gz").read_bytes()).decode().splitlines()
    for role, lines in (("eval", validation), ("test", (data / "test.txt").read_text(encoding="utf-8").splitlines())):
        expected, num_tokens = compute_loss_of_lines(out, lines, num_streams=3)
        assert results[f"{role}_num_tokens"] == num_tokens == sum(len(line.split()) + 1 for line in lines)
        assert results[f"{role}_loss"] == pytest.approx(expected, rel=1e-5)
        assert results[f"{role}_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert type(AutoModelForCausalLM.from_pretrained(out)) is AwdLstmForCausalLM
    assert len(set(json.loads((out / "fingerprint.json").read_text())["batches"])) == 4
    report = json.loads((out / "v0_init.json").read_text())
    assert set(report["parameters"]) == {"embedding.weight", "decoder.bias"} | {
        f"layers.{k}.{kind}" for k in (0, 1) for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh")
    }


def test_a_stopped_run_goes_on_in_the_middle_of_an_epoch(awd_flags, tmp_path):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    changes = {"v0_init": "data_driven", "lr_decay_epochs": "1"}
    run_clm.main(awd_flags(**changes, output_dir=straight))
    shutil.copytree(straight / "checkpoint-2", resumed / "checkpoint-2")
    run_clm.main(awd_flags(**changes, output_dir=resumed))
    expected, weights = (load_file(folder / "model.safetensors") for folder in (straight, resumed))
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_the_learning_rate_falls_after_the_named_epochs(awd_flags, tmp_path):
    changes = {"max_steps": None, "num_train_epochs": 4, "save_strategy": "no", "save_steps": None, "logging_steps": 1}
    changes |= {
        "lr_scheduler_type": "constant_with_warmup",
        "warmup_steps": 2,
        "block_size": 60,
        "learning_rate": "0.01",
    }
    # 60 lines of 7 words in 4 streams are 105 tokens per stream, two segments: two steps per epoch
    run_clm.main([*awd_flags(**changes), "--lr_decay_epochs", "2", "3"])
    rates = [entry["learning_rate"] for entry in read_log(tmp_path / "out") if "learning_rate" in entry]
    assert rates == pytest.approx([0.0, 0.005, 0.01, 0.01, 1e-3, 1e-3, 1e-4, 1e-4])


def test_a_trained_model_is_evaluated_alone(awd_flags, tmp_path):
    run_clm.main(awd_flags(do_eval=True, output_dir=tmp_path / "first"))
    perplexity = read_results(tmp_path / "first")["eval_perplexity"]
    pretrained = {"model_type": None, "config_overrides": None, "model_name_or_path": tmp_path / "first"}
    assert type(load_model(tmp_path / "first")) is AwdLstmForCausalLM  # as the analysis commands load it
    run_clm.main(awd_flags(**pretrained, do_train=None, do_eval=True, output_dir=tmp_path / "second"))
    assert read_results(tmp_path / "second")["eval_perplexity"] == pytest.approx(perplexity, rel=1e-6)


BAD_INPUT = {
    "streaming": ({"streaming": True}, ["--streaming", "awd_lstm", "leave it out"]),
    "label smoothing": ({"label_smoothing_factor": 0.1}, ["--label_smoothing_factor=0.1", "leave it out"]),
    "batch larger than the text": ({"per_device_train_batch_size": 500}, ["420 tokens", "500 streams"]),
    "varying short segments": ({"vary_block_size": True}, ["6 tokens", "at least 20"]),
    "varying blocks of a transformer": (
        {"model_type": "gpt2", "config_overrides": "n_embd=8,n_head=2,n_positions=6", "vary_block_size": True},
        ["--vary_block_size", "awd_lstm"],
    ),
    "prompts": ({"prompt_column": "q", "completion_column": "a"}, ["--prompt_column=q", "awd_lstm", "leave it out"]),
    "token budget": ({"max_tokens_per_batch": 64}, ["--max_tokens_per_batch=64", "awd_lstm", "leave it out"]),
}


@pytest.mark.parametrize("name", BAD_INPUT)
def test_bad_input_ends_with_one_line_and_status_2_and_nothing_written(name, awd_flags, tmp_path, monkeypatch, capsys):
    changes, expected = BAD_INPUT[name]
    refuse(run_clm, awd_flags(**changes), expected, capsys, monkeypatch, with_log=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_two_processes_with_half_the_streams_each_are_one_with_all(awd_flags, tmp_path):
    """Without dropout; gradients are averaged over the processes, losses over all tokens, states stay where their streams are."""
    no_dropout = ",".join(
        f"{name}=0"
        for name in ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop")
    )
    overrides = f"embedding_size=8,hidden_size=12,num_layers=2,{no_dropout}"
    options = {"config_overrides": overrides, "do_eval": True, "do_predict": True, "max_steps": None}
    options |= {"num_train_epochs": 2, "save_steps": 5, "v0_init": "data_driven"}
    options |= {"learning_rate": "1e-3", "block_size": 20, "vary_block_size": True}
    one, two = tmp_path / "one", tmp_path / "two"
    batches = {"per_device_train_batch_size": 4, "per_device_eval_batch_size": 4}
    run_clm.main(awd_flags(**options | batches, output_dir=one))
    halves = {name: 2 for name in batches}
    result = start(*TORCHRUN, SCRIPT, *awd_flags(**options | halves, output_dir=two))
    assert result.returncode == 0, result.stderr
    for name in ("eval_loss", "test_loss"):
        assert read_results(two)[name] == pytest.approx(read_results(one)[name], rel=1e-4)
    assert read_results(two)["eval_num_tokens"] == read_results(one)["eval_num_tokens"]
    expected, weights = (load_file(folder / "model.safetensors") for folder in (one, two))
    for name, tensor in expected.items():
        torch.testing.assert_close(weights[name], tensor, rtol=1e-3, atol=2e-5)
    checkpoint = two / "checkpoint-5"
    assert {path.name for path in checkpoint.glob("stream_state*")} == {"stream_state_0.pt", "stream_state_1.pt"}
    ours = torch.load(one / "checkpoint-5" / "stream_state.pt", weights_only=True)
    parts = [torch.load(checkpoint / f"stream_state_{rank}.pt", weights_only=True) for rank in (0, 1)]
    for layer in range(2):
        for part in range(2):
            joined = torch.cat([of_rank[layer][part] for of_rank in parts])
            torch.testing.assert_close(joined, ours[layer][part], rtol=1e-3, atol=1e-5)
    shutil.copytree(checkpoint, tmp_path / "again" / "checkpoint-5")
    result = start(*TORCHRUN, SCRIPT, *awd_flags(**options | halves, output_dir=tmp_path / "again"))
    assert result.returncode == 0, result.stderr
    again = load_file(tmp_path / "again" / "model.safetensors")
    assert all(torch.equal(again[name], tensor) for name, tensor in weights.items())


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
def test_a_pushed_model_is_read_back_where_this_package_is_missing(awd_flags, tmp_path):
    with LoopbackHub() as hub:
        for step, command in {
            "push": [SCRIPT, *awd_flags(push_to_hub=True, hub_model_id="someone/awd-lstm", v0_init="random")],
            "load": ["-c", LOAD_WITHOUT_PACKAGE, "someone/awd-lstm", tmp_path / "read.pt"],
        }.items():
            done = start(*command, **hub.make_environment(tmp_path / step))
            assert done.returncode == 0, done.stderr
        pushed = set(hub.repositories["someone/awd-lstm"].head.files)
    assert {"awd_lstm.py", "config.json", "model.safetensors", "tokenizer.json", "v0_init.json", "README.md"} <= pushed
    input_ids, logits = torch.load(tmp_path / "read.pt", weights_only=True)
    with torch.no_grad():
        expected = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(input_ids).logits
    assert input_ids.shape == (1, 4) and torch.equal(logits, expected)
