"""Sums of losses and perplexities by hand; runs of the scripts hold them against a loop over tokens."""

import math

import pytest
import torch

from hf_v0init.tasks.token_loss import compute_perplexity, sum_token_losses


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
