"""The unit tests of a service stand on what that service is installed with: where it is installed alone,
nothing else is there. tests/isolation.py proves it, in minutes; this says it at once."""

from __future__ import annotations

import ast
import re
import sys
from functools import cache
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from tests.isolation import MAKES_INPUTS, ROOT, RUNNER, SERVICES

OURS = {"headrace", "open_inference", "services", "tests"}


@cache
def imported(path: Path) -> frozenset[str]:
    """Every module that the file imports, wherever in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(found)


@cache
def distributions() -> dict[str, list[str]]:
    return {module: [plain(name) for name in names] for module, names in packages_distributions().items()}


def plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def installed(service: str) -> set[str]:
    """What the environment of `service` is asked to hold."""
    lock = (ROOT / "requirements" / f"{service}.txt").read_text()
    return {plain(name) for name in (*re.findall(r"^[\w.-]+", lock, re.MULTILINE), *RUNNER)} | {
        plain(name) for name in MAKES_INPUTS.get(service, ())
    }


def brings(service: str, words: list[str]) -> bool:
    """Whether the module of these words is there where `service` is installed alone."""
    if words[0] == "services":
        return not set(words[1:2]) & (set(SERVICES) - {service})
    if words[0] in OURS or words[0] in sys.stdlib_module_names:
        return True
    return bool(installed(service) & set(distributions().get(words[0], [])))


def strangers(path: Path, service: str, seen: set[Path]) -> list[str]:
    """What `path`, and the files of the tests that it imports, need and `service` does not bring."""
    seen.add(path)
    wrong: set[str] = set()
    further: list[str] = []
    for name in imported(path):
        words = name.split(".")
        if not brings(service, words):
            wrong.add(f"{path.relative_to(ROOT)} imports {name}")
        file = ROOT.joinpath(*words).with_suffix(".py")
        if words[0] == "tests" and file.is_file() and file not in seen:
            further += strangers(file, service, seen)
    return sorted(wrong) + further


@pytest.mark.parametrize("service", SERVICES)
def test_unit_tests_need_nothing_else(service: str) -> None:
    seen: set[Path] = set()
    folder = ROOT / "tests" / "unit" / service
    assert [wrong for path in sorted(folder.rglob("*.py")) for wrong in strangers(path, service, seen)] == []


def test_what_else_is_needed_is_found() -> None:
    path = ROOT / "tests" / "contract" / "test_attribute_bounds.py"
    assert strangers(path, "gateway", set())
    assert strangers(path, "registry", set())
    assert strangers(ROOT / "tests" / "fixtures" / "onnx_files.py", "router", set())
