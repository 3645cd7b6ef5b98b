"""The names of `hf_v0init` are there, for programs and for type checkers alike; `make types` checks their types."""

import ast
import importlib
from importlib.resources import files
from pathlib import Path

import pytest

import hf_v0init

PACKAGE = Path(hf_v0init.__file__).parent
TYPED_USAGE = Path(__file__).with_name("typed_usage.py")


def find_names_for_type_checkers() -> dict[str, str]:
    """Name -> module below `hf_v0init`, from the imports under `if TYPE_CHECKING`."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test))
    return {alias.asname: node.module for node in block.body for alias in node.names}


def test_type_checkers_see_the_names_that_programs_get():
    assert find_names_for_type_checkers() == hf_v0init._HOME


@pytest.mark.parametrize("name", hf_v0init.__all__)
def test_every_name_is_where_it_is_said_to_be(name):
    module = importlib.import_module(f"hf_v0init.{hf_v0init._HOME[name]}")
    assert getattr(hf_v0init, name) is getattr(module, name)
    assert name in dir(hf_v0init)


def test_every_name_is_in_the_typed_program():
    tree = ast.parse(TYPED_USAGE.read_text(encoding="utf-8"))
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == "hf_v0init"
        for alias in node.names
    }
    assert imported == set(hf_v0init.__all__)


def test_the_package_says_that_it_has_types():
    assert files("hf_v0init").joinpath("py.typed").is_file()


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="'hf_v0init' has no attribute 'V0Trainer'"):
        hf_v0init.V0Trainer  # noqa: B018
