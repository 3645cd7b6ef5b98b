"""The translation script's parts, each beside what the library under it does alone: training, tokenizing, generating."""

import functools
import time

import datasets
import numpy as np
import torch
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import LogitsProcessor, LogitsProcessorList, PrinterCallback

from benchmarks.measuring import Conditions, Row, measure_pairs, measure_times
from benchmarks.rows_training import FIRST_STEPS, StepClock
from benchmarks.tasks import TranslationTask, load_translation_task, make_arguments, tokenize
from hf_v0init.tasks.token_budget import TokenBudgetBatchSampler
from hf_v0init.tasks.token_loss import TokenCrossEntropy
from hf_v0init.trainer.per_sample import write_trainers_v0

MAX_TOKENS = 512
NUM_PAIRS = 29_000
PAPER_EPOCHS = 55
NUM_BEAMS = 5
LEARNING_RATE, BETAS, WEIGHT_DECAY = 1e-3, (0.9, 0.98), 1e-4


def measure_translation(conditions: Conditions) -> list[Row]:
    """Steps of run_translation's Trainer with token-budget batches, beside a hand-written loop over the same batches; and how long
    the statistics pass is beside 1/20 of a training of the paper's length."""
    num_steps, rounds = conditions.choose(15, 60), conditions.choose(3, 8)
    task = load_translation_task(conditions.data_dir, NUM_PAIRS)
    rows = [task.tokenized[index] for index in range(len(task.tokenized))]
    lengths = [[len(row[name]) for row in rows] for name in ("input_ids", "labels")]
    sampler = TokenBudgetBatchSampler(*lengths, MAX_TOKENS, seed=42)
    passes: list[float] = []

    def train() -> float:
        clock = StepClock()
        trainer = _make_trainer(conditions, task, num_steps, callbacks=[clock])
        trainer.train()
        passes.append(trainer.get_v0_report()["seconds"])
        return clock.seconds

    def train_by_hand() -> float:
        return _train_by_hand(task, rows, sampler, num_steps)

    times = measure_times([train, train_by_hand], rounds)
    padding = 1.0 - sum(map(sum, lengths)) / _count_padded(sampler)
    samples_of_step = len(rows) / len(sampler)
    step_seconds = min(ours for ours, _ in times) / num_steps
    run_seconds = NUM_PAIRS * PAPER_EPOCHS / 20 / samples_of_step * step_seconds
    share = 5000 * _time_pass_sample(conditions, task) / run_seconds
    return [
        Row(
            "translation training",
            f"tokens per second of run_translation's Trainer, {MAX_TOKENS} tokens per batch",
            "a hand-written loop over the same batches",
            [theirs / ours for ours, theirs in times],
            aim=0.95,
            at_least=True,
            note=f"{task.name}, post-norm 6+6 of 96; padding {padding:.1%}",
            figures={"padding_share": padding, "seconds_a_step": step_seconds},
        ),
        Row(
            "share of the pass",
            "the pass over 5,000 samples",
            f"1/20 of a training of {PAPER_EPOCHS} epochs of {NUM_PAIRS:,} pairs",
            [share],
            note=f"{share:.1%}; {task.name}, batches of 8 in the pass",
            figures={"steps_of_training_that_the_pass_takes": share * run_seconds / step_seconds},
        ),
    ]


def _make_trainer(conditions: Conditions, task: TranslationTask, num_steps: int, callbacks=(), **settings):
    model = task.make_model()
    arguments = make_arguments(
        conditions.work_dir,
        for_translation=True,
        max_steps=num_steps + FIRST_STEPS,
        learning_rate=LEARNING_RATE,
        adam_beta2=BETAS[1],
        weight_decay=WEIGHT_DECAY,
        max_grad_norm=0.0,
        **{"v0_init": "data_driven"} | settings,
    )
    trainer = conditions.translation_trainer(
        model=model,
        args=arguments,
        train_dataset=task.tokenized,
        processing_class=task.tokenizer,
        data_collator=task.make_collator(model),
        compute_loss_func=TokenCrossEntropy(),
        max_tokens_per_batch=MAX_TOKENS,
        callbacks=list(callbacks),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _train_by_hand(task: TranslationTask, rows: list[dict], sampler: TokenBudgetBatchSampler, num_steps: int) -> float:
    model = task.make_model()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True
    )
    total = num_steps + FIRST_STEPS
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / total)
    batches = iter(DataLoader(rows, batch_sampler=sampler, collate_fn=task.make_collator(model)))
    model.train()
    for step in range(total):
        if step == FIRST_STEPS:
            begin = time.process_time()
        batch = next(batches)
        labels = batch.pop("labels")  # the decoder's inputs are in the batch
        logits = model(**batch).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        loss.backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            loss.item()
    return time.process_time() - begin


def _count_padded(sampler: TokenBudgetBatchSampler) -> int:
    """Tokens of both sides that an epoch's batches hold, padding included."""
    return sum(
        len(batch) * int(side[batch].max())
        for batch in sampler
        for side in (sampler.source_lengths, sampler.target_lengths)
    )


def _time_pass_sample(conditions: Conditions, task: TranslationTask) -> float:
    """Seconds of processor time a sample of the Trainer's pass."""
    num_samples = conditions.choose(256, 1024)
    trainer = _make_trainer(
        conditions, task, 1, v0_estimator="per_sample", v0_num_samples=num_samples, v0_stats_batch_size=8
    )
    optimizer = trainer.create_optimizer()
    plan = trainer.v0_arguments.resolve()
    begin = time.process_time()
    write_trainers_v0(trainer, plan, optimizer)
    return (time.process_time() - begin) / num_samples


def measure_preprocessing(conditions: Conditions) -> list[Row]:
    """Tokenizing 29,000 pairs beside the tokenizer alone; and everything between the imports and the model on a second start."""
    task = load_translation_task(conditions.data_dir, NUM_PAIRS)
    sides = [list(task.pairs[column]) for column in ("source", "target")]

    def tokenize_pairs() -> None:
        datasets.disable_caching()  # written to a temporary file, and not found again
        tokenize(task.pairs, task.tokenizer)
        datasets.enable_caching()

    def tokenize_texts() -> None:
        for texts in sides:
            task.tokenizer(texts, max_length=64, truncation=True)

    def start_again() -> None:
        load_translation_task(conditions.data_dir, NUM_PAIRS)

    def pass_two_seconds() -> float:
        return 2.0

    pairs = measure_pairs(tokenize_pairs, tokenize_texts, conditions.choose(2, 8))
    second = measure_pairs(start_again, pass_two_seconds, conditions.choose(2, 5))
    return [
        Row(
            "preprocessing",
            f"pairs per second, {len(task.pairs):,} pairs of {task.name}, written to the cache",
            "the tokenizer's own batch call, kept in memory",
            [1.0 / ratio for ratio in pairs],
            aim=0.8,
            at_least=True,
        ),
        Row(
            "second start",
            "after the imports: reading, training the tokenizer, tokenized pairs from the cache",
            "2 seconds",
            second,
            aim=1.0,
        ),
    ]


class _EndLikeSource(LogitsProcessor):
    """Ends a translation at the length of its source, as a trained model does about; before that it does not end."""

    def __init__(self, lengths: torch.Tensor, eos_token_id: int) -> None:
        self.lengths, self.eos_token_id = lengths, eos_token_id

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        lengths = self.lengths.repeat_interleave(len(scores) // len(self.lengths))
        ends = input_ids.shape[1] >= lengths
        scores[~ends, self.eos_token_id] = -torch.inf
        others = scores[ends]
        end_score = others[:, self.eos_token_id].clone()
        others.fill_(-torch.inf)
        others[:, self.eos_token_id] = end_score
        scores[ends] = others
        return scores


def measure_generation(conditions: Conditions) -> list[Row]:
    """Translating a test set with run_translation's Trainer, beside transformers' `generate` in batches sorted by length."""
    num_sentences, batch_size = conditions.choose(96, 1000), 32
    task = load_translation_task(conditions.data_dir, NUM_PAIRS)
    order = np.random.default_rng(0).permutation(len(task.tokenized))[:num_sentences]
    order = sorted(
        order.tolist(), key=lambda index: -len(task.tokenized[index]["input_ids"])
    )  # as the script sorts them
    test = task.tokenized.select(order)
    trainer = _make_trainer(
        conditions,
        task,
        1,
        per_device_eval_batch_size=batch_size,
        predict_with_generate=True,
        generation_max_length=65,
        generation_num_beams=NUM_BEAMS,
    )
    sources = test.remove_columns("labels")
    model = trainer.model
    generate = model.generate

    def generate_like_source(input_ids=None, attention_mask=None, **options):
        ends = _EndLikeSource(attention_mask.sum(1), task.tokenizer.eos_token_id)
        return generate(
            input_ids, attention_mask=attention_mask, logits_processor=LogitsProcessorList([ends]), **options
        )

    model.generate = functools.wraps(generate)(generate_like_source)
    rows = [task.tokenized[index] for index in order]
    rows.sort(key=lambda row: len(row["input_ids"]))

    def predict() -> None:
        trainer.predict(sources)

    def predict_with_loss() -> None:
        trainer.predict(test)

    def generate_sorted() -> None:
        model.eval()
        for start in range(0, len(rows), batch_size):
            inputs = task.tokenizer.pad(
                {
                    name: [row[name] for row in rows[start : start + batch_size]]
                    for name in ("input_ids", "attention_mask")
                },
                return_tensors="pt",
            )
            with torch.no_grad():
                model.generate(**inputs, max_length=65, num_beams=NUM_BEAMS)

    times = measure_times([predict, generate_sorted, predict_with_loss], conditions.choose(3, 5))
    what = f"sentences per second of run_translation's Trainer, beam {NUM_BEAMS}, {num_sentences} sentences"
    against = "transformers' `generate` in batches sorted by length"
    return [
        Row(
            "generation",
            what,
            against,
            [theirs / ours for ours, theirs, _ in times],
            aim=0.95,
            at_least=True,
            note=f"{task.name}, post-norm 6+6 of 96; outputs are made to end at their source's length",
        ),
        Row(
            "generation and loss",
            what + ", with the exact loss on their references",
            against,
            [theirs / ours for _, theirs, ours in times],
            note="as run_translation predicts; `generate` gives no loss",
        ),
    ]
