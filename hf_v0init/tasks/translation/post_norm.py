"""The paper's translation model: a post-norm encoder-decoder Transformer, as a transformers Marian model.

Marian is the transformers architecture that normalises after each residual sum (as in Vaswani et al., 2017),
has sinusoidal positions and ties the three embeddings. By default it starts from N(0, init_std^2); the paper's
model starts from fairseq's Xavier initialisation instead, which `apply_xavier_initialization` gives.
"""

import math

import torch
from torch import nn
from transformers import MarianConfig, PreTrainedModel

from ...errors import InputError


def build_post_norm_config(
    vocab_size: int,
    pad_token_id: int,
    eos_token_id: int,
    *,
    d_model: int = 512,
    ffn_dim: int = 1024,
    num_heads: int = 4,
    num_layers: int = 6,
    dropout: float = 0.3,
    attention_dropout: float = 0.0,
    max_positions: int = 1024,
) -> MarianConfig:
    """The configuration of a post-norm Transformer; the defaults are the paper's IWSLT'14 model.

    Args:
        vocab_size: entries of the joint vocabulary.
        pad_token_id: padding, and what the decoder starts from.
        eos_token_id: ends every source and target.
        d_model, ffn_dim, num_heads, num_layers: sizes, the same in the encoder and in the decoder.
        dropout: after embeddings and sublayers. `attention_dropout`: of the attention weights.
        max_positions: the longest source or target in tokens.

    Returns:
        A MarianConfig: post-norm, ReLU, embeddings scaled by sqrt(d_model) and shared by encoder, decoder
        and output.
    """
    return MarianConfig(
        vocab_size=vocab_size,
        decoder_vocab_size=vocab_size,
        d_model=d_model,
        encoder_layers=num_layers,
        decoder_layers=num_layers,
        encoder_attention_heads=num_heads,
        decoder_attention_heads=num_heads,
        encoder_ffn_dim=ffn_dim,
        decoder_ffn_dim=ffn_dim,
        dropout=dropout,
        attention_dropout=attention_dropout,
        activation_function="relu",
        scale_embedding=True,
        init_std=d_model**-0.5,
        max_position_embeddings=max_positions,
        pad_token_id=pad_token_id,
        bos_token_id=None,
        eos_token_id=eos_token_id,
        forced_eos_token_id=None,
        decoder_start_token_id=pad_token_id,
        share_encoder_decoder_embeddings=True,
        tie_word_embeddings=True,
    )


@torch.no_grad()
def apply_xavier_initialization(model: PreTrainedModel) -> None:
    """Draws a Marian model's weights again, in place, from the distributions of fairseq's Transformer.

    Linear weights are Xavier-uniform, those of the query, key and value projections with gain 1/sqrt(2);
    embeddings are N(0, 1/d_model) with a zero row for padding; biases are 0, layer norms 1 and 0. Sinusoidal
    positions, buffers and everything frozen stay. Draws come from torch's global generator.

    Raises:
        InputError: a trainable parameter belongs to no module that has a rule here.
    """
    embedding_weights = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    initialized = set()
    for name, module in model.named_modules():
        weight = getattr(module, "weight", None)
        if weight is None or not weight.requires_grad or id(weight) in initialized:
            continue
        initialized.add(id(weight))
        if isinstance(module, nn.Embedding) or id(weight) in embedding_weights:
            nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
            if model.config.pad_token_id is not None:
                weight[model.config.pad_token_id].zero_()
        elif isinstance(module, nn.Linear):
            is_attention_input = name.rsplit(".", 1)[-1] in ("q_proj", "k_proj", "v_proj")
            nn.init.xavier_uniform_(weight, gain=1 / math.sqrt(2) if is_attention_input else 1.0)
        elif isinstance(module, nn.LayerNorm):
            nn.init.ones_(weight)
        else:
            raise InputError(f"{name}: Xavier initialisation knows no {type(module).__name__}; use it on Marian models")
        if getattr(module, "bias", None) is not None:
            nn.init.zeros_(module.bias)
