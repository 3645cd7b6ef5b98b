"""Text that a causal language model writes: continuations of prompts, shared among the processes of a run."""

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedModel, PreTrainedTokenizerBase


def generate_completions(
    network: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    max_new_tokens: int,
    accelerator: Accelerator,
) -> list[str]:
    """Continue each prompt with the most likely tokens, the processes sharing the work.

    One prompt at a time: batches would be padded at the left, which not every model takes. A prompt that leaves
    no room among the model's positions loses its beginning. The whole model must be on every process.

    Args:
        network: the model itself, unwrapped; it is left in evaluation mode.
        prompts: token ids, at least one each.
        max_new_tokens: generated at most, a prompt.

    Returns:
        The texts after the prompts, in the order of `prompts`, without special tokens, on every process.
    """
    positions = getattr(network.config.get_text_config(), "max_position_embeddings", None)
    if positions is not None:
        max_new_tokens = min(max_new_tokens, positions - 1)
        prompts = [prompt[-(positions - max_new_tokens) :] for prompt in prompts]
    pad_token_id = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    completions = []
    network.eval()
    with accelerator.split_between_processes(prompts) as own_prompts, torch.no_grad():
        for prompt in own_prompts:
            input_ids = torch.tensor([prompt], device=network.device)
            output = network.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_token_id or 0,
                do_sample=False,
            )
            completions.append(tokenizer.decode(output[0, len(prompt) :], skip_special_tokens=True))
    return gather_object(completions) if accelerator.num_processes > 1 else completions
