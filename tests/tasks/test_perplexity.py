"""Exact perplexity against a loop that asks the model for one token after the other."""

import math

import pytest
import torch
from conftest import VOCAB, make_gpt2
from transformers import Trainer, TrainingArguments

from hf_v0init.tasks.language_modeling.samples import PaddingCollator
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


@pytest.mark.parametrize("options", [{}, {"label_smoothing": 0.3, "eval_accumulation_steps": 1}], ids=["", "smoothing"])
@pytest.mark.parametrize("batch_size", [1, 3, 64])
def test_metrics_are_those_of_the_slow_loop(tmp_path, batch_size, options):
    samples = make_samples()
    assert_exact(evaluate(tmp_path, samples, batch_size, **options), evaluate_slowly(samples))


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
