"""What the README's snippets are about, tiny: a model, data, an accelerator."""

import torch
from accelerate import Accelerator
from transformers import GPT2Config, GPT2LMHeadModel

torch.manual_seed(0)
rows = torch.randint(1, 20, (32, 8))
data = [{"input_ids": row, "labels": row.clone()} for row in rows]
model = GPT2LMHeadModel(
    GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0)
)
accelerator = Accelerator(cpu=True)
loader = torch.utils.data.DataLoader(data, batch_size=8)
