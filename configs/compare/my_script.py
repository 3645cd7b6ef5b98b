"""A script of one's own that `hf-v0init compare` can run; see README.md beside it. It learns walks of steps of 1 or 2."""

import torch
from transformers import GPT2Config, GPT2LMHeadModel, HfArgumentParser, set_seed

from hf_v0init import V0InitTrainer, V0InitTrainingArguments

(args,) = HfArgumentParser(V0InitTrainingArguments).parse_args_into_dataclasses()
set_seed(args.seed)
model = GPT2LMHeadModel(GPT2Config(vocab_size=25, n_positions=12, n_embd=32, n_layer=2, n_head=2))
walks = torch.randint(1, 3, (1000, 12), generator=torch.Generator().manual_seed(0)).cumsum(1)
data = [{"input_ids": walk, "labels": walk} for walk in walks]
trainer = V0InitTrainer(model, args, train_dataset=data[:800], eval_dataset=data[800:])
trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
trainer.evaluate()
