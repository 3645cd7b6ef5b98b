"""AWD-LSTM against a loop of LSTM cells, one token after the other, and against masks that the test draws itself."""

import json
import math

import pytest
import torch
from conftest import VOCAB
from torch.nn import functional
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.dynamic_module_utils import get_imports, get_relative_imports

from hf_v0init.tasks.language_modeling.awd_lstm import AwdLstmConfig, AwdLstmForCausalLM, draw_locked_mask

NO_DROPOUT = dict.fromkeys(
    ("embedding_dropout", "input_dropout", "hidden_dropout", "output_dropout", "weight_drop"), 0.0
)
SIZES = {"vocab_size": VOCAB, "embedding_size": 6, "hidden_size": 9}


def make_awd_lstm(num_layers: int = 2, seed: int = 0, scale: float = 0.6, **overrides) -> AwdLstmForCausalLM:
    """A small model with large weights, so that outputs depend on every part of it."""
    torch.manual_seed(seed)
    options = SIZES | NO_DROPOUT | {"ar_alpha": 0.0, "tar_beta": 0.0, "bos_token_id": 0, "eos_token_id": 0}
    model = AwdLstmForCausalLM(AwdLstmConfig(num_layers=num_layers, **options | overrides))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape) * scale)
    return model


def make_tokens(rows: int = 3, length: int = 11, seed: int = 5) -> torch.Tensor:
    return torch.randint(1, VOCAB, (rows, length), generator=torch.Generator().manual_seed(seed))


def run_slowly(model, rows: torch.Tensor, masks: dict | None = None, states: list | None = None):
    """Cells, gate by gate and token by token, in float64, from `states`; `masks` multiply what dropout would.

    Returns:
        logits, outputs of the last layer before and after its mask, all (rows, positions, ...), and (h, c) of each layer.
    """
    masks = masks or {}
    weights = {name: parameter.double() for name, parameter in model.named_parameters()}
    num_layers, embedding = model.config.num_layers, weights["embedding.weight"]
    decoder = weights.get("decoder.weight", embedding)
    logits, outputs, dropped, after = [], [], [], []
    for row, tokens in enumerate(rows.tolist()):
        state = [
            [torch.zeros(weights[f"layers.{k}.weight_hh"].shape[1]).double() for _ in range(2)]
            for k in range(num_layers)
        ]
        state = state if states is None else [list(layer) for layer in states[row]]
        row_logits, row_outputs, row_dropped = [], [], []
        for token in tokens:
            x = embedding[token] * masks.get("word", torch.ones(VOCAB))[token]
            x = x * masks["input"][row] if "input" in masks else x
            for k in range(num_layers):
                if k > 0 and "hidden" in masks:
                    x = x * masks["hidden"][k][row]
                h, c = state[k]
                w_hh = weights[f"layers.{k}.weight_hh"] * (masks["weight"][k] if "weight" in masks else 1.0)
                gates = weights[f"layers.{k}.weight_ih"] @ x + weights[f"layers.{k}.bias_ih"]
                gates = gates + w_hh @ h + weights[f"layers.{k}.bias_hh"]
                enter, forget, cell, leave = gates.chunk(4)
                c = torch.sigmoid(forget) * c + torch.sigmoid(enter) * torch.tanh(cell)
                h = torch.sigmoid(leave) * torch.tanh(c)
                state[k] = [h, c]
                x = h
            row_outputs.append(x)
            x = x * masks["output"][row] if "output" in masks else x
            row_dropped.append(x)
            row_logits.append(decoder @ x + weights["decoder.bias"])
        for collected, of_row in ((logits, row_logits), (outputs, row_outputs), (dropped, row_dropped)):
            collected.append(torch.stack(of_row))
        after.append(state)
    return torch.stack(logits), torch.stack(outputs), torch.stack(dropped), after


def compute_loss_slowly(logits, targets) -> torch.Tensor:
    losses = [
        -torch.log_softmax(logits[row, position], dim=-1)[target]
        for row, of_row in enumerate(targets.tolist())
        for position, target in enumerate(of_row)
        if target != -100
    ]
    return sum(losses) / len(losses)


# ------------------------------------------------------------------------------------------- against the reference


@pytest.mark.parametrize("num_layers", [1, 2, 3])
@pytest.mark.parametrize("tied", [True, False])
def test_evaluation_equals_a_loop_of_cells(num_layers, tied):
    overrides = {**dict.fromkeys(NO_DROPOUT, 0.5), "ar_alpha": 2.0, "tar_beta": 1.0, "tie_word_embeddings": tied}
    model, tokens = make_awd_lstm(num_layers, **overrides).eval(), make_tokens()
    result = model(tokens, labels=tokens)
    logits, _, _, states = run_slowly(model, tokens)
    torch.testing.assert_close(result.logits.double(), logits, rtol=1e-4, atol=1e-5)
    expected = compute_loss_slowly(logits[:, :-1], tokens[:, 1:])
    assert result.loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert math.exp(result.loss.item()) == pytest.approx(math.exp(expected.item()), rel=1e-5)
    sizes = [part.shape[1] for part, _ in result.state]
    assert sizes == [9] * (num_layers - 1) + [6 if tied else 9]
    for k in range(num_layers):
        for part in range(2):
            slow = torch.stack([states[row][k][part] for row in range(len(tokens))])
            torch.testing.assert_close(result.state[k][part].double(), slow, rtol=1e-4, atol=1e-6)


def test_every_mask_falls_where_the_paper_has_it():
    """All dropouts on: the masks are drawn here by the same calls in the model's order, and multiply the slow loop."""
    rates = {"embedding_dropout": 0.2, "input_dropout": 0.3, "hidden_dropout": 0.4, "output_dropout": 0.5}
    model = make_awd_lstm(3, **rates, weight_drop=0.35, ar_alpha=2.0, tar_beta=1.0).train()
    tokens = make_tokens()
    torch.manual_seed(17)
    loss = model(tokens, labels=tokens).loss
    torch.manual_seed(17)
    masks = {"word": torch.empty(VOCAB, 1).bernoulli_(0.8).div_(0.8).squeeze(1), "hidden": {}, "weight": {}}
    masks["input"] = draw_locked_mask(torch.empty(3, 11, 6), 0.3).squeeze(1)
    for k in range(3):
        if k > 0:
            masks["hidden"][k] = draw_locked_mask(torch.empty(3, 11, 9), 0.4).squeeze(1)
        w_hh = model.layers[k].weight_hh
        masks["weight"][k] = functional.dropout(torch.ones_like(w_hh), 0.35, True)
    masks["output"] = draw_locked_mask(torch.empty(3, 11, 6), 0.5).squeeze(1)
    logits, outputs, dropped, _ = run_slowly(model, tokens, masks)
    slow = compute_loss_slowly(logits[:, :-1], tokens[:, 1:]) + 2.0 * dropped.square().mean()
    slow = slow + (outputs[:, 1:] - outputs[:, :-1]).square().mean()
    assert loss.item() == pytest.approx(slow.item(), rel=1e-5)
    assert 0 < (masks["weight"][1] == 0).float().mean() < 1 and set(masks["word"].tolist()) == {0.0, 1.25}


def test_masks_keep_the_mean_and_are_the_same_at_all_positions():
    torch.manual_seed(0)
    mask = draw_locked_mask(torch.empty(200, 7, 50), 0.25)
    assert mask.shape == (200, 1, 50)
    values, counts = mask.unique(return_counts=True)
    assert values.tolist() == pytest.approx([0.0, 4 / 3])
    assert counts[0].item() / mask.numel() == pytest.approx(0.25, abs=0.02)


# ----------------------------------------------------------------------------------------------- state and padding


def regularise_slowly(outputs: list) -> torch.Tensor:
    """2 and 1 times the mean squares of outputs and of their changes, over all positions of all rows."""
    changes = [(each[:, 1:] - each[:, :-1]).square().mean(dim=2).flatten() for each in outputs]
    return 2.0 * torch.cat([each.square().mean(dim=2).flatten() for each in outputs]).mean() + torch.cat(changes).mean()


def test_padding_at_the_right_counts_for_nothing_in_training():
    model, tokens = make_awd_lstm(2, ar_alpha=2.0, tar_beta=1.0).train(), make_tokens(rows=2, length=8)
    mask = torch.ones_like(tokens)
    mask[1, 5:] = 0
    targets = make_tokens(rows=2, length=8, seed=6).masked_fill(mask == 0, -100)
    loss = model(tokens, attention_mask=mask, shift_labels=targets).loss
    nll, kept = 0.0, []
    for row, length in ((0, 8), (1, 5)):
        logits, outputs, _, _ = run_slowly(model, tokens[row : row + 1, :length])
        nll = nll + compute_loss_slowly(logits, targets[row : row + 1, :length]) * length
        kept.append(outputs)
    assert loss.item() == pytest.approx((nll / 13 + regularise_slowly(kept)).item(), rel=1e-6)


def test_targets_that_are_shifted_already_and_the_share_of_a_larger_step():
    model, tokens = make_awd_lstm(1, ar_alpha=2.0, tar_beta=1.0).train(), make_tokens(rows=2, length=9)
    inputs, targets = tokens[:, :-1], tokens[:, 1:].clone()
    targets[0, 3] = -100
    loss = model(inputs, labels=inputs, shift_labels=targets).loss
    logits, outputs, _, _ = run_slowly(model, inputs)
    expected = compute_loss_slowly(logits, targets) + regularise_slowly([outputs])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    # 15 targets here, 45 in the step: a third of everything, regularisers included
    share = model(inputs, shift_labels=targets, num_items_in_batch=torch.tensor(45)).loss
    assert share.item() == pytest.approx(loss.item() / 3, rel=1e-6)
    # one position has no temporal regulariser
    model.config.ar_alpha = 0.0
    loss = model(tokens[:, :1], shift_labels=tokens[:, 1:2]).loss
    expected = compute_loss_slowly(run_slowly(model, tokens[:, :1])[0], tokens[:, 1:2])
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)


# ------------------------------------------------------------------------------------------ as a transformers model


def test_save_and_load_by_the_auto_classes(tmp_path):
    model, tokens = make_awd_lstm(3).eval(), make_tokens()
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["model_type"] == "awd_lstm" and config["architectures"] == ["AwdLstmForCausalLM"]
    assert type(AutoConfig.from_pretrained(tmp_path)) is AwdLstmConfig
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert type(loaded) is AwdLstmForCausalLM and not loaded.training
    assert loaded.decoder.weight is loaded.embedding.weight
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    # what travels with it needs no more than what loads it
    assert set(get_imports(tmp_path / "awd_lstm.py")) == {"dataclasses", "torch", "transformers"}
    assert get_relative_imports(tmp_path / "awd_lstm.py") == []


def test_a_larger_vocabulary_stays_tied():
    model = make_awd_lstm(2)
    model.resize_token_embeddings(VOCAB + 3, mean_resizing=False)
    assert model.decoder.weight is model.embedding.weight and model.decoder.bias.shape == (VOCAB + 3,)
    assert model(torch.tensor([[VOCAB + 2, 1]])).logits.shape == (1, 2, VOCAB + 3)


def test_bfloat16_and_autocast_stay_close():
    model, tokens = make_awd_lstm(2).eval(), make_tokens()
    exact = model(tokens, labels=tokens).loss.item()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        try:
            torch.nn.LSTM(8, 8)(torch.randn(3, 2, 8))
        except RuntimeError as error:
            pytest.skip(f"torch's own LSTM does not run under bfloat16 autocast on this processor: {error}")
        first = model(tokens[:, :6])
        again = model(tokens[:, 6:], state=first.state)
        assert model(tokens, labels=tokens).loss.item() == pytest.approx(exact, rel=0.03)
    assert torch.isfinite(again.logits).all()
    narrow = model.to(torch.bfloat16)
    result = narrow(tokens, labels=tokens)
    assert result.loss.item() == pytest.approx(exact, rel=0.03) and result.state[0][0].dtype == torch.bfloat16
