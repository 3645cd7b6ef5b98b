"""Leaves the user's run as it was: whatever a look at the gradients switches for a moment is put back."""

import collections
import contextlib
import copy
import functools
import random
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn


def read_rng_states() -> dict:
    """Read the states of Python's, NumPy's, torch's CPU and every accelerator's random number generators."""
    states = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    if torch.cuda.is_available() and torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state_all()
    if hasattr(torch, "mps") and torch.backends.mps.is_available():
        states["mps"] = torch.mps.get_rng_state()
    return states


def write_rng_states(states: dict) -> None:
    """Put back what `read_rng_states` read."""
    random.setstate(states["python"])
    np.random.set_state(states["numpy"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state_all(states["cuda"])
    if "mps" in states:
        torch.mps.set_rng_state(states["mps"])


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators (all devices) with one number in [0, 2^63)."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextlib.contextmanager
def preserve_rng() -> Iterator[None]:
    """Restore all random number generator states on leaving, also when an exception passes."""
    states = read_rng_states()
    try:
        yield
    finally:
        write_rng_states(states)


_waiting: list[int] = []  # signals that came while interrupts are deferred


@contextlib.contextmanager
def defer_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait for `raise_if_interrupted`, or for the end of this context, so that it never cuts off what is being put back.

    A second Ctrl-C acts at once. Outside the main thread, which signals do not reach, nothing changes.
    """
    previous = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(previous):
        yield
        return

    def note(signum, frame) -> None:
        if _waiting:
            previous(signum, frame)
        _waiting.append(signum)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
        if _waiting:
            _waiting.clear()
            previous(signal.SIGINT, None)


def raise_if_interrupted() -> None:
    """Raise `KeyboardInterrupt` if Ctrl-C was pressed since `defer_interrupts` began."""
    if _waiting:
        _waiting.clear()
        raise KeyboardInterrupt


MAX_COPIED_BYTES = 1 << 30  # of weights that are not trained, which a forward may update (momentum encoders)


_REGISTRIES = frozenset(vars(nn.Module()))  # of every module: its parameters, buffers, hooks and mode


@contextlib.contextmanager
def preserve_attributes(*owners: Any) -> Iterator[None]:
    """Restore which attributes objects have of their own, and the values of tensors and plain containers (an EMA, logs), in place.

    Parameters, buffers and submodules of a module are no such values; `preserve_model` has them.
    """
    attributes = [(owner, dict(vars(owner))) for owner in owners]
    tensors, containers = [], []
    for _, own in attributes:
        for name, value in own.items():
            if isinstance(value, torch.Tensor):
                tensors.append((value, value.detach().clone()))
            elif (
                isinstance(value, (dict, list, set, collections.deque)) and name not in _REGISTRIES and _is_plain(value)
            ):
                containers.append((value, copy.deepcopy(value)))
    try:
        yield
    finally:
        for owner, own in attributes:
            for name in vars(owner).keys() - own.keys():
                del vars(owner)[name]
            vars(owner).update(own)
        with torch.no_grad():
            for value, saved in tensors:
                value.copy_(saved)
        for container, saved in containers:
            container.clear()
            getattr(container, "extend" if isinstance(container, (list, collections.deque)) else "update")(saved)


@contextlib.contextmanager
def preserve_model(
    model: nn.Module, other_parameters: Iterable[nn.Parameter] = (), *, copies_frozen: bool = True
) -> Iterator[None]:
    """Restore train/eval modes, buffers (also new ones, and those that were None), plain attributes of the modules, weights that are
    not trained, and gradients.

    Inside, every `grad` is None. Buffers are copied, in place where the module kept the tensor, so aliases stay
    valid; gradients are set aside, not copied. Trained weights are not touched by a backward pass and are not copied; those
    that are not trained are, up to 1 GiB of them in all.

    Args:
        other_parameters: outside the model, whose gradients are kept as well.
        copies_frozen: False for modules whose weights no forward updates.
    """
    buffers = [(module, dict(module._buffers)) for module in model.modules()]
    copies = {id(b): b.detach().clone() for _, kept in buffers for b in kept.values() if b is not None}
    frozen = [parameter for parameter in model.parameters() if not parameter.requires_grad and not parameter.is_meta]
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in frozen)
    if copies_frozen and num_bytes <= MAX_COPIED_BYTES:
        frozen_copies = [(parameter, parameter._version, parameter.detach().clone()) for parameter in frozen]
    else:
        frozen_copies = []
    gradients = [(parameter, parameter.grad) for parameter in {*model.parameters(), *other_parameters}]
    try:
        for parameter, _ in gradients:
            parameter.grad = None
        with preserve_attributes(*model.modules()):
            yield
    finally:
        with torch.no_grad():
            for module, kept in buffers:
                module._buffers.clear()
                module._buffers.update(kept)
                for buffer in kept.values():
                    if buffer is not None:
                        buffer.copy_(copies[id(buffer)])
            for parameter, version, saved in frozen_copies:
                if parameter._version != version:
                    parameter.copy_(saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextlib.contextmanager
def preserve_generators(*owners: Any) -> Iterator[None]:
    """Restore the private random number generators of objects such as a data set or a collator, up to four attributes deep."""
    undo: list[Callable[[], Any]] = []
    waiting, seen = collections.deque((owner, 0) for owner in owners), set()
    while waiting:
        owner, depth = waiting.popleft()  # the closest first, or its own attributes would be too deep
        if id(owner) in seen:
            continue
        seen.add(id(owner))
        if isinstance(owner, (torch.Generator, np.random.RandomState)):
            undo.append(functools.partial(owner.set_state, owner.get_state()))
        elif isinstance(owner, random.Random):
            undo.append(functools.partial(owner.setstate, owner.getstate()))
        elif isinstance(owner, np.random.Generator):
            undo.append(
                functools.partial(setattr, owner.bit_generator, "state", copy.deepcopy(owner.bit_generator.state))
            )
        elif depth < 4 and hasattr(owner, "__dict__") and not isinstance(owner, type):
            waiting += [(value, depth + 1) for value in vars(owner).values()]
    try:
        yield
    finally:
        for restore in undo:
            restore()


def _is_plain(value: Any, depth: int = 0) -> bool:
    """Whether a container holds nothing but numbers, text, small tensors, and containers of these."""
    if isinstance(value, torch.Tensor):
        return value.numel() <= 1024
    if isinstance(value, dict):
        return depth < 6 and all(_is_plain(inner, depth + 1) for inner in value.values())
    if isinstance(value, (list, tuple, set, collections.deque)):
        return depth < 6 and len(value) < 100_000 and all(_is_plain(inner, depth + 1) for inner in value)
    return isinstance(value, (int, float, str, type(None)))
