"""What a v0 costs: the first step, the steps while it decays, the steps afterwards, its memory, and the length that is measured."""

import time

import torch
from torch import nn

from benchmarks.measuring import BYTES, Conditions, Row, measure_memory, measure_pairs
from benchmarks.tasks import make_gpt2, make_random_sequences
from hf_v0init import attach_v0

DECAY_STEPS = 10_000  # of v0s that are watched while they decay
NUM_STEPS = 8  # of the memory's row, of which two decay


def _stack(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _describe(model: nn.Module) -> str:
    count, tensors = sum(p.numel() for p in model.parameters()), len(list(model.parameters()))
    return f"{count / 1e6:.1f}M elements in {tensors} tensors"


class ManyTensors(nn.Module):
    """A thousand small matrices, where what is done once per tensor is all there is."""

    def __init__(self, num: int = 1000) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.matrices = nn.ParameterList([nn.Parameter(torch.randn(32, 32) / 32**0.5) for _ in range(num)])

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sum of the squares of 64 rows through each matrix."""
        return sum((x @ matrix).square().mean() for matrix in self.matrices)


def _measure_first_step(
    model: nn.Module, compute_loss, options: dict, num_pairs: int, with_draw: bool = False
) -> list[float]:
    matrices = [p for p in model.parameters() if p.dim() > 1]

    def step(with_v0: bool) -> float:
        """Processor seconds of forward, backward and step of a new AdamW."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        if with_v0:
            attach_v0(optimizer, model, max_steps=10_000, **options)
        begin = time.process_time()
        compute_loss().backward()
        if with_draw and not with_v0:
            with torch.no_grad():
                _ = [torch.empty_like(p).normal_() for p in matrices]
        optimizer.step()
        taken = time.process_time() - begin
        optimizer.zero_grad()
        return taken

    return measure_pairs(lambda: step(True), lambda: step(False), num_pairs)


def measure_first_steps(conditions: Conditions) -> list[Row]:
    """A run's first step with v0, beside the stock run's first step (and, for a random v0, a draw of as many numbers by torch)."""
    num_pairs = conditions.choose(9, 25)
    large, many = make_gpt2(4, 256), ManyTensors()
    batch, x = _stack(make_random_sequences(8)), torch.randn(64, 32)
    linear = {"v0_decay_steps": DECAY_STEPS}
    cases = [
        ("first step, linear", large, lambda: large(**batch).loss, linear, 1.03, False),
        (
            "first step, beta2",
            large,
            lambda: large(**batch).loss,
            {"v0_init": "first_gradient", "v0_scale": 1.0},
            1.03,
            False,
        ),
        (
            "first step, random",
            large,
            lambda: large(**batch).loss,
            {"v0_init": "random", "v0_scale": 100.0},
            1.03,
            True,
        ),
        ("first step, 1,000 tensors", many, lambda: many(x), linear, 1.15, False),
    ]
    return [
        Row(
            name,
            f"a run's first step with {' '.join(f'{k}={v}' for k, v in options.items())}, {_describe(model)}",
            "the stock first step" + (" and a draw of as many numbers with `normal_`" if with_draw else ""),
            _measure_first_step(model, compute_loss, options, num_pairs, with_draw),
            aim=aim,
        )
        for name, model, compute_loss, options, aim, with_draw in cases
    ]


def _make_step(model: nn.Module, compute_loss, with_v0: bool, decay_steps: int, num_made: int):
    """Return a function that makes a whole training step of an optimizer that has made `num_made` already."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
    if with_v0:
        attach_v0(optimizer, model, v0_decay_steps=decay_steps)

    def step() -> float:
        begin = time.process_time()
        compute_loss().backward()
        optimizer.step()
        taken = time.process_time() - begin
        optimizer.zero_grad()
        return taken

    for _ in range(num_made):
        step()
    return step


def measure_later_steps(conditions: Conditions) -> list[Row]:
    """Whole steps while v0 decays and after it, beside those of an optimizer that never had one."""
    num_pairs = conditions.choose(15, 50)
    large, many = make_gpt2(4, 256), ManyTensors()
    batch, x = _stack(make_random_sequences(8)), torch.randn(64, 32)
    rows = []
    for name, model, compute_loss, decay_steps, num_made, aim in (
        ("steps while v0 decays", large, lambda: large(**batch).loss, DECAY_STEPS, 8, 1.03),
        ("the same, 1,000 tensors", many, lambda: many(x), DECAY_STEPS, 8, 1.15),
        ("later steps", large, lambda: large(**batch).loss, 7, 9, 1.03),
    ):
        steps = [_make_step(model, compute_loss, with_v0, decay_steps, num_made) for with_v0 in (True, False)]
        ratios = measure_pairs(*steps, num_pairs)
        rows.append(
            Row(
                name,
                f"forward, backward and step with a linear decay, {_describe(model)}",
                "the stock step",
                ratios,
                aim=aim,
            )
        )
    return rows


def measure_decay_memory(conditions: Conditions) -> Row:
    """The first steps of a linear decay, beside as many of the stock optimizer."""
    model, batch_size = make_gpt2(), 8
    rows = make_random_sequences(NUM_STEPS * batch_size)
    batches = [_stack(rows[k::NUM_STEPS]) for k in range(NUM_STEPS)]

    def train(with_v0: bool):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        hook = attach_v0(optimizer, model, v0_decay_steps=DECAY_STEPS) if with_v0 else None
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer, hook

    train(False)  # what is made once
    ours, theirs = measure_memory(lambda: train(True)), measure_memory(lambda: train(False))
    elements = sum(p.numel() for p in model.parameters())
    return Row(
        "memory while v0 decays",
        f"peak of {NUM_STEPS} steps, {ours.peak / 2**20:.0f} MiB, {_describe(model)}",
        "peak of as many stock steps",
        [ours.peak / theirs.peak],
        aim=1.01,
        clock=BYTES,
        note="all that torch allocates; what is kept is a vector of rows and one of columns for each matrix",
        figures={"bytes_per_element_kept": (ours.left - theirs.left) / elements},
    )


def measure_length(conditions: Conditions) -> Row:
    """The first step with a measured length, beside the stock first step and as many forwards as the measurement counts."""
    model, batch = make_gpt2(4, 256), _stack(make_random_sequences(8))
    counts: list[int] = []

    def ours() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        hook = attach_v0(optimizer, model, v0_decay_steps="auto", max_steps=10_000, loss_fn=lambda: model(**batch).loss)
        before = [p.detach().clone() for p in model.parameters()]
        begin = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        taken = time.process_time() - begin
        counts.append(hook.length.num_forwards)
        optimizer.zero_grad()
        with torch.no_grad():
            for parameter, old in zip(model.parameters(), before, strict=True):
                parameter.copy_(old)
        return taken

    def stock() -> float:
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        begin = time.process_time()
        model(**batch).loss.backward()
        optimizer.step()
        with torch.no_grad():
            for _ in range(counts[-1]):
                model(**batch)
        taken = time.process_time() - begin
        optimizer.zero_grad()
        return taken

    ratios = measure_pairs(ours, stock, conditions.choose(5, 15))
    return Row(
        "first step, measured length",
        f"a run's first step with v0_decay_steps=auto, {_describe(model)}",
        "the stock first step and as many forwards as were counted",
        ratios,
        aim=1.10,
        note="what is above 1 puts weights where they are measured and back",
        figures={"forwards": float(counts[-1])},
    )
