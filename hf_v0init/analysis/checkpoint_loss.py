"""A saved checkpoint and a text file become a model and its loss, for the commands."""

import re
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoTokenizer, DataCollatorForSeq2Seq

from ..errors import InputError
from ..tasks.language_modeling.awd_lstm import AwdLstmForCausalLM
from ..tasks.language_modeling.samples import PaddingCollator
from ..tasks.text_files import read_lines
from ..tasks.translation.pairs import load_pair_files, select_pairs

BATCH_SIZE = 16
NO_TARGET = -100
_OUR_MODELS = {AwdLstmForCausalLM.__name__: AwdLstmForCausalLM}


def pair_checkpoints(first, second) -> list[tuple[int, Path, Path]]:
    """Pair the checkpoints of two runs at the same steps, or two single checkpoints.

    Returns:
        (step, folder of the first, folder of the second), ascending; of two single checkpoints, one pair of step 0.

    Raises:
        InputError: a folder is missing, or there is nothing to pair.
    """
    ours, theirs = _find_checkpoints(first), _find_checkpoints(second)
    pairs = [(step, ours[step], theirs[step]) for step in sorted(ours) if step in theirs]
    if pairs:
        return pairs
    if _holds_weights(first) and _holds_weights(second):
        return [(0, Path(first), Path(second))]
    raise InputError(
        f"{first} and {second}: neither hold weights themselves nor checkpoint-<step> folders at the same steps; save both runs "
        "at the same steps"
    )


def _find_checkpoints(folder) -> dict[int, Path]:
    places = {place: re.fullmatch(r"checkpoint-(\d+)", place.name) for place in Path(folder).glob("checkpoint-*")}
    return {int(name[1]): place for place, name in places.items() if name and _holds_weights(place)}


def _holds_weights(folder) -> bool:
    return any(Path(folder).glob("model*.safetensors"))


def load_model(folder) -> nn.Module:
    """Load the model that a checkpoint's config.json names, in evaluation mode, onto a GPU if there is one.

    Raises:
        InputError: no checkpoint of a transformers model.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not _holds_weights(folder):
        raise InputError(f"{folder}: has no config.json with safetensors; give a folder that save_pretrained wrote")
    (name,) = AutoConfig.from_pretrained(folder).architectures
    model = (_OUR_MODELS.get(name) or getattr(transformers, name)).from_pretrained(folder)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def load_batch_loss(
    folder, config, file: str | None, num_samples: int = 256, max_length: int = 128
) -> Callable[[nn.Module], float]:
    """Make the loss of a checkpoint on a text file: mean nats per target token, without label smoothing.

    Args:
        folder: the checkpoint, for its tokenizer.
        config: the model's configuration: whether it is an encoder-decoder, and how many positions it has.
        file: for causal language models, a text file, whose tokens are cut into windows of `max_length`; for encoder-decoder
            models, what `load_pair_files` reads.
        num_samples: the first so many windows or pairs are used.
        max_length: in tokens, at most the model's positions; longer sentences are cut.

    Raises:
        InputError: no file, or one that does not fit the model.
    """
    if file is None:
        raise InputError("give --file: a text, or for a translation model a file of sentence pairs")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    if config.is_encoder_decoder:
        samples = _tokenize_pairs(tokenizer, file, num_samples, max_length)
        if tokenizer.pad_token is None:  # which token it is makes no difference, since it is masked
            tokenizer.pad_token = tokenizer.eos_token
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_TARGET)
    else:
        samples = _cut_windows(tokenizer, read_lines(file), num_samples, max_length)
        collate = PaddingCollator(tokenizer.pad_token_id)
    batches = [collate(samples[i : i + BATCH_SIZE]) for i in range(0, len(samples), BATCH_SIZE)]
    return make_batch_loss(batches, shifts_labels=not config.is_encoder_decoder)


def make_batch_loss(batches: Iterable[dict], shifts_labels: bool) -> Callable[[nn.Module], float]:
    """Make a function that measures the mean loss of a model over the batches, each target counted once and the same.

    Args:
        batches: dicts of tensors with "labels", as a data collator makes them; each call sees the same ones.
        shifts_labels: whether the model predicts label i + 1 from position i, so that the first of each row is no target.

    Returns:
        A function of the model: the mean of `model(**batch).loss` weighted by the targets of each batch (labels that are not -100).
    """
    batches = [dict(batch) for batch in batches]
    counts = [int((batch["labels"][:, int(shifts_labels) :] != NO_TARGET).sum()) for batch in batches]
    if not sum(counts):
        raise InputError("there is no target to measure a loss on; give more data")

    def measure(model: nn.Module) -> float:
        device, total = next(model.parameters()).device, 0.0
        for batch, count in zip(batches, counts, strict=True):
            if count:
                with torch.no_grad():
                    loss = model(**{name: value.to(device) for name, value in batch.items()}).loss
                total += float(loss.float().mean()) * count
        return total / sum(counts)

    return measure


def _cut_windows(tokenizer, lines: list[str], num_samples: int, max_length: int) -> list[dict]:
    tokens: list[int] = []
    for line in lines:
        if len(tokens) >= num_samples * max_length:
            break
        tokens += tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
    windows = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)][:num_samples]
    return [{"input_ids": window, "labels": window} for window in windows if len(window) > 1]


def _tokenize_pairs(tokenizer, file: str, num_samples: int, max_length: int) -> list[dict]:
    pairs = load_pair_files("validation", file, None, None)
    pairs = select_pairs(pairs.select(range(min(num_samples, len(pairs)))), role="validation")
    sources = tokenizer(pairs["source"][:], max_length=max_length, truncation=True)["input_ids"]
    targets = tokenizer(text_target=pairs["target"][:], max_length=max_length, truncation=True)["input_ids"]
    return [{"input_ids": one, "labels": other} for one, other in zip(sources, targets, strict=True)]
