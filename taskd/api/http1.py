"""HTTP/1.1 on one connection: Sanic's protocol with a strict reader and our own answers.

Sanic gives the server, the flow control, the request object and the router. What it would answer by
itself (text, another status, or nothing) is replaced here, so that every answer has the JSON form and
the same headers, and every request has a deadline that no dripping client can move (FACTS M8, M9).
"""

from __future__ import annotations

import asyncio
import logging
import re
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from http import HTTPStatus
from typing import Any, Literal, Protocol

from sanic.compat import Header
from sanic.exceptions import SanicException
from sanic.request import Request
from sanic.server.protocols.http_protocol import HttpProtocol

from taskd.api import answers
from taskd.api.answers import Answer
from taskd.api.head import MAX_HEAD, Head, check_begun, read_head
from taskd.errors import Refused

log = logging.getLogger("taskd.api")

LINGER_S = 2.0
"""How long what a client still sends is thrown away after an early answer, so that it can read it."""
LINGER_BYTES = 64 << 20
SMALL = 64 << 10
"""An unread rest of a body up to this size is read to keep the connection; a larger one ends it."""

_HIGH_WATER = 64 << 10
_CHUNK = re.compile(rb"([0-9a-fA-F]{1,16})(?:[ \t]*;[^\r\n]{0,64})?")
_REASONS = {status.value: status.phrase for status in HTTPStatus}


class Ended(Exception):
    """The connection is over: there is nobody to answer."""


class Handler(Protocol):
    """What answers requests; it never raises but for cancellation."""

    hsts: bool
    max_connections: int

    def request_id(self) -> str:
        """Return a new id for a request or an answer without one."""
        ...

    async def handle(self, request: DoorRequest) -> Answer:
        """Answer one request."""
        ...


class DoorRequest(Request):
    """One request with what the checks at the door found out about it.

    When the next request of the connection has the same head, byte by byte, it is this object again: what
    follows from the head alone is found out once.
    """

    __slots__ = ("answer_by", "door", "door_id", "extra", "kept", "started_at")

    door: DoorHttp
    """What reads its body."""

    door_id: str
    """Its `X-Request-Id`."""
    started_at: float
    """When its first byte was seen, by the loop's clock."""
    answer_by: float
    """Until when the database may take, by the loop's clock."""
    extra: str
    """Header lines, each with its end, that its answer gets, whatever the answer is."""
    kept: Any
    """What the handler has found out from the head, for itself; None at first."""


class DoorHttp:
    """Reads requests of one connection and writes their answers, one after the other."""

    __slots__ = (
        "_head",
        "_last",
        "_raw",
        "busy",
        "keep_alive",
        "left",
        "protocol",
        "rest",
        "waits",
        "without_body",
    )

    def __init__(self, protocol: DoorProtocol) -> None:
        self.protocol = protocol
        self.keep_alive = True
        self.busy = False
        """Whether a request has been read and is being answered."""
        self.rest: Literal["", "sized", "chunked"] = ""
        """How what is left of the body is framed; empty when nothing is."""
        self.left = 0
        """Bytes that are left of a sized body."""
        self.waits = False
        """Whether the client waits for `100 Continue`."""
        self.without_body = False
        """Whether the answer goes without its body: the request was HEAD."""
        self._raw = b""
        """The last head that was read, with the empty line at its end."""
        self._head: Head
        self._last: DoorRequest | None = None
        """The request with that head."""

    async def serve(self) -> None:
        """Serve requests until the connection ends."""
        protocol = self.protocol
        handler: Handler = protocol.app.ctx.door
        while self.keep_alive:
            if not protocol.recv_buffer:
                await protocol.receive_more()
            if protocol.since is None:  # a request that came together with the one before
                protocol.since = protocol.loop.time()
            self.without_body = False
            request: DoorRequest | None = None
            request_id = handler.request_id()
            try:
                request = self._again()
                if request is None:
                    request = await self._read_request()
            except (Refused, SanicException) as refused:
                answer = answers.error(_refused(refused), request_id)
                answer.close = True
            else:
                self.busy = True
                request.door_id = request_id
                request.started_at = protocol.since
                request.extra = ""
                answer = await handler.handle(request)
            data = self._written(answer, request, request_id, handler.hsts)
            if protocol.writable:
                protocol.write(data)
            else:
                await protocol.send(data)
            if self.rest or request is None:
                await self._clear_up(request)
            self.busy = False
            protocol.since = None

    def _again(self) -> DoorRequest | None:
        """Return the last request when the head of the next one is the same; None when it is to be read.

        Clients repeat themselves: most requests of a connection are alike.
        """
        buffer = self.protocol.recv_buffer
        if self._last is None or not buffer.startswith(self._raw):
            return None
        del buffer[: len(self._raw)]
        self._begin(self._head)
        return self._last

    async def _read_request(self) -> DoorRequest:
        protocol, buffer = self.protocol, self.protocol.recv_buffer
        start = seen = 0
        while True:
            while buffer[:2] == b"\r\n":  # RFC 9112, 2.2: empty lines before a request are skipped
                del buffer[:2]
            end = buffer.find(b"\r\n\r\n", start)
            if end >= 0 and end <= MAX_HEAD:
                break
            if end > MAX_HEAD or len(buffer) > MAX_HEAD + 3:
                raise Refused("too_large", f"request line and headers are larger than {MAX_HEAD} bytes")
            check_begun(buffer, seen)
            seen = len(buffer)
            start = max(0, seen - 3)
            await protocol.receive_more()
        raw = bytes(buffer[: end + 4])
        del buffer[: end + 4]
        head = read_head(raw[:-4])
        self._begin(head)
        request = DoorRequest(
            url_bytes=head.target.encode("ascii"),
            headers=Header(head.headers),
            version=f"1.{head.minor}",
            method=head.method,
            transport=protocol.transport,  # type: ignore[arg-type]
            app=protocol.app,
            head=raw,
        )
        request.door = self
        request.conn_info = protocol.conn_info
        request.kept = None
        self._raw, self._head, self._last = raw, head, request
        return request

    def _begin(self, head: Head) -> None:
        self.keep_alive = head.keep_alive
        self.without_body = head.method == "HEAD"
        self.waits = head.waits
        self.left = head.length or 0
        self.rest = "chunked" if head.chunked else "sized" if head.length else ""

    def arrived_body(self, most: int) -> bytes | None:
        """Return the whole body, which is empty when there is none; None when not all of it is here yet.

        Raises:
            Refused: `too_large`, it is longer than `most`.
        """
        if not self.rest:
            return b""
        buffer = self.protocol.recv_buffer
        left = self.left
        if self.rest == "chunked" or len(buffer) < left:
            return None
        if left > most:
            raise _too_large(most)
        self.rest, self.left, self.waits = "", 0, False
        data = bytes(buffer[:left])
        del buffer[:left]
        return data

    async def read_body(self, most: int) -> bytes:
        """Return the whole body, of which some is still to come (`arrived_body`).

        Raises:
            Refused: `too_large` as soon as it is known to be longer than `most`; `bad_request` for a
                broken chunk; `request_timeout`.
        """
        if self.rest == "sized":
            if self.left > most:
                raise _too_large(most)
            await self._go_on()
            return await self._take_rest()
        parts: list[bytes] = []
        total = 0
        await self._go_on()
        while size := await self._chunk_size():
            total += size
            if total > most:
                raise _too_large(most)
            parts.append(await self._take(size))
            if await self._line(0) != b"":
                raise self._broken()
        if await self._line(0) != b"":  # a trailer: nobody needs one, and it may be a smuggled request
            raise self._broken()
        self.rest = ""
        return b"".join(parts)

    async def _go_on(self) -> None:
        if self.waits:
            self.waits = False
            if not self.protocol.recv_buffer:
                await self.protocol.send(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def _take_rest(self) -> bytes:
        data = await self._take(self.left)
        self.rest, self.left = "", 0
        return data

    async def _take(self, size: int) -> bytes:
        buffer = self.protocol.recv_buffer
        if len(buffer) >= size:
            data = bytes(buffer[:size])
            del buffer[:size]
            return data
        parts = []
        while size:
            if not buffer:
                await self.protocol.receive_more()
            parts.append(bytes(buffer[:size]))
            del buffer[:size]
            size -= len(parts[-1])
        return b"".join(parts)

    async def _chunk_size(self) -> int:
        match = _CHUNK.fullmatch(await self._line(100))
        if match is None:
            raise self._broken()
        return int(match[1], 16)

    async def _line(self, most: int) -> bytes:
        """Return the line that comes next, without its end; one longer than `most` bytes is broken."""
        buffer = self.protocol.recv_buffer
        while (end := buffer.find(b"\r\n", 0, most + 2)) < 0:
            if len(buffer) >= most + 2:
                raise self._broken()
            await self.protocol.receive_more()
        line = bytes(buffer[:end])
        del buffer[: end + 2]
        return line

    def _broken(self) -> Refused:
        self.keep_alive = False
        return Refused("bad_request", "the body's chunks are broken")

    def _written(self, answer: Answer, request: DoorRequest | None, request_id: str, hsts: bool) -> bytes:
        """Return the bytes of an answer, and decide whether the connection goes on after it."""
        small = self.rest == "sized" and self.left <= SMALL and not self.waits
        if answer.close or (self.rest and not small) or self.protocol.ended:
            self.keep_alive = False
        body = answer.body
        head = f"{_fixed(answer.status, answer.kind, self.keep_alive, hsts)}X-Request-Id: {request_id}\r\n"
        if answer.status != 204:
            head += f"Content-Length: {len(body)}\r\n"
        for name, value in answer.headers:
            head += f"{name}: {value}\r\n"
        if request is not None:
            head += request.extra
        data = (head + "\r\n").encode("latin-1")
        return data if self.without_body else data + body

    async def _clear_up(self, request: DoorRequest | None) -> None:
        """After an answer that came before the request was read to its end: get rid of the rest."""
        if self.rest and self.keep_alive:
            try:
                await self._take_rest()
            except Refused:
                self.keep_alive = False
        elif self.rest or (request is None and not self.protocol.ended):
            await self.protocol.linger()


class DoorProtocol(HttpProtocol):
    """One connection, with a deadline for each request that `look` enforces."""

    __slots__ = ("_waiter", "cut", "discarded", "door", "ended", "on_end", "paused", "since")

    app: Any
    recv_buffer: bytearray
    door: DoorHttp | None

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.door = None
        self.since: float | None = None
        """When the first byte of the request under way was seen; None while none is."""
        self.cut = False
        """Whether the request's time is over."""
        self.ended = False
        """Whether the client sends no more."""
        self.on_end: Callable[[], object] | None = None
        """Called when the client sends no more, or is gone: whoever holds an answer back lets it go."""
        self._waiter: asyncio.Future[None] | None = None
        """What is told when something has come, or the request's time is over."""
        self.paused = False
        self.discarded = -1
        """Bytes thrown away; -1 while they are kept."""

    def connection_made(self, transport: Any) -> None:
        """Take the connection, or refuse it when there are too many."""
        handler: Handler = self.app.ctx.door
        if len(self.connections) >= handler.max_connections:
            transport.abort()
            return
        super().connection_made(transport)  # type: ignore[no-untyped-call]
        self._time = self.loop.time()

    def connection_lost(self, exc: Exception | None) -> None:
        """End what runs for the connection."""
        if self.conn_info is not None:  # None: refused at once
            super().connection_lost(exc)  # type: ignore[no-untyped-call]

    async def connection_task(self) -> None:
        """Serve the connection; whatever happens, it ends closed and logged."""
        try:
            self.door = DoorHttp(self)
            await self.door.serve()
        except (asyncio.CancelledError, Ended):
            pass
        except Exception:  # an edge: a defect must not be lost with its connection
            log.exception("connection failed")
        finally:
            self.door = None
            self._task = None
            self.close()

    @property
    def writable(self) -> bool:
        """Whether the client has read enough of what was written before."""
        return bool(self._can_write.is_set())

    async def send(self, data: bytes) -> None:
        """Write, once the client has read enough of what was written before.

        Raises:
            Ended: the client is gone.
        """
        await self._can_write.wait()
        self.write(data)

    def write(self, data: bytes) -> None:
        """Write now.

        Raises:
            Ended: the client is gone.
        """
        if self.transport is None or self.transport.is_closing():
            raise Ended
        self.transport.write(data)
        self._time = self.loop.time()

    async def receive_more(self) -> None:
        """Return when there is more in the buffer.

        Raises:
            Ended: the client is gone, and no request is under way.
            Refused: `request_timeout`, or `bad_request` when the client ended its request halfway.
        """
        if self.cut:
            raise Refused("request_timeout", "the request did not arrive in time")
        if not self.ended:
            if self.paused and self.transport is not None:
                self.paused = False
                self.transport.resume_reading()
            size = len(self.recv_buffer)
            await self._next()
            if self.cut:
                raise Refused("request_timeout", "the request did not arrive in time")
            if len(self.recv_buffer) > size:
                return
        if self.since is None:
            raise Ended
        raise Refused("bad_request", "the request ends before it is complete")

    async def linger(self) -> None:
        """Say that nothing more comes from here, and throw away what the client still sends for a while.

        A socket that is closed with unread bytes resets the connection, and the answer is lost with it.
        """
        if self.transport is None or self.transport.is_closing() or not self.transport.can_write_eof():
            return
        self.discarded = 0
        self.recv_buffer.clear()
        self.transport.write_eof()
        if self.paused:
            self.paused = False
            self.transport.resume_reading()
        if not self.ended:
            with suppress(TimeoutError):
                await asyncio.wait_for(self._next(), LINGER_S)

    async def _next(self) -> None:
        """Return when `_wake` is called."""
        self._waiter = self.loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def data_received(self, data: bytes) -> None:
        """Keep what came, up to a bound beyond which the socket is not read."""
        if self.discarded >= 0:
            self.discarded += len(data)
            if self.discarded > LINGER_BYTES:
                self._wake()
            return
        buffer = self.recv_buffer
        if not buffer and self.since is None:
            self.since = self.loop.time()
        buffer += data
        if len(buffer) >= _HIGH_WATER and self.transport is not None:
            self.paused = True
            self.transport.pause_reading()
        self._wake()

    def eof_received(self) -> bool:
        """Let a request that is under way be answered: its client may only have closed its half."""
        self.ended = True
        self._wake()
        if self.on_end is not None:
            self.on_end()
        return self.since is not None and self.transport is not None and self.transport.can_write_eof()

    def look(self, now: float, request_timeout_s: float) -> None:
        """Enforce the deadlines; called about twice a second."""
        door = self.door
        if door is None or self.transport is None:
            return
        if not self._can_write.is_set():
            if now - self._time > request_timeout_s:  # it does not read its answers
                self.abort()  # type: ignore[no-untyped-call]
        elif self.since is None:
            if now - self._time > self.keep_alive_timeout:
                self.close()
        elif (not door.busy or door.rest) and now - self.since > request_timeout_s:
            if self.cut and now - self.since > 2 * request_timeout_s:
                self.abort()  # type: ignore[no-untyped-call]
            self.cut = True
            self._wake()


@cache
def _fixed(status: int, kind: str, keep_alive: bool, hsts: bool) -> str:
    """Return the lines of a head that many answers share."""
    lines = [
        f"HTTP/1.1 {status} {_REASONS.get(status, '')}",
        "Cache-Control: no-store",
        "X-Content-Type-Options: nosniff",
        f"Connection: {'keep-alive' if keep_alive else 'close'}",
    ]
    if status != 204:
        lines.append(f"Content-Type: {kind}")
    if hsts:
        lines.append("Strict-Transport-Security: max-age=31536000")
    return "\r\n".join(lines) + "\r\n"


def _too_large(most: int) -> Refused:
    return Refused("too_large", f"the body is larger than {most} bytes")


def _refused(problem: Exception) -> Refused:
    if isinstance(problem, Refused):
        return problem
    return Refused("bad_request", "the request line is malformed")
