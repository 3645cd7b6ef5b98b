"""The kinds of runs in which a v0 cannot be exact, refused in one line before any training. Knows Trainers from outside."""

from ..errors import InputError
from ..second_moment.deepspeed import require_supported_config


def require_supported_run(trainer) -> None:
    """Raise `InputError` if `trainer` is set up to run in a way in which no v0 can be written, naming what to use instead."""
    if trainer.is_deepspeed_enabled:
        require_supported_config(trainer.accelerator.state.deepspeed_plugin.deepspeed_config)
    plugin = getattr(trainer.accelerator.state, "fsdp_plugin", None)
    if plugin is not None and getattr(plugin, "fsdp_version", 1) != 2:
        raise InputError(
            "v0_init under FSDP1 (fsdp_version 1) is not possible: its parameters are one-dimensional pieces without rows and "
            "columns; use FSDP2 (fsdp_version: 2 in the accelerate config or fsdp_config), or v0_init=zeros"
        )
    config = getattr(getattr(trainer.model, "config", None), "distributed_config", None)
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    for owner, name, what in (
        (config, "pp_size", "pipeline parallelism"),
        (config, "ep_size", "expert parallelism"),
        (parallelism, "cp_size", "context parallelism"),
        (parallelism, "sp_size", "sequence parallelism"),
    ):
        size = getattr(owner, name, None) or 1
        if size > 1:
            raise InputError(
                f"v0_init with {what} ({name}={size}) is not supported: there a process sees neither whole samples nor whole "
                f"tensors; use FSDP2 or tensor parallelism ({name}=1), or v0_init=zeros"
            )
