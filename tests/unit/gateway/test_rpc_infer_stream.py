"""ModelStreamInfer on a transport in memory, with `h2` at the other end: what is asked and answered, and how
a stream ends."""

from __future__ import annotations

import gzip

import pytest
from headrace.v1.control_pb2 import ApiKey
from headrace.v1.dataplane_pb2 import PredictReply, Priority
from headrace.v1.tensor_pb2 import Code
from open_inference.open_inference_pb2 import InferParameter, ModelInferRequest

from services.common.frames.wire import ErrorCode
from services.gateway.codecs.streamed import id_in
from services.gateway.rpc.limits import RpcLimits
from tests.fixtures.gateway import PREDICT_ONLY, api_key
from tests.fixtures.rpc import STREAM_INFER, Client, Front, infer, prefixed
from tests.fixtures.rpc_streams import ids, label, messages, nothing_is_left, opened, say, turning
from tests.fixtures.waiting import eventually


async def test_requests_of_a_stream_are_under_way_at_once_and_answered_in_their_order() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    for again in range(3):  # the first ones teach the messages' form
        await say(client, stream, infer(1.0, id="a"), infer(20.0, id="b"), infer(2.0))
        assert len(front.router.waiting) == 3
        front.router.answer(last=True)
        await client.turn()
        assert len(messages(client.answers[stream])) == 3 * again
        front.router.answer_all()
        await client.turn()
    said = messages(client.answers[stream])
    assert [label(one) for one in said] == [1, 0, 1] * 3
    assert [one.infer_response.id for one in said[-3:-1]] == ["a", "b"]
    assert len(said[-1].infer_response.id) == 32
    assert all(one.infer_response.parameters["triton_final_response"].bool_param for one in said)
    assert all(one.infer_response.model_name == "cancer" for one in said)
    assert not client.answers[stream].ended
    await say(client, stream, infer(id="last"), end=True)
    assert not client.answers[stream].ended
    front.router.answer()
    await client.turn()
    answer = client.answers[stream]
    assert (answer.status, answer.ended, answer.reset) == (Code.CODE_OK, True, None)
    assert ids(answer)[-1] == "last"
    assert nothing_is_left(front, client)


async def test_a_stream_without_requests_ends_well() -> None:
    front = Front()
    client = front.client()
    stream = client.head(STREAM_INFER)
    client.send(stream, b"")
    await client.turn()
    answer = client.answers[stream]
    assert (answer.status, answer.ended, bytes(answer.data)) == (Code.CODE_OK, True, b"")
    assert nothing_is_left(front, client)


async def test_an_error_is_its_requests_alone() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    nobody = ModelInferRequest.FromString(infer(id="nobody"))
    nobody.model_name = "nobody"
    wrong = ModelInferRequest.FromString(infer(id="wrong"))
    wrong.inputs[0].name = "y"
    await say(
        client, stream, infer(id="good"), nobody.SerializeToString(), b"\xff", wrong.SerializeToString()
    )
    await say(client, stream, infer(id="late"), infer(20.0, id="other"), end=True)
    assert len(front.router.waiting) == 3
    front.router.answer()
    refused = PredictReply(code=Code.CODE_UNAVAILABLE, message="away")
    front.router.answer(lambda reply: reply.MergeFrom(refused))
    front.router.answer()
    await client.turn()
    answer = client.answers[stream]
    said = messages(answer)
    assert (said[0].infer_response.id, said[5].infer_response.id) == ("good", "other")
    assert [bool(one.error_message) for one in said] == [False, True, True, True, True, False]
    assert (said[1].infer_response.id, said[3].infer_response.id) == ("nobody", "wrong")
    assert "nobody" in said[1].error_message
    assert "no ModelInferRequest" in said[2].error_message
    assert "inputs.y" in said[3].error_message
    assert (said[4].error_message, said[4].infer_response.id) == ("away", "late")
    assert said[1].infer_response.parameters["triton_final_response"].bool_param
    assert (answer.status, answer.ended) == (Code.CODE_OK, True)
    assert nothing_is_left(front, client)


async def test_an_error_ends_the_stream_where_its_client_asked_for_that() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client, triton_grpc_error="true")
    wrong = ModelInferRequest.FromString(infer(id="wrong"))
    wrong.inputs[0].name = "y"
    await say(client, stream, infer(id="before"), wrong.SerializeToString(), infer(id="after"))
    assert len(front.router.waiting) == 1
    await say(client, stream, infer(id="after"))
    assert len(front.router.waiting) == 1
    assert not client.answers[stream].ended
    front.router.answer()
    await client.turn()
    answer = client.answers[stream]
    assert ids(answer) == ["before"]
    assert (answer.status, answer.ended) == (Code.CODE_INVALID_ARGUMENT, True)
    assert "inputs.y" in answer.trailers["grpc-message"]
    assert nothing_is_left(front, client)


async def test_an_error_that_ends_the_stream_ends_what_is_behind_it() -> None:
    front = Front(RpcLimits(max_stream_requests=2))
    client = front.client()
    stream = await opened(client, triton_grpc_error="true")
    await say(client, stream, *(infer(id=str(number)) for number in range(5)))
    await say(client, stream, infer(id="as it came"))
    refused = PredictReply(code=Code.CODE_UNAVAILABLE, message="away")
    front.router.answer(lambda reply: reply.MergeFrom(refused))
    await client.turn()
    assert client.answers[stream].status == Code.CODE_UNAVAILABLE
    assert not client.answers[stream].data
    assert front.router.cancelled == [2]
    assert nothing_is_left(front, client)


async def test_what_comes_behind_an_error_that_ends_the_stream_need_not_be_whole() -> None:
    """The client's half is closed already, and all but the beginning of what it said last was let go of."""
    front = Front(RpcLimits(max_stream_requests=1))
    client = front.client()
    stream = await opened(client, triton_grpc_error="true")
    await say(client, stream, infer(id="a"), infer(id="b"))
    await say(client, stream, b"\xff", bytes(10_000), end=True)
    for _ in range(2):
        front.router.answer()
        await client.turn()
    answer = client.answers[stream]
    assert ids(answer) == ["a", "b"]
    assert answer.status == Code.CODE_INVALID_ARGUMENT
    assert nothing_is_left(front, client)


@pytest.mark.parametrize(
    ("metadata", "code"),
    [
        ({"x_api_key": None}, Code.CODE_UNAUTHENTICATED),
        ({"x_api_key": "hr_nobody"}, Code.CODE_UNAUTHENTICATED),
        ({"grpc_encoding": "br"}, Code.CODE_UNIMPLEMENTED),
    ],
)
async def test_whoever_may_not_call_hears_so_before_saying_anything(
    metadata: dict[str, str | None], code: Code
) -> None:
    front = Front()
    client = front.client()
    answer = client.answers[await opened(client, **metadata)]
    assert (answer.status, answer.reset) == (code, ErrorCode.NO_ERROR)
    whole = client.head(STREAM_INFER, **metadata)
    client.send(whole, prefixed(infer()))
    await client.turn()
    assert client.answers[whole].status == code
    assert nothing_is_left(front, client)


async def test_what_a_key_may_do_is_looked_at_for_each_request() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)

    def change(**fields: object) -> None:
        key = api_key(PREDICT_ONLY, ["predict"])
        key.MergeFrom(ApiKey(revision=key.revision + 1, **fields))  # type: ignore[arg-type]  # its fields
        front.keys.apply(key.key_id.encode(), key.SerializeToString())

    change(rate_per_second=0.001, burst=1)
    await say(client, stream, infer(id="first"), infer(id="second"))
    change(models=["other"])
    await say(client, stream, infer(id="third"))
    change(revoked=True)
    await say(client, stream, infer(id="fourth"), end=True)
    front.router.answer_all()
    await client.turn()
    answer = client.answers[stream]
    said = messages(answer)
    assert ids(answer) == ["first", "second", "third", "fourth"]
    assert not said[0].error_message
    assert "limit" in said[1].error_message
    assert "not for the model" in said[2].error_message
    assert "not known" in said[3].error_message
    assert answer.status == Code.CODE_OK


async def test_requests_are_counted_among_those_over_grpc() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer(), b"\xff", infer(), end=True)
    front.router.answer_all()
    await client.turn()
    assert sum(front.metrics.cell("grpc_infer", "cancer", 200).buckets) == 2
    assert (
        sum(front.metrics.cell("grpc_infer", "", 400).buckets)
        + sum(front.metrics.cell("grpc_infer", "", 422).buckets)
        == 1
    )


async def test_parameters_mean_what_they_mean_to_model_infer() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client, x_request_priority="high")
    parameters = {
        "triton_enable_empty_final_response": InferParameter(bool_param=True),
        "user_id": InferParameter(string_param="u"),
        "timeout": InferParameter(int64_param=2_000_000),
    }
    await say(client, stream, infer(parameters=parameters))
    (request,) = front.router.requests
    assert request.unit == "u"
    assert not request.parameters
    assert request.priority == Priority.PRIORITY_HIGH
    front.router.answer()
    await client.turn()
    assert len(messages(client.answers[stream])) == 1


async def test_compressed_messages() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client, grpc_encoding="gzip")
    content = prefixed(gzip.compress(infer(20.0, id="packed")), 1) + prefixed(infer(id="plain"))
    client.send(stream, content)
    await turning(client, lambda: len(front.router.waiting) == 2)
    front.router.answer_all()
    await client.turn()
    answer = client.answers[stream]
    assert ids(answer) == ["packed", "plain"]
    assert [label(said) for said in messages(answer)] == [0, 1]
    assert nothing_is_left(front, client)
    front.service.close()


@pytest.mark.parametrize("sent", [b"\x07\0\0\0\1x", b"\1\0\0\0\1x", b"\0\0\0\0\5x"])
async def test_what_is_no_message_ends_the_stream_and_what_was_asked(sent: bytes) -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer())
    client.send(stream, sent)
    await client.turn()
    assert client.answers[stream].status == Code.CODE_INTERNAL
    assert front.router.cancelled == [1]
    assert nothing_is_left(front, client)


async def test_the_deadline_of_a_stream_is_that_of_its_requests_too() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client, grpc_timeout="300m")
    await say(client, stream, infer())
    deadline = front.router.deadlines[-1]
    other = await opened(client)
    await say(client, other, infer(20.0))
    later = front.router.deadlines[-1]
    assert deadline is not None
    assert later is not None
    assert later - deadline > 5
    await turning(client, lambda: client.answers[stream].ended)
    assert client.answers[stream].status == Code.CODE_DEADLINE_EXCEEDED
    assert front.router.cancelled == [1]
    assert front.server.streams.open == 1


def statuses(client: Client, said: bytes) -> dict[int, bytes]:
    """What each stream ended with, of `said` in frames."""
    found, at = {}, 0
    while at < len(said):
        size, kind = int.from_bytes(said[at : at + 3], "big"), said[at + 3]
        stream, payload = int.from_bytes(said[at + 5 : at + 9], "big"), said[at + 9 : at + 9 + size]
        if kind == 1 and b"grpc-status" in payload:
            at_value = payload.index(b"grpc-status") + 12
            found[stream] = payload[at_value : at_value + payload[at_value - 1]]
        at += 9 + size
    return found


async def drained(front: Front, client: Client) -> bytes:
    """All that the client hears from now on."""
    while front.router.waiting:
        front.router.answer()
    await eventually(lambda: client.cable.closed)
    assert front.service.bodies.held == 0
    assert front.server.streams.open == 0
    return client.cable.take()


async def test_draining_answers_what_came_and_sends_the_client_elsewhere() -> None:
    front = Front(RpcLimits(max_stream_requests=1, drain_notice_s=0.01))
    client, idle = front.client(), front.client()
    await opened(idle)
    goes_on, ends, whole = [await opened(client) for _ in range(3)]
    await say(client, goes_on, *(infer(id=str(number)) for number in range(4)), b"\xff")
    await say(client, goes_on, b"\xff", infer(id="4"), b"\xff", infer(id="5"))  # left as they came
    await say(client, ends, infer(id="ends"))
    await say(client, whole, infer(id="whole"), end=True)
    for one in (client, idle):
        one.connection.drain()
    await eventually(lambda: idle.cable.closed)
    assert list(statuses(idle, idle.cable.take()).values()) == [b"14"]
    asked = len(front.router.requests)
    for stream, end in ((goes_on, False), (ends, True)):
        client.send(stream, b"" if end else prefixed(infer(id="late")), end=end)
    client.connection.data_received(client.h2.data_to_send())
    assert len(front.router.requests) == asked
    said = await drained(front, client)
    assert statuses(client, said) == {goes_on: b"14", ends: b"0", whole: b"0"}
    for answered in (b"\x1a\x01%d" % number for number in range(6)):
        assert answered in said
    assert b"late" not in said


async def test_draining_answers_what_fails_at_once_too() -> None:
    front = Front(RpcLimits(max_stream_begun=3, drain_notice_s=0.0))
    client = front.client(window=1 << 20)
    client.h2.increment_flow_control_window(1 << 20)
    stream = await opened(client)
    for _ in range(100):
        client.send(stream, prefixed(b"\xff") * 20, end=False)
    client.connection.data_received(client.h2.data_to_send())
    client.connection.drain()
    said = await drained(front, client)
    assert said.count(b"no ModelInferRequest") == 2000
    assert statuses(client, said) == {stream: b"14"}


async def test_a_shut_connection_gives_its_streams_up() -> None:
    front = Front()
    client = front.client()
    stream = await opened(client)
    await say(client, stream, infer(), infer())
    client.connection.shut()
    assert b"grpc-status\x0214" in client.cable.take()
    assert front.router.cancelled == [1, 2]
    assert nothing_is_left(front, client)


def test_the_id_is_found_without_reading_the_rest() -> None:
    full = ModelInferRequest(model_name="m" * 200, model_version="2", id="Größe", raw_input_contents=[b"x"])
    assert id_in(full.SerializeToString()).decode() == "Größe"
    assert id_in(ModelInferRequest(id="only").SerializeToString()) == b"only"
    assert id_in(ModelInferRequest(model_name="m", raw_input_contents=[b"x"]).SerializeToString()) == b""
    for broken in (b"", b"\x1a", b"\x1a\x05ab", b"\x1a\x02\xff\xff", b"\x0a" + b"\xff" * 9, b"\xff" * 20):
        assert id_in(broken) == b""
