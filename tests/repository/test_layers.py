"""Dependencies point one way, and the maths stays alone."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "hf_v0init"

# A file may import from its own row and from rows further down. A row names folders and flat modules of the package.
LAYERS = [
    ["cli", "__main__"],
    ["compare", "analysis"],
    ["tasks"],
    ["trainer", "loop"],
    ["diagnostics"],
    ["hook"],
    ["records"],
    ["estimation", "second_moment"],
    ["settings", "sharding", "state_guard", "plots"],
    ["method", "extras"],
    ["errors", "third_party_messages", "yaml_file"],
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# What may not be loaded by these, not even through others.
FORBIDDEN = {
    "method": {"torch", "numpy", "transformers", "accelerate", "datasets"},
    "settings": {"torch", "numpy", "transformers", "accelerate", "datasets"},
    "second_moment.table": {"torch", "numpy", "transformers", "accelerate", "datasets"},
    "records.checkpoints": {"torch", "numpy", "transformers", "accelerate", "datasets"},
    "sharding": {"transformers", "accelerate", "datasets"},
    "estimation": {"transformers", "accelerate", "datasets"},
    "second_moment": {"transformers", "accelerate", "datasets"},
    "hook": {"transformers", "accelerate", "datasets"},
    "compare": {"torch", "transformers", "accelerate", "datasets"},
}


def get_module(path: Path) -> tuple[str, ...]:
    """The dotted name of a file below `hf_v0init`, without it: ("second_moment", "state")."""
    return path.relative_to(PACKAGE).with_suffix("").parts


def find_imports(path: Path, *, at_load: bool = False) -> tuple[set[tuple[str, ...]], set[str]]:
    """The modules of the package, and other top-level packages, that a file imports; with `at_load` only those outside of
    functions."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    ours, others = set(), set()
    nodes = list(ast.walk(tree))
    if at_load:
        inside = {id(n) for f in nodes if isinstance(f, ast.FunctionDef) for n in ast.walk(f)}
        inside |= {
            id(n) for f in nodes if isinstance(f, ast.If) and "TYPE_CHECKING" in ast.dump(f.test) for n in ast.walk(f)
        }
        nodes = [node for node in nodes if id(node) not in inside]
    for node in nodes:
        if isinstance(node, ast.Import):
            others |= {alias.name.split(".")[0] for alias in node.names}
        if not isinstance(node, ast.ImportFrom):
            continue
        module = tuple((node.module or "").split(".")) if node.module else ()
        if node.level:
            module = get_module(path)[: -node.level] + module
        elif module and module[0] == "hf_v0init":
            module = module[1:]
        else:
            others.add(module[0])
            continue
        for alias in node.names:
            submodule = PACKAGE.joinpath(*module, alias.name)
            is_module = submodule.with_suffix(".py").is_file() or submodule.is_dir()
            ours.add((*module, alias.name) if is_module else module)
    return ours, others


def get_files(name: str) -> list[Path]:
    place = PACKAGE.joinpath(*name.split("."))
    return sorted(place.rglob("*.py")) if place.is_dir() else [place.with_suffix(".py")]


def find_all_loaded(name: str) -> dict[str, str]:
    """Other packages that importing anything in `name` loads, through whatever of ours: package -> the file that does."""
    waiting, seen, loaded = get_files(name), set(), {}
    while waiting:
        path = waiting.pop()
        if path in seen or not path.is_file():
            continue
        seen.add(path)
        ours, others = find_imports(path, at_load=True)
        loaded |= {other: str(path.relative_to(ROOT)) for other in others if other not in loaded}
        for module in ours:
            for depth in range(1, len(module) + 1):
                place = PACKAGE.joinpath(*module[:depth])
                waiting += [place / "__init__.py", place.with_suffix(".py")]
    return loaded


def test_every_place_has_a_layer():
    found = {get_module(path)[0] for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert found == set(LEVEL)


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: "/".join(get_module(p)))
def test_files_import_only_downwards(path):
    if path == PACKAGE / "__init__.py":
        pytest.skip("names are loaded when they are used")
    level = LEVEL[get_module(path)[0]]
    ours, _ = find_imports(path)
    upwards = {".".join(other) for other in ours if other and LEVEL[other[0]] < level}
    assert not upwards, f"{path.relative_to(ROOT)} imports {upwards}, which lies above it"


@pytest.mark.parametrize("name", sorted(FORBIDDEN))
def test_nothing_loads_what_it_must_not_even_through_others(name):
    loaded = find_all_loaded(name)
    assert not {package: file for package, file in loaded.items() if package in FORBIDDEN[name]}


def test_the_maths_knows_no_optimizer():
    for path in get_files("estimation"):
        assert not [module for module in find_imports(path)[0] if module[0] == "second_moment"], path.name


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
    assert "hf_v0init.second_moment" not in script.read_text(encoding="utf-8")


def test_nobody_but_scripts_prints():
    for path in PACKAGE.rglob("*.py"):
        if "tasks" in path.parts and path.name.endswith(
            ("script_support.py", "script.py")
        ):  # these speak to a terminal
            continue
        calls = [
            node.lineno
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "print"
        ]
        assert not calls, f"{path.name} prints in lines {calls}"
