"""The command `hf-v0init env`: what a report of a problem needs to say about the machine it was seen on."""

import importlib.metadata
import platform

import typer

PACKAGES = (
    "torch",
    "transformers",
    "accelerate",
    "numpy",
    "safetensors",
    "datasets",
    "trl",
    "peft",
    "deepspeed",
    "bitsandbytes",
    "torchao",
)


def collect_environment() -> dict[str, str]:
    """Collect the versions of this package, of Python, of the system and of the packages that decide the numbers, and the devices."""
    found = {
        "hf_v0init": read_version("hf_v0init"),
        "Python": f"{platform.python_version()} ({platform.python_implementation()})",
        "system": platform.platform(),
    }
    found |= {package: read_version(package) for package in PACKAGES}
    return found | {"devices": _describe_devices()}


def read_version(package: str) -> str:
    """Read the version of an installed distribution, or say that there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _describe_devices() -> str:
    try:
        import torch
    except ImportError as error:  # an installation that is broken is what a report may be about
        return f"torch cannot be imported: {error}"
    if not torch.cuda.is_available():
        return f"no CUDA device, {torch.get_num_threads()} CPU threads"
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return f"{', '.join(names)} (CUDA {torch.version.cuda})"


def env() -> None:
    """Print the versions and devices that a report of a problem should contain."""
    for name, value in collect_environment().items():
        typer.echo(f"- {name}: {value}")


def add_commands(app: typer.Typer) -> None:
    """Register the command."""
    app.command("env")(env)
