"""Continuations of prompts."""

import torch
from accelerate import Accelerator
from conftest import VOCAB, make_gpt2
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_v0init.tasks.language_modeling.completions import generate_completions


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = {f"w{i}": i for i in range(VOCAB)}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="w1")), eos_token="w0")


@torch.no_grad()
def continue_greedily(network, prompt, num_tokens) -> list[int]:
    ids = list(prompt)
    for _ in range(num_tokens):
        ids.append(int(network(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == 0:
            break
    return ids[len(prompt) :]


def test_greedy_completions_are_the_most_likely_tokens_whatever_the_length_of_the_prompts():
    network, tokenizer = make_gpt2(), make_tokenizer()
    prompts = [[3, 4, 5], [7], [9] * 8]
    texts = generate_completions(network, tokenizer, prompts, 4, Accelerator(cpu=True))
    for prompt, text in zip(prompts, texts, strict=True):
        expected = [token for token in continue_greedily(network.eval(), prompt, 4) if token != 0]
        assert text.split() == [f"w{token}" for token in expected]


def test_a_prompt_without_room_loses_its_beginning():
    network, tokenizer = make_gpt2(), make_tokenizer()  # 16 positions
    long = [(7 * i) % 39 + 1 for i in range(30)]
    accelerator = Accelerator(cpu=True)
    texts = generate_completions(network, tokenizer, [long, long[-12:]], 4, accelerator)
    assert texts[0] == texts[1]
    assert len(generate_completions(network, tokenizer, [long], 99, accelerator)[0].split()) <= 15
