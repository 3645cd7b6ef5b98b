"""A saved checkpoint and text files become a model and a loss, for the commands."""

import re
from collections.abc import Callable
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
from .batch_loss import NO_TARGET, make_batch_loss
from .weights import INDEX_FILE, WEIGHTS_FILE

_CHECKPOINT = re.compile(r"checkpoint-(\d+)")
_OUR_MODELS = {AwdLstmForCausalLM.__name__: AwdLstmForCausalLM}


def holds_weights(folder) -> bool:
    """Whether a folder holds safetensors weights itself."""
    return any((Path(folder) / name).is_file() for name in (WEIGHTS_FILE, INDEX_FILE))


def find_checkpoints(folder) -> dict[int, Path]:
    """Find the checkpoints of an output folder: {optimizer step: folder}, in the order of the steps."""
    found = {}
    for path in Path(folder).iterdir():
        match = _CHECKPOINT.fullmatch(path.name)
        if match and holds_weights(path):
            found[int(match[1])] = path
    return dict(sorted(found.items()))


def pair_checkpoints(first, second) -> list[tuple[int, Path, Path]]:
    """Pair two checkpoints, or the checkpoints of two runs at the same steps.

    Returns:
        (step, folder of the first, folder of the second), ascending; of two single checkpoints, one pair of step 0. Where both
        hold weights themselves and no common step, these are the pair.

    Raises:
        InputError: a folder is missing, or there is nothing to pair.
    """
    for folder in (first, second):
        if not Path(folder).is_dir():
            raise InputError(
                f"{folder}: there is no such folder; give a checkpoint, or a run's output folder with checkpoints"
            )
    ours, theirs = find_checkpoints(first), find_checkpoints(second)
    pairs = [(step, ours[step], theirs[step]) for step in ours if step in theirs]
    if pairs:
        return pairs
    if holds_weights(first) and holds_weights(second):
        return [(0, Path(first), Path(second))]
    raise InputError(
        f"{first} and {second}: neither hold weights themselves nor checkpoint-<step> folders at the same steps; save both runs "
        "at the same steps"
    )


def load_model(folder, device: str | None = None) -> nn.Module:
    """Load the model that a checkpoint's config.json names, in evaluation mode.

    Args:
        device: "cpu", "cuda", ...; default: a GPU if there is one.

    Raises:
        InputError: no whole checkpoint of a transformers model, or a device that is not there.
    """
    folder = Path(folder)
    if not (folder / "config.json").is_file() or not holds_weights(folder):
        raise InputError(f"{folder}: has no config.json with {WEIGHTS_FILE}; give a folder that save_pretrained wrote")
    names = AutoConfig.from_pretrained(folder).architectures or []
    model_class = _OUR_MODELS.get(names[0], getattr(transformers, names[0], None)) if names else None
    if model_class is None:
        raise InputError(f"{folder}: config.json names the architecture {names}, which transformers does not have")
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return model_class.from_pretrained(folder).to(device).eval()
    except (RuntimeError, AssertionError) as error:  # torch built without the device, or no such device
        raise InputError(f"device={device}: {str(error).splitlines()[0]}; use cpu") from error


def load_batch_loss(
    folder,
    config,
    *,
    file=None,
    source_file=None,
    target_file=None,
    num_samples: int = 256,
    batch_size: int = 16,
    max_length: int = 128,
) -> Callable[[nn.Module], float]:
    """Make the loss of a checkpoint on text files: mean nats a target token, without label smoothing.

    Args:
        folder: the checkpoint, for its tokenizer.
        config: the model's configuration: whether it is an encoder-decoder, and how many positions it has.
        file: for causal language models, a text file, whose tokens are cut into windows of `max_length`; for encoder-decoder
            models, what `load_pair_files` reads.
        source_file, target_file: parallel text files, for encoder-decoder models.
        num_samples: the first so many windows or pairs are used.
        max_length: in tokens, at most the model's positions; longer sentences are cut.

    Raises:
        InputError: no tokenizer, no file, files that do not fit the model, or numbers out of range.
    """
    for name, value, least in (
        ("num_samples", num_samples, 1),
        ("batch_size", batch_size, 1),
        ("max_length", max_length, 2),
    ):
        if value < least:
            raise InputError(f"{name}={value}: must be a whole number >= {least}")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError) as error:
        raise InputError(f"{folder}: has no tokenizer that can be loaded; save it beside the model") from error
    max_length = min(max_length, getattr(config, "max_position_embeddings", None) or max_length)
    if config.is_encoder_decoder:
        samples = _tokenize_pairs(tokenizer, file, source_file, target_file, num_samples, max_length)
        if tokenizer.pad_token is None:  # which token it is makes no difference, since it is masked
            tokenizer.pad_token = tokenizer.eos_token
        collate = DataCollatorForSeq2Seq(tokenizer, label_pad_token_id=NO_TARGET)
    else:
        if file is None or source_file is not None or target_file is not None:
            raise InputError(
                "a causal language model is measured on one text file: give --file, and no source and target file"
            )
        samples = _cut_windows(tokenizer, read_lines(file), num_samples, max_length)
        collate = PaddingCollator(tokenizer.pad_token_id)
    return make_batch_loss(collate(samples[i : i + batch_size]) for i in range(0, len(samples), batch_size))


def _cut_windows(tokenizer, lines: list[str], num_samples: int, max_length: int) -> list[dict]:
    tokens: list[int] = []
    for line in lines:
        if len(tokens) >= num_samples * max_length:
            break
        tokens += tokenizer(line + "\n", add_special_tokens=False)["input_ids"]
    windows = [tokens[i : i + max_length] for i in range(0, len(tokens), max_length)][:num_samples]
    return [{"input_ids": window, "labels": window} for window in windows if len(window) > 1]


def _tokenize_pairs(tokenizer, file, source_file, target_file, num_samples: int, max_length: int) -> list[dict]:
    pairs = load_pair_files("validation", file, source_file, target_file)
    if pairs is None:
        raise InputError(
            "a translation model is measured on sentence pairs: give --source_file and --target_file, or --file"
        )
    pairs = select_pairs(pairs.select(range(min(num_samples, len(pairs)))), role="validation")
    sources = tokenizer(pairs["source"][:], max_length=max_length, truncation=True)["input_ids"]
    targets = tokenizer(text_target=pairs["target"][:], max_length=max_length, truncation=True)["input_ids"]
    return [{"input_ids": one, "labels": other} for one, other in zip(sources, targets, strict=True)]
