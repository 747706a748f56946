"""The package of the metrics reads no clock, no environment and no database."""

import ast
from pathlib import Path

import pytest

from tutormax_assets import metrics

ALLOWED = {
    "collections",
    "dataclasses",
    "dataframely",
    "datetime",
    "functools",
    "hashlib",
    "itertools",
    "operator",
    "polars",
    "pydantic",
    "scipy",
    "statistics",
    "tomllib",
    "typing",
}
CLOCK_AND_FILES = {"now", "today", "utcnow", "open", "environ", "getenv", "read_text", "collect"}

MODULES = sorted(Path(str(metrics.__file__)).parent.rglob("*.py"))


def imported(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("." * node.level + (node.module or ""))
    return names


def foreign(names: set[str]) -> set[str]:
    return {
        name
        for name in names
        if name.split(".")[0] not in ALLOWED
        and not f"{name}.".startswith(("tutormax_assets.metrics.", "tutormax_assets.errors."))
    }


def used_names(tree: ast.Module) -> set[str]:
    nodes = list(ast.walk(tree))
    return {n.attr for n in nodes if isinstance(n, ast.Attribute)} | {
        n.id for n in nodes if isinstance(n, ast.Name)
    }


def test_all_modules_are_looked_at() -> None:
    assert {
        "changes",
        "policy",
        "quality",
        "reasons",
        "schemas",
        "tiers",
        "window",
    } <= {path.stem for path in MODULES}


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_imports_nothing_impure(path: Path) -> None:
    assert foreign(imported(ast.parse(path.read_text()))) == set()


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.stem)
def test_a_module_asks_no_clock_opens_nothing_and_stays_lazy(path: Path) -> None:
    assert used_names(ast.parse(path.read_text())) & CLOCK_AND_FILES == set()


@pytest.mark.parametrize(
    ("line", "name"),
    [
        ("import os", "os"),
        ("from os import environ", "os"),
        ("import time", "time"),
        ("import dagster as dg", "dagster"),
        ("from tutormax_assets.settings import Settings", "tutormax_assets.settings"),
        ("from tutormax_assets import metrics_table", "tutormax_assets"),
        ("def f():\n    import sqlalchemy.orm", "sqlalchemy.orm"),
        ("from . import policy", "."),
    ],
)
def test_an_impure_import_is_noticed(line: str, name: str) -> None:
    assert foreign(imported(ast.parse(line))) == {name}


@pytest.mark.parametrize(
    "line", ["import polars as pl", "from tutormax_assets.metrics.policy import Policy"]
)
def test_a_pure_import_passes(line: str) -> None:
    assert foreign(imported(ast.parse(line))) == set()
