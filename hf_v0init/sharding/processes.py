"""How the processes of a run agree: how many there are, what each of them has, and that all fail if one does."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist

from ..errors import InputError


def get_rank_and_world_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; (0, 1) without a process group."""
    joined = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if joined else (0, 1)


def gather_objects(mine: Any) -> list:
    """Return what every process has, by rank."""
    world_size = get_rank_and_world_size()[1]
    if world_size == 1:
        return [mine]
    everyone: list = [None] * world_size
    dist.all_gather_object(everyone, mine)
    return everyone


def raise_together(error: BaseException | None) -> None:
    """Raise on every process if any process failed, so that none waits for ever for the others.

    The failing process raises its own exception, the others the same message as `InputError` (or a `RuntimeError` where
    it was no input error).
    """
    if getattr(error, "raised_alone", False):  # the others wait elsewhere, see `estimation.trust_radius`
        raise error
    mine = None if error is None else (isinstance(error, InputError), f"{error}" or type(error).__name__)
    everyone = gather_objects(mine)
    if error is not None:
        raise error
    for rank, theirs in enumerate(everyone):
        if theirs is not None:
            is_input_error, message = theirs
            raise (InputError if is_input_error else RuntimeError)(f"process {rank}: {message}")


@contextlib.contextmanager
def fail_together() -> Iterator[None]:
    """Raise an exception that leaves this context on any process on every process; see `raise_together`. All must enter it."""
    error = None
    try:
        yield
    except Exception as exception:
        error = exception
    raise_together(error)


def add_over_processes(tensors: list[torch.Tensor]) -> None:
    """Replace each tensor by its sum over all processes, in place; all processes must call this with tensors of the same shapes."""
    if get_rank_and_world_size()[1] > 1:
        for reduction in [dist.all_reduce(tensor, async_op=True) for tensor in tensors]:
            reduction.wait()
