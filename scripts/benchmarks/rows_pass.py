"""The paper's pass before training: its time and memory, and how many samples it needs."""

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import nn

from benchmarks.measuring import BYTES, Conditions, Row, measure_memory, measure_pairs
from benchmarks.tasks import load_translation_task, make_arguments, make_gpt2, make_random_sequences, read_penn_treebank
from hf_v0init.estimation.statistics import PassCounts, StatisticsBatch, make_sum_visitor, visit_gradients
from hf_v0init.estimation.stopping import TOLERANCE, SumsSeen, compute_relative_errors, list_stages, see_sums
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
    gradients = TrainerGradients(trainer, trainer.v0_arguments, plan.moments, seed=0)
    visit = make_sum_visitor(_make_sums(plan))
    inputs = [trainer._prepare_inputs(batch.inputs) for batch in gradients._make_batches(None)[0]]
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


def measure_sample_counts(conditions: Conditions) -> list[Row]:
    """The error of v0 from fewer samples against that from 5,000, and what `--v0_num_samples auto` takes."""
    task = load_translation_task(conditions.data_dir, conditions.work_dir, 29_000)
    num_layers = conditions.choose(2, 6)
    model = task.make_model(num_layers)
    collate = task.make_collator(model)
    rows = [_find_errors(task.name, model, list(task.tokenized.select(_choose(len(task.tokenized)))), collate)]
    treebank = read_penn_treebank(conditions.data_dir, length=32, num=28_000)
    if treebank is not None:
        data, vocabulary = treebank
        chosen = [data[index] for index in _choose(len(data))]
        rows.append(_find_errors("Penn Treebank", make_gpt2(2, 64, vocabulary), chosen, _stack))
    return rows


def _choose(num_available: int) -> list[int]:
    order = torch.randperm(num_available, generator=torch.Generator().manual_seed(0))
    return order[:REFERENCE_SAMPLES].tolist()


def _find_errors(name: str, model: nn.Module, data: Sequence, collate: Callable) -> Row:
    """One pass, which is looked at after so many samples as each stage has."""
    plan = plan_v0(torch.optim.AdamW(model.parameters()), model)
    sums = _make_sums(plan)
    spacing = {p: max(1, p.numel() // LOOKED_AT) for p in sums}
    visit, counts, seen = make_sum_visitor(sums), PassCounts(), []
    for first, end in list_stages(BATCH_SIZE, len(data)):
        starts = range(first * BATCH_SIZE, min(end * BATCH_SIZE, len(data)), BATCH_SIZE)
        parts = ((start, data[start : start + BATCH_SIZE]) for start in starts)
        batches = (StatisticsBatch(collate(part), len(part), start // BATCH_SIZE) for start, part in parts)
        counts = counts + visit_gradients(model, plan.named_parameters, batches, _compute_loss, visit)
        taken = ([pair[i].detach().reshape(-1)[:: spacing[p]] for p, pair in sums.items()] for i in (0, 1))
        seen.append(see_sums(*taken, counts))
    errors = {one.counts.num_samples: _compare(one, seen[-1]) for one in seen[:-1]}
    own = {
        now.counts.num_samples: float(compute_relative_errors(earlier, now, 1.0).median())
        for earlier, now in itertools.pairwise(seen[:-1])
    }
    chosen = next((count for count, error in own.items() if error <= TOLERANCE), len(data))
    fewest = next((count for count, error in errors.items() if error <= TOLERANCE), len(data))
    figures = {f"error_at_{count}": error for count, error in errors.items()}
    figures |= {f"disagreement_at_{count}": error for count, error in own.items()}
    return Row(
        f"samples, {name}",
        f"median error of v0 from the {chosen:,} samples that `auto` takes, against v0 from {len(data):,}",
        f"{TOLERANCE:.0%}",
        [errors.get(chosen, 0.0) / TOLERANCE],
        aim=1.0,
        clock="error",
        note=f"fewest of the stages within {TOLERANCE:.0%}: {fewest:,}; batches of {BATCH_SIZE}",
        figures=figures | {"auto": chosen, "fewest": fewest},
    )


def _compare(some: SumsSeen, reference: SumsSeen) -> float:
    exact, estimate = reference.estimate(1.0), some.estimate(1.0)
    nonzero = exact > 0
    return float(((estimate - exact).abs()[nonzero] / exact[nonzero]).median())
