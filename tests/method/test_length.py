"""The rule that turns a trust radius into a warmup: its pieces, its edges, and what it says about runs that were made."""

import math

import pytest

from hf_v0init import InputError
from hf_v0init.method.length import (
    LONGEST_FRACTION,
    SHORTEST_FRACTION,
    STEPS_PER_X,
    compute_largest_rate_with_room,
    compute_relative_rate,
    compute_warmup_length,
    describe_bound,
)

D50 = 5.9e-4  # the small Multi30k model's, seed 1


def test_the_length_grows_with_the_rate_up_to_a_share_of_the_run():
    assert compute_relative_rate(1.5e-3, D50) == pytest.approx(2.542, abs=1e-3)
    lengths = [compute_warmup_length(compute_relative_rate(rate, D50), 600) for rate in (3e-4, 7.5e-4, 1.5e-3, 3e-3)]
    assert lengths == [200, round(STEPS_PER_X * 7.5e-4 / D50), 400, 400]
    assert round(STEPS_PER_X * 3e-4 / D50) < 200 < lengths[1] < 400
    assert compute_warmup_length(10.0, 6000) == round(10.0 * STEPS_PER_X)  # a longer run has room


@pytest.mark.parametrize("num_steps", [1, 2, 3, 600, 10**6])
def test_the_length_leaves_a_rest_of_the_run(num_steps):
    lengths = [compute_warmup_length(x, num_steps) for x in (0.0, 0.3, 1.0, 10.0, 1e9)]
    assert lengths == sorted(lengths) and all(1 <= length <= max(1, LONGEST_FRACTION * num_steps) for length in lengths)
    assert lengths[0] >= SHORTEST_FRACTION * num_steps - 0.5 or num_steps == 1


@pytest.mark.parametrize("num_steps", [10, 600, 20_000])
def test_the_largest_rate_with_room_is_where_the_length_is_cut(num_steps):
    with_room = compute_largest_rate_with_room(D50, num_steps)
    for factor, is_cut in ((0.99, False), (1.2, True)):
        x = compute_relative_rate(factor * with_room, D50)
        assert ("cut from" in describe_bound(x, compute_warmup_length(x, num_steps))) == is_cut


@pytest.mark.parametrize(
    "compute",
    [
        lambda: compute_relative_rate(-1e-3, D50),
        lambda: compute_relative_rate(math.nan, D50),
        lambda: compute_relative_rate(1e-3, 0.0),
        lambda: compute_warmup_length(-1.0, 600),
        lambda: compute_warmup_length(math.inf, 600),
        lambda: compute_warmup_length(1.0, 0),
        lambda: compute_largest_rate_with_room(-1.0, 10),
        lambda: compute_largest_rate_with_room(D50, 0),
    ],
)
def test_bad_input_is_refused(compute):
    with pytest.raises(InputError, match="must be a"):
        compute()
