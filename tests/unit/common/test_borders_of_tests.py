"""The unit tests of a service stand on that service alone: elsewhere the others are not installed."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests.isolation import ROOT, SERVICES


def imported(path: Path) -> set[str]:
    """Every module that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def of_others(path: Path, service: str, seen: set[Path]) -> list[str]:
    """What `path` and the files of the tests that it imports take from other services."""
    seen.add(path)
    wrong: list[str] = []
    for name in sorted(imported(path)):
        words = name.split(".")
        if words[0] == "services" and set(words[1:2]) & (set(SERVICES) - {service}):
            wrong.append(f"{path.relative_to(ROOT)} imports {name}")
        file = ROOT.joinpath(*words).with_suffix(".py")
        if words[0] == "tests" and file.is_file() and file not in seen:
            wrong += of_others(file, service, seen)
    return wrong


@pytest.mark.parametrize("service", SERVICES)
def test_unit_tests_need_no_other_service(service: str) -> None:
    seen: set[Path] = set()
    folder = ROOT / "tests" / "unit" / service
    assert [wrong for path in sorted(folder.rglob("*.py")) for wrong in of_others(path, service, seen)] == []


def test_what_another_service_gives_is_found() -> None:
    path = ROOT / "tests" / "contract" / "test_attribute_bounds.py"
    assert of_others(path, "gateway", set())
    assert of_others(path, "registry", set())
