"""Pushes and deploys the example models: `python -m examples.register --url URL --key-file FILE`.

What is registered already is left alone, so that a second run only looks. Ends when every model answers.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from examples.catalogue import Example, ExampleVersion

READY_WITHIN_S = 120.0
NAMES = ("cancer", "digits", "minilm")


def register(client: httpx.Client, names: Sequence[str] = NAMES) -> None:
    """Push what is missing of `names`, deploy it, wait until it serves."""
    missing = [name for name in names if client.get(f"/v1/deployments/{name}").status_code != 200]
    if missing:
        # The training libraries take seconds to import: only a first run pays for them.
        for example in import_module("examples.catalogue").EXAMPLES:
            if example.name in missing:
                _push(client, example)
    for name in names:
        _wait_until_ready(client, name)


def _push(client: httpx.Client, example: Example) -> None:
    created = client.post("/v1/models", json={"name": example.name, "description": example.description})
    if created.status_code != 409:
        _expect(created)
    for version in example.versions:
        if client.get(f"/v1/models/{example.name}/versions/{version.version}").status_code == 404:
            _push_version(client, example, version)
    champion = example.versions[0].version
    _expect(client.put(f"/v1/models/{example.name}/aliases/champion", json={"version": champion}))
    weights = [{"version": v.version, "weight": v.weight} for v in example.versions]
    _expect(client.put(f"/v1/deployments/{example.name}", json={"versions": weights}))
    print(f"{example.name}: {', '.join(f'version {v.version} {v.weight:g}%' for v in example.versions)}")


def _push_version(client: httpx.Client, example: Example, version: ExampleVersion) -> None:
    with tempfile.TemporaryDirectory(prefix="headrace-example-") as folder, ExitStack() as stack:
        paths, metrics = version.build(Path(folder))
        metadata = {
            "version": version.version,
            "backend": example.backend,
            "metrics": metrics,
            "lineage": {"source_uri": f"examples/{example.name}.py"},
        }
        files = [("files", (path.name, stack.enter_context(path.open("rb")))) for path in paths]
        answer = client.post(
            f"/v1/models/{example.name}/versions", data={"metadata": json.dumps(metadata)}, files=files
        )
        _expect(answer)


def _wait_until_ready(client: httpx.Client, name: str) -> None:
    deadline = time.monotonic() + READY_WITHIN_S
    while client.get(f"/v2/models/{name}/ready").status_code != 200:
        if time.monotonic() > deadline:
            raise SystemExit(f"{name} was deployed but does not serve after {READY_WITHIN_S:g} s.")
        time.sleep(0.2)


def _expect(answer: httpx.Response) -> None:
    if not answer.is_success:
        raise SystemExit(f"{answer.request.method} {answer.request.url}: {answer.status_code} {answer.text}")


def main() -> int:
    """Read the arguments and register."""
    parser = argparse.ArgumentParser(prog="python -m examples.register", description=__doc__)
    parser.add_argument("--url", default="http://127.0.0.1:8000", help="where the gateway answers")
    parser.add_argument("--key-file", type=Path, default=Path(".headrace/admin.key"))
    parser.add_argument("--only", nargs="+", choices=NAMES, default=NAMES, help="not all of the models")
    arguments = parser.parse_args()
    key = arguments.key_file.read_text().strip()
    headers = {"authorization": f"Bearer {key}"}
    with httpx.Client(base_url=arguments.url, headers=headers, timeout=60) as client:
        register(client, arguments.only)
    return 0


if __name__ == "__main__":
    sys.exit(main())
