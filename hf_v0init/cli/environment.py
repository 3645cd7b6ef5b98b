"""The command `hf-v0init env`: what a report of a problem needs to say about the machine it was seen on."""

import importlib.metadata
import platform

import typer

PACKAGES = (
    "hf_v0init torch transformers accelerate numpy safetensors datasets trl peft deepspeed bitsandbytes torchao".split()
)


def read_version(package: str) -> str:
    """Read the version of an installed distribution, or say that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def env() -> None:
    """Print the versions and devices that a report of a problem should contain."""
    for package in PACKAGES:
        typer.echo(f"- {package}: {read_version(package)}")
    typer.echo(f"- Python: {platform.python_version()}")
    typer.echo(f"- system: {platform.platform()}")
    import torch

    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    typer.echo(f"- devices: {', '.join(names) or 'no CUDA device'} (CUDA {torch.version.cuda})")


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("env")(env)
