"""Generators, metric stores and counters that an estimation must leave as they were, also when it fails halfway."""

import collections
import copy
import random

import numpy as np
import pytest
import torch
from torch import nn

from hf_v0init.state_guard import preserve_attributes, preserve_generators


class Failure(Exception):
    pass


def run_in(context, change, fails: bool) -> None:
    """Make the change inside, and leave with an exception or without."""
    if not fails:
        with context:
            change()
        return
    with pytest.raises(Failure), context:
        change()
        raise Failure


class Source:
    """A data set or collator with generators of its own."""

    def __init__(self):
        self.torch, self.python = torch.Generator().manual_seed(1), random.Random(2)
        self.numpy, self.legacy = np.random.default_rng(3), np.random.RandomState(4)
        self.inner = None

    def draw(self) -> list[float]:
        own = [
            float(torch.rand(1, generator=self.torch)),
            self.python.random(),
            self.numpy.random(),
            self.legacy.rand(),
        ]
        return own + (self.inner.draw() if self.inner is not None else [])


@pytest.mark.parametrize("fails", [False, True])
def test_private_generators_are_restored(fails):
    source = Source()
    source.inner = Source()
    source.inner.inner = source  # a cycle ends
    source.inner.inner = None
    source.draw()
    twin = copy.deepcopy(source)
    run_in(preserve_generators(source), lambda: [source.draw() for _ in range(3)], fails)
    assert [source.draw() for _ in range(3)] == [twin.draw() for _ in range(3)]


@pytest.mark.parametrize("fails", [False, True])
def test_metric_stores_and_counters_are_restored_in_place(fails):
    class Owner:
        def __init__(self):
            self.seen, self.name, self.nothing = 3, "a", None
            self.metrics = {"train": collections.defaultdict(list, {"loss": [1.0]}), "eval": {}}
            self.logs, self.last, self.ids = [1, 2], collections.deque([5], maxlen=2), {7}
            self.model = nn.Linear(2, 2)

    owner, expected = Owner(), Owner()
    places = {name: id(value) for name, value in vars(owner).items() if not isinstance(value, (int, str, type(None)))}

    def change():
        owner.seen, owner.name, owner.nothing = 9, "b", 1.0
        owner.metrics["train"]["loss"].append(2.0)
        owner.metrics["train"]["more"].append(2.0)
        owner.logs.append(3)
        owner.last.extend([6, 7])
        owner.ids.add(8)

    run_in(preserve_attributes(owner), change, fails)
    for name, place in places.items():
        assert id(getattr(owner, name)) == place, name
    for name in ("seen", "name", "nothing", "metrics", "logs", "last", "ids"):
        assert getattr(owner, name) == getattr(expected, name), name
    owner.metrics["train"]["again"].append(1)  # still a defaultdict
    assert owner.last.maxlen == 2
