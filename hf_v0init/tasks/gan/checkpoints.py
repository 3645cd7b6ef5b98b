"""Checkpoints of a GAN's training, whole or recognisably not: `records.checkpoints` tells which.

checkpoint-N/generator/, discriminator/   weights and configuration, as `from_pretrained` reads them
checkpoint-N/training_state.pt            both optimizers and schedules, number of processes
checkpoint-N/rng_state_R.pth              the random states of process R
checkpoint-N/trainer_state.json           step and log, as the Trainer's
checkpoint-N/v0_init.json                 what was done about v0
"""

import json
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch import nn
from transformers import TrainerState

from ...errors import InputError
from ...records.checkpoints import begin_save, complete_save, delete_old_checkpoints
from ...records.report import read_report, write_report
from ...state_guard import read_rng_states, write_rng_states

STATE_FILE, PROCESS_FILE = "training_state.pt", "process_state_{}.pt"


def save_gan_checkpoint(
    output_dir: str,
    accelerator: Accelerator,
    networks: dict[str, nn.Module],
    stateful: dict,
    state: TrainerState,
    v0_report: dict | None,
    own: dict,
    limit: int | None,
) -> None:
    """Write `checkpoint-N` for step N, and delete old ones beyond `limit`. Every process must call it.

    Args:
        networks: by name, unwrapped.
        stateful: what has `state_dict`, by name: optimizers, schedules.
        own: further tensors and numbers of this process.
    """
    folder = Path(output_dir, f"checkpoint-{state.global_step}")
    if accelerator.is_main_process:
        begin_save(folder)
    accelerator.wait_for_everyone()
    process_state = {"rng": _to_plain(read_rng_states()), "own": own}
    torch.save(process_state, folder / PROCESS_FILE.format(accelerator.process_index))
    if accelerator.is_main_process:
        for name, network in networks.items():
            network.save_pretrained(folder / name)
        content = {
            "states": {name: each.state_dict() for name, each in stateful.items()},
            "kinds": _name_kinds(stateful),
            "num_processes": accelerator.num_processes,
        }
        torch.save(content, folder / STATE_FILE)
        if v0_report is not None:
            write_report(v0_report, folder)
        state.save_to_json(str(folder / "trainer_state.json"))
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        complete_save(folder)
        delete_old_checkpoints(output_dir, limit, str(folder))


def load_gan_checkpoint(
    folder: str, accelerator: Accelerator, networks: dict[str, nn.Module], stateful: dict
) -> tuple[TrainerState, dict | None, dict]:
    """Load a whole checkpoint into networks, optimizers, schedules and random states.

    Returns:
        The Trainer's state, the record of v0 (None if there is none), and `own` of this process.

    Raises:
        InputError: networks of other sizes, another optimizer, another number of processes.
    """
    path = Path(folder)
    report = read_report(path)
    saved = torch.load(path / STATE_FILE, map_location="cpu", weights_only=True)
    if saved["num_processes"] != accelerator.num_processes:
        raise InputError(
            f"{folder} was written by {saved['num_processes']} process(es) and this run has {accelerator.num_processes}: its noise "
            "and order of images would be others; start as many"
        )
    for name, network in networks.items():
        try:
            network.load_state_dict(load_file(path / name / "model.safetensors"))
        except RuntimeError as error:
            config = json.loads((path / name / "config.json").read_text(encoding="utf-8"))
            raise InputError(f"{folder}: its {name} has other sizes than this run's: {config}; give these") from error
    for name, kind in _name_kinds(stateful).items():
        if saved["kinds"].get(name) != kind:
            raise InputError(
                f"{folder}: its {name.replace('_', ' ')} is {saved['kinds'].get(name)} and this run's {kind}; use the same, or start anew"
            )
        stateful[name].load_state_dict(saved["states"][name])
    process_state = torch.load(path / PROCESS_FILE.format(accelerator.process_index), weights_only=True)
    write_rng_states(_from_plain(process_state["rng"]))
    return TrainerState.load_from_json(str(path / "trainer_state.json")), report, process_state["own"]


def _name_kinds(stateful: dict) -> dict[str, str]:
    return {name: type(each).__name__ for name, each in stateful.items()}


def _to_plain(states: dict) -> dict:
    """Random states in types that torch loads without running code: NumPy's array becomes a list."""
    kind, keys, *rest = states["numpy"]
    return states | {"numpy": (kind, keys.tolist(), *rest)}


def _from_plain(states: dict) -> dict:
    kind, keys, *rest = states["numpy"]
    return states | {"numpy": (kind, np.array(keys, dtype=np.uint32), *rest)}
