"""v0 at the first step: what it adds to the step that writes it, the memory of measuring, and the steps afterwards."""

import time

import torch
from torch import nn

from benchmarks.measuring import BYTES, Conditions, Row, measure_memory, measure_pairs
from benchmarks.tasks import make_gpt2, make_random_sequences
from hf_v0init import attach_v0

NUM_STEPS = 4  # of the measurement


def _fill_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)


def measure_first_steps(conditions: Conditions) -> list[Row]:
    """A run's first step with v0, beside the stock run's first step (and, for a random v0, a draw of as many numbers by torch)."""
    model = make_gpt2(4, 256)
    matrices = [p for p in model.parameters() if p.dim() > 1]
    size = f"{sum(p.numel() for p in matrices) / 1e6:.0f}M elements, 8 x 128 tokens"
    rows = make_random_sequences(8)
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    num_pairs = conditions.choose(9, 25)

    def step(v0_init: str | None = None, with_draw: bool = False) -> float:
        """Processor seconds of forward, backward and step of a new AdamW."""
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6)
        if v0_init is not None:
            attach_v0(optimizer, model, v0_init=v0_init, max_steps=10_000)
        begin = time.process_time()
        model(**batch).loss.backward()
        if with_draw:
            with torch.no_grad():
                _ = [torch.empty_like(p).normal_() for p in matrices]
        optimizer.step()
        taken = time.process_time() - begin
        optimizer.zero_grad()
        return taken

    random = measure_pairs(lambda: step("random"), lambda: step(with_draw=True), num_pairs)
    first = measure_pairs(lambda: step("first_gradient"), step, num_pairs)
    note = "what is above 1 reads the gradients and v0 for the report, once per run"
    return [
        Row(
            "first step, random",
            f"a run's first step with a random v0, {size}",
            "the stock first step and a draw of as many numbers with `normal_`",
            random,
            aim=1.03,
            note=note,
        ),
        Row(
            "first step, first_gradient",
            f"a run's first step with v0 = g^2, {size}",
            "the stock first step",
            first,
            aim=1.03,
            note=note,
        ),
    ]


def measure_measuring_memory(conditions: Conditions) -> Row:
    """Everything from an empty optimizer to the step that writes v0, beside as many training steps from an empty optimizer."""
    model, batch_size = make_gpt2(), 8
    rows = make_random_sequences(NUM_STEPS * batch_size)
    batches = [
        {name: torch.stack([row[name] for row in rows[k::NUM_STEPS]]) for name in rows[0]} for k in range(NUM_STEPS)
    ]

    def train(with_v0: bool):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
        if with_v0:
            attach_v0(optimizer, model, v0_init="data_driven", v0_estimation_steps=NUM_STEPS)
        for batch in batches:
            model(**batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    train(False)  # what is made once
    ours, theirs = measure_memory(lambda: train(True)), measure_memory(lambda: train(False))
    return Row(
        "measuring memory",
        f"peak of {NUM_STEPS} measured steps, the last of which writes v0, {ours.peak / 2**20:.0f} MiB",
        "peak of as many training steps",
        [ours.peak / theirs.peak],
        aim=1.0,
        clock=BYTES,
        note=f"all that torch allocates; {ours.left - theirs.left} bytes are left beyond what training leaves",
        figures={"bytes_left_beyond_training": ours.left - theirs.left},
    )


def measure_later_steps(conditions: Conditions) -> Row:
    """`optimizer.step()` after v0 was written, beside that of an optimizer that never had one."""
    steps = []
    for with_v0 in (True, False):
        model = make_gpt2(4, 256)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        handle = attach_v0(optimizer, model, v0_init="random", max_steps=10_000) if with_v0 else None
        _fill_gradients(model)
        optimizer.step()
        if handle is not None and (handle.is_attached or optimizer._optimizer_step_pre_hooks):
            raise RuntimeError("the hook is still on the optimizer after the step that wrote v0")
        steps.append(lambda optimizer=optimizer: [optimizer.step() for _ in range(5)] and None)
    ratios = measure_pairs(*steps, conditions.choose(15, 50))
    return Row(
        "later steps",
        "AdamW's step after a v0",
        "AdamW's step",
        ratios,
        aim=1.03,
        note="1 within noise: the hook is gone",
    )
