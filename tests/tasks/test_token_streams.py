"""Contiguous streams: which tokens a segment and a batch hold."""

import itertools

import datasets
import numpy as np
import pytest
import torch
from conftest import VOCAB

from hf_v0init.errors import InputError
from hf_v0init.tasks.language_modeling.streams import (
    TokenStreams,
    draw_boundaries,
)

BOS = 0


def make_rows(num_tokens: int, seed: int = 1) -> datasets.Dataset:
    """Rows of uneven length, one of them empty, of tokens 1, 2, ... in a random order that is no order of numbers."""
    tokens = torch.randint(1, VOCAB, (num_tokens,), generator=torch.Generator().manual_seed(seed)).tolist()
    cuts = [0, *range(5, num_tokens, 7), num_tokens]
    rows = [tokens[a:b] for a, b in itertools.pairwise(cuts)]
    features = datasets.Features({"input_ids": datasets.List(datasets.Value("int32"))})
    return datasets.Dataset.from_dict({"input_ids": [*rows[:2], [], *rows[2:]]}, features=features)


def read_text(rows: datasets.Dataset) -> list[int]:
    return [BOS, *(token for row in rows["input_ids"] for token in row)]


def make_streams(num_tokens=101, num_streams=4, segment_length=5, **options) -> TokenStreams:
    return TokenStreams(make_rows(num_tokens), num_streams, segment_length, [BOS], **options)


# ------------------------------------------------------------------------------------------------------ the data

CASES = [
    (num_tokens, num_streams, segment_length, False)
    for num_tokens in (12, 40, 41, 43, 101)
    for num_streams in (1, 3, 4)
    for segment_length in (1, 5, 200)
] + [(1003, num_streams, segment_length, True) for num_streams in (1, 4) for segment_length in (20, 33, 2000)]


@pytest.mark.parametrize(("num_tokens", "num_streams", "segment_length", "varies"), CASES)
def test_every_token_is_a_target_exactly_once_and_batches_continue_each_other(
    num_tokens, num_streams, segment_length, varies
):
    rows = make_rows(num_tokens)
    text = read_text(rows)
    streams = TokenStreams(rows, num_streams, segment_length, [BOS], varies=varies, seed=5)
    # the text itself carries its position, so that a target can be told from an equal word elsewhere
    streams.tokens = np.arange(len(text), dtype=np.int32)
    for epoch in (0, 1, 7):
        streams.set_epoch(epoch)
        seen, last = [], [None] * num_streams
        assert len(streams) % num_streams == 0
        for index in range(len(streams)):
            segment, stream = divmod(index, num_streams)
            item = streams[index]
            inputs, targets = item["input_ids"].tolist(), item["shift_labels"].tolist()
            assert item["begins_stream"] == (segment == 0)
            assert targets == [position + 1 for position in inputs] and len(inputs) >= 1
            assert last[stream] is None or inputs[0] == last[stream]
            last[stream] = targets[-1]
            if not varies:
                assert len(inputs) <= segment_length + 1
            seen += targets
        assert sorted(seen) == list(range(1, num_tokens + 1))
    lengths = streams._lengths
    assert lengths.max() - lengths.min() <= 1 and lengths.sum() == num_tokens == streams.num_targets


def test_the_first_token_is_not_doubled_and_segments_can_be_limited():
    rows = make_rows(60)
    with_bos = rows.map(lambda row, index: {"input_ids": [BOS, *row["input_ids"]] if index == 0 else row["input_ids"]}, with_indices=True)  # fmt: skip
    assert TokenStreams(with_bos, 2, 5, [BOS]).tokens.tolist() == read_text(rows)
    assert TokenStreams(rows, 2, 5, []).num_targets == 59
    limited = TokenStreams(rows, 2, 5, [BOS], max_segments=6)
    assert limited.num_targets == 30 and len(limited) == 6


def test_drawn_lengths_follow_the_distribution_and_the_seed():
    num_segments, lengths = [], []
    for epoch in range(40):
        boundaries = draw_boundaries(46_479, 70, (3, epoch))
        assert boundaries[0] == 0 and boundaries[-1] == 46_479
        lengths.append(np.diff(boundaries))
        assert lengths[-1].min() >= 4
        num_segments.append(len(lengths[-1]))
    assert set(num_segments) == {round(46_479 / (70 * 0.975))}
    joined = np.concatenate(lengths)
    assert joined.mean() == pytest.approx(70 * 0.975, rel=1e-3)
    assert (joined < 52).mean() == pytest.approx(0.05, abs=0.005)
    assert joined[joined > 52].std() == pytest.approx(5, rel=0.05)
    assert (draw_boundaries(46_479, 70, (3, 2)) == draw_boundaries(46_479, 70, (3, 2))).all()
    assert len(lengths[0]) == len(lengths[1]) and (lengths[0] != lengths[1]).any()
    assert (draw_boundaries(46_479, 70, (4, 2)) != draw_boundaries(46_479, 70, (3, 2))).any()


@pytest.mark.parametrize(
    ("options", "parts"),
    [
        ({"num_tokens": 3, "num_streams": 4}, ["3 tokens", "4 streams", "lower the batch size"]),
        ({"varies": True}, ["5 tokens", "at least 20"]),
    ],
)
def test_texts_that_cannot_be_cut_are_refused(options, parts):
    with pytest.raises(InputError) as caught:
        make_streams(**options)
    assert all(part in str(caught.value) for part in parts) and "\n" not in str(caught.value)
