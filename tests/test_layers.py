"""Dependencies point one way, and the maths stays alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "hf_v0init"

# A file may import from its own row and from rows further down.
LAYERS = [
    ["trainer", "cli", "diagnostics"],
    ["trainer_gradients"],
    ["initialization", "arguments", "report", "model_card", "supported_runs", "safe_resume"],
    ["strategies", "gradient_statistics", "statistics_batches", "sharded_pass", "deepspeed_state", "enough_samples"],
    ["optimizer_state", "optimizer_choice", "element_samples"],
    ["optimizer_probe"],
    ["optimizer_layouts", "optimizer_table"],
    ["sharding", "run_preservation", "warmup_equivalence", "checkpoint_safety", "cost_model"],
    ["errors", "scales"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What each of these may not know, by top-level package or by word in the source.
FORBIDDEN = {
    "strategies": {"transformers", "accelerate", "datasets", "optimizer_state"},
    "gradient_statistics": {"transformers", "accelerate", "datasets", "optimizer_state"},
    "optimizer_state": {"transformers", "accelerate", "datasets", "strategies", "gradient_statistics"},
    "optimizer_choice": {"transformers", "accelerate", "datasets", "optimizer_state"},
    "optimizer_probe": {"transformers", "accelerate", "datasets", "optimizer_table"},
    "optimizer_layouts": {"transformers", "accelerate", "datasets"},
    "optimizer_table": {"torch", "numpy", "transformers", "accelerate"},
    "trainer_gradients": {"strategies", "initialization", "optimizer_state"},
    "initialization": {"transformers", "accelerate", "trainer", "trainer_gradients"},
    "warmup_equivalence": {"torch", "numpy", "transformers"},
    "cost_model": {"torch", "numpy", "transformers", "typer"},
    "enough_samples": {"transformers", "accelerate", "datasets", "optimizer_state"},
    "checkpoint_safety": {"torch", "numpy", "transformers"},
    "scales": {"torch", "numpy", "transformers"},
}


def imported_modules(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            module = node.module or ""
            if node.level or module.startswith("hf_v0init"):
                module = module.removeprefix("hf_v0init").lstrip(".")
                names |= {module.split(".")[0]} if module else {alias.name for alias in node.names}
            else:
                names.add(module.split(".")[0])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
    return names


@pytest.mark.parametrize("name", sorted(LEVEL))
def test_core_files_import_only_downwards(name):
    ours = imported_modules(PACKAGE / f"{name}.py") & set(LEVEL)
    upwards = {other for other in ours if LEVEL[other] < LEVEL[name]}
    assert not upwards, f"{name}.py imports {upwards}, which lies above it"


@pytest.mark.parametrize("name", sorted(set(LEVEL) - {"cli"}))
def test_core_files_do_not_know_what_is_built_on_them(name):
    assert not imported_modules(PACKAGE / f"{name}.py") & {"tasks", "comparison", "analysis", "benchmarks"}


@pytest.mark.parametrize("path", [*PACKAGE.glob("data/*.py"), *PACKAGE.glob("models/*.py")], ids=lambda p: p.stem)
def test_data_and_models_do_not_know_the_tasks_they_serve(path):
    assert not imported_modules(path) & {"tasks", "trainer", "comparison", "benchmarks"}


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_lower_files_do_not_know_what_they_must_not(name):
    assert not imported_modules(PACKAGE / f"{name}.py") & FORBIDDEN[name]


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").glob("*.py")), ids=lambda p: p.name)
def test_scripts_never_touch_optimizer_state(script):
    tree = ast.parse(script.read_text(encoding="utf-8"))
    touched = [
        node.lineno
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and node.attr == "state"
        and isinstance(node.value, (ast.Name, ast.Attribute))
        and getattr(node.value, "attr", getattr(node.value, "id", "")) == "optimizer"
    ]
    assert not touched, f"{script.name} touches optimizer.state in lines {touched}"
    assert "optimizer_state" not in imported_modules(script)


def test_nobody_but_scripts_and_cli_prints():
    for path in PACKAGE.rglob("*.py"):
        if path.name in ("cli.py", "script_support.py"):  # these two speak to a terminal
            continue
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not calls, f"{path.name} prints in lines {calls}"
