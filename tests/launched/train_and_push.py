"""Train and push a tiny GPT-2 once per list of training flags: the process that test_hub.py starts.

Reads a JSON list of lists of flags from standard input, trains each, calls `push_to_hub()`, and prints
one JSON object a run: {"report": ..., "error": null or "ExceptionName: message"}.
"""

import json
import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser

from hf_v0init import V0InitTrainer, V0InitTrainingArguments


def make_samples(num_samples: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(7)
    token_ids = torch.randint(0, 64, (num_samples, 12), generator=generator)
    return [{"input_ids": row, "labels": row} for row in token_ids]


def train_and_push(flags: list[str]) -> dict:
    (args,) = HfArgumentParser(V0InitTrainingArguments).parse_args_into_dataclasses(flags)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=0, eos_token_id=0)
    samples = make_samples(32)
    report = error = None
    try:
        trainer = V0InitTrainer(
            model=GPT2LMHeadModel(config), args=args, train_dataset=samples, eval_dataset=samples[:8]
        )
        trainer.train()
        report = trainer.get_v0_report()
        trainer.push_to_hub()
    except Exception as exception:
        error = f"{type(exception).__name__}: {exception}"
    return {"report": report, "error": error}


if __name__ == "__main__":
    for flags in json.load(sys.stdin):
        print(json.dumps(train_and_push(flags)), flush=True)
