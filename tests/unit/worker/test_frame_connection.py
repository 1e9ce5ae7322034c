"""One router's stream, as the worker takes it."""

from __future__ import annotations

from headrace.v1.dataplane_pb2 import PredictRequest, RequestFrame

from services.worker.servicer import FrameConnection


class Held:
    """Keeps what it is given, and knows what was cancelled."""

    def __init__(self) -> None:
        self.cancelled: list[object] = []

    def accept(self, items, _settle, waiting) -> None:  # type: ignore[no-untyped-def]  # a stand-in
        for item in items:
            waiting[item.id] = (self, item)

    def cancel(self, item: object) -> None:
        self.cancelled.append(item)


def test_a_cancel_is_of_what_came_before_its_frame() -> None:
    held = Held()
    connection = FrameConnection(held, None)  # type: ignore[arg-type]  # nothing is answered
    connection.on_request_frame(RequestFrame(items=[PredictRequest(id=7, model="first")]))
    connection.on_request_frame(RequestFrame(items=[PredictRequest(id=7, model="again")], cancels=[7]))
    assert [item.model for item in held.cancelled] == ["first"]  # type: ignore[attr-defined]  # requests
