"""The paper's pass before training: its time and memory."""

from collections.abc import Sequence

import torch
from torch import nn

from benchmarks.measuring import BYTES, Conditions, Row, measure_memory, measure_pairs
from benchmarks.tasks import make_arguments, make_gpt2, make_random_sequences
from hf_v0init.estimation.statistics import PassCounts, StatisticsBatch, make_sum_visitor, visit_gradients
from hf_v0init.initialization.plan import plan_v0
from hf_v0init.initialization.writing import estimate_grad_sq_mean, write_v0
from hf_v0init.trainer.gradients import TrainerGradients
from hf_v0init.trainer.mixin import V0InitTrainer

BATCH_SIZE = 8
LOOKED_AT = 512  # elements per tensor for the error of v0
REFERENCE_SAMPLES = 5000


def _stack(rows: Sequence[dict]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def _compute_loss(model: nn.Module, inputs: dict) -> torch.Tensor:
    return model(**inputs).loss


def _make_sums(plan) -> dict[nn.Parameter, tuple[torch.Tensor, torch.Tensor]]:
    return {p: (torch.zeros_like(p), torch.zeros_like(p)) for _, p in plan.named_parameters}


def measure_pass_time(conditions: Conditions) -> Row:
    """The Trainer's own pass, data loader and collator included, beside forward and backward of the same batches."""
    per_pair, num_pairs = 4, conditions.choose(9, 156)
    # So many logits that they get new memory from the system in every batch, whoever computes them: smaller ones come from the heap,
    # and then what ran before, and what it freed, makes differences of 5% between runs of one and the same function.
    data = make_random_sequences(BATCH_SIZE * per_pair, 10_000)
    model = make_gpt2(vocabulary=10_000)
    settings = {"v0_init": "data_driven", "v0_estimator": "per_sample", "v0_stats_batch_size": BATCH_SIZE}
    arguments = make_arguments(conditions.work_dir, per_device_train_batch_size=BATCH_SIZE, **settings)
    trainer = V0InitTrainer(model=model, args=arguments, train_dataset=data)
    plan = plan_v0(trainer.create_optimizer(), model)
    gradients = TrainerGradients(trainer, trainer.v0_arguments.resolve(), plan.moments, seed=0)
    visit = make_sum_visitor(_make_sums(plan))
    inputs = [trainer._prepare_inputs(batch.inputs) for batch in gradients._make_batches()[0]]
    num_items = BATCH_SIZE * inputs[0]["labels"].shape[1]

    def run_pass() -> None:
        gradients.run(plan.named_parameters, visit)

    def run_plainly() -> None:
        model.train()
        for batch in inputs:
            trainer.compute_loss(model, batch, num_items_in_batch=num_items).backward()
            model.zero_grad()

    return Row(
        "pass time",
        f"statistics pass, {BATCH_SIZE * per_pair * num_pairs:,} samples in pairs of {BATCH_SIZE * per_pair}",
        "training's loss and its backward of the same batches",
        measure_pairs(run_pass, run_plainly, num_pairs),
        aim=1.03,
        note="GPT-2, 4 layers of 128, 8 x 128 tokens per batch, 10,000 words; medians of 9 pairs vary from 1.01 to 1.04 "
        "between runs, and were 1.06 to 1.08 with 4,000 words, where a batch is shorter",
    )


def measure_pass_memory(conditions: Conditions) -> list[Row]:
    """Everything from an empty optimizer to a written v0, beside two training steps from an empty optimizer."""
    return [
        _compare_memory("pass memory", make_gpt2(), BATCH_SIZE, "most of it is activations"),
        _compare_memory("pass memory, few tokens", make_gpt2(6, 512), 1, "most of it is weights and state"),
    ]


def _compare_memory(name: str, model: nn.Module, batch_size: int, what_it_is: str) -> Row:
    rows = make_random_sequences(4 * batch_size)
    batches = [StatisticsBatch(_stack(rows[k::4]), batch_size, k) for k in range(4)]

    def start_v0():
        optimizer = torch.optim.AdamW(model.parameters())
        plan = plan_v0(optimizer, model)

        def run_pass(named_parameters, visit) -> PassCounts:
            return visit_gradients(model, named_parameters, batches, _compute_loss, visit)

        write_v0(plan, estimate_grad_sq_mean(plan, run_pass, batch_size), 1.0)
        return optimizer

    def train():
        optimizer = torch.optim.AdamW(model.parameters())
        for batch in batches[:2]:
            _compute_loss(model, batch.inputs).backward()
            optimizer.step()
            optimizer.zero_grad()
        return optimizer

    _compute_loss(model, batches[0].inputs).backward()  # what is made once
    model.zero_grad()
    ours, theirs = measure_memory(start_v0), measure_memory(train)
    matrices = [p.numel() for p in model.parameters() if p.dim() > 1]
    state = 8 * sum(matrices) + 4 * len(matrices)  # two moments in fp32 and a step count
    return Row(
        name,
        f"peak of the pass and the write of v0, {ours.peak / 2**20:.0f} MiB",
        "peak of a training step",
        [ours.peak / theirs.peak],
        aim=1.0,
        clock=BYTES,
        note=f"all that torch allocates; {what_it_is}; {ours.left - state} bytes are left beyond Adam's own state",
        figures={"bytes_left_beyond_the_state": ours.left - state},
    )
