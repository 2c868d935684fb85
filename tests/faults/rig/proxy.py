"""A small proxy before Postgres that makes the network bad: TCP on its client's side, a socket file behind.

It reads the messages of the protocol as far as it must to know which statement is under way and when the
server has reported its end. Source: PostgreSQL manual, "Message Formats".
"""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

_CANCEL = 80877102
_CHUNK = 65536


class Frames:
    """Cuts a byte stream into messages; the first of a client has no type byte."""

    def __init__(self, *, first_is_bare: bool) -> None:
        self._bare = first_is_bare
        self._buffer = bytearray()

    def feed(self, data: bytes) -> list[bytes]:
        """Return the messages that are complete now, each as it was sent."""
        self._buffer += data
        found: list[bytes] = []
        while True:
            head = 4 if self._bare else 5
            if len(self._buffer) < head:
                return found
            size = struct.unpack_from("!I", self._buffer, head - 4)[0] + head - 4
            if len(self._buffer) < size:
                return found
            found.append(bytes(self._buffer[:size]))
            del self._buffer[:size]
            self._bare = False


class Pair:
    """One client's connection and the one behind it."""

    def __init__(self, proxy: Proxy, client: _Stream, server: _Stream) -> None:
        self.proxy = proxy
        self.client = client
        self.server = server
        self.statement = b""
        """The text of the statement that is under way."""
        self.cutting = False
        """The answer to this statement is withheld; once it is whole the client's connection is cut."""
        self.startup = b""
        """The client's first message: it names user, database and application."""
        self.silent = False
        """Nothing is carried any more, either way, and neither side is told: a peer that is gone."""
        self.deaf = False
        """No notification reaches the client any more; all else does."""
        self._withheld = bytearray()

    async def up(self) -> None:
        """Carry what the client sends."""
        frames = Frames(first_is_bare=True)
        while data := await self.client.reader.read(_CHUNK):
            await self.proxy.pace(len(data))
            for message in frames.feed(data):
                self.startup = self.startup or message
                if self.silent:
                    continue
                if message[:4] == b"\x00\x00\x00\x10" and struct.unpack_from("!I", message, 4)[0] == _CANCEL:
                    self.proxy.cancels += 1
                if message[:1] in b"PQ" and len(message) > 5:
                    self.statement = message
                    self.cutting = self.proxy.wants_cut(message)
                    await self.proxy.held(message)
                self.server.writer.write(message)
            await self.server.writer.drain()
        await self.proxy.flowing()
        with suppress(OSError):
            self.server.writer.write_eof()

    async def down(self) -> None:
        """Carry what the server sends."""
        frames = Frames(first_is_bare=False)
        while data := await self.server.reader.read(_CHUNK):
            await self.proxy.pace(len(data))
            for message in frames.feed(data):
                if self.silent or (self.deaf and message[:1] == b"A"):
                    continue
                if not self.cutting:
                    self.client.writer.write(message)
                    continue
                self._withheld += message
                if message[:1] == b"E":  # an error is no commit: let it through
                    self.cutting = False
                    self.client.writer.write(bytes(self._withheld))
                    self._withheld.clear()
                elif message[:1] == b"Z":  # sent after the commit
                    self.proxy.cuts += 1
                    self.reset()
                    return
            await self.client.writer.drain()

    def reset(self) -> None:
        """Break the client's connection with a RST and close the server's."""
        self.client.reset()
        self.server.reset()

    def half_close(self) -> None:
        """Tell the server that the client sends no more; the client hears nothing of it."""
        with suppress(OSError):
            self.server.writer.write_eof()


class _Stream:
    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    def reset(self) -> None:
        raw: socket.socket | None = self.writer.get_extra_info("socket")
        if raw is not None and raw.family != socket.AF_UNIX:
            with suppress(OSError):
                raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()


class Proxy:
    """Listens on loopback while the `with` block of `proxy` runs. One loop; changed by the case alone."""

    def __init__(self, path: str, dice: random.Random) -> None:
        """`path` is the socket file of the server."""
        self._path = path
        self._dice = dice
        self.port = 0
        self.connects = 0
        self.connected_at: list[float] = []
        """When each connect came, monotonic."""
        self.cancels = 0
        self.cuts = 0
        self.holding = 0
        """Statements that are held back now, or were."""
        self._flow = asyncio.Event()
        self._flow.set()
        self._released = asyncio.Event()
        self._released.set()
        self._delay_s = self._jitter_s = self._bytes_a_second = 0.0
        self._cut: bytes | None = None
        self._cut_share = 0.0
        self._hold: bytes | None = None
        self._pairs: set[Pair] = set()
        self._tasks: set[asyncio.Task[None]] = set()

    # -- modes -------------------------------------------------------------------------------------------

    def silence(self, application: str) -> int:
        """From now on carry nothing on the present connections of an application; returns how many."""
        found = self._of(application)
        for pair in found:
            pair.silent = True
        return len(found)

    def deafen(self, application: str) -> int:
        """From now on lose all notifications on the present connections of an application."""
        found = self._of(application)
        for pair in found:
            pair.deaf = True
        return len(found)

    def _of(self, application: str) -> list[Pair]:
        return [pair for pair in self._pairs if application.encode() in pair.startup and not pair.silent]

    def pass_(self) -> None:
        """Carry everything at once again; what was held goes on."""
        self._delay_s = self._jitter_s = self._bytes_a_second = 0.0
        self._cut = self._hold = None
        self._flow.set()
        self._released.set()

    def delay(self, delay_s: float, jitter_s: float = 0.0) -> None:
        """Each chunk comes `delay_s` plus or minus up to `jitter_s` later, each way."""
        self._delay_s, self._jitter_s = delay_s, jitter_s

    def throttle(self, bytes_a_second: float) -> None:
        """Each connection carries this much each way."""
        self._bytes_a_second = bytes_a_second

    def blackhole(self) -> None:
        """Carry nothing, tell nobody; new connections are taken and stay silent."""
        self._flow.clear()

    def cut_after_commit(self, statement: str, share: float = 1.0) -> None:
        """Cut a share of the answers to statements that contain this text, once the commit is reported."""
        self._cut, self._cut_share = statement.encode(), share

    def hold(self, statement: str) -> None:
        """Keep statements that contain this text back until `pass_`; what follows on them waits as well."""
        self._hold = statement.encode()
        self._released.clear()

    def reset_all(self) -> None:
        """Break every connection with a RST."""
        for pair in list(self._pairs):
            pair.reset()

    def half_close_all(self) -> None:
        """Half-close every connection towards the server."""
        for pair in list(self._pairs):
            pair.half_close()

    # -- what pairs ask ----------------------------------------------------------------------------------

    async def flowing(self) -> None:
        """Wait while nothing is carried."""
        await self._flow.wait()

    async def pace(self, size: int) -> None:
        """Wait as long as the mode wants for a chunk."""
        wait_s = 0.0
        if self._delay_s or self._jitter_s:
            wait_s += max(0.0, self._delay_s + self._dice.uniform(-self._jitter_s, self._jitter_s))
        if self._bytes_a_second:
            wait_s += size / self._bytes_a_second
        if wait_s:
            await asyncio.sleep(wait_s)
        await self._flow.wait()

    def wants_cut(self, message: bytes) -> bool:
        """Whether the answer to this statement is to be cut."""
        return self._cut is not None and self._cut in message and self._dice.random() < self._cut_share

    async def held(self, message: bytes) -> None:
        """Wait while this statement is held back."""
        if self._hold is not None and self._hold in message:
            self.holding += 1
            await self._released.wait()

    # -- connections -------------------------------------------------------------------------------------

    def accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Take a client in."""
        self.connects += 1
        self.connected_at.append(time.monotonic())
        task = asyncio.get_running_loop().create_task(self._carry(_Stream(reader, writer)))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _carry(self, client: _Stream) -> None:
        await self._flow.wait()
        try:
            server = _Stream(*await asyncio.open_unix_connection(self._path))
        except OSError:
            client.reset()
            return
        pair = Pair(self, client, server)
        self._pairs.add(pair)
        ways = [asyncio.ensure_future(pair.up()), asyncio.ensure_future(pair.down())]
        try:
            await asyncio.wait([ways[1]])
            if pair.silent:  # the client is not told; it must find out by itself
                await asyncio.wait([ways[0]])
            # The server is done with this connection, or it was cut: its client hears of it.
            await self._flow.wait()
            client.writer.close()
            await asyncio.sleep(0)
        finally:
            for way in ways:
                way.cancel()
            await asyncio.gather(*ways, return_exceptions=True)
            pair.reset()
            self._pairs.discard(pair)

    async def close(self) -> None:
        """Break what is left."""
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)


@asynccontextmanager
async def proxy(path: str, dice: random.Random) -> AsyncIterator[Proxy]:
    """Run a proxy before the server whose socket file is `path`."""
    made = Proxy(path, dice)
    server = await asyncio.start_server(made.accept, "127.0.0.1", 0)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        await made.close()
