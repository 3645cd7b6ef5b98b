"""Blocks and lines of a masked language model: every token once, in the tokenizer's frame, with its words."""

import datasets
import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hf_v0init.errors import InputError
from hf_v0init.tasks.language_modeling.masking import (
    Frame,
    FramedTexts,
    require_words,
)
from hf_v0init.tasks.language_modeling.samples import find_word_starts, tokenize_texts
from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer, train_word_tokenizer

TEXTS = ["the cat sat", "", "on the very big mat , said the dog", "   ", "yes"]
FRAME = Frame([1], [2])


@pytest.fixture(scope="module")
def words():
    return train_word_tokenizer(TEXTS, 40, for_masking=True)


@pytest.fixture(scope="module")
def pieces():
    """WordPiece, as BERT has it, so small a vocabulary that most words are of several pieces."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokenizer.train_from_iterator(TEXTS, trainers.WordPieceTrainer(vocab_size=40, special_tokens=special))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = dict(zip(("pad_token", "unk_token", "cls_token", "sep_token", "mask_token"), special, strict=True))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def tokenize(tokenizer, texts=TEXTS, separator=(), **options):
    rows = datasets.Dataset.from_dict({"text": texts})
    return tokenize_texts(rows, tokenizer, "text", separator=list(separator), **options)


def list_samples(dataset) -> list[dict]:
    return [dataset[index] for index in range(len(dataset))]


@pytest.mark.parametrize("length", [3, 4, 5, 9, 17, 100])
def test_blocks_hold_every_token_once_in_order(words, length):
    rows = tokenize(words, separator=[2])
    stream = [
        token for text in TEXTS if text.strip() for token in words(text, add_special_tokens=False)["input_ids"] + [2]
    ]
    blocks = FramedTexts(rows, length, FRAME, False)
    samples = [sample["input_ids"].tolist() for sample in list_samples(blocks)]
    assert [token for sample in samples for token in sample[1:-1]] == stream
    assert all(sample[0] == 1 and sample[-1] == 2 for sample in samples)
    assert all(len(sample) == length for sample in samples[:-1]) and len(samples[-1]) > 2
    assert blocks.compute_lengths() == [len(sample) for sample in samples]
    assert len(FramedTexts(rows, length, FRAME, False, max_samples=1)) == 1


@pytest.mark.parametrize("length", [4, 7, 50])
def test_lines_are_samples_cut_at_the_length_and_empty_ones_left_out(words, length):
    lines = FramedTexts(tokenize(words), length, FRAME, True)
    expected = [[*words(text)["input_ids"][:-1][: length - 1], 2] for text in TEXTS if text.strip()]
    assert [sample["input_ids"].tolist() for sample in list_samples(lines)] == expected
    assert lines.compute_lengths() == [len(ids) for ids in expected]
    assert len(FramedTexts(tokenize(words), length, FRAME, True, max_samples=2)) == 2


def count_words_by_spelling(tokenizer, ids) -> list[int]:
    """The number of the word of each piece: a piece that does not begin with ## begins one."""
    words, word = [], -1
    for piece in tokenizer.convert_ids_to_tokens(ids):
        word += not piece.startswith("##")
        words.append(word)
    return words


@pytest.mark.parametrize("line_by_line", [False, True])
@pytest.mark.parametrize("length", [4, 6, 11, 60])
def test_words_begin_where_pieces_say(pieces, line_by_line, length):
    rows = tokenize(pieces, separator=[] if line_by_line else [3], mark_words=True)
    num_continued = 0
    for sample in list_samples(FramedTexts(rows, length, Frame.of_tokenizer(pieces), line_by_line)):
        assert sample["word_starts"].dtype == bool and len(sample["word_starts"]) == len(sample["input_ids"])
        starts = sample["word_starts"].tolist()
        expected = count_words_by_spelling(pieces, sample["input_ids"])
        # a word that the cut went through begins anew, behind [CLS]
        is_cut = len(expected) > 1 and expected[1] == expected[0]
        assert starts[0] and starts[1] and starts[-1]
        assert (np.cumsum(starts) - 1).tolist() == [number + (is_cut and i > 0) for i, number in enumerate(expected)]
        num_continued += starts.count(False)
    assert num_continued > 0  # there are words of several pieces


def test_frames_and_words_of_tokenizers(words, pieces):
    bpe, masking_bpe = (
        train_bpe_tokenizer(TEXTS, 280, for_translation=False, for_masking=mask) for mask in (False, True)
    )
    frames = [Frame.of_tokenizer(tokenizer) for tokenizer in (words, pieces, bpe, masking_bpe)]
    assert frames == [Frame([1], [2]), Frame([2], [3]), Frame([], []), Frame([1], [2])]
    assert find_word_starts([0, 0, 1, None, None, 2, 2]) == [True, False, True, True, True, True, False]
    require_words(masking_bpe)
    undivided = Tokenizer(models.WordLevel({"a": 0, "[UNK]": 1}, unk_token="[UNK]"))
    undivided.pre_tokenizer = pre_tokenizers.Split("x", "isolated")
    with pytest.raises(InputError, match=r"whole line for one word.*--whole_word_mask"):
        require_words(PreTrainedTokenizerFast(tokenizer_object=undivided, unk_token="[UNK]"))


def test_text_without_tokens_is_refused(words):
    for line_by_line in (False, True):
        with pytest.raises(InputError, match="no tokens"):
            FramedTexts(tokenize(words, ["", "  "]), 10, FRAME, line_by_line)
