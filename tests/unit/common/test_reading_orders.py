"""The docstring of every package names its files, so that its reading order can be trusted."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[3]
ROOTS = ("services", "client/headrace_client", "deploy/embedded")
#: Named for what they are: the package, its entry, what Alembic finds by itself.
UNNAMED = {"__init__", "__main__", "migrations"}

PACKAGES = sorted(
    {
        path.parent.relative_to(REPOSITORY)
        for root in ROOTS
        for path in (REPOSITORY / root).rglob("__init__.py")
        if "migrations" not in path.parts
    }
)


def modules(package: Path) -> set[str]:
    files = {path.stem for path in package.glob("*.py")}
    folders = {path.parent.name for path in package.glob("*/__init__.py")}
    return (files | folders) - UNNAMED


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_a_package_names_its_modules_and_no_others(package: Path) -> None:
    there = modules(REPOSITORY / package)
    told = ast.get_docstring(ast.parse((REPOSITORY / package / "__init__.py").read_text())) or ""
    assert {name for name in there if not re.search(rf"\b{name}\b", told)} == set()
    assert set(re.findall(r"(?<![\w/])(\w+)\.py\b", told)) - UNNAMED <= there


def test_packages_are_found() -> None:
    assert len(PACKAGES) > 20
