"""What other packages say on our terminals: nothing at the default log level that means nothing, everything else as it is."""

import logging
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_v0init.third_party_messages import KNOWN, drop_known_messages

ROOT = Path(__file__).parents[2]
SAID = {
    "torchao": "Failed to load /x/torchao/_C_mxfp8.cpython-310-x86_64-linux-gnu.so: Could not load this library: /x/torchao/_C_mxfp8.so",
    "torch.utils._pytree": "<enum 'KernelPreference'> is an Enum subclass and is now natively supported by torch.compile as an opaque",
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward from kernels-community: No module named 'kernels'. Please",
    "transformers.modeling_utils": "`loss_type=None` was set in the config but it is unrecognized. Using the default loss: `ForCausalLMLoss`.",
    "DeepSpeed": "Setting accelerator to CPU. If you have GPU or other accelerator, we were unable to detect it.",
}
WARNED = re.compile(r"\bWARNING\b|Warning: |Failed to |^W\d{4} ")
STARTS = {
    "translate": ["-m", "hf_v0init.cli.main", "translate", "--help"],
    "translation.script": ["-m", "hf_v0init.tasks.translation.script", "--help"],
    "run_clm.py": ["scripts/run_clm.py", "--help"],
    "demo.py": ["scripts/demo.py", "--help"],
    "optimizers": ["-m", "hf_v0init.cli.main", "optimizers"],
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_messages_are_dropped_and_no_others(name):
    drop_known_messages()
    drop_known_messages()
    logger = logging.getLogger(name)
    record = logging.LogRecord(name, logging.WARNING, __file__, 1, SAID[name], None, None)
    assert not logger.filter(record)
    other = logging.LogRecord(name, logging.WARNING, __file__, 1, "Failed to load %s", ("libcudart.so",), None)
    assert logger.filter(other)
    assert len([f for f in logger.filters if type(f).__name__ == "_DropKnown"]) == 1


@pytest.mark.slow
@pytest.mark.parametrize("start", STARTS)
def test_nothing_of_others_reaches_the_terminal_at_the_start(start):
    done = subprocess.run([sys.executable, *STARTS[start]], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "WARNING" not in done.stdout


RUNS = {
    "clm": "scripts/run_clm.py --train_file={0}/lines.txt --validation_file={0}/lines.txt --model_type=gpt2 --vocab_size=300 "
    "--config_overrides=n_embd=8,n_layer=1,n_head=1 --block_size=16",
    "translation": "scripts/run_translation.py --dataset_name=embedded --vocab_size=400 --max_eval_samples=20 "
    "--config_overrides=d_model=16,encoder_layers=1,decoder_layers=1,encoder_ffn_dim=16,decoder_ffn_dim=16",
}
FLAGS = "--do_train --do_eval --use_cpu --max_steps=2 --report_to=none --disable_tqdm=true --output_dir={0}/out"


@pytest.mark.slow
@pytest.mark.parametrize("task", RUNS)
def test_no_warning_of_others_reaches_the_terminal_during_a_run(tmp_path, task):
    (tmp_path / "lines.txt").write_text("".join(f"line {i} of a short text\n" for i in range(200)))
    command = [sys.executable, *f"{RUNS[task]} {FLAGS}".format(tmp_path).split()]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    said = [line for line in (done.stderr + done.stdout).splitlines() if WARNED.search(line)]
    assert [line for line in said if " WARNING hf_v0init: " not in line] == []
