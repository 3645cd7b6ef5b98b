"""Masks: against masking by hand, their shares, whole words, and on what they depend."""

import numpy as np
import pytest
import torch
from transformers import TrainerControl, TrainerState

from hf_v0init.errors import InputError
from hf_v0init.tasks.language_modeling.masking import MaskedSamples, Masking, compose_seed
from hf_v0init.tasks.script_trainer import AnnounceEpoch
from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer, train_word_tokenizer

MASK, KEPT, ORDINARY = 4, np.array([0, 1, 2, 4]), np.arange(5, 40)
FRAMED = np.array([1, 7, 8, 9, 2, 3, 11, 12, 13, 14, 15, 16, 17, 18, 2, 0, 0])


def make_masking(**settings) -> Masking:
    return Masking(MASK, KEPT, ORDINARY, **settings)


def mask_by_hand(masking: Masking, ids, word_starts, seed) -> tuple[list[int], list[int]]:
    """One token after the other, from the same draws."""
    generator = np.random.default_rng(seed)
    words, word = [], -1
    for position in range(len(ids)):
        word += 1 if word_starts is None or word_starts[position] else 0
        words.append(word)
    candidates = sorted({words[i] for i in range(len(ids)) if ids[i] not in KEPT})
    expected = masking.probability * len(candidates)
    num_chosen = max(1, int(expected) + (1 if generator.random() >= 1 - (expected - int(expected)) else 0))
    chosen = set(generator.choice(candidates, num_chosen, replace=False).tolist())
    fates, random_ids = generator.random(len(ids)), generator.choice(ORDINARY, len(ids))
    inputs, labels = [], []
    for i, token in enumerate(ids):
        if words[i] not in chosen or token in KEPT:
            inputs.append(token)
            labels.append(-100)
            continue
        labels.append(token)
        if fates[i] < masking.mask_share:
            inputs.append(MASK)
        elif fates[i] < masking.mask_share + masking.random_share:
            inputs.append(random_ids[i])
        else:
            inputs.append(token)
    return inputs, labels


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize("probability", [0.01, 0.15, 0.5, 0.99])
def test_masks_are_those_made_by_hand(whole_words, probability):
    masking = make_masking(probability=probability, whole_words=whole_words, mask_share=0.5, random_share=0.3)
    starts = np.random.default_rng(0).random(len(FRAMED)) < 0.6 if whole_words else None
    for seed in range(50):
        inputs, labels = masking.mask(FRAMED, starts, (0, seed))
        assert inputs.dtype == labels.dtype == np.int64
        expected = mask_by_hand(masking, FRAMED.tolist(), starts, (0, seed))
        assert (inputs.tolist(), labels.tolist()) == expected


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
        chosen += is_target.sum()
        total += len(ids)
        replaced += (inputs[is_target] == MASK).sum()
        random += ((inputs != MASK) & (inputs != ids)).sum()
    assert chosen / total == pytest.approx(0.15, abs=0.003)  # 4 standard errors of whole words
    assert replaced / chosen == pytest.approx(0.8, abs=0.013)
    assert random / chosen == pytest.approx(0.1 * 34 / 35, abs=0.01)  # 1 in 35 draws the token itself


def test_special_tokens_are_neither_masked_nor_drawn_and_the_unknown_token_is_masked():
    masking = make_masking(probability=0.9, random_share=0.2)
    was_target, drawn = set(), set()
    for seed in range(300):
        inputs, labels = masking.mask(FRAMED, None, (seed,))
        assert (labels[np.isin(FRAMED, KEPT)] == -100).all()
        was_target |= set(labels.tolist()) - {-100}
        drawn |= set(inputs[(inputs != FRAMED) & (inputs != MASK)].tolist())
    assert was_target == set(FRAMED.tolist()) - set(KEPT.tolist()) and 3 in was_target
    assert drawn == set(ORDINARY.tolist())


def test_whole_words_are_masked_whole_and_each_is_as_likely():
    masking = make_masking(probability=0.4, whole_words=True)
    ids = np.arange(5, 15)
    starts = np.array([1, 1, 0, 0, 0, 1, 0, 1, 1, 0], dtype=bool)
    word = np.cumsum(starts) - 1
    times = np.zeros(5)
    for seed in range(5000):
        is_target = masking.mask(ids, starts, (seed,))[1] != -100
        for number in range(5):
            assert len(set(is_target[word == number])) == 1
        times += [is_target[word == number][0] for number in range(5)]
    np.testing.assert_allclose(times / 5000, 0.4, atol=0.03)


def test_a_short_sample_has_one_target_and_a_sample_of_special_tokens_none():
    masking = make_masking()
    for seed in range(20):
        assert (masking.mask(np.array([1, 9, 2]), None, (seed,))[1] != -100).tolist() == [False, True, False]
        inputs, labels = masking.mask(np.array([1, 2, 0]), None, (seed,))
        assert inputs.tolist() == [1, 2, 0] and (labels == -100).all()


# ------------------------------------------------------------------------------------------ on what masks depend


class Samples(list):
    epoch = None

    def set_epoch(self, epoch):
        self.epoch = epoch

    def compute_lengths(self):
        return [len(sample["input_ids"]) for sample in self]


def make_samples(num: int = 30) -> Samples:
    generator = np.random.default_rng(5)
    return Samples({"input_ids": generator.integers(5, 40, 20)} for _ in range(num))


def list_labels(samples) -> list[list[int]]:
    return [sample["labels"].tolist() for sample in samples]


def read_all(dataset: MaskedSamples) -> list[list[int]]:
    return list_labels(dataset[index] for index in range(len(dataset)))


def test_masks_of_training_depend_on_seed_epoch_and_number_alone():
    first = MaskedSamples(make_samples(), make_masking(), seed=3)
    labels = read_all(first)
    torch.manual_seed(9)
    np.random.seed(9)
    assert [first[index]["labels"].tolist() for index in reversed(range(30))] == labels[::-1]
    assert read_all(MaskedSamples(make_samples(), make_masking(), seed=3)) == labels
    assert read_all(MaskedSamples(make_samples(), make_masking(), seed=4)) != labels
    first.set_epoch(1)
    other_epoch = read_all(first)
    assert sum(a == b for a, b in zip(labels, other_epoch, strict=True)) <= 2
    first.set_epoch(0)
    assert read_all(first) == labels


def test_masks_of_evaluation_are_always_the_same():
    dataset = MaskedSamples(make_samples(), make_masking(), seed=None)
    labels = read_all(dataset)
    dataset.set_epoch(5)
    assert read_all(dataset) == labels
    assert labels != read_all(MaskedSamples(make_samples(), make_masking(), seed=0))
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
    dataset = MaskedSamples(make_samples(), make_masking(), seed=3)
    callback, state = AnnounceEpoch(dataset.set_epoch), TrainerState()
    for epoch in range(40):
        # what the Trainer has after the last step of the epoch before, and after a stop within this one
        for state.epoch in ((epoch - 1) + steps_an_epoch / steps_an_epoch, epoch + 1 / steps_an_epoch):
            callback.on_epoch_begin(None, state, TrainerControl())
            assert int(dataset._epoch) == epoch


# -------------------------------------------------------------------------------------------------- of a tokenizer


def test_ids_of_a_tokenizer():
    tokenizer = train_word_tokenizer(["a b <unk> c"], 20, for_masking=True)
    masking = Masking.for_tokenizer(tokenizer, probability=0.3)
    assert masking.mask_token_id == tokenizer.mask_token_id == 4 and masking.probability == 0.3
    assert masking.kept_ids.tolist() == [0, 1, 2, 4]  # not <unk>, which is a word of the text
    assert masking.ordinary_ids.tolist() == [5, 6, 7]


def test_a_tokenizer_without_a_mask_token_is_refused():
    tokenizer = train_bpe_tokenizer(["a b"], 270, for_translation=False)
    with pytest.raises(InputError, match=r"no mask token.*--tokenizer_name"):
        Masking.for_tokenizer(tokenizer)
