"""The files for `accelerate launch --config_file`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils import DistributedType

FOLDER = Path(__file__).resolve().parents[2] / "configs" / "accelerate"
FILES = sorted(FOLDER.glob("*.yaml"))

EXPECTED = {
    "ddp": (DistributedType.MULTI_GPU, 2),
    "fsdp2": (DistributedType.FSDP, 2),
    "one_gpu": (DistributedType.NO, 1),
    "two_cpu_processes": (DistributedType.MULTI_GPU, 2),
    "zero2": (DistributedType.DEEPSPEED, 2),
}

PRINT_WORLD = """
import json, sys
import torch.distributed
from transformers import HfArgumentParser, TrainingArguments

(arguments,) = HfArgumentParser(TrainingArguments).parse_args_into_dataclasses(sys.argv[2:])
facts = {"world_size": arguments.world_size, "device": arguments.device.type, "backend": torch.distributed.get_backend()}
with open(f"{sys.argv[1]}/{arguments.process_index}.json", "w") as file:
    json.dump(facts, file)
torch.distributed.destroy_process_group()
"""


def test_there_is_a_file_for_each_way_of_running():
    assert [path.stem for path in FILES] == sorted(EXPECTED)


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_accelerate_reads_the_file(path):
    config = load_config_from_file(str(path))
    assert (config.distributed_type, config.num_processes) == EXPECTED[path.stem]
    assert config.mixed_precision == "no" and config.num_machines == 1
    assert config.use_cpu == (path.stem == "two_cpu_processes")
    # every key is one that accelerate knows, and none is spelled so that it silently falls away
    options = {action.dest for action in launch_command_parser()._actions}
    nested = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert set(nested.get("fsdp_config", {})) | set(nested.get("deepspeed_config", {})) <= options


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_launcher_takes_its_settings_from_the_file(path):
    arguments, *_ = _validate_launch_command(
        launch_command_parser().parse_args(["--config_file", str(path), "script.py"])
    )
    assert arguments.num_processes == EXPECTED[path.stem][1]
    assert arguments.multi_gpu == (path.stem in ("ddp", "two_cpu_processes"))
    assert arguments.use_fsdp == (path.stem == "fsdp2")
    assert arguments.use_deepspeed == (path.stem == "zero2")
    if arguments.use_fsdp:
        assert arguments.fsdp_version == 2 and arguments.fsdp_reshard_after_forward is True
    if arguments.use_deepspeed:
        assert arguments.zero_stage == 2
        assert arguments.gradient_accumulation_steps is None and arguments.gradient_clipping is None


@pytest.mark.slow
def test_two_cpu_processes_are_two_and_joined(tmp_path):
    script = tmp_path / "print_world.py"
    script.write_text(PRINT_WORLD)
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", FOLDER / "two_cpu_processes.yaml"]
    command += ["--main_process_port", "0", script, tmp_path, "--use_cpu", "--output_dir", tmp_path]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    result = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    facts = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert facts == [{"world_size": 2, "device": "cpu", "backend": "gloo"}] * 2
