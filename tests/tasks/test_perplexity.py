"""Exact perplexity against a loop that asks the model for one token after the other."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import VOCAB, make_gpt2
from test_language_modeling import make_rows
from transformers import Trainer, TrainingArguments

from hf_v0init.tasks.language_modeling.samples import PaddingCollator, StreamedTokenWindows, TokenWindows
from hf_v0init.tasks.token_loss import ExactPerplexityMixin, compute_perplexity, sum_token_losses

LENGTHS = (10, 7, 10, 2, 9, 3, 10, 10, 5, 10, 4)  # uneven, no multiple of any batch size used here


class ExactTrainer(ExactPerplexityMixin, Trainer):
    pass


def make_samples() -> list[dict]:
    generator = torch.Generator().manual_seed(7)
    samples = []
    for length in LENGTHS:
        ids = torch.randint(1, VOCAB, (length,), generator=generator).tolist()
        labels = [-100, -100, *ids[2:]] if length > 6 else list(ids)
        samples.append({"input_ids": ids, "labels": labels})
    return samples


def evaluate(output_dir, samples, batch_size=4, label_smoothing=0.0, **arguments) -> dict:
    trainer = ExactTrainer(
        model=make_gpt2(),
        args=TrainingArguments(
            output_dir=str(output_dir),
            use_cpu=True,
            report_to="none",
            disable_tqdm=True,
            per_device_eval_batch_size=batch_size,
            label_smoothing_factor=label_smoothing,
            **arguments,
        ),
        eval_dataset=samples,
        data_collator=PaddingCollator(0),
    )
    return trainer.evaluate()


@torch.no_grad()
def evaluate_slowly(samples) -> tuple[float, int, int]:
    """Sum of -log p(token | tokens before it) in float64, number of targets, number of right guesses."""
    model = make_gpt2().double().eval()
    total, num_tokens, num_correct = 0.0, 0, 0
    for sample in samples:
        ids, labels = torch.tensor(sample["input_ids"]), sample["labels"]
        for position in range(1, len(ids)):
            if labels[position] == -100:
                continue
            scores = model(ids[None, :position]).logits[0, -1]
            total -= torch.log_softmax(scores, dim=-1)[labels[position]].item()
            num_tokens += 1
            num_correct += int(scores.argmax() == labels[position])
    return total, num_tokens, num_correct


def assert_exact(metrics, expected):
    total, num_tokens, num_correct = expected
    assert metrics["eval_num_tokens"] == num_tokens
    assert metrics["eval_loss"] == pytest.approx(total / num_tokens, rel=1e-6)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(total / num_tokens), rel=1e-6)
    assert metrics["eval_accuracy"] == num_correct / num_tokens


@pytest.mark.parametrize("batch_size", [1, 3, 4, 64])
def test_one_process_equals_the_slow_loop(tmp_path, batch_size):
    samples = make_samples()
    assert_exact(evaluate(tmp_path, samples, batch_size), evaluate_slowly(samples))


def test_neither_label_smoothing_nor_accumulation_changes_it(tmp_path):
    samples = make_samples()
    metrics = evaluate(tmp_path, samples, label_smoothing=0.3, eval_accumulation_steps=1)
    assert_exact(metrics, evaluate_slowly(samples))


def test_the_stock_mean_of_batch_means_is_another_number(tmp_path):
    """What the exact evaluation corrects, so that the tests above cannot pass by chance."""
    samples = make_samples()
    trainer = Trainer(
        model=make_gpt2(),
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none", per_device_eval_batch_size=4),
        eval_dataset=samples,
        data_collator=PaddingCollator(0),
    )
    total, num_tokens, _ = evaluate_slowly(samples)
    assert abs(trainer.evaluate()["eval_loss"] - total / num_tokens) > 1e-4


def test_windows_drop_no_tail(tmp_path):
    """A stream of 23 tokens in windows of 6, first token forecast from a beginning-of-text token."""
    tokens = torch.randint(1, VOCAB, (23,), generator=torch.Generator().manual_seed(1)).tolist()
    rows = make_rows([tokens[:4], tokens[4:21], tokens[21:]])
    windows = TokenWindows(rows, 6, [0])
    metrics = evaluate(tmp_path, windows)
    assert metrics["eval_num_tokens"] == 23
    assert_exact(metrics, evaluate_slowly(windows[i] for i in range(len(windows))))
    streamed = evaluate(tmp_path, StreamedTokenWindows(rows, 6, [0]))
    assert streamed["eval_num_tokens"] == 23
    assert streamed["eval_loss"] == pytest.approx(metrics["eval_loss"], rel=1e-6)


def test_sums_of_rows():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 1.0], [0.0, 0.0]], [[1.0, 1.0], [0.0, 3.0], [9.0, 0.0]]])
    labels = torch.tensor([[1, 0, 1], [-100, -100, 0]])
    sums = sum_token_losses(logits, labels)
    expected = [
        [math.log1p(math.exp(-2.0)) + math.log1p(math.exp(-1.0)), 2, 2],
        [math.log1p(math.exp(3.0)), 1, 0],
    ]
    torch.testing.assert_close(sums, torch.tensor(expected))
    assert sum_token_losses(logits.bfloat16(), labels).dtype == torch.float32


def test_perplexity_of_extreme_sums():
    assert compute_perplexity(20 * math.log(50.0), 20) == pytest.approx(50.0)
    assert compute_perplexity(1e6, 1) == math.inf
    assert math.isnan(compute_perplexity(0.0, 0))


@pytest.mark.slow
def test_two_processes_count_every_token_once(tmp_path):
    """11 samples in batches of 2 on 2 processes: the last round is filled up with samples already counted."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run([*command, __file__, str(tmp_path)], env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    expected = evaluate_slowly(make_samples())
    for rank in range(2):
        for metrics in json.loads((tmp_path / f"metrics_{rank}.json").read_text()).values():
            assert_exact(metrics, expected)


class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        yield from make_samples()


def evaluate_on_two_processes(output_dir: str) -> None:
    trainer = ExactTrainer(
        model=make_gpt2(),
        args=TrainingArguments(
            output_dir, use_cpu=True, report_to="none", disable_tqdm=True, per_device_eval_batch_size=2
        ),
        data_collator=PaddingCollator(0, length=10),
    )
    assert trainer.args.world_size == 2
    metrics = {"indexed": trainer.evaluate(make_samples()), "streamed": trainer.evaluate(Stream())}
    Path(output_dir, f"metrics_{trainer.args.process_index}.json").write_text(json.dumps(metrics))
    trainer.accelerator.end_training()


if __name__ == "__main__":
    evaluate_on_two_processes(sys.argv[1])
