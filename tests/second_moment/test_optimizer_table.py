"""The table: every optimizer has its row, and the refused ones are refused with the reason that was measured."""

import subprocess
import sys
import warnings

import pytest
from optimizer_cases import (
    CASES,
    LR,
    REFUSED_ROWS,
    find_row_of_optim,
    load,
    make_parameter,
)
from torch import nn
from trainers import make_arguments
from transformers.training_args import OptimizerNames

from hf_v0init import InputError, V0InitTrainer
from hf_v0init.second_moment.formats import FORMATS
from hf_v0init.second_moment.state import find_format
from hf_v0init.second_moment.table import (
    ROWS,
    SUPPORTED_ROWS,
    find_row,
)

# ---- the table itself ------------------------------------------------------------------------------------------------------------


def test_every_optim_value_has_one_row_and_none_is_invented():
    named = [value for row in ROWS for value in row.optim]
    assert sorted(named) == sorted(name.value for name in OptimizerNames)
    papers = {"SGD", "Adam", "AdamW", "AdaBound", "RAdam", "AdaBelief", "RMSprop", "AMSGrad"}
    assert papers <= {row.name for row in ROWS}


def test_every_supported_row_has_a_case_and_a_layout():
    assert {(row.name, row.package) for row in SUPPORTED_ROWS} == {case.row for case in CASES}
    assert all(row.format in FORMATS for row in SUPPORTED_ROWS)
    for name in {name for row in ROWS for name in row.classes}:
        rows = [row for row in ROWS if name in row.classes]
        assert len({(row.format, row.key, row.beta2, row.starts, bool(row.refusal)) for row in rows}) == 1, name


@pytest.mark.parametrize("row", [row for row in ROWS if not row.is_probed], ids=lambda row: f"{row.name}-{row.package}")
def test_the_classes_named_exist(row):
    """Where the package is installed; the old home of torchao's optimizers does not."""
    for name in row.classes:
        if ".prototype." in name:
            continue
        module, _, class_name = name.rpartition(".")
        found = load(f"{module}:{class_name}")
        assert f"{found.__module__}.{found.__qualname__}" in row.classes


@pytest.mark.parametrize(
    "value", [name.value for name in OptimizerNames if not find_row_of_optim(name.value).is_probed]
)
def test_optim_values_lead_to_the_class_of_their_row(value, tmp_path):
    """What transformers builds for the value is a class that the row names."""
    args = make_arguments(tmp_path, optim=value, optim_target_modules="all-linear")
    model = nn.ModuleDict({"linear": nn.Linear(8, 8)})
    try:
        built, _ = V0InitTrainer.get_optimizer_cls_and_kwargs(args, model)
    except (ImportError, ValueError) as error:
        pytest.skip(f"transformers cannot build it here: {error}")
    assert f"{built.__module__}.{built.__qualname__}" in find_row_of_optim(value).classes


def test_command_prints_the_table_without_torch():
    code = "import sys; sys.argv = ['x', 'optimizers']; from hf_v0init.cli.main import main\ntry: main()\nexcept SystemExit as e: assert e.code == 0\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "AdEMAMix" in done.stdout and "refused" in done.stdout


# ---- refusals -------------------------------------------------------------------------------------------------------


REFUSED = [
    ("torch.optim:SGD", {}, "no second moment"),
    ("torch.optim:Adafactor", {}, "no effect"),
    ("transformers.optimization:Adafactor", {"scale_parameter": False, "relative_step": False}, "no effect"),
    ("optimi:StableAdamW", {}, "no effect"),
    ("pytorch_optimizer:StableAdamW", {}, "no effect"),
    ("bitsandbytes.optim:Lion", {}, "no second moment"),
    ("bitsandbytes.optim:PagedLion8bit", {}, "no second moment"),
    ("schedulefree:SGDScheduleFree", {}, "no second moment"),
    ("galore_torch:GaLoreAdamW", {}, "projected"),
    ("galore_torch:GaLoreAdamW8bit", {}, "projected"),
    ("galore_torch:GaLoreAdafactor", {"scale_parameter": False, "relative_step": False}, "projected"),
    ("apollo_torch:APOLLOAdamW", {}, "projected"),
]


@pytest.mark.parametrize(("path", "options", "words"), REFUSED, ids=lambda x: x if isinstance(x, str) else "")
def test_refused_rows_raise_their_reason(path, options, words):
    optimizer_class = load(path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        optimizer = optimizer_class([make_parameter()], lr=LR, **options)
    with pytest.raises(InputError, match=words) as caught:
        find_format(optimizer)
    row = find_row(f"{optimizer_class.__module__}.{optimizer_class.__qualname__}")
    assert row.refusal in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("path", "words"), [("lomo_optim:Lomo", "no second moment"), ("lomo_optim:AdaLomo", "row and column means")]
)
def test_lomo_is_refused(path, words):
    optimizer_class = load(path)  # whose constructor needs a GPU
    with pytest.raises(InputError, match=words):
        find_format(optimizer_class.__new__(optimizer_class))


def test_every_refused_row_is_tried():
    tried = {path for path, *_ in REFUSED} | {"lomo_optim:Lomo", "lomo_optim:AdaLomo"}
    homes = {path.split(":")[0].split(".")[0] for path in tried}
    assert {row.classes[0].split(".")[0] for row in REFUSED_ROWS} == homes
