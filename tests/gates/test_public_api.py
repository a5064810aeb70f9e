from __future__ import annotations

import ast
import inspect
import re
from pathlib import Path

import pytest

import shardpoint
from shardpoint import errors
from tests.gates.sources import PACKAGE

LISTED = Path(__file__).with_name("public_api.txt").read_text(encoding="utf-8").split()

# The original's parameters, in the original's order.
SIGNATURES = {
    "save_checkpoint": "save_dir booster model optimizer lr_scheduler epoch step batch_size coordinator",
    "load_checkpoint": "load_dir booster model optimizer lr_scheduler",
    "save_json": "data file_path",
    "load_json": "file_path",
}


def test_the_exported_names_are_the_listed_ones() -> None:
    assert shardpoint.__all__ == LISTED, (
        "changing what users can import is a change of the public API: say so in changes/"
    )


@pytest.mark.parametrize("name", LISTED)
def test_every_exported_name_resolves_and_is_listed_by_dir(name: str) -> None:
    assert getattr(shardpoint, name) is not None
    assert name in dir(shardpoint)


def test_every_error_is_exported() -> None:
    own = {name for name, cls in errors.error_classes().items() if cls.__module__ == errors.__name__}
    assert own <= set(LISTED)


def test_type_checkers_see_the_same_names() -> None:
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module for node in guarded.body if isinstance(node, ast.ImportFrom) for alias in node.names
    }
    assert set(seen) == set(LISTED) - {"__version__"}
    homes: dict[str, str] = vars(shardpoint)["_HOMES"]
    assert {name: homes.get(name, "shardpoint.errors") for name in seen} == seen


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="has no attribute 'save_chekpoint'"):
        _ = shardpoint.save_chekpoint


@pytest.mark.parametrize("name", SIGNATURES)
def test_the_four_functions_keep_the_originals_signatures(name: str) -> None:
    parameters = inspect.signature(getattr(shardpoint, name)).parameters
    assert list(parameters) == SIGNATURES[name].split()
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}


def test_the_version_is_a_release() -> None:
    assert re.fullmatch(r"\d+\.\d+\.\d+", shardpoint.__version__)
