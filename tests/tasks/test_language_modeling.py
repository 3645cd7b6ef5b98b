"""Windows of a token stream, prompts with completions, and their batches."""

import datasets
import pytest

from hf_v0init.errors import InputError
from hf_v0init.tasks.language_modeling.samples import (
    StreamedTokenWindows,
    TokenWindows,
    find_first_token,
    tokenize_completions,
    tokenize_texts,
)
from hf_v0init.tasks.tokenizer_training import train_bpe_tokenizer, train_word_tokenizer

ROWS = [[5, 6, 7], [], [8], [9, 10, 11, 12, 13, 14, 15], [16, 17]]
STREAM = [token for row in ROWS for token in row]


def make_rows(rows=ROWS):
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": rows}, features=features)


def count_targets(samples) -> dict[int, int]:
    counts: dict[int, int] = {}
    for sample in samples:
        for token in sample["labels"][1:]:
            counts[token] = counts.get(token, 0) + 1
    return counts


@pytest.mark.parametrize("first_token", [[], [1]], ids=["without_bos", "with_bos"])
@pytest.mark.parametrize("length", [2, 3, 4, 5, 13, 14, 15, 40])
@pytest.mark.parametrize("streamed", [False, True])
def test_every_token_is_a_target_exactly_once_in_order(length, first_token, streamed):
    if streamed:
        windows = list(StreamedTokenWindows(make_rows(), length, first_token))
    else:
        indexed = TokenWindows(make_rows(), length, first_token)
        windows = [indexed[i] for i in range(len(indexed))]
    stream = first_token + STREAM
    assert count_targets(windows) == dict.fromkeys(stream[1:], 1)
    assert windows[0]["input_ids"] == stream[:length]
    rejoined = windows[0]["input_ids"] + [token for window in windows[1:] for token in window["input_ids"][1:]]
    assert rejoined == stream
    assert all(len(window["input_ids"]) == length for window in windows[:-1])
    assert all(window["input_ids"] == window["labels"] for window in windows)


def test_windows_follow_a_selection_and_a_first_token_that_is_there_is_not_doubled():
    assert TokenWindows(make_rows().select([4, 0]), 10, [])[0]["input_ids"] == [16, 17, 5, 6, 7]
    windows = TokenWindows(make_rows([[1, 5], [6]]), 10, [1])
    assert [windows[0]["input_ids"]] == [[1, 5, 6]]
    assert [w["input_ids"] for w in StreamedTokenWindows(make_rows([[], [1, 5], [6]]), 10, [1])] == [[1, 5, 6]]


def test_limits_and_bounds():
    windows = TokenWindows(make_rows(), 4, [], max_windows=2)
    assert len(windows) == 2 and len(list(StreamedTokenWindows(make_rows(), 4, [], max_windows=2))) == 2
    for rows in ([], [[]], [[5]]):
        with pytest.raises(InputError, match="no tokens"):
            TokenWindows(make_rows(rows), 4, [])
    assert list(StreamedTokenWindows(make_rows([[5]]), 4, [])) == []
    # a stream is read again in every epoch
    stream = StreamedTokenWindows(make_rows().to_iterable_dataset(), 4, [1])
    assert list(stream) == list(stream) and len(list(stream)) == 5


# -------------------------------------------------------------------------------------------------- tokenizing


@pytest.fixture(scope="module")
def bpe():
    return train_bpe_tokenizer(["the cat sat on the mat", "a dog"] * 3, 280, for_translation=False)


@pytest.fixture(scope="module")
def words():
    return train_word_tokenizer(["ask me now", "tell you so"], 20)


def complete(tokenizer, prompt, completion, max_length=100, prefix=""):
    rows = datasets.Dataset.from_dict({"p": [prompt], "c": [completion]}).to_iterable_dataset()
    samples = tokenize_completions(rows, tokenizer, "p", "c", max_length=max_length, prompt_prefix=prefix)
    return next(iter(samples))


def test_the_loss_is_on_the_completion_and_its_end(words):
    ids = words.get_vocab()
    sample = complete(words, "me now", "you so", prefix="ask ")
    assert sample["input_ids"] == [ids[w] for w in ("ask", "me", "now", "you", "so", "</s>")]
    assert sample["labels"] == [-100] * 3 + [ids[w] for w in ("you", "so", "</s>")]


def test_too_long_samples_lose_the_beginning_of_the_prompt_then_the_end(words):
    ids = words.get_vocab()
    assert complete(words, "ask me now", "you so", max_length=5)["input_ids"] == [
        ids[w] for w in ("me", "now", "you", "so", "</s>")
    ]
    cut = complete(words, "ask me now", "tell you so", max_length=3)
    assert cut["input_ids"] == [ids[w] for w in ("now", "tell", "you")]
    assert cut["labels"] == [-100, ids["tell"], ids["you"]]


def test_an_empty_prompt_still_forecasts_the_first_token(words):
    ids = words.get_vocab()
    sample = complete(words, "", "you")
    assert sample["input_ids"] == [ids["<s>"], ids["you"], ids["</s>"]]
    assert sample["labels"] == [-100, ids["you"], ids["</s>"]]
    assert find_first_token(words) == [ids["<s>"]]


@pytest.mark.parametrize("value", [None, 3])
def test_rows_without_text_are_an_input_error(bpe, value):
    rows = datasets.Dataset.from_dict({"text": [value]})
    with pytest.raises(InputError, match="column 'text'"):
        tokenize_texts(rows, bpe, "text")
