"""Changes a model's weights for a moment: reads them from checkpoints, mixes them, and puts everything back."""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from ..errors import InputError
from ..state_guard import preserve_model, preserve_rng

WEIGHTS_FILE, INDEX_FILE = "model.safetensors", "model.safetensors.index.json"

Weights = dict[str, torch.Tensor]


@contextlib.contextmanager
def preserve_weights(model: nn.Module) -> Iterator[Weights]:
    """Restore every parameter bit for bit on leaving, also when an exception passes.

    Yields:
        Copies of the parameters by name, on their devices. A parameter under several names has the first.
    """
    parameters = dict(model.named_parameters())
    saved = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    try:
        yield saved
    finally:
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(saved[name])


@contextlib.contextmanager
def borrow_model(model: nn.Module) -> Iterator[Weights]:
    """Lend the model for measurements at other weights: in evaluation mode, without gradients.

    On leaving, weights, buffers, gradients, train/eval modes and all random states are as before, also when an exception
    passes.

    Yields:
        Copies of the parameters, as `preserve_weights`.
    """
    with preserve_rng(), preserve_model(model), preserve_weights(model) as saved, torch.no_grad():
        model.eval()
        yield saved


def read_weights(folder) -> Weights:
    """Read the weights of a checkpoint: a folder with safetensors, in one file or sharded.

    Returns:
        CPU tensors by name, as saved; tied weights under the name that transformers saves them by.

    Raises:
        InputError: the folder holds no safetensors weights, or a damaged file.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = Path(folder)
    try:
        if (folder / INDEX_FILE).is_file():
            names = sorted(set(json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))["weight_map"].values()))
        elif (folder / WEIGHTS_FILE).is_file():
            names = [WEIGHTS_FILE]
        else:
            raise InputError(f"{folder}: has no {WEIGHTS_FILE}; give a folder that a Trainer or save_pretrained wrote")
        weights: Weights = {}
        for name in names:
            weights |= load_file(folder / name)
        return weights
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{folder}: its weights cannot be read ({error}); save the checkpoint again") from error


def list_untrained(model: nn.Module) -> set[str]:
    """List the parameters that training leaves alone: frozen ones, and those that the class computes instead of saving them.

    The latter (a Transformer's sinusoidal positions) come back from `from_pretrained` as if they were trained. A parameter that
    has another name under which it is saved, as tied embeddings have, is trained.
    """
    computed = set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    names: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), set()).add(name)
    return {
        name
        for name, parameter in model.named_parameters(remove_duplicate=False)
        if not parameter.requires_grad or names[id(parameter)] <= computed
    }


def match_weights(model: nn.Module, weights: Weights, source: str = "weights") -> Weights:
    """Find the tensor for each parameter and each saved floating-point buffer of `model`.

    Untrained parameters (`list_untrained`) that `weights` lacks are left out: transformers does not save what it computes.

    Returns:
        Tensors by the model's name (of a tied parameter, the first), as they lie in `weights`; copies of those that are the
        model's own.

    Raises:
        InputError: a trainable parameter or a buffer has no tensor, or one of another shape.
    """
    names: dict[int, list[str]] = {}
    targets: dict[str, torch.Tensor] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        aliases = names.setdefault(id(parameter), [])
        if not aliases:
            targets[name] = parameter
        aliases.append(name)
    saved = model.state_dict(keep_vars=True)
    for name, buffer in model.named_buffers():
        if name in saved and buffer.is_floating_point():
            targets[name] = buffer
            names.setdefault(id(buffer), []).append(name)
    matched: Weights = {}
    untrained = list_untrained(model)
    for name, target in targets.items():
        found = next((weights[alias] for alias in names[id(target)] if alias in weights), None)
        if found is None and name in untrained:
            continue
        if found is None:
            raise InputError(
                f"{source}: has no tensor {name!r}, which the model needs; give a checkpoint of this model"
            )
        if found.shape != target.shape:
            raise InputError(
                f"{source}: {name!r} has shape {tuple(found.shape)}, the model {tuple(target.shape)}; give a checkpoint of "
                "this model"
            )
        # What is the model's own tensor would change under our hands.
        matched[name] = found.detach().clone() if found.data_ptr() == target.data_ptr() else found.detach()
    return matched


def write_mixture_(model: nn.Module, first: Weights, second: Weights, share: float) -> None:
    """Write share * first + (1 - share) * second into the parameters and floating-point buffers of `model`.

    Computed in fp32 (fp64 for fp64 weights) on the model's device; at shares 0 and 1 the weights are copied as they are.

    Args:
        first, second: what `match_weights` returned.
        share: a in eq. 22 of arXiv 2412.02153.
    """
    targets = dict(model.named_parameters()) | dict(model.named_buffers())
    with torch.no_grad():
        for name, one in first.items():
            target, other = targets[name], second[name]
            if share == 1.0 or share == 0.0:
                target.copy_(one if share == 1.0 else other)
                continue
            dtype = torch.float64 if target.dtype == torch.float64 else torch.float32
            one, other = (tensor.to(target.device, dtype) for tensor in (one, other))
            target.copy_(share * one + (1.0 - share) * other)
