"""Headrace itself, everything on: a key with a rate limit, a 90/10 split of two versions, predictions logged
to Kafka, analytics and drift reading them, traces sampled as platform.env says; gateway → router → worker, or
the router's guest where cores are few."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx

from benchmarks.environments import CACHE, REPOSITORY
from benchmarks.load.requests import Endpoint
from benchmarks.parts import SERVING, batches, processes, running_models
from benchmarks.process_tree import Unavailable
from benchmarks.targets.peer import GRPC_PATH, MODEL
from benchmarks.targets.port import LOOPBACK, Front, Running
from benchmarks.workload import Dialect, Workload
from deploy.embedded import native
from deploy.embedded.process import EmbeddedError
from deploy.embedded.stack import Stack

READY_WITHIN_S = 60.0
#: Answers, each by another connection, after which every process of the gateway is taken to know a key.
_IN_A_ROW = 12
#: The limit is there and checked on every request; it is never reached.
RATE_LIMIT = 1_000_000


class HeadraceTarget:
    """The embedded stack on free ports with one worker, in a folder of its own."""

    name = "headrace"
    title = "Headrace"
    setup = (
        "gateway, router and one worker as processes; where cores are few, as many processes of gateway and "
        "router together as there are cores, each with a guest of the worker's that runs small models, and "
        "the worker's own; API key, rate limit, 90/10 split of two versions, prediction log to the embedded "
        "broker, analytics and drift consuming; traces sampled as shipped; the hot path compiled, where that "
        "is possible"
    )

    def __init__(
        self, *, home: Path = CACHE / "headrace" / "home", environment: Mapping[str, str] | None = None
    ):
        self._home = home
        # Compiled modules are used as `make up` uses them.
        self._environment = {"HEADRACE_NATIVE": os.environ.get("HEADRACE_NATIVE", "1"), **(environment or {})}
        self._fresh = True
        self._stack: Stack | None = None

    @property
    def stack(self) -> Stack:
        """The stack that runs."""
        if self._stack is None:
            raise Unavailable("is not running")
        return self._stack

    def install(self) -> None:
        """It runs in the caller's environment; its hot path is compiled for the sources as they are."""
        if self._environment["HEADRACE_NATIVE"] != "0":
            print(native.compiled(), flush=True)

    def versions(self) -> str:
        """The commit that is measured."""
        argv = ["git", "describe", "--always", "--abbrev=12", "--dirty=, with changes", "--exclude=*"]
        done = subprocess.run(argv, cwd=REPOSITORY, capture_output=True, text=True, check=False)
        compiled = self._environment["HEADRACE_NATIVE"] != "0" and native.find() is not None
        how = "compiled hot path" if compiled else "plain Python"
        return f"Headrace at {done.stdout.strip() or 'an unknown commit'}, {how}"

    @contextmanager
    def running(self, workload: Workload) -> Iterator[Running]:
        """Start the stack, push and deploy the model, make a key. State stays between the rounds of a run."""
        if self._fresh:
            shutil.rmtree(self._home, ignore_errors=True)
            self._fresh = False
        self._home.mkdir(parents=True, exist_ok=True)
        stack = self._stack = Stack.on_free_ports(self._home, workers=1, environment=self._environment)
        try:
            stack.start()
        except EmbeddedError as error:
            raise Unavailable(f"does not start: {error}") from error
        try:
            key = _deploy(stack, workload)
            yield Running(
                self._fronts(stack, key),
                lambda: processes(stack),
                serving_parts=SERVING,
                batches=lambda: batches(running_models(stack)),
            )
        finally:
            stack.stop()

    def _fronts(self, stack: Stack, key: str) -> Sequence[Front]:
        port = stack.configuration.ports["GATEWAY_HTTP_PORT"]
        grpc_port = stack.configuration.ports["GATEWAY_GRPC_PORT"]
        headers = (("Authorization", f"Bearer {key}"),)
        infer = f"/v2/models/{MODEL}/infer"

        def without_consumers() -> None:
            for part in ("analytics", "drift"):
                if part in stack.pids():
                    stack.kill(part, signal.SIGKILL, hold=True)

        def front(name: str, path: str, dialect: Dialect, *, consumers: bool = True) -> Front:
            endpoint = Endpoint(LOOPBACK, port, path, dialect, MODEL, headers)
            return Front(name, endpoint, None if consumers else without_consumers)

        return [
            front("Headrace", "/v1/predict", Dialect.NATIVE),
            front("Headrace, V2 JSON", infer, Dialect.V2_JSON),
            front("Headrace, V2 binary", infer, Dialect.V2_BINARY),
            Front("Headrace, gRPC", Endpoint(LOOPBACK, grpc_port, GRPC_PATH, Dialect.GRPC, MODEL, headers)),
            front("Headrace, analytics and drift stopped", "/v1/predict", Dialect.NATIVE, consumers=False),
        ]


def _deploy(stack: Stack, workload: Workload) -> str:
    """Push both versions, deploy them 90/10, wait until they serve; gives a key that may only predict."""
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    with httpx.Client(base_url=stack.rest_url, headers=headers, timeout=60) as client:
        client.post("/v1/models", json={"name": MODEL, "description": workload.title})
        # Versions are immutable and the home is kept between rounds: each workload has its own.
        offset = sum(ord(character) for character in workload.name)
        versions = [f"{workload.name}.{offset}.{number}" for number in (1, 2)]
        for version, model in zip(versions, workload.models, strict=True):
            if client.get(f"/v1/models/{MODEL}/versions/{version}").status_code == 200:
                continue
            _expect(
                client.post(
                    f"/v1/models/{MODEL}/versions",
                    data={"metadata": json.dumps({"version": version})},
                    files={"files": ("model.onnx", model)},
                )
            )
        shares = [{"version": versions[0], "weight": 90}, {"version": versions[1], "weight": 10}]
        _expect(client.put(f"/v1/deployments/{MODEL}", json={"versions": shares}))
        made = _expect(
            client.post(
                "/v1/keys", json={"name": "bench", "scopes": ["predict"], "rate_per_second": RATE_LIMIT}
            )
        )
        key = str(made.json()["key"])
        body, needed = workload.body(Dialect.NATIVE, 0, MODEL)
        wanted = {"authorization": f"Bearer {key}", **dict(needed)}
        deadline = time.monotonic() + READY_WITHIN_S
        for version in versions:
            asked = json.dumps({**json.loads(body), "version": version})
            answered = 0
            while answered < _IN_A_ROW:
                # Each by a connection of its own: several processes share the port and learn of the key.
                answer = httpx.post(f"{stack.rest_url}/v1/predict", content=asked, headers=wanted, timeout=60)
                answered = answered + 1 if answer.status_code == 200 else 0
                if not answered and time.monotonic() > deadline:
                    raise Unavailable(f"deployed, but answers {answer.status_code}: {answer.text[:300]}")
                time.sleep(0.02)
        return key


def _expect(answer: httpx.Response) -> httpx.Response:
    if not answer.is_success:
        raise Unavailable(f"{answer.request.method} {answer.request.url.path}: {answer.text[:300]}")
    return answer
