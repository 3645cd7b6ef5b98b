"""Token-budget batches: every sample once, within the budget, on any number of processes."""

import json

import numpy as np
import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from processes import ROOT, TORCHRUN, start
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments
from translation_models import make_marian

from hf_v0init.errors import InputError
from hf_v0init.tasks.token_budget import TokenBudgetBatchSampler, TokenBudgetMixin

RNG = np.random.default_rng(5)
SOURCE = RNG.integers(1, 40, 501)
TARGET = np.clip(SOURCE + RNG.integers(-6, 7, 501), 1, None)


def collect(sampler, epoch: int = 0) -> list[list[int]]:
    sampler.set_epoch(epoch)
    return list(sampler)


def compute_cost(batch, multiple: int = 1) -> int:
    longest = max(max(SOURCE[i], TARGET[i]) for i in batch)
    return -(-longest // multiple) * multiple * len(batch)


@pytest.mark.parametrize("num_processes", [1, 2, 3, 8])
@pytest.mark.parametrize("multiple", [None, 8])
def test_every_sample_once_within_the_budget_and_in_equal_shards(num_processes, multiple):
    sampler = TokenBudgetBatchSampler(SOURCE, TARGET, 256, num_processes=num_processes, pad_to_multiple_of=multiple)
    for epoch in range(3):
        batches = collect(sampler, epoch)
        assert sorted(i for batch in batches for i in batch) == list(range(501))
        assert max(compute_cost(batch, multiple or 1) for batch in batches) <= 256
        assert len(batches) == len(sampler) and len(batches) % num_processes == 0
    # samples of like length share a batch: padding costs little over each sample's longer side
    assert sum(map(compute_cost, batches)) < 1.15 * np.maximum(SOURCE, TARGET).sum()
    # as accelerate deals them out
    shards = [list(BatchSamplerShard(sampler, num_processes, rank)) for rank in range(num_processes)]
    assert {len(shard) for shard in shards} == {len(sampler) // num_processes}
    assert sorted(i for shard in shards for batch in shard for i in batch) == list(range(501))


def test_batches_are_as_full_as_the_budget_allows():
    equal = TokenBudgetBatchSampler([10] * 95, [7] * 95, 100)
    assert sorted(map(len, equal)) == [5] + [10] * 9


def test_order_depends_on_seed_and_epoch_alone():
    make = lambda seed: TokenBudgetBatchSampler(SOURCE, TARGET, 256, seed=seed)  # noqa: E731
    torch.manual_seed(1)
    first = collect(make(0), 4)
    torch.manual_seed(2)
    state = torch.get_rng_state()
    assert collect(make(0), 4) == first
    assert torch.equal(torch.get_rng_state(), state)
    assert collect(make(0), 5) != first
    assert collect(make(1), 4) != first
    # not only the order of batches changes, but also who is in a batch with whom
    assert {tuple(sorted(b)) for b in collect(make(0), 5)} != {tuple(sorted(b)) for b in first}


def test_bad_budgets_are_refused():
    with pytest.raises(InputError, match=r"=39: training sample \d+ alone has (39|4\d) tokens; raise the budget"):
        TokenBudgetBatchSampler([40, 5], [39, 5], 39)
    with pytest.raises(InputError, match="has no samples"):
        TokenBudgetBatchSampler([], [], 10)
    with pytest.raises(InputError, match="3 training samples cannot be dealt out evenly to 4 processes"):
        TokenBudgetBatchSampler([1, 1, 1], [1, 1, 1], 10, num_processes=4)
    assert len(TokenBudgetBatchSampler([1, 1, 1, 1], [1, 1, 1, 1], 10, num_processes=4)) == 4


# ---- in a Trainer


class BudgetTrainer(TokenBudgetMixin, Seq2SeqTrainer):
    pass


def make_rows(num: int = 60) -> list[dict]:
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(num):
        length = int(rng.integers(2, 12))
        ids = rng.integers(4, 20, length).tolist()
        rows.append({"input_ids": ids, "attention_mask": [1] * length, "labels": ids[::-1]})
    return rows


def make_trainer(folder, max_steps: int, max_tokens: int = 64, **arguments) -> BudgetTrainer:
    model = make_marian(dropout=0.1)

    def collate(rows):
        width = max(len(row["labels"]) for row in rows)
        padding = {"input_ids": 0, "attention_mask": 0, "labels": -100}
        batch = {
            key: torch.tensor([row[key] + [value] * (width - len(row[key])) for row in rows])
            for key, value in padding.items()
        }
        return {**batch, "decoder_input_ids": model.prepare_decoder_input_ids_from_labels(batch["labels"])}

    arguments = Seq2SeqTrainingArguments(
        output_dir=str(folder), max_steps=max_steps, report_to="none", use_cpu=True, disable_tqdm=True,
        logging_strategy="no", learning_rate=1e-2, lr_scheduler_type="constant", **arguments,
    )  # fmt: skip
    return BudgetTrainer(
        model=model, args=arguments, train_dataset=make_rows(), data_collator=collate, max_tokens_per_batch=max_tokens
    )


def test_effective_batch_size_is_the_mean_number_of_samples_and_without_a_budget_the_trainer_is_the_stock_one(tmp_path):
    trainer = make_trainer(tmp_path, 1, gradient_accumulation_steps=3)
    expected = 3 * 60 / len(trainer.get_train_dataloader())
    assert trainer.get_v0_effective_batch_size() == pytest.approx(expected)
    stock = make_trainer(tmp_path, 1, max_tokens=None, per_device_train_batch_size=7)
    assert [len(batch["labels"]) for batch in stock.get_train_dataloader()] == [7] * 8 + [4]


TWO_PROCESSES = """
import json, sys
from pathlib import Path
sys.path[:0] = ["tests", "tests/references", "tests/tasks"]
from test_token_budget import make_trainer
trainer = make_trainer(sys.argv[1], 1)
loader, epochs = trainer.get_train_dataloader(), []
for epoch in range(2):
    loader = trainer.get_train_dataloader() if epoch == 0 else loader
    trainer._token_budget_sampler.set_epoch(epoch)
    epochs.append([batch["labels"].ne(-100).sum(1).tolist() for batch in loader])
found = [epochs, trainer.get_v0_effective_batch_size()]
Path(sys.argv[1], f"rank{trainer.args.process_index}.json").write_text(json.dumps(found))
"""


@pytest.mark.slow
def test_two_real_processes_see_every_sample_once(tmp_path):
    (tmp_path / "two.py").write_text(TWO_PROCESSES)
    start(*TORCHRUN, tmp_path / "two.py", tmp_path, PYTHONPATH=str(ROOT)).check_returncode()
    (first, size), (second, size_too) = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    lengths = sorted(len(row["labels"]) for row in make_rows())
    for mine, other in zip(first, second, strict=True):
        assert len(mine) == len(other) and sorted(n for batch in mine + other for n in batch) == lengths
    assert size == size_too == pytest.approx(60 / len(first[0]))
