"""Batches of like length change what an evaluation costs, and nothing that it says."""

import datasets
import numpy as np
import pytest
import torch
from transformers import BartConfig, BartForConditionalGeneration, DataCollatorForSeq2Seq, Seq2SeqTrainer

from hf_v0init.tasks.token_loss import ExactEvaluationMixin
from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer
from hf_v0init.tasks.translation.sorted_evaluation import LengthSortedEvaluationMixin, find_length_order
from hf_v0init.trainer.arguments import V0InitSeq2SeqTrainingArguments

LENGTHS = [3, 9, 1, 5, 9, 2, 7, 4, 8, 6, 1]


class Plain(ExactEvaluationMixin, Seq2SeqTrainer):
    pass


class Sorted(LengthSortedEvaluationMixin, Plain):
    pass


@pytest.fixture
def dataset():
    generator = np.random.default_rng(0)
    sources = [[*generator.integers(10, 300, size=length).tolist(), 2] for length in LENGTHS]
    targets = [[2 + index, *source[:3], 2] for index, source in enumerate(sources)]  # tells which sample it is
    columns = {"input_ids": sources, "attention_mask": [[1] * len(source) for source in sources], "labels": targets}
    return datasets.Dataset.from_dict(columns)


@pytest.fixture
def make(tmp_path, dataset):
    torch.manual_seed(0)
    tokenizer = train_bpe_tokenizer(["a few words to begin with"], 300, for_translation=True)
    sizes = {f"{side}_{name}": 1 for side in ("encoder", "decoder") for name in ("layers", "attention_heads")}
    config = BartConfig(
        vocab_size=320, d_model=16, encoder_ffn_dim=16, decoder_ffn_dim=16, max_position_embeddings=32, **sizes,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=2, forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForConditionalGeneration(config).eval()

    def make(kind, **options):
        arguments = V0InitSeq2SeqTrainingArguments(
            str(tmp_path), use_cpu=True, per_device_eval_batch_size=4, predict_with_generate=True, report_to="none",
            generation_max_length=6, disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        collator = DataCollatorForSeq2Seq(tokenizer, model=model)
        return kind(model, arguments, data_collator=collator, eval_dataset=dataset, **options)

    return make


def test_the_order_is_from_the_longest_and_stable(dataset):
    order = find_length_order(dataset)
    assert order.tolist() == [1, 4, 8, 6, 9, 3, 7, 0, 5, 2, 10]


def test_predictions_come_in_the_order_of_the_data_set(make, dataset):
    plain, ours = make(Plain).predict(dataset), make(Sorted).predict(dataset)
    assert np.array_equal(ours.label_ids[:, 0], 2 + np.arange(len(LENGTHS)))
    assert np.array_equal(ours.label_ids, plain.label_ids)
    assert np.array_equal(ours.predictions, plain.predictions)
    assert ours.metrics["test_loss"] == pytest.approx(plain.metrics["test_loss"], rel=1e-6)


def test_an_evaluation_says_the_same_and_gives_metrics_matching_rows(make):
    seen = {}

    def keep(name):
        def compute(evaluation):
            predictions, labels = evaluation
            seen[name] = sorted(map(tuple, np.concatenate([labels, predictions], axis=1).tolist()))
            return {}

        return compute

    losses = [make(kind, compute_metrics=keep(kind)).evaluate()["eval_loss"] for kind in (Plain, Sorted)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    assert seen[Plain] == seen[Sorted]


def test_batches_hold_samples_of_like_length(make, dataset):
    trainer = make(Sorted)
    for loader in (trainer.get_eval_dataloader(), trainer.get_test_dataloader(dataset)):
        assert [batch["input_ids"].shape[1] for batch in loader] == [10, 7, 3]
    assert [batch["input_ids"].shape[1] for batch in make(Plain).get_eval_dataloader()] == [10, 10, 9]


def test_other_data_are_left_as_they_are(make, dataset):
    rows = list(dataset)
    output = make(Sorted).predict(rows)
    assert np.array_equal(output.label_ids[:, 0], 2 + np.arange(len(rows)))


def test_sentences_without_references_are_translated_too(make, dataset):
    expected = make(Plain).predict(dataset).predictions
    output = make(Sorted).predict(dataset.remove_columns("labels"))
    assert output.label_ids is None and np.array_equal(output.predictions, expected)
