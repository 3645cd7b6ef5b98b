"""The configurations under the paper's name, and the plans of its tables, run the paper's method."""

from pathlib import Path

import pytest
import yaml

from hf_v0init import V0InitArguments
from hf_v0init.compare.planning.plan import read_plan

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FULL_SIZE = sorted(CONFIGS.glob("*/*_paper.yaml"))
FULL_SIZE = [path for path in FULL_SIZE if path.parent.name != "compare"]
TABLES = sorted((CONFIGS / "paper").glob("table_*.yaml"))


def read_v0(flags: dict) -> V0InitArguments:
    """The v0 settings among a run's flags, resolved as a Trainer resolves them."""
    return V0InitArguments(**{name: flags[name] for name in V0InitArguments.__dataclass_fields__ if name in flags})


@pytest.mark.parametrize("path", FULL_SIZE, ids=lambda path: path.stem)
def test_every_configuration_of_the_paper_takes_its_preset(path):
    flags = yaml.safe_load(path.read_text(encoding="utf-8"))
    settings = read_v0(flags)
    assert flags["v0_preset"] == "paper"
    assert (settings.v0_init, settings.v0_estimator, settings.v0_num_samples) == ("data_driven", "per_sample", 5000)
    assert settings.v0_scale == 1.0 and not settings.v0_include_bias_and_norm


@pytest.mark.parametrize("pocket", [False, True], ids=["full", "small"])
@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_every_run_of_the_papers_tables_takes_v0_from_single_samples(path, pocket, monkeypatch):
    monkeypatch.chdir(CONFIGS.parent)
    plan = read_plan(path, pocket=pocket)
    assert plan.runs
    for run in plan.runs:
        settings = read_v0(run.arguments)
        if settings.v0_init == "data_driven":
            assert settings.v0_estimator == "per_sample", run.name
        if settings.v0_init == "random" and path.stem != "table_06":  # which is over the scale
            assert settings.v0_scale == 100.0, run.name
