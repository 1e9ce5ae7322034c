"""What somebody on call sees of a running platform: traces, metrics and logs, from all services at once."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import grpc
import httpx
import numpy as np
import pytest
from onnx import TensorProto, helper
from open_inference.open_inference_pb2 import ModelInferRequest
from open_inference.open_inference_pb2_grpc import GRPCInferenceServiceStub
from prometheus_client.parser import text_string_to_metric_families

from deploy.embedded.stack import Stack
from services.common.bus import KafkaBus, Record
from services.common.topics import PREDICTIONS
from tests.fixtures import promql
from tests.fixtures.onnx_files import model_bytes, value
from tests.fixtures.otlp import OtlpReceiver, ReceivedSpan, otlp
from tests.fixtures.waiting import PATIENCE_S, until

__all__ = ["otlp"]

SERVICES = ("gateway", "router", "worker", "registry", "analytics", "drift")
#: What a prediction passes through, the consumers of its event included.
ON_THE_WAY = {"gateway", "router", "worker", "analytics", "drift"}
PARTS = ("gateway", "router", "worker-0", "registry", "analytics", "drift")
NEVER_SAMPLED = "00"
SAMPLED = "01"


def brittle() -> bytes:
    """y = x below 1, and a failure of the model's own from there on: FP32 [batch, 1] → FP32 [batch, 1]. It
    makes 1 + ⌊x⌋ columns of x and multiplies them with a matrix that has one row."""
    return model_bytes(
        [value("x", TensorProto.FLOAT, "batch", 1)],
        [value("y", TensorProto.FLOAT, "batch", 1)],
        [
            helper.make_node("ReduceMax", ["x"], ["largest"], keepdims=0),
            helper.make_node("Cast", ["largest"], ["whole"], to=TensorProto.INT64),
            helper.make_node("Add", ["whole", "one"], ["columns"]),
            helper.make_node("Concat", ["one", "columns"], ["shape"], axis=0),
            helper.make_node("Expand", ["x", "shape"], ["wide"]),
            helper.make_node("MatMul", ["wide", "weight"], ["y"]),
        ],
        initializers=[
            helper.make_tensor("one", TensorProto.INT64, [1], [1]),
            helper.make_tensor("weight", TensorProto.FLOAT, [1, 1], [1.0]),
        ],
    )


@pytest.fixture(scope="module")
def stack(otlp: OtlpReceiver) -> Iterator[Stack]:
    """A platform with one worker and one model, whose spans go to `otlp`."""
    home = Path(tempfile.mkdtemp(prefix="headrace-telemetry-"))
    home.chmod(0o755)
    # Requests without a traceparent are not sampled: a trace is there because a caller asked for it.
    environment = {
        "OTEL_EXPORTER_OTLP_ENDPOINT": otlp.endpoint,
        "OTEL_TRACES_SAMPLE_RATIO": "0.0",
        "HEADRACE_ROUTER": "inside",  # services of one process are still told apart
    }
    running = Stack.on_free_ports(home, workers=1, environment=environment)
    running.start()
    try:
        with caller(running) as client:
            deploy(client)
        yield running
    finally:
        running.stop()
        shutil.rmtree(home, ignore_errors=True)


def caller(stack: Stack) -> httpx.Client:
    headers = {"authorization": f"Bearer {stack.admin_key}"}
    return httpx.Client(base_url=stack.rest_url, headers=headers, timeout=PATIENCE_S)


@pytest.fixture
def client(stack: Stack) -> Iterator[httpx.Client]:
    with caller(stack) as client:
        yield client


def deploy(client: httpx.Client) -> None:
    client.post("/v1/models", json={"name": "brittle"}).raise_for_status()
    client.post(
        "/v1/models/brittle/versions",
        data={"metadata": json.dumps({"version": "1", "backend": "onnx"})},
        files=[("files", ("model.onnx", brittle()))],
    ).raise_for_status()
    deployment = {"versions": [{"version": "1", "weight": 100}]}
    client.put("/v1/deployments/brittle", json=deployment).raise_for_status()
    # Gateway and router learn of it each on its own, and the worker has to load it.
    until(lambda: predict(client, 0, NEVER_SAMPLED)[0].status_code == 200)


def predict(client: httpx.Client, x: float, sampled: str | None = SAMPLED) -> tuple[httpx.Response, str, str]:
    """A prediction by a caller that traces; gives the answer, and the caller's trace and span."""
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    headers = {} if sampled is None else {"traceparent": f"00-{trace}-{span}-{sampled}"}
    body = {"model": "brittle", "inputs": [[x]], "user_id": "somebody"}
    return client.post("/v1/predict", json=body, headers=headers), trace, span


def services_of(spans: list[ReceivedSpan]) -> set[str]:
    return {span.service for span in spans}


def ancestry(span: ReceivedSpan, spans: list[ReceivedSpan]) -> list[str]:
    """The services from `span` up to the caller, whose own span is not ours."""
    known = {other.span: other for other in spans}
    way = [span.service]
    while span.parent in known:
        span = known[span.parent]
        way.append(span.service)
    return way


def test_one_trace_reaches_from_the_request_to_the_consumers_of_its_event(
    client: httpx.Client, otlp: OtlpReceiver
) -> None:
    answer, trace, caller_span = predict(client, 0.5)
    assert answer.status_code == 200, answer.text
    assert answer.json()["outputs"] == {"y": [[0.5]]}

    spans = otlp.wait(trace, lambda found: services_of(found) >= ON_THE_WAY)
    assert services_of(spans) == ON_THE_WAY
    ways = {span.service: ancestry(span, spans) for span in spans}
    assert ways["worker"] == ["worker", "router", "gateway"]
    # Over Kafka: the consumers continue the worker's span.
    assert ways["analytics"] == ["analytics", "worker", "router", "gateway"]
    assert ways["drift"] == ["drift", "worker", "router", "gateway"]
    (top,) = (span for span in spans if span.service == "gateway")
    assert top.parent == caller_span
    assert top.attributes["headrace.request_id"] == answer.json()["request_id"]
    for span in spans:
        assert span.start_ns <= span.end_ns
        assert span.start_ns >= top.start_ns


def test_a_grpc_call_is_traced_the_same_way(stack: Stack, otlp: OtlpReceiver) -> None:
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    tensor = ModelInferRequest.InferInputTensor(name="x", datatype="FP32", shape=[1, 1])
    request = ModelInferRequest(
        model_name="brittle", inputs=[tensor], raw_input_contents=[np.array([[0.25]], np.float32).tobytes()]
    )
    headers = (("authorization", f"Bearer {stack.admin_key}"), ("traceparent", f"00-{trace}-{span}-01"))
    with grpc.insecure_channel(stack.grpc_address) as channel:
        stub = GRPCInferenceServiceStub(channel)  # type: ignore[no-untyped-call]  # generated
        result = stub.ModelInfer(request, metadata=headers, timeout=PATIENCE_S)
    assert np.frombuffer(result.raw_output_contents[0], np.float32).tolist() == [0.25]
    spans = otlp.wait(trace, lambda found: services_of(found) >= ON_THE_WAY)
    assert services_of(spans) == ON_THE_WAY
    assert {one.parent for one in spans if one.service == "gateway"} == {span}


def test_requests_that_are_not_sampled_leave_no_span(client: httpx.Client, otlp: OtlpReceiver) -> None:
    before = otlp.traces()
    refused = [predict(client, 0, NEVER_SAMPLED) for _ in range(5)]
    untraced = [predict(client, 0, None) for _ in range(5)]
    assert {answer.status_code for answer, _, _ in refused + untraced} == {200}
    # A sampled one afterwards: once it is whole, what came before it would have come too.
    answer, trace, _ = predict(client, 0)
    assert answer.status_code == 200
    spans = otlp.wait(trace, lambda found: services_of(found) >= ON_THE_WAY)
    assert services_of(spans) == ON_THE_WAY
    assert otlp.traces() - before == {trace}


def test_a_management_call_is_one_trace_over_the_services_it_passes(
    client: httpx.Client, otlp: OtlpReceiver
) -> None:
    trace, span = secrets.token_hex(16), secrets.token_hex(8)
    answer = client.get("/v1/models/brittle", headers={"traceparent": f"00-{trace}-{span}-01"})
    assert answer.status_code == 200, answer.text
    spans = otlp.wait(trace, lambda found: services_of(found) >= {"gateway", "registry"})
    assert services_of(spans) == {"gateway", "registry"}
    (inner,) = (one for one in spans if one.service == "registry")
    assert ancestry(inner, spans) == ["registry", "gateway"]


def log_lines(stack: Stack, part: str) -> list[dict[str, Any]]:
    """Every line of a service's log; fails where one is not JSON."""
    return [json.loads(line) for line in (stack.configuration.logs / f"{part}.log").read_text().splitlines()]


def test_every_line_of_every_log_is_json_with_its_facts(stack: Stack, client: httpx.Client) -> None:
    assert predict(client, 0)[0].status_code == 200
    assert (
        predict(client, 99)[0].status_code == 500
    )  # where libraries would like to say something of their own
    for part in stack.pids():
        if part not in PARTS:
            continue  # a server
        lines = log_lines(stack, part)
        for line in lines:
            assert {"ts", "level", "service", "event"} <= line.keys(), line
        services = {"gateway", "router", "worker"} if part == "gateway" else {part.removesuffix("-0")}
        assert {line["service"] for line in lines} == services


@pytest.mark.parametrize("sampled", [SAMPLED, NEVER_SAMPLED])
def test_the_logs_of_a_failed_request_name_its_trace(
    stack: Stack, client: httpx.Client, sampled: str
) -> None:
    """Whoever has the trace id of a failure finds what each service said of it, sampled or not."""
    answer, trace, _ = predict(client, 99, sampled)
    assert answer.status_code == 500, answer.text

    def said(service: str) -> list[dict[str, Any]]:
        # A small model is run by the worker's guest in the gateway's process, once the guest has it.
        lines = [line for part in ("gateway", "worker-0") for line in log_lines(stack, part)]
        return [line for line in lines if line.get("trace_id") == trace and line["service"] == service]

    until(lambda: said("gateway"))
    (line,) = said("gateway")
    assert line["event"] == "request_failed"
    assert line["request_id"] == answer.json()["request_id"]
    if sampled == SAMPLED:  # the context of other requests does not travel with the frames
        until(lambda: said("worker"))
        (line,) = said("worker")
        assert line["event"] == "model_failed"
        assert line["model"] == "brittle/1"


def scrape(stack: Stack, part: str) -> dict[str, dict[str, set[str]]]:
    """The samples of one service: by family type and by sample name, the labels seen."""
    answer = httpx.get(f"{metrics_url(stack, part)}/metrics", timeout=PATIENCE_S)
    assert answer.status_code == 200, part
    found: dict[str, dict[str, set[str]]] = {}
    for family in text_string_to_metric_families(answer.text):
        samples = {sample.name: set(sample.labels) for sample in family.samples}
        found[family.name] = samples
        assert family.documentation, family.name
    return found


def metrics_url(stack: Stack, part: str) -> str:
    if part == "gateway":
        return f"http://127.0.0.1:{stack.configuration.ports['GATEWAY_OPS_PORT']}"
    return stack.service_url(part)


def test_every_service_has_its_metrics_and_what_the_process_uses(stack: Stack, client: httpx.Client) -> None:
    assert predict(client, 0)[0].status_code == 200
    for part in PARTS:
        families = scrape(stack, part)
        service = part.removesuffix("-0")
        assert any(name.startswith(f"headrace_{service}_") for name in families), part
        used = {"process_cpu_seconds", "process_resident_memory_bytes", "process_open_fds"} & families.keys()
        # Of two services in one process the gateway says it, or sums over services would count it twice.
        assert len(used) == (0 if part == "router" and stack.configuration.joint else 3), part


def test_names_that_triton_dashboards_ask_for(stack: Stack, client: httpx.Client) -> None:
    assert predict(client, 0)[0].status_code == 200
    families = scrape(stack, "worker-0")
    for name in ("nv_inference_request_success", "nv_inference_count", "nv_inference_queue_duration_us"):
        assert families[name] == {name: {"model", "version"}}


def test_alerts_and_dashboards_ask_for_what_the_platform_exports(stack: Stack, client: httpx.Client) -> None:
    """Families on the wire, and the labels that queries match on."""
    predict(client, 0)
    predict(client, 99)
    families: set[str] = set()
    labels: dict[str, set[str]] = {}
    for part in PARTS:
        for name, samples in scrape(stack, part).items():
            families |= {name, f"{name}_total", *samples}
            for sample, seen in samples.items():
                labels.setdefault(sample, set()).update(seen)
    histogram = re.compile(r"_(bucket|sum|count)$")
    for expression in promql.expressions():
        for name in promql.metric_names(expression) - {"up", "ALERTS"}:
            assert name in families or histogram.sub("", name) in families, expression
        for name, asked in promql.labels_asked(expression).items():
            if name in labels:  # where nothing has been counted yet, labels are not on the wire
                assert asked - {"job", "service", "instance"} <= labels[name], expression


async def test_a_record_that_nobody_can_read_is_set_aside_and_counted(stack: Stack) -> None:
    async with KafkaBus(stack.kafka_bootstrap_servers, "vandal") as bus:
        await bus.publish([Record(PREDICTIONS.name, b"brittle/1", b"no prediction")])

    def aside(part: str) -> float:
        text = httpx.get(f"{metrics_url(stack, part)}/metrics", timeout=PATIENCE_S).text
        families = {family.name: family for family in text_string_to_metric_families(text)}
        return sum(sample.value for sample in families[f"headrace_{part}_dead_letters"].samples)

    # The services look every 15 s.
    await asyncio.to_thread(until, lambda: aside("analytics") == aside("drift") == 1)
