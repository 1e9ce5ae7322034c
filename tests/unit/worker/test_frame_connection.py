"""One router's stream, as the worker takes it."""

from __future__ import annotations

from typing import ClassVar

from headrace.v1.dataplane_pb2 import PredictRequest, RequestFrame

from services.worker.item import Item
from services.worker.servicer import FrameConnection


class Held:
    """Keeps what it is given, and knows what was cancelled."""

    def __init__(self) -> None:
        self.cancelled: list[Item] = []

    def accept(self, requests, settle, waiting, contents) -> None:  # type: ignore[no-untyped-def]  # a stand-in
        assert contents == {}
        for request in requests:
            waiting[request.id] = (self, Item(request, 1, ((), ()), (b"",), 1.0, settle))

    def cancel(self, item: Item) -> None:
        self.cancelled.append(item)


class Outlet:
    """A peer whose frames have no large tensors."""

    contents: ClassVar[dict[int, list[memoryview | None]]] = {}


def test_a_cancel_is_of_what_came_before_its_frame() -> None:
    held = Held()
    connection = FrameConnection(held, Outlet())  # type: ignore[arg-type]  # nothing is answered
    connection.on_request_frame(RequestFrame(items=[PredictRequest(id=7, model="first")]))
    connection.on_request_frame(RequestFrame(items=[PredictRequest(id=7, model="again")], cancels=[7]))
    assert [item.request.model for item in held.cancelled] == ["first"]
