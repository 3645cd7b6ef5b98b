"""The post-norm Transformer against a slow one written out here, and fairseq's initialisation in numbers."""

import math
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, MarianMTModel
from translation_models import make_marian

from hf_v0init.tasks.translation.post_norm import build_post_norm_config

PRESET = Path(__file__).parents[2] / "configs" / "translation" / "post_norm_transformer.json"


def layer_norm(x, norm):
    centred = x - x.mean(-1, keepdim=True)
    return centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + norm.eps) * norm.weight + norm.bias


def linear(x, layer):
    return x @ layer.weight.T + (0 if layer.bias is None else layer.bias)


def attend(layer, queries, keys, num_heads, hidden):
    """Multi-head attention, one head after the other; `hidden[i, j]` is true where i must not see j."""
    q, k, v = linear(queries, layer.q_proj), linear(keys, layer.k_proj), linear(keys, layer.v_proj)
    size = q.shape[-1] // num_heads
    heads = []
    for head in range(num_heads):
        part = slice(head * size, (head + 1) * size)
        scores = q[:, part] @ k[:, part].T / math.sqrt(size)
        heads.append(torch.softmax(scores.masked_fill(hidden, -math.inf), dim=-1) @ v[:, part])
    return linear(torch.cat(heads, dim=-1), layer.out_proj)


def feed_forward(x, layer):
    return linear(linear(x, layer.fc1).clamp(min=0), layer.fc2)


def embed(ids, weight):
    length, d = len(ids), weight.shape[1]
    position = torch.arange(length).unsqueeze(1) / 10000 ** (torch.arange(0, d, 2) / d)
    return weight[ids] * math.sqrt(d) + torch.cat((position.sin(), position.cos()), dim=1)


def compute_logits(model, source, target):
    """One sentence pair through encoder and decoder: every sublayer is norm(x + sublayer(x))."""
    weight, heads = model.model.shared.weight, model.config.encoder_attention_heads
    x = embed(source, weight)
    nothing = torch.zeros(len(source), len(source), dtype=torch.bool)
    for layer in model.model.encoder.layers:
        x = layer_norm(x + attend(layer.self_attn, x, x, heads, nothing), layer.self_attn_layer_norm)
        x = layer_norm(x + feed_forward(x, layer), layer.final_layer_norm)
    memory, x = x, embed(target, weight)
    future = torch.ones(len(target), len(target), dtype=torch.bool).triu(1)
    for layer in model.model.decoder.layers:
        x = layer_norm(x + attend(layer.self_attn, x, x, heads, future), layer.self_attn_layer_norm)
        seen = torch.zeros(len(target), len(source), dtype=torch.bool)
        x = layer_norm(x + attend(layer.encoder_attn, x, memory, heads, seen), layer.encoder_attn_layer_norm)
        x = layer_norm(x + feed_forward(x, layer), layer.final_layer_norm)
    return x @ weight.T


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_forward_equals_a_post_norm_transformer_written_out(attention):
    model = make_marian().eval()
    model.set_attn_implementation(attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:  # norms and biases away from 1 and 0, so that each of them shows
                parameter.add_(0.1 * torch.randn_like(parameter))
    source, target = torch.tensor([5, 6, 7, 8, 2]), torch.tensor([0, 9, 10, 11])
    padded = torch.tensor([[5, 6, 7, 8, 2, 0, 0]])
    with torch.no_grad():
        logits = model(
            input_ids=padded, attention_mask=padded.ne(0).long(), decoder_input_ids=target.unsqueeze(0)
        ).logits[0]
        expected = compute_logits(model, source, target)
    assert (logits - expected).abs().max() < 1e-5 * expected.abs().max()


def test_the_papers_model():
    config = build_post_norm_config(10000, 0, 2)
    from_file = AutoConfig.from_pretrained(PRESET)
    new_per_run = {"vocab_size", "decoder_vocab_size", "architectures", "transformers_version", "_name_or_path"}
    token_ids = {"pad_token_id", "eos_token_id", "bos_token_id", "decoder_start_token_id"}
    for name in config.to_dict().keys() - new_per_run - token_ids:
        assert getattr(config, name) == getattr(from_file, name), name
    assert (config.d_model, config.encoder_ffn_dim, config.encoder_layers, config.decoder_layers) == (512, 1024, 6, 6)
    assert (config.encoder_attention_heads, config.decoder_attention_heads, config.dropout) == (4, 4, 0.3)
    assert (config.activation_function, config.scale_embedding) == ("relu", True)
    assert (config.pad_token_id, config.eos_token_id, config.decoder_start_token_id) == (0, 2, 0)
    # embeddings once; per layer 4 or 8 projections of d^2 + d, two of d*ffn, and norms of 2d
    d, ffn = 512, 1024
    attention, mlp, norm = 4 * (d * d + d), 2 * d * ffn + ffn + d, 2 * d
    expected = 10000 * d + 6 * (attention + mlp + 2 * norm) + 6 * (2 * attention + mlp + 3 * norm)
    with torch.device("meta"):
        model = MarianMTModel(config)
    assert sum(p.numel() for p in model.parameters() if p.requires_grad) == expected


def test_xavier_initialisation_has_fairseqs_distributions():
    model = make_marian(vocab_size=400, d_model=64, ffn_dim=96)
    num_checked = 0
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        num_checked += 1
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif "layer_norm" in name:
            assert (parameter == 1).all(), name
        elif name == "model.shared.weight":
            assert (parameter[0] == 0).all()
            assert parameter[1:].std().item() == pytest.approx(64**-0.5, rel=0.02)
            assert parameter.abs().max() > 3 * 64**-0.5  # normal, not uniform
        else:
            gain = 2**-0.5 if name.split(".")[-2] in ("q_proj", "k_proj", "v_proj") else 1
            bound = gain * math.sqrt(6 / sum(parameter.shape))
            assert 0.98 * bound < parameter.abs().max().item() <= bound, name
            assert parameter.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05), name
    assert num_checked == sum(p.requires_grad for p in model.parameters())
