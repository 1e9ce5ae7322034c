"""Which methods are served beside the hot one: those that grpcio's generated code registers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import grpc

from services.common.frames.header_blocks import Field
from services.gateway.keys import Key

#: Who calls, by the metadata; None: anybody may. Raises HeadraceError for callers that it is not for.
Door = Callable[[Sequence[Field]], Key | None]


@dataclass(frozen=True, slots=True, eq=False)
class Method:
    """One method, and what is said at its door."""

    path: str
    #: Its parts are callable, or None where they are another kind's.
    handler: Any
    door: Door | None

    @property
    def streams(self) -> bool:
        """Whether a call may go on for as long as its client likes."""
        return bool(self.handler.request_streaming or self.handler.response_streaming)


class Methods:
    """Stands where generated code (`add_…Servicer_to_server`) expects a grpcio server."""

    def __init__(self) -> None:
        self.by_path: dict[bytes, Method] = {}
        self._doors: dict[str, Door] = {}

    def guard(self, service: str, door: Door, but: frozenset[str]) -> None:
        """Let every method of `service` that is registered later, `but` those, be called through `door`."""
        for name in but:
            self._doors[f"{service}/{name}"] = _open
        self._doors[service] = door

    def add_generic_rpc_handlers(self, _handlers: object) -> None:
        """The same methods once more, in the form that older servers take."""

    def add_registered_method_handlers(
        self, service: str, handlers: Mapping[str, grpc.RpcMethodHandler[Any, Any]]
    ) -> None:
        """Take the methods of one service."""
        for name, handler in handlers.items():
            path = f"/{service}/{name}"
            door = self._doors.get(f"{service}/{name}", self._doors.get(service))
            self.by_path[path.encode()] = Method(path, handler, door)


def _open(_metadata: Sequence[Field]) -> None:
    """Lets everybody in."""
