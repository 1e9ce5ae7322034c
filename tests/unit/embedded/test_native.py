"""What is compiled, and when a compiled copy counts. Compiling itself is left to `make test-native`."""

from __future__ import annotations

import ast
import re
import sys
from pathlib import Path

import pytest

from deploy.embedded import behind, native
from deploy.embedded.configuration import REPOSITORY
from deploy.embedded.service import ServiceProcess
from deploy.embedded.stack import Stack


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    for name in ("services/router/call.py", "proto/headrace/v1/tensor_pb2.pyi", "pyproject.toml"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("one = 1\n")
    return tmp_path


def compiled(repository: Path) -> Path:
    copy = repository / ".headrace" / "native" / native.digest(repository)
    (copy / "services").mkdir(parents=True)
    return copy


@pytest.mark.parametrize(
    "edited", ["services/router/call.py", "services/router/new.py", "proto/headrace/v1/tensor_pb2.pyi"]
)
def test_a_copy_counts_only_for_the_sources_that_it_was_made_of(repository: Path, edited: str) -> None:
    assert native.find(repository) is None
    copy = compiled(repository)
    assert native.find(repository) == copy
    (repository / edited).write_text("one = 2\n")
    assert native.find(repository) is None


def test_a_service_runs_the_copy_only_where_it_may(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def service(*, compiled: bool) -> ServiceProcess:
        return ServiceProcess(
            "router", tmp_path, module="services.router", ports=(1,), health_ports=(1,),
            environment=lambda: {"PYTHONPATH": "sources"}, compiled=compiled,
        )  # fmt: skip

    monkeypatch.setattr(native, "find", lambda: tmp_path / "copy")
    command = service(compiled=True).command()
    assert command.cwd == tmp_path / "copy"
    assert command.env["PYTHONPATH"] == f"{tmp_path / 'copy'}:sources"
    assert service(compiled=False).command().cwd == REPOSITORY
    monkeypatch.setattr(native, "find", lambda: None)
    command = service(compiled=True).command()
    assert command.cwd == REPOSITORY
    assert command.env["PYTHONPATH"] == "sources"


def test_without_a_compiler_a_sentence_says_so_and_nothing_fails(
    monkeypatch: pytest.MonkeyPatch, repository: Path
) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    assert native.compiled(repository) == (
        "The hot path runs as plain Python: there is no C compiler (no-such-compiler)."
    )
    assert native.find(repository) is None


def test_a_failure_is_told_until_a_source_changes(monkeypatch: pytest.MonkeyPatch, repository: Path) -> None:
    monkeypatch.setattr(native, "missing", lambda: "")
    monkeypatch.setattr(sys, "executable", "/bin/false")
    said = native.compiled(repository)
    assert said.startswith("The hot path runs as plain Python: compiling failed; see ")
    assert native.failure(repository) in said
    assert list((repository / ".headrace" / "native").glob(".building*")) == []
    (repository / "services/router/call.py").write_text("one = 2\n")
    assert native.failure(repository) == ""


def test_an_image_compiles_what_it_has_of_the_sources(tmp_path: Path) -> None:
    for path in (*native.GROUPS["frames"], *native.GROUPS["router"]):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    assert set(native.present(tmp_path)) == {"frames", "router"}


def test_the_images_of_all_services_with_a_hot_path_are_compiled() -> None:
    dockerfile = (REPOSITORY / "deploy" / "Dockerfile").read_text()
    of_services = {path.split("/")[1] for group in native.GROUPS.values() for path in group} - {"common"}
    (said,) = re.findall(r'case "\$\{NATIVE\}-\$\{SERVICE\}" in (\S+)\)', dockerfile)
    assert {choice.removeprefix("1-") for choice in said.split("|")} == of_services


def test_a_stack_is_renewed_once_what_it_was_started_from_is_compiled(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked: list[str] = []

    class Running(Stack):
        def renew(self, timeout: float = 0.0) -> bool:
            asked.append("renewed")
            return True

    stack = Running({"HEADRACE_HOME": str(tmp_path)})
    monkeypatch.setattr(native, "build", lambda: tmp_path)
    monkeypatch.setattr(native, "find", lambda: None)  # a source was edited while they were compiled
    assert not behind.compile_and_renew(stack)
    assert asked == []
    monkeypatch.setattr(native, "find", lambda: tmp_path)
    assert behind.compile_and_renew(stack)
    assert asked == ["renewed"]


PATHS = [path for group in native.GROUPS.values() for path in group]


def test_what_is_compiled_is_there() -> None:
    assert [path for path in PATHS if not (REPOSITORY / path).is_file()] == []


def test_no_default_of_a_compiled_class_is_forgotten() -> None:
    """mypyc drops a class attribute's None where its type is a protocol that it compiles as well, and cannot
    have two names in one assignment there."""
    modules = {path: ast.parse((REPOSITORY / path).read_text()) for path in PATHS}
    classes = [node for tree in modules.values() for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    protocols = {node.name for node in classes if any(ast.unparse(base) == "Protocol" for base in node.bases)}
    assert len(protocols) > 5
    forgotten = [
        f"{node.name}.{ast.unparse(line)}"
        for node in classes
        for line in node.body
        if isinstance(line, ast.AnnAssign)
        and line.value is not None
        and {name.id for name in ast.walk(line.annotation) if isinstance(name, ast.Name)} & protocols
    ]
    assert forgotten == []


def test_no_trait_has_defaults() -> None:
    """mypyc forgets all of them."""
    nodes = [node for path in PATHS for node in ast.walk(ast.parse((REPOSITORY / path).read_text()))]
    classes = [node for node in nodes if isinstance(node, ast.ClassDef)]
    traits = [node for node in classes if "trait" in map(ast.unparse, node.decorator_list)]
    assert traits
    lines = [line for node in traits for line in node.body]
    assert not any(isinstance(line, ast.Assign) for line in lines)
    assert not any(isinstance(line, ast.AnnAssign) and line.value is not None for line in lines)
