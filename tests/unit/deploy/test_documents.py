"""What the documents name is there: variables, commands with options, make's targets, modules, files."""

from __future__ import annotations

import importlib
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
from headrace_client.cli import app

from deploy.embedded.configuration import read_platform_env
from tests.fixtures import promql

ROOT = Path(__file__).resolve().parents[3]
SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
DOCUMENTS = (
    "README.md",
    "ARCHITECTURE.md",
    "deploy/README.md",
    "proto/README.md",
    "benchmarks/README.md",
)
#: Words of others, which look like our variables.
FOREIGN = {"RLIMIT_NICE", "SCHED_IDLE", "SO_REUSEPORT", "WIRE_JSON"}
_VARIABLE = re.compile(r"(?<![\w/.])([A-Z][A-Z0-9]*_[A-Z0-9_]*(?:\*(?!\*))?)(?![\w.])")
#: A list of alternatives: `list|show`.
_SEVERAL = re.compile(r"\w+(\|\w+)+")
#: A command in a code block, or between backticks.
_COMMAND = re.compile(r"(?:^ {4,}|`|\$\()(?:\w+=\$\()?headrace ((?:\\\n|[^`\n#])+)", re.MULTILINE)


def text_of(document: str) -> str:
    return (ROOT / document).read_text()


def known_variables() -> set[str]:
    """Those of settings, of platform.env, and what our own code and make ask for by name."""
    kinds = [importlib.import_module(f"services.{service}.settings").Settings for service in SERVICES]
    known = {name.upper() for kind in kinds for name in kind.model_fields} | set(read_platform_env())
    asking = [
        *(ROOT / "deploy").rglob("*.py"),
        *(ROOT / "services/common").rglob("*.py"),
        *(ROOT / "client").rglob("*.py"),
        *(ROOT / "tests/fixtures").glob("*.py"),
        *(ROOT / "benchmarks").rglob("*.py"),
    ]
    for file in asking:
        known |= set(re.findall(r"[\"']([A-Z][A-Z0-9_]+)[\"']", file.read_text()))
    scripts = (text_of(name) for name in ("deploy/venv.sh", "deploy/docker-compose.yml", "Makefile"))
    for script in scripts:
        known |= set(re.findall(r"\$[{(]?([A-Z][A-Z0-9_]+)", script))
    # f"HEADRACE_{name}" in configuration.py.
    return known | {"HEADRACE_FRONTS", "HEADRACE_GUESTS"}


def told_to_operators() -> Iterator[tuple[str, str]]:
    """Every text that names variables, with where it stands."""
    for document in DOCUMENTS:
        yield document, text_of(document)
    for rule in promql.alerts():
        yield rule["alert"], " ".join(rule["annotations"].values())
    for dashboard in promql.dashboards().values():
        for panel in promql.panels(dashboard):
            yield panel["title"], panel.get("description", "")


def test_every_variable_that_a_text_names_is_read_by_somebody() -> None:
    known = known_variables() | FOREIGN

    def is_known(name: str) -> bool:
        if name.endswith("*"):
            return any(one.startswith(name[:-1]) for one in known)
        return name in known

    named = {(name, where) for where, text in told_to_operators() for name in _VARIABLE.findall(text)}
    assert {("LOG_MAX_BYTES", "HeadraceEventLogBacklog"), ("HEADRACE_WORKERS", "README.md")} <= named
    assert {one for one in named if not is_known(one[0])} == set()


def commands(document: str) -> list[list[str]]:
    """The words behind `headrace` of every command in it; `list|show` is two commands."""
    found: list[list[str]] = []
    for command in _COMMAND.findall(text_of(document)):
        words = shlex.split(command.replace("\\\n", " ").replace(")", " ").replace("…", ""), posix=True)
        head = next((at for at, word in enumerate(words) if word in {">", "|", "<"}), len(words))
        several = next((at for at, word in enumerate(words[:head]) if _SEVERAL.fullmatch(word)), None)
        if several is None:
            found.append(words[:head])
        else:
            found += [[*words[:several], one] for one in words[several].split("|")]
    return found


def complaint(words: list[str]) -> str | None:
    """What is wrong with a command, None where it could be said."""
    command: Any = typer.main.get_command(app)
    while words and getattr(command, "commands", None):
        if words[0] not in command.commands:
            return f"no {words[0]}"
        command, words = command.commands[words[0]], words[1:]
    options = {option for parameter in command.params for option in parameter.opts}
    unknown = [word for word in words if re.match(r"--?[a-z]", word) and word not in options]
    return f"no {unknown[0]}" if unknown else None


def test_a_command_that_does_not_exist_is_noticed() -> None:
    assert complaint(["rollouts", "begin", "churn"]) == "no begin"
    assert complaint(["deploy", "churn", "1=100", "--slowly"]) == "no --slowly"


@pytest.mark.parametrize(("document", "least"), [("README.md", 25), ("ARCHITECTURE.md", 0)])
def test_every_command_can_be_said(document: str, least: int) -> None:
    said = commands(document)
    assert len(said) >= least
    assert [(" ".join(words), wrong) for words in said if (wrong := complaint(words))] == []


@pytest.mark.parametrize("document", DOCUMENTS)
def test_targets_modules_and_links_exist(document: str) -> None:
    text = text_of(document)
    code = "\n".join([*re.findall(r"`([^`\n]+)`", text), *re.findall(r"^ {4}.*$", text, re.MULTILINE)])
    rules = re.findall(r"^([a-z][a-z -]*):", text_of("Makefile"), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    assert set(re.findall(r"^ *(?:[A-Z_]+=\S+ )*make ([a-z][a-z-]*)", code, re.MULTILINE)) <= targets
    for module in re.findall(r"python -m ([\w.]+)", code):
        if module.split(".")[0] in {"services", "deploy", "examples", "benchmarks", "tests"}:
            path = ROOT.joinpath(*module.split("."))
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), module
    for link in re.findall(r"\]\(([^)]+)\)", text):
        path, _, anchor = link.partition("#")
        if link.startswith("http"):
            continue
        leads_to = (ROOT / document).parent / path if path else ROOT / document
        assert leads_to.exists(), link
        headings = re.findall(r"^#+ (.+)$", leads_to.read_text(), re.MULTILINE) if anchor else []
        anchors = {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}
        assert not anchor or anchor in anchors, link


def test_every_contract_is_listed() -> None:
    listed = re.findall(r"^\| `(\S+\.proto)` \|", text_of("proto/README.md"), re.MULTILINE)
    there = [str(path.relative_to(ROOT / "proto")) for path in (ROOT / "proto").rglob("*.proto")]
    assert sorted(listed) == sorted(there)


def test_extras_are_listed() -> None:
    project = tomllib.loads(text_of("services/common/pyproject.toml"))["project"]
    told = re.search(r"Extras of `headrace-common`\*\* \(([^)]+)\)", text_of("ARCHITECTURE.md"))
    assert told is not None
    assert sorted(re.findall(r"`(\w+)`", told[1])) == sorted(project["optional-dependencies"])
