"""Masks: their shares, whole words, and on what they depend. Golden runs hold them."""

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_v0init.tasks.language_modeling.masking import MaskedSamples, Masking, compose_seed
from hf_v0init.tasks.script_trainer import AnnounceEpoch
from hf_v0init.tasks.tokenizer_training import train_word_tokenizer

MASK, KEPT, ORDINARY = 4, np.array([0, 1, 2, 4]), np.arange(5, 40)
FRAMED = np.array([1, 7, 8, 9, 2, 3, 11, 12, 13, 14, 15, 16, 17, 18, 2, 0, 0])


def make_masking(**settings) -> Masking:
    return Masking(MASK, KEPT, ORDINARY, **settings)


@pytest.mark.parametrize("whole_words", [False, True])
def test_shares_of_masked_random_and_unchanged_tokens(whole_words):
    """10 words of 1, 2 or 3 tokens: 15% of the tokens on average, although 1.5 words cannot be chosen."""
    masking = make_masking(whole_words=whole_words)
    starts = np.array([1, 1, 0, 1, 1, 0, 0, 1, 0, 1, 1, 0, 1, 1, 0, 0, 1, 1], dtype=bool)
    generator = np.random.default_rng(1)
    chosen = replaced = random = total = 0
    for index in range(6000):
        ids = generator.integers(5, 40, len(starts))
        inputs, labels = masking.mask(ids, starts, (0, 0, 0, index))
        is_target = labels != -100
        assert (labels[is_target] == ids[is_target]).all() and (inputs[~is_target] == ids[~is_target]).all()
        if whole_words:  # all of a word or nothing
            assert (is_target[1:] == is_target[:-1])[~starts[1:]].all()
        chosen += is_target.sum()
        total += len(ids)
        replaced += (inputs[is_target] == MASK).sum()
        random += ((inputs != MASK) & (inputs != ids)).sum()
    assert chosen / total == pytest.approx(0.15, abs=0.003)  # 4 standard errors of whole words
    assert replaced / chosen == pytest.approx(0.8, abs=0.013)
    assert random / chosen == pytest.approx(0.1 * 34 / 35, abs=0.01)  # 1 in 35 draws the token itself


def test_a_short_sample_has_one_target_a_sample_of_special_tokens_none_and_all_other_tokens_may_be_targets():
    for seed in range(20):
        assert (make_masking().mask(np.array([1, 9, 2]), None, (seed,))[1] != -100).tolist() == [False, True, False]
        inputs, labels = make_masking().mask(np.array([1, 2, 0]), None, (seed,))
        assert inputs.tolist() == [1, 2, 0] and (labels == -100).all()
    labels = [make_masking(probability=0.9).mask(FRAMED, None, (seed,))[1] for seed in range(50)]
    ordinary = set(FRAMED.tolist()) - set(KEPT.tolist())
    assert set(np.concatenate(labels).tolist()) - {-100} == ordinary and 3 in ordinary  # the unknown token too


# ------------------------------------------------------------------------------------------ on what masks depend


def make_samples(num: int = 30) -> list[dict]:
    generator = np.random.default_rng(5)
    return [{"input_ids": generator.integers(5, 40, 20)} for _ in range(num)]


def list_labels(samples) -> list[list[int]]:
    return [sample["labels"].tolist() for sample in samples]


def read_all(dataset: MaskedSamples) -> list[list[int]]:
    return list_labels(dataset[index] for index in range(len(dataset)))


def test_masks_of_training_depend_on_seed_epoch_and_number_alone_and_those_of_evaluation_on_the_number():
    first = MaskedSamples(make_samples(), make_masking(), seed=3)
    labels = read_all(first)
    torch.manual_seed(9)
    np.random.seed(9)
    assert [first[index]["labels"].tolist() for index in reversed(range(30))] == labels[::-1]
    assert read_all(MaskedSamples(make_samples(), make_masking(), seed=3)) == labels
    assert read_all(MaskedSamples(make_samples(), make_masking(), seed=4)) != labels
    first.set_epoch(1)
    assert sum(a == b for a, b in zip(labels, read_all(first), strict=True)) <= 2
    first.set_epoch(0)
    assert read_all(first) == labels
    evaluation = MaskedSamples(make_samples(), make_masking(), seed=None)
    labels = read_all(evaluation)
    evaluation.set_epoch(5)
    assert read_all(evaluation) == labels != read_all(MaskedSamples(make_samples(), make_masking(), seed=0))
    assert compose_seed(None, 0, 1) == compose_seed(None, 7, 1) != compose_seed(0, 0, 1)


def test_loader_workers_that_live_on_see_the_epoch():
    dataset = MaskedSamples(make_samples(6), make_masking(), seed=3)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, num_workers=1, persistent_workers=True)
    read = []
    for epoch in range(2):
        dataset.set_epoch(epoch)
        read.append([row.tolist() for batch in loader for row in batch["labels"]])
        assert read[-1] == read_all(dataset)
    assert read[0] != read[1]


@pytest.mark.parametrize("steps_an_epoch", [3, 7, 49, 915])
def test_the_epoch_is_told_from_what_the_trainer_counts(steps_an_epoch):
    told, state = [], TrainerState()
    callback = AnnounceEpoch(told.append)
    for epoch in range(40):
        # what the Trainer has after the last step of the epoch before, and after a stop within this one
        for state.epoch in ((epoch - 1) + steps_an_epoch / steps_an_epoch, epoch + 1 / steps_an_epoch):
            callback.on_epoch_begin(None, state, TrainerControl())
            assert told[-1] == epoch


# -------------------------------------------------------------------------------------------------- of a tokenizer


def test_ids_of_a_tokenizer():
    tokenizer = train_word_tokenizer(["a b <unk> c"], 20, for_masking=True)
    masking = Masking.for_tokenizer(tokenizer, probability=0.3)
    assert masking.mask_token_id == tokenizer.mask_token_id == 4 and masking.probability == 0.3
    assert masking.kept_ids.tolist() == [0, 1, 2, 4]  # not <unk>, which is a word of the text
    assert masking.ordinary_ids.tolist() == [5, 6, 7]
