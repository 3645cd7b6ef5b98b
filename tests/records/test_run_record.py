"""What `--v0_record_run` writes, and that it leaves the run alone."""

import hashlib
import json

import torch
from conftest import make_gpt2, make_sequences
from trainers import assert_equal_weights, make_trainer, read_logs, train

from hf_v0init.records.run_log import hash_tensors

EVALUATES = {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 4}


def read_log(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / "run_log.jsonl").read_text().splitlines()]


def read_fingerprint(folder) -> dict:
    return json.loads((folder / "fingerprint.json").read_text())


def test_recorded_run_is_the_run(tmp_path):
    stock = train(tmp_path / "stock", stock=True)
    recorded = train(tmp_path / "recorded", v0_record_run=True)
    assert_equal_weights(stock, recorded)
    assert read_logs(stock) == read_logs(recorded)


def test_log_has_every_figure_and_the_clock_of_training(tmp_path):
    trainer = train(tmp_path, v0_record_run=True, kwargs={"eval_dataset": make_sequences(8)}, max_steps=4, **EVALUATES)
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [entry["step"] for entry in trainer.state.log_history]
    for mine, theirs in zip(log, trainer.state.log_history, strict=True):
        assert theirs.items() <= mine.items()
    clocks = [entry["train_seconds"] for entry in log]
    assert clocks == sorted(clocks) and clocks[0] > 0
    trainer._run_record.on_log(trainer.args, trainer.state, trainer.control, logs={"eval_runtime": 1000.0})
    assert read_log(tmp_path)[-1]["train_seconds"] < clocks[-1] - 900


def test_fingerprints_are_equal_for_arms_of_one_seed_and_for_these_only(tmp_path):
    arms = {
        "zeros": {},
        "data_driven": {"v0_init": "data_driven"},
        "first_gradient": {"v0_init": "first_gradient"},
        "warmup": {"warmup_steps": 3, "learning_rate": 5e-3},
        "measured warmup": {"untuned_warmup": "trust_radius"},
    }
    prints = {}
    for name, options in arms.items():
        train(tmp_path / name, v0_record_run=True, **options)
        prints[name] = read_fingerprint(tmp_path / name)
    assert len(prints["zeros"]["batches"]) == 4 and len(set(prints["zeros"]["batches"])) == 4
    assert all(fingerprint == prints["zeros"] for fingerprint in prints.values())
    train(tmp_path / "order", v0_record_run=True, data_seed=5)
    order = read_fingerprint(tmp_path / "order")
    assert order["initial_weights"] == prints["zeros"]["initial_weights"]
    assert order["batches"] != prints["zeros"]["batches"]
    train(tmp_path / "weights", v0_record_run=True, model=make_gpt2(seed=3))
    assert read_fingerprint(tmp_path / "weights")["initial_weights"] != prints["zeros"]["initial_weights"]


def test_fingerprint_is_the_sha256_of_what_it_says():
    tensor = torch.tensor([[1.5, -2.0]], dtype=torch.bfloat16)
    header = b"w torch.bfloat16 (1, 2)"
    expected = hashlib.sha256(header + tensor.view(torch.int16).numpy().tobytes()).hexdigest()
    assert hash_tensors([("w", tensor)]) == expected
    assert hash_tensors([("w", tensor.T)]) != expected
    assert hash_tensors([("w", torch.tensor(3.0))]) == hash_tensors([("w", torch.tensor(3.0))])


def test_continued_run_continues_its_log(tmp_path):
    options = {"v0_record_run": True, "save_strategy": "steps", "save_steps": 2, "max_steps": 5}
    train(tmp_path, **options)
    before, fingerprint = read_log(tmp_path), read_fingerprint(tmp_path)
    with open(tmp_path / "run_log.jsonl", "a") as file:
        file.write('{"loss": 1.0, "st')  # killed while writing
    trainer = make_trainer(tmp_path, **options)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    log = read_log(tmp_path)
    assert [entry["step"] for entry in log] == [entry["step"] for entry in before]
    assert log[:2] == before[:2] and log[2]["train_seconds"] > log[1]["train_seconds"]
    assert read_fingerprint(tmp_path) == fingerprint
