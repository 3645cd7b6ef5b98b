"""Loss and accuracy of single images, by hand."""

import math

import pytest
import torch

from hf_v0init.tasks.images.script import score_images


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
