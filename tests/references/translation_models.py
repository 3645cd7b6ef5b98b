"""Tiny encoder-decoder models for the tests."""

import torch
from transformers import MarianMTModel

from hf_v0init.tasks.translation.post_norm import apply_xavier_initialization, build_post_norm_config


def make_marian(vocab_size: int = 24, dropout: float = 0.0, seed: int = 0, **sizes) -> MarianMTModel:
    sizes = {"d_model": 16, "ffn_dim": 24, "num_heads": 2, "num_layers": 2, "max_positions": 32, **sizes}
    torch.manual_seed(seed)
    model = MarianMTModel(build_post_norm_config(vocab_size, 0, 2, dropout=dropout, **sizes))
    apply_xavier_initialization(model)
    return model
