"""Loss per target token: gradients that do not depend on how a step is cut up, and exact evaluations, also of images."""

import math

import pytest
import torch
from test_token_budget import make_rows, make_trainer
from torch.nn import functional
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from transformers.trainer_pt_utils import LabelSmoother
from translation_models import make_marian

from hf_v0init.tasks.images.script import score_images
from hf_v0init.tasks.token_loss import ExactEvaluationMixin, TokenCrossEntropy, compute_perplexity, sum_token_losses

LOGITS = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([[1, 2, 3, -100, -100], [6, -100, -100, -100, -100], [0, 1, 2, 3, 4]])
NUM_TOKENS = 9


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_loss_is_that_of_torch_and_of_transformers(smoothing):
    outputs = {"logits": LOGITS}
    loss = TokenCrossEntropy(smoothing)(outputs, LABELS)
    flat = LOGITS.flatten(0, 1), LABELS.flatten()
    assert loss.item() == pytest.approx(functional.cross_entropy(*flat, label_smoothing=smoothing).item(), rel=1e-6)
    assert loss.item() == pytest.approx(LabelSmoother(smoothing)(outputs, LABELS).item(), rel=1e-6)
    parts = [
        TokenCrossEntropy(smoothing)({"logits": LOGITS[i : i + 1]}, LABELS[i : i + 1], torch.tensor(NUM_TOKENS))
        for i in range(3)
    ]
    assert sum(parts).item() == pytest.approx(loss.item(), rel=1e-6)


class ExactTrainer(ExactEvaluationMixin, Seq2SeqTrainer):
    pass


@pytest.mark.parametrize("predict_with_generate", [False, True])
def test_eval_loss_is_exact_whatever_the_batches(tmp_path, predict_with_generate):
    model, rows = make_marian().eval(), make_rows(23)
    total = tokens = 0
    for row in rows:
        with torch.no_grad():
            logits = model(
                input_ids=torch.tensor([row["input_ids"]]),
                decoder_input_ids=torch.tensor([[0, *row["labels"][:-1]]]),
            ).logits
        total += functional.cross_entropy(logits[0].double(), torch.tensor(row["labels"]), reduction="sum").item()
        tokens += len(row["labels"])
    model.generation_config.max_length = 8
    for batch_size in (1, 5, 23):
        trainer = ExactTrainer(
            model=model,
            args=Seq2SeqTrainingArguments(
                output_dir=str(tmp_path), per_device_eval_batch_size=batch_size, report_to="none", use_cpu=True,
                disable_tqdm=True, predict_with_generate=predict_with_generate, label_smoothing_factor=0.1,
            ),
            eval_dataset=rows,
            data_collator=make_trainer(tmp_path, 1).data_collator,
            compute_loss_func=TokenCrossEntropy(0.1),
            compute_metrics=(lambda evaluation: {"shape": len(evaluation.predictions)})
            if predict_with_generate
            else None,
        )  # fmt: skip
        metrics = trainer.evaluate()
        assert metrics["eval_loss"] == pytest.approx(total / tokens, rel=1e-5)
        if predict_with_generate:
            assert metrics["eval_shape"] == 23


# ---- sums over rows and images, by hand; runs of the scripts hold them against a loop over tokens


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


def test_scores_of_images_by_hand():
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
