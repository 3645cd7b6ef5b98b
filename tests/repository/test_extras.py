"""An absent extra gives one line that names what to type; the base installation does without all of them."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from hf_v0init.errors import InputError
from hf_v0init.extras import EXTRAS, MissingExtraError, require_extra

tomllib = pytest.importorskip("tomllib" if sys.version_info >= (3, 11) else "tomli")

ROOT = Path(__file__).parents[2]
DISTRIBUTIONS = {
    "markdown_it": "markdown-it-py",
    "PIL": "pillow",
    "sklearn": "scikit-learn",
    "torch_fidelity": "torch-fidelity",
}
HIDDEN = sorted(
    {package for packages in EXTRAS.values() for package in packages}
    - {"tokenizers", "filelock", "psutil", "markdown_it"}
)

# Hides packages as if they were not installed, from this process alone, then runs what follows as a program would be.
HIDE = """
import runpy, sys

sys.modules.update(dict.fromkeys({hidden!r}))
sys.argv = {argv!r}
{start}
"""


def run_hidden(hidden, argv: list[str], start: str) -> subprocess.CompletedProcess:
    code = HIDE.format(hidden=set(hidden), argv=argv, start=start)
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)


def read_requirements() -> dict[str, set[str]]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    names = {"": project["dependencies"], **project["optional-dependencies"]}
    return {
        extra: {re.match(r"[\w.-]+(\[[\w,]+\])?", r)[0] for r in requirements} for extra, requirements in names.items()
    }


@pytest.mark.parametrize("extra", EXTRAS)
def test_the_table_of_extras_is_that_of_the_installation(extra):
    ours = {DISTRIBUTIONS.get(package, package) for package in EXTRAS[extra]}
    declared = {name for name in read_requirements()[extra] if not name.startswith("hf_v0init")}
    # The demo draws, and its extra says so; the table holds matplotlib once.
    assert declared - {"matplotlib"} == ours - {"matplotlib"}


def test_an_absent_extra_names_what_to_type(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy", None)
    with pytest.raises(MissingExtraError) as caught:
        require_extra("compare", importing="hf_v0init.somewhere")
    assert str(caught.value) == "scipy is not installed; type: pip install 'hf_v0init[compare]'"
    assert caught.value.name == "hf_v0init.somewhere"
    assert isinstance(caught.value, InputError) and isinstance(caught.value, ImportError)
    monkeypatch.setitem(sys.modules, "psutil", None)
    with pytest.raises(MissingExtraError) as caught:
        require_extra("compare")
    assert str(caught.value) == "scipy, psutil are not installed; type: pip install 'hf_v0init[compare]'"


COMMAND = "from hf_v0init.cli.main import main; main()"
MISSING = [
    ("datasets", ["hf-v0init", "translate", "nosuch.yaml"], "scripts"),
    ("PIL", ["hf-v0init", "images", "nosuch.yaml"], "images"),
    ("scipy", ["hf-v0init", "compare", "configs/compare/tiny.yaml", "--output_dir", "nosuch"], "compare"),
    ("matplotlib", ["hf-v0init", "saddle", "--figure", "m.png"], "compare"),
]


@pytest.mark.parametrize(("package", "argv", "extra"), MISSING)
def test_commands_end_with_one_line(package, argv, extra):
    done = run_hidden({package}, argv, COMMAND)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == f"error: {package} is not installed; type: pip install 'hf_v0init[{extra}]'\n"


def test_a_module_that_a_launcher_starts_ends_with_one_line():
    done = run_hidden({"datasets"}, ["x"], "runpy._run_module_as_main('hf_v0init.tasks.translation.script')")
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "datasets is not installed; type: pip install 'hf_v0init[scripts]'" in done.stderr


def test_the_base_installation_explains():
    explained = run_hidden(HIDDEN, ["hf-v0init", "explain", "--v0_decay_steps", "9"], COMMAND)
    assert explained.returncode == 0 and "min(1, t / 9)" in explained.stdout and explained.stderr == ""


@pytest.mark.slow
def test_the_base_installation_trains(tmp_path):
    train = f"""
import torch
from transformers import GPT2Config, GPT2LMHeadModel
from hf_v0init import V0InitTrainer, V0InitTrainingArguments
from hf_v0init.second_moment.state import read_second_moment
model = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_positions=8, n_embd=8, n_layer=1, n_head=1, bos_token_id=0, eos_token_id=0))
rows = [{{"input_ids": torch.arange(8) + i, "labels": torch.arange(8) + i}} for i in range(8)]
arguments = V0InitTrainingArguments({str(tmp_path)!r}, max_steps=2, v0_init="data_driven", use_cpu=True, report_to="none")
trainer = V0InitTrainer(model=model, args=arguments, train_dataset=rows)
trainer.train()
assert trainer.state.global_step == 2 and trainer.get_v0_report()
assert not {set(HIDDEN)!r} & {{name for name, module in sys.modules.items() if module is not None}}
"""
    trained = run_hidden(HIDDEN, ["x"], train)
    assert trained.returncode == 0, trained.stderr
