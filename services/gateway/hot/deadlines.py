"""The deadlines of one connection, in seconds that the front's sweep counts."""

from __future__ import annotations

import enum
from abc import abstractmethod

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from services.common.errors import HeadraceError
from services.gateway.errors import RequestTimeout
from services.gateway.hot.exchange import HotExchange
from services.gateway.hot.front import HotFront, HttpLimits


class Phase(enum.Enum):
    """What a connection is waiting for: a request, the rest of one, or us."""

    IDLE = enum.auto()
    HEAD = enum.auto()
    BODY = enum.auto()
    BUSY = enum.auto()


class TimedProtocol(HttpToolsProtocol):
    """One connection: where it is, and what is too long there."""

    front: HotFront
    #: Seconds spent in the present phase, counted by the sweep.
    _ticks: int
    #: Bytes of its answers that the client had not taken when the sweep came by; 0 while it takes them all.
    _unread: int
    _in_head: bool
    _in_body: bool
    _lingering: bool
    _half_closed: bool

    @abstractmethod
    def _refuse_rest(self, error: HeadraceError) -> None:
        """Answer `error` once everything before it is answered, and take nothing more."""

    @abstractmethod
    def _start(self, exchange: HotExchange) -> None:
        """The turn of `exchange` has come, or what it is answered has changed."""

    @abstractmethod
    def _ask_if_there(self) -> None:
        """Find out whether a client that sends nothing more waits for its answers or has left."""

    def tick(self) -> None:
        """A second has passed."""
        self._ticks += 1
        limits = self.front.limits
        if self.transport.is_closing():
            self._tick_unread(limits)
        elif self._lingering:
            if self._ticks > limits.linger_s:
                self.transport.close()
        elif self.flow.write_paused:
            self._tick_unread(limits)
        elif self._half_closed:
            self._ask_if_there()
        else:
            self._tick_phase(self.phase(), limits)

    def _tick_unread(self, limits: HttpLimits) -> None:
        unread = self.transport.get_write_buffer_size()
        if unread != self._unread:  # who goes on reading may take as long as a large answer needs
            self._unread, self._ticks = unread, 0
        elif self._ticks > limits.unread_s:
            self.transport.abort()

    def _tick_phase(self, phase: Phase, limits: HttpLimits) -> None:
        if phase is Phase.IDLE:
            if self._ticks > (limits.drain_idle_s if self.front.draining else limits.keep_alive_s):
                self.transport.close()
        elif phase is Phase.HEAD:
            if self._ticks > limits.head_s and not self.flow.read_paused:  # or it is us who do not read
                self._refuse_rest(RequestTimeout("The request's headers did not arrive in time."))
        elif phase is Phase.BODY and self._ticks > limits.body_s:
            self._body_late()

    def phase(self) -> Phase:
        """What the connection is waiting for."""
        if self._in_head:
            return Phase.HEAD
        if self._in_body:
            return Phase.BODY
        if self.cycle is None or self.cycle.response_complete:
            return Phase.IDLE
        return Phase.BUSY

    def _body_late(self) -> None:
        cycle = self.cycle
        if isinstance(cycle, HotExchange) and cycle.refusal is None and not cycle.response_complete:
            if self.flow.read_paused:
                return  # it is us who do not read
            cycle.refusal = RequestTimeout("The body did not arrive in time.")
            if cycle.started:
                self._start(cycle)
        elif not self.flow.read_paused:
            self.transport.close()
