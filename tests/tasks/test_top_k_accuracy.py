"""Accuracy of image classifiers, exactly: by hand, and the same however the set is cut into batches."""

import math

import pytest
import torch
from torch import nn
from transformers import Trainer, TrainingArguments

from hf_v0init.tasks.images.script import ExactAccuracyMixin, score_images


def test_scores_by_hand():
    logits = torch.randn(40, 8, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 8
    scores = score_images(logits.to(torch.bfloat16), labels)
    assert scores.dtype == torch.float32
    rounded = logits.to(torch.bfloat16).double()
    for row in range(40):
        own = rounded[row, labels[row]].item()
        above = sum(value > own for value in rounded[row].tolist())
        nll = math.log(sum(math.exp(value) for value in rounded[row].tolist())) - own
        assert scores[row].tolist() == pytest.approx([nll, float(above == 0), float(above < 5)], rel=1e-5)
    assert scores[:, 1].sum() < scores[:, 2].sum() < 40


def test_few_classes_are_all_among_the_first_five():
    assert score_images(torch.randn(6, 3), torch.tensor([0, 1, 2, 0, 1, 2]))[:, 2].tolist() == [1.0] * 6


class Linear(nn.Module):
    def __init__(self, num_classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(4, num_classes)

    def forward(self, pixel_values, labels=None):
        logits = self.head(pixel_values)
        return {"loss": nn.functional.cross_entropy(logits, labels), "logits": logits}


class ExactTrainer(ExactAccuracyMixin, Trainer):
    pass


@pytest.mark.parametrize("num_classes", [3, 9])
def test_figures_do_not_depend_on_the_batches(tmp_path, num_classes):
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randn(23, 4, generator=generator)
    labels = torch.randint(num_classes, (23,), generator=generator)
    rows = [{"pixel_values": x, "labels": int(y)} for x, y in zip(pixels, labels, strict=True)]
    model, figures = Linear(num_classes), []
    for batch_size in (1, 5, 23):
        arguments = TrainingArguments(
            str(tmp_path), per_device_eval_batch_size=batch_size, use_cpu=True, report_to=[], disable_tqdm=True
        )
        metrics = ExactTrainer(model=model, args=arguments).evaluate(rows, metric_key_prefix="test")
        figures.append({name: value for name, value in metrics.items() if "second" not in name and "time" not in name})
    scores = score_images(model.head(pixels).detach(), labels).double().mean(dim=0)
    expected = {"test_loss": scores[0], "test_accuracy": scores[1], "test_top5_accuracy": scores[2]}
    if num_classes <= 5:
        del expected["test_top5_accuracy"]
    expected["test_num_images"] = 23
    for found in figures:
        found.pop("epoch", None)
        assert found == pytest.approx({name: float(value) for name, value in expected.items()}, rel=1e-6)
