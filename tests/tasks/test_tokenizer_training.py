"""Trained tokenizers: exact round trips, the special tokens, the vocabulary, saving and loading."""

import pytest
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MarianConfig

from hf_v0init.errors import InputError
from hf_v0init.tasks.tokenizer_training import (
    SPECIAL_TOKENS,
    train_bpe_tokenizer,
    train_on_main_process,
    train_word_tokenizer,
)

CORPUS = [
    "Zwei Männer stehen am Herd und bereiten Essen zu.",
    "Two men are at the stove preparing food.",
    "Ein kleines Mädchen klettert in ein Spielhaus aus Holz.",
    "A little girl climbing into a wooden playhouse.",
] * 5

TEXTS = [
    *CORPUS[:4],
    "Ärger über Straßenschilder, „Anführung“ – naïve cafés …",
    "",
    " ",
    "  two before, two after  ",
    "tab\there\nline\r\n\n\nend",
    "İstanbul ß ẞ ﬁ e\u0301 \u200b\ufeff\u00a0\u3000",
    "日本語と中文, русский, العربية, हिन्दी",
    "👩‍👩‍👧‍👦 😀 \U0001f1e9\U0001f1ea",
    "don't , it . is ! spaced ?",
    "▁meta Ġbyte Ċ level",
    "\x00\x01\x7f",
    "x" * 500,
]


@pytest.fixture(scope="module", params=[False, True], ids=["running_text", "translation"])
def tokenizer(request):
    trained = train_bpe_tokenizer(iter(CORPUS), 350, for_translation=request.param)
    trained.for_translation = request.param
    return trained


def test_special_tokens_and_vocabulary_size(tokenizer):
    assert tokenizer.convert_ids_to_tokens([0, 1, 2, 3]) == list(SPECIAL_TOKENS)
    named = (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.unk_token_id)
    assert named == (0, 1, 2, 3) and sorted(tokenizer.get_vocab().values()) == list(range(350))
    assert all(3 not in tokenizer(text)["input_ids"] for text in TEXTS)
    assert tokenizer.model_input_names == ["input_ids", "attention_mask"]


def test_only_translation_appends_the_end_and_treats_the_first_word_like_others(tokenizer):
    ids = tokenizer("men are men")["input_ids"]
    if tokenizer.for_translation:
        assert ids[-1] == tokenizer.eos_token_id and ids.count(tokenizer.eos_token_id) == 1
        words = tokenizer.convert_ids_to_tokens(ids)
        assert words == ["Ġmen", "Ġare", "Ġmen", "</s>"]
        assert tokenizer(text_target="men")["input_ids"] == tokenizer("men")["input_ids"]
    else:
        assert tokenizer.eos_token_id not in ids
        assert tokenizer(" men")["input_ids"] + tokenizer(" are")["input_ids"] == tokenizer(" men are")["input_ids"]


@pytest.mark.parametrize("config", [None, GPT2Config(), MarianConfig(), LlamaConfig()], ids=lambda c: type(c).__name__)
def test_a_saved_tokenizer_loads_as_it_was_beside_any_configuration(tokenizer, tmp_path, config):
    """And decoding gives the text back."""
    tokenizer.save_pretrained(tmp_path)
    if config is not None:
        config.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for text in TEXTS:
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        for each in (loaded, tokenizer):
            assert each.decode(each(text)["input_ids"], skip_special_tokens=True) == text
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)


def test_training_is_deterministic():
    vocabularies = [train_bpe_tokenizer(CORPUS, 350, for_translation=True).get_vocab() for _ in range(2)]
    assert vocabularies[0] == vocabularies[1]
    assert train_word_tokenizer(CORPUS, 20).get_vocab() == train_word_tokenizer(reversed(CORPUS), 20).get_vocab()


def test_the_word_vocabulary_is_the_most_frequent_words(tmp_path):
    tokenizer = train_on_main_process(lambda: train_word_tokenizer(["b b a <unk> c", " a b </s> N\n"], 7))
    tokenizer.save_pretrained(tmp_path)
    GPT2Config().save_pretrained(tmp_path)
    for each in (tokenizer, AutoTokenizer.from_pretrained(tmp_path)):
        assert each.get_vocab() == {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3, "b": 4, "a": 5, "N": 6}
        assert each("a <unk> c  b ").input_ids == [5, 3, 3, 4, 2]
        assert each("").input_ids == [2]
        assert each.decode(each("a b N").input_ids, skip_special_tokens=True) == "a b N"


def test_bytes_are_always_there_and_a_vocabulary_without_words_is_refused():
    assert len(train_bpe_tokenizer(CORPUS, 100, for_translation=False)) == 260
    with pytest.raises(InputError, match="vocabulary of 4 "):
        train_on_main_process(lambda: train_word_tokenizer(CORPUS, 4))
